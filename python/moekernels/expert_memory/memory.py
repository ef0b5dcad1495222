"""The memory that holds one expert, and later another."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading

import torch
from torch import Tensor

from moekernels.expert_memory.files import ExpertFile
from moekernels.expert_memory.layout import ALIGNMENT, Constant, Layout, Span

#: What a thread reads at a time: enough to keep a disk busy with a few threads, little enough for a processor's cache.
PIECE = 2**20


class Slot:
    """Memory for one expert.

    On the CPU that is pages of its own, which the system has back when the slot is gone; a file's blocks are read
    straight to their place there, if that is aligned and the dtype the file's. All else passes through a small buffer
    of the thread that reads.

    Args:
        layout: of the experts that it is for.
        device: where it lies.

    Attributes:
        tensors: the tensors of the expert that is there, by the names of the layout's weights.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self._pages: memoryview | None = None
        if device.type == "cpu":
            self._pages, self._memory = _pages(layout.nbytes)
        else:
            self._memory = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
        self.tensors = layout.tensors(self._memory)
        # After the kernels that read the expert which was there.
        self._last_use = torch.cuda.Event() if device.type == "cuda" else None

    def used(self) -> None:
        """Kernels that read the memory have been launched: the next expert waits for them."""
        if self._last_use is not None:
            self._last_use.record(torch.cuda.current_stream(self._memory.device))

    def fill(self, file: ExpertFile, span: Span) -> int:
        """Read a span of at most :data:`PIECE` bytes to its place, in its dtype there.

        Returns:
            The bytes that were read from the file.

        Raises:
            ExpertReadError: they cannot be read.
        """
        if self._last_use is not None:
            self._last_use.synchronize()
        begin = span.offset // ALIGNMENT * ALIGNMENT
        needed = span.offset + span.nbytes - begin
        length = -(-needed // ALIGNMENT) * ALIGNMENT
        end = span.target + span.nbytes // span.stored.itemsize * span.dtype.itemsize
        is_whole_blocks = begin == span.offset and length == span.nbytes and span.target % ALIGNMENT == 0
        if self._pages is not None and is_whole_blocks and span.stored == span.dtype:
            file.read(self._pages[span.target : end], begin, needed)
        else:
            buffer, memory = _buffers.of(self._memory.device)
            file.read(buffer[:length], begin, needed)
            source = memory[span.offset - begin : needed]
            if source.data_ptr() % span.stored.itemsize:
                source = source.clone()
            self._memory[span.target : end].view(span.dtype).copy_(source.view(span.stored))
        file.drop(begin, length)
        return length

    def set(self, constant: Constant) -> None:
        """Fill the constant's place with it."""
        if self._last_use is not None:
            self._last_use.synchronize()
        place = self._memory[constant.target :][: constant.nbytes].view(constant.dtype)
        # Copied, which waits for a GPU to have it, as filling there would not.
        place.copy_(torch.full(place.shape, constant.value, dtype=constant.dtype))


class _Buffers(threading.local):
    """A buffer for each thread, pinned if it feeds a GPU."""

    def __init__(self) -> None:
        self._made: dict[bool, tuple[memoryview, Tensor]] = {}

    def of(self, device: torch.device) -> tuple[memoryview, Tensor]:
        """The same memory, as bytes and as a tensor."""
        pinned = device.type == "cuda"
        if pinned not in self._made:
            self._made[pinned] = _pinned(PIECE + 2 * ALIGNMENT) if pinned else _pages(PIECE + 2 * ALIGNMENT)
        return self._made[pinned]


_buffers = _Buffers()


def _pages(nbytes: int) -> tuple[memoryview, Tensor]:
    """Memory of this process alone, in pages that are there once they are written to."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(pages), torch.frombuffer(pages, dtype=torch.uint8)


def _pinned(nbytes: int) -> tuple[memoryview, Tensor]:
    whole = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, pin_memory=True)
    memory = whole[-whole.data_ptr() % ALIGNMENT :][:nbytes]
    return memoryview((ctypes.c_char * nbytes).from_address(memory.data_ptr())).cast("B"), memory
