"""Memory of large CPU tensors: used again, never shared, never more than was in use, and given back on request."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import moekernels
from moekernels import ops
from moekernels._library import _C

_MB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux")


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    gc.collect()
    moekernels.release_memory()
    yield
    moekernels.release_memory()


def output(num_bytes: int, value: float = 1.0) -> Tensor:
    """What an op returns: that many bytes of one value."""
    rows = torch.full((1, 1024), value)
    return ops.permute(rows, torch.zeros(num_bytes // 4096, dtype=torch.int32))


def in_use() -> int:
    return _C.memory_usage()["in_use"]


def kept() -> int:
    return _C.memory_usage()["kept"]


def resident() -> int:
    """Bytes, without those of files: of a library more and more pages are read."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def test_the_next_output_lies_where_the_last_one_was() -> None:
    first = output(4 * _MB)
    address = first.data_ptr()
    assert address % (2 * _MB) == 0
    del first
    assert output(4 * _MB, 2.0).data_ptr() == address


def test_an_output_of_about_the_same_size_fits_too() -> None:
    address = output(32 * _MB).data_ptr()
    assert output(31 * _MB).data_ptr() == address
    assert output(16 * _MB).data_ptr() != address


def test_usage_counts_what_lives_and_what_is_kept() -> None:
    before = in_use()
    first, second = output(4 * _MB), output(6 * _MB)
    assert in_use() - before == 10 * _MB and kept() == 0
    del first
    assert in_use() - before == 6 * _MB and kept() == 4 * _MB
    del second
    assert in_use() == before and kept() == 10 * _MB
    assert moekernels.release_memory() == 10 * _MB
    assert kept() == 0 and moekernels.release_memory() == 0


def test_small_outputs_are_left_to_torch() -> None:
    before = in_use()
    small = output(1 * _MB)
    assert in_use() == before
    del small
    assert kept() == 0


def test_outputs_that_live_share_nothing() -> None:
    tensors = [output(2 * _MB, float(i)) for i in range(8)]
    del tensors[::2]
    tensors += [output(2 * _MB, float(100 + i)) for i in range(8)]
    for tensor, value in zip(tensors, (1, 3, 5, 7, *range(100, 108)), strict=True):
        assert torch.equal(tensor, torch.full_like(tensor, float(value)))


def test_a_view_keeps_its_memory() -> None:
    row = output(4 * _MB, 3.0)[5]
    others = [output(4 * _MB, 4.0) for _ in range(3)]
    moekernels.release_memory()
    assert torch.equal(row, torch.full_like(row, 3.0)) and len(others) == 3


def test_sizes_that_change_take_no_more_than_was_in_use_at_once() -> None:
    before = in_use()
    for megabytes in (20, 4, 8, 16, 2, 12, 20, 6):
        pair = output(megabytes * _MB), output(megabytes * _MB)
        assert in_use() + kept() - before <= 2 * 20 * _MB
        del pair
    assert kept() == 2 * 20 * _MB


def test_other_sizes_are_made_of_the_pages_that_are_kept() -> None:
    """As in a step of training, whose sizes are needed in turn."""
    tensors = [output(16 * _MB, float(i)) for i in range(6)]
    held = resident()
    for sizes in ((64, 32), (20, 40, 36), (96,), (2, 6, 8, 80), (40, 56)):
        del tensors
        tensors = [output(megabytes * _MB, float(megabytes)) for megabytes in sizes]
        assert kept() == 0 and resident() - held < 8 * _MB
        assert all(x.min() == x.max() == megabytes for x, megabytes in zip(tensors, sizes, strict=True))


def test_what_is_left_of_a_block_is_kept() -> None:
    large, small = output(12 * _MB), output(4 * _MB)
    del large
    others = output(6 * _MB, 6.0), output(6 * _MB, 7.0)  # the second is the half that was left
    assert kept() == 0 and small.min() == 1.0
    assert [float(tensor.min()) for tensor in others] == [float(tensor.max()) for tensor in others] == [6.0, 7.0]


def test_memory_released_while_outputs_live() -> None:
    tensor = output(4 * _MB, 5.0)
    output(4 * _MB)
    assert moekernels.release_memory() == 4 * _MB
    assert torch.equal(tensor, torch.full_like(tensor, 5.0))


def test_released_memory_is_the_systems() -> None:
    before = resident()
    tensor = output(256 * _MB)
    assert resident() - before > 200 * _MB
    del tensor
    moekernels.release_memory()
    assert resident() - before < 50 * _MB


def test_many_threads() -> None:
    def work(seed: int) -> bool:
        held: list[tuple[Tensor, float]] = []
        for i in range(60):
            value = float(seed * 1000 + i)
            held.append((output((2 + (seed + i) % 3 * 2) * _MB, value), value))
            if len(held) > 3:
                tensor, expected = held.pop(i % 3)
                if not torch.equal(tensor, torch.full_like(tensor, expected)):
                    return False
        return True

    before = in_use()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    gc.collect()
    assert in_use() == before


def run(code: str, **environment: str) -> None:
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=True)


def test_a_forked_child_has_its_own() -> None:
    run("""
import os, torch
from moekernels import ops

def output(value):
    return ops.permute(torch.full((1, 1024), value), torch.zeros(1024, dtype=torch.int32))

torch.set_num_threads(1)  # others do not survive a fork
output(1.0)
tensor = output(2.0)
child = os.fork()
if child == 0:
    tensor.fill_(9.0)
    os._exit(not (output(7.0) == 7.0).all())
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert (tensor == 2.0).all()
""")


def test_what_tensors_are_put_through() -> None:
    tensor = output(4 * _MB, 6.0)
    for other in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), tensor.clone()):
        assert torch.equal(other, tensor)
    assert tensor.share_memory_().is_shared() and bool((tensor == 6.0).all())
    assert torch.equal(torch.from_numpy(output(4 * _MB, 6.0).numpy()), tensor)


def test_gradients_are_used_again_from_step_to_step() -> None:
    weight = torch.randn(2, 1024, 1024, requires_grad=True)
    rows = torch.randn(8, 1024)
    offsets = torch.tensor([0, 4, 8], dtype=torch.int32)
    addresses = set()
    for _ in range(4):
        ops.grouped_gemm(rows, weight, offsets).sum().backward()
        assert weight.grad is not None
        addresses.add(weight.grad.data_ptr())
        weight.grad = None
    assert len(addresses) == 1


def test_switched_off() -> None:
    code = """
import torch
from moekernels import ops
from moekernels._library import _C

ops.permute(torch.ones(1, 1024), torch.zeros(2048, dtype=torch.int32))
assert _C.memory_usage() == {"in_use": 0, "kept": 0, "most_in_use": 0}
"""
    run(code, MOEKERNELS_KEEP_MEMORY="off")
