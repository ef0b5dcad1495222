from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Processes that share a machine share its threads too: with more, they wait for each other at every barrier.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    threads = max((os.cpu_count() or 1) // workers, 1)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start

# A test that names a repository looks in a cache; huggingface_hub reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import moekernels


def _cuda_missing() -> str | None:
    """Why tests marked `gpu` cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not moekernels.build_info()["cuda_archs"]:
        return f"built without CUDA: {moekernels.build_info()['cuda_reason']}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := _cuda_missing()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every op test runs on the CPU and, where there is one, on the GPU."""
    return torch.device(request.param)


@pytest.fixture(params=[*moekernels.build_info()["cpu_isas"], pytest.param("cuda", marks=pytest.mark.gpu)])
def unit(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The same for every instruction set of the CPU: the device that stands for it."""
    if request.param == "cuda":
        yield torch.device("cuda")
    else:
        with moekernels.cpu_isa(request.param):
            yield torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
