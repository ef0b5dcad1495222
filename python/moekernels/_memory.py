"""The memory of large tensors on the CPU."""

from __future__ import annotations

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
