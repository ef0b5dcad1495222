"""Where a pipeline runs."""

from __future__ import annotations

import warnings

import torch

from moekernels._library import build_info


def resolve_device(device: int | str | torch.device | None) -> torch.device | None:
    """The device that is meant; for an integer see :func:`numbered_device`.

    Raises:
        ValueError: there is no such device.
    """
    if device is None:
        return None
    if isinstance(device, int):
        return numbered_device(device, stacklevel=4)
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a number, a name such as 'cuda:0', or 'cpu', got {device!r}") from error


def numbered_device(number: int, stacklevel: int = 2) -> torch.device:
    """The GPU of that number, or the CPU: if it is -1, or, with a warning, where there is no GPU to use."""
    missing = _missing_gpu()
    if number >= 0 and missing is None:
        return torch.device("cuda", number)
    if number >= 0:
        warnings.warn(f"device {number} is a GPU, but {missing}; running on the CPU", stacklevel=stacklevel)
    return torch.device("cpu")


def default_device() -> torch.device:
    """A GPU if there is one to use, else the CPU."""
    return torch.device("cpu" if _missing_gpu() else "cuda")


def _missing_gpu() -> str | None:
    """Why no GPU can be used, or None."""
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees none"
    info = build_info()
    return None if info["cuda_archs"] else f"this build has no CUDA kernels ({info['cuda_reason']})"
