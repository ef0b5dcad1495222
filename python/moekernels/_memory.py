"""The memory of large tensors on the CPU, and how much there is."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moekernels._library import _C


def release_memory() -> int:
    """Return to the system what is kept of the memory of CPU tensors that are gone.

    On Linux, what the ops return or work in on the CPU lies, from 2 MB on, in blocks that are used again once their
    tensor is gone; otherwise each new one would be cleared page by page. Blocks in use and kept together never exceed
    one and a half times what was once asked for at a time, and the system may take kept ones when it runs short, so
    there is rarely a need for this call. ``MOEKERNELS_KEEP_MEMORY=off`` in the environment switches keeping off. On a
    GPU torch keeps memory itself (``torch.cuda.empty_cache``).

    Returns:
        The number of bytes.
    """
    return _C.release_memory()


def _function_of_glibc(name: str) -> Callable[..., Any] | None:
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):
        return None


# Looked up once: whoever watches what loading a checkpoint does would see a library opened.
_malloc_trim = _function_of_glibc("malloc_trim")


def trim_heap() -> None:
    """Return to the system what the C library keeps of memory that was freed in pieces: after loading a checkpoint that
    can be half a gigabyte. Only glibc has a function for it."""
    if _malloc_trim is not None:
        _malloc_trim(ctypes.c_size_t(0))


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device.

    On the CPU that is what the kernel calls available, or what the limit of the process's group leaves.
    """
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else min(_available(), _left_by_group())


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _left_by_group(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """What a container's limit leaves (control groups, version 2); file pages count as free, as they can be dropped."""
    left = 2**63
    try:
        group = root / own.read_text().rpartition("::")[2].strip().lstrip("/")
        for folder in (group, *group.parents):
            if (folder / "memory.max").is_file() and (limit := (folder / "memory.max").read_text().strip()) != "max":
                lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
                statistics = {name: int(value) for name, value in lines}
                used = int((folder / "memory.current").read_text()) - statistics.get("file", 0)
                left = min(left, max(int(limit) - used, 0))
            if folder == root:
                break
    except (OSError, ValueError):
        pass
    return left
