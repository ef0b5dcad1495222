"""CUDA kernels on the CPU: the ``simt`` fixture builds kernel sources together with the runtime in ``runtime/``.

A test of a launcher::

    def test_permute(simt: Simt) -> None:
        library = simt.library("rows/permute.cu")  # in csrc/cuda
        rows = poisoned((num_rows, hidden_size), torch.bfloat16)
        for seed in range(3):
            library.run(
                "permute", hidden=hidden, token_of_row=token_of_row, rows=rows, num_tokens=..., dtype=torch.bfloat16,
                settings=Settings(seed=seed, compute_capability=80),
            )
        assert torch.equal(rows, hidden[token_of_row])
        assert library.launches == ["permute_kernel<...> <<<...>>>"]

Found and reported with source line: accesses outside the buffers of the call or outside shared memory, writes to
inputs, misaligned accesses, races in shared memory and missing proxy fences (by vector clocks), divergence, deadlock,
endless loops, asynchronous work that nobody waits for, and misuse of mbarriers, tensor maps, wgmma and setmaxnreg.
Memory that nobody wrote holds NaN or -1. Blocks of a cluster run together. A launch that overlaps the one before it has
to wait before it touches memory, and must not read as constant what that one may still write. Not found: other races in
global memory. Not modelled: ordinary loads and stores to another block's shared memory, and blocks that wait for each
other without being a cluster.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simt.build import KERNELS, missing_requirement
from tests.simt.device import Simt
from tests.simt.hardware import HardwareLibrary, Machine, compile_program, present_architecture
from tests.simt.nvcc import missing_compiler


@pytest.fixture(scope="session")
def simt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Simt:
    """Builds and loads kernel libraries; the tests that use it are skipped where nothing can be built."""
    reason = missing_requirement()
    if reason is not None:
        pytest.skip(reason)
    cache = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
    return Simt(Path(cache.mkdir("simt")) if cache is not None else tmp_path_factory.mktemp("simt"))


@pytest.fixture(scope="session", params=["emulated", pytest.param("hardware", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """Builds the kernel files that test the emulator, for it and, where there is one, for a GPU.

    So the first run on a GPU tests the emulator itself: what it allows, hardware has to do alike.
    """
    if request.param == "emulated":
        simt: Simt = request.getfixturevalue("simt")
        return lambda name: simt.library(KERNELS / name)
    if (reason := missing_compiler()) is not None:
        pytest.skip(reason)
    folder, built = tmp_path_factory.mktemp("hardware"), dict[str, HardwareLibrary]()

    def build(name: str) -> HardwareLibrary:
        if name not in built:
            program = compile_program(KERNELS / name, present_architecture(), folder / f"{name}.so")
            built[name] = HardwareLibrary(program)
        return built[name]

    return build
