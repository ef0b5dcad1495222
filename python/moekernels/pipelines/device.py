"""Where a pipeline runs."""

from __future__ import annotations

import warnings

import torch

from moekernels._library import build_info


def resolve_device(device: int | str | torch.device | None) -> torch.device | None:
    """The device that is meant: an integer is the GPU of that number, and -1 the CPU.

    Where there is no GPU to use, integers from 0 mean the CPU too, with a warning.

    Raises:
        ValueError: there is no such device.
    """
    if device is None:
        return None
    if isinstance(device, int):
        missing = _missing_gpu()
        if device >= 0 and missing is None:
            device = f"cuda:{device}"
        else:
            if device >= 0:
                warnings.warn(f"device={device} is a GPU, but {missing}; running on the CPU", stacklevel=3)
            device = "cpu"
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a number, a name such as 'cuda:0', or 'cpu', got {device!r}") from error


def default_device() -> torch.device:
    """A GPU if there is one to use, else the CPU."""
    return torch.device("cpu" if _missing_gpu() else "cuda")


def _missing_gpu() -> str | None:
    """Why no GPU can be used, or None."""
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees none"
    info = build_info()
    return None if info["cuda_archs"] else f"this build has no CUDA kernels ({info['cuda_reason']})"
