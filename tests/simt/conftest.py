"""CUDA kernels on the CPU: the ``simt`` fixture builds kernel sources together with the runtime in ``runtime/``.

A test of a launcher::

    def test_permute(simt: Simt) -> None:
        library = simt.library("permute.cu")  # in csrc/cuda
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
Memory that nobody wrote holds NaN or -1. Not found: races in global memory. Not modelled: thread block clusters, and
blocks that wait for each other.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simt.build import missing_requirement
from tests.simt.device import Simt


@pytest.fixture(scope="session")
def simt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Simt:
    """Builds and loads kernel libraries; the tests that use it are skipped where nothing can be built."""
    reason = missing_requirement()
    if reason is not None:
        pytest.skip(reason)
    cache = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
    return Simt(Path(cache.mkdir("simt")) if cache is not None else tmp_path_factory.mktemp("simt"))
