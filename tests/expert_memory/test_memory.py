"""A process with streamed experts takes no more memory than dense part and budget, by the kernel's own figures."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moekernels import _memory
from moekernels.expert_memory import budget
from moekernels.models import OlmoeConfig, OlmoeForCausalLM

_MIB = 2**20
_EXPERTS_MIB = 72

_RUN = """
import sys
from pathlib import Path
import torch
from moekernels.models import OlmoeForCausalLM

def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024

def run(directory, budget):
    model = OlmoeForCausalLM.from_pretrained(directory, expert_memory=budget)
    with torch.no_grad():
        for seed in range(4):
            model(torch.randint(3, 97, (1, 5), generator=torch.Generator().manual_seed(seed)))
    return model

directory, small, budget = sys.argv[1:]
run(small, 2**30)  # what is loaded but once
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
model = run(directory, int(budget))
print(resident("VmHWM") - before, model.get_memory_footprint(), model.expert_cache.stats().evictions)
"""


def _write(directory: Path, num_experts: int) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 3}
    config = OlmoeConfig(**sizes, num_experts=num_experts, num_experts_per_tok=4, vocab_size=97)
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    model.to_empty(device="cpu").save_pretrained(directory)


def _pages_in_cache(path: Path) -> int:
    """How much of a file the system keeps in memory."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        pages = -(-size // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found) == 0
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(page & 1 for page in found) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of resident memory")
def test_peak_and_page_cache(tmp_path: Path) -> None:
    _write(tmp_path / "model", 16)
    _write(tmp_path / "small", 4)
    weights = tmp_path / "model" / "model.safetensors"
    with weights.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    room = 12 * _MIB
    arguments = [str(tmp_path / "model"), str(tmp_path / "small"), str(room)]
    result = subprocess.run(
        [sys.executable, "-c", _RUN, *arguments], check=True, capture_output=True, text=True, timeout=120
    )
    peak, dense, evictions = map(int, result.stdout.split())
    assert weights.stat().st_size > _EXPERTS_MIB * _MIB
    assert evictions > 10
    # Beside both: the header of the file, activations, and the buffers of the threads that read.
    assert peak < (dense + room) * 1.05 + 8 * _MIB, f"{peak / _MIB:.1f} MiB for {(dense + room) / _MIB:.1f}"
    assert _pages_in_cache(weights) < dense + 8 * _MIB


def test_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(_memory, "_left_by_group", lambda: 2**63)
    for available, taken in ((64 * 2**30, 56 * 2**30), (2 * 2**30, 2**30), (2**20, 0)):
        monkeypatch.setattr(_memory, "_available", lambda available=available: available)
        assert budget.auto_budget(cpu) == taken
    monkeypatch.undo()
    assert 0 < _memory.free_memory(cpu) < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_limits_of_groups(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    group = root / "a" / "b"
    group.mkdir(parents=True)
    own.write_text("0::/a/b\n")
    assert _memory._left_by_group(root, own) == 2**63
    for folder, limit in ((group, "max"), (root / "a", str(10 * _MIB))):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{4 * _MIB}\n")
        (folder / "memory.stat").write_text(f"anon 5\nfile {_MIB}\n")
    assert _memory._left_by_group(root, own) == 7 * _MIB
