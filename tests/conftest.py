from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

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

# The files that take longest, longest first: they begin first, so that no process is left with one of them when the
# others have finished. pytest --durations=0 tells.
LONGEST = (
    "robustness/test_corruption.py",  # forks often, which takes longer once a process has become large
    "simt/test_compile.py",
    "amx/test_ops.py",
    "models/test_training.py",
    "company/test_drop_in.py",
    "simt/test_quantized_gemm_tiled.py",
    "simt/test_quantized_gemm_decode.py",
    "simt/test_grouped_gemm.py",
    "models/test_quantized_own.py",
    "test_cli.py",
    "simt/test_grouped_weight_grad.py",
    "checkpoint/test_memory.py",
    "simt/test_grouped_gemm_sm90.py",
    "nn/test_export.py",
    "test_build_options.py",
    "robustness/test_soak.py",
    "distributed/test_layers.py",
    "company/test_own_models.py",
    "simt/test_crosscheck.py",
    "simt/test_runtime.py",
    "simt/test_grouped_gemm_sm80.py",
    "simt/test_activation.py",
    "test_cpp_package.py",
    "test_memory.py",
    "distributed/test_models.py",
    "integrations/test_upstream.py",
    "bench/test_case.py",
    "company/test_memory.py",
    "models/switch_transformers/test_mlp.py",
)


def _longest_first(items: list[pytest.Item]) -> None:
    """After those listed, files with many tests before those with few."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    assert all(path.exists() for path in ranks)
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (ranks.get(item.path, len(ranks)), -counts[item.path]))


def _cuda_missing() -> str | None:
    """Why tests marked `gpu` cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not moekernels.build_info()["cuda_archs"]:
        return f"built without CUDA: {moekernels.build_info()['cuda_reason']}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if workers:
        _longest_first(items)
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
