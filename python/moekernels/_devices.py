"""Which device is meant, and whether it is there."""

from __future__ import annotations

import warnings

import torch

from moekernels._library import build_info

Device = torch.device | str | int


def infer_device() -> str:
    """The kind of device models run best on: "cuda" where PyTorch has it, otherwise "xpu", otherwise "cpu"."""
    return next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), "cpu")


def existing_device(device: Device) -> torch.device:
    """A device of this machine; a number is that of a GPU.

    Raises:
        ValueError: there is no such device.
    """
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"not a device: {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no such device: {str(found)!r}; this machine has {torch.cuda.device_count()} CUDA devices")
    return found


def resolve_device(device: Device | None) -> torch.device | None:
    """The device that a pipeline is asked for; for an integer see :func:`numbered_device`.

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


def named_device(name: str) -> torch.device:
    """The device that the command line names; a number is a GPU, see :func:`numbered_device`.

    Raises:
        ValueError: there is no such device, or this build has no kernels for it.
    """
    if name == "auto":
        return default_device()
    if name.removeprefix("-").isdigit():
        return numbered_device(int(name))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda (cuda:1, ...), got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: PyTorch {torch.__version__} sees no CUDA device")
        if not build_info()["cuda_archs"]:
            raise ValueError(f"--device {name}: this build has no CUDA kernels: {build_info()['cuda_reason']}")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def _missing_gpu() -> str | None:
    """Why no GPU can be used, or None."""
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees none"
    info = build_info()
    return None if info["cuda_archs"] else f"this build has no CUDA kernels ({info['cuda_reason']})"
