from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

# Processes that share a machine share its threads too: with more, they wait for each other at every barrier.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(cores // workers, 1)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start

# A test that names a repository looks in a cache; huggingface_hub reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import moekernels
from tests.isa import isas


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


@pytest.fixture(autouse=True)
def _cuda_faults_stay_where_they_are(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fault of a kernel leaves its process without a GPU: it ends there, under the name of the test that made it."""
    yield
    if request.node.get_closest_marker("gpu") is None:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"{request.node.nodeid}: {error}", file=sys.__stderr__, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # the test counts as failed, and another process goes on with the next
        pytest.exit(f"after {request.node.nodeid}: {error}", returncode=1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every op test runs on the CPU and, where there is one, on the GPU."""
    return torch.device(request.param)


@pytest.fixture(params=[*isas(), pytest.param("cuda", marks=pytest.mark.gpu)])
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
