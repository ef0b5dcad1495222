"""The tests of the ops on the AMX kernels, with emulated tile registers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.amx.build import kernel_library
from tests.compiler import Compiler
from tests.isa import missing_isa

ROOT = Path(__file__).resolve().parents[2]

FILES = (
    "ops/test_attention.py",
    "ops/test_expert_tables.py",
    "ops/test_float32_by_tiles.py",
    "ops/test_gradient_kernels.py",
    "ops/test_gradients.py",
    "ops/test_grouped_gemm.py",
    "ops/test_grouped_weight_grad.py",
    "ops/test_linear.py",
    "ops/test_quantized.py",
    "ops/test_sparse_mlp.py",
    "nn/test_attention.py",
)


@pytest.fixture(scope="module")
def environment(compiler: Compiler) -> dict[str, str]:
    """Of a process whose CPU kernels are those of the emulated processor."""
    found = {**os.environ, "LD_PRELOAD": str(kernel_library(compiler))}
    for name in ("MOEKERNELS_CPU_ISA", *(name for name in os.environ if name.startswith("PYTEST_"))):
        found.pop(name, None)
    return found


def test_the_kernels_are_those_of_the_emulated_processor(environment: dict[str, str]) -> None:
    code = "import json, moekernels; print(json.dumps(moekernels.build_info()))"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["cpu_isa"] == "amx"


@pytest.mark.skipif(missing_isa("amx") is None, reason="the processor has tile registers, and tests/ops used them")
def test_of_the_ops(environment: dict[str, str]) -> None:
    others = "not portable and not avx"  # instruction sets, which are those of the installed library
    options = ("-q", "-n", "0", "-p", "no:cacheprovider", "-k", others)
    command = [sys.executable, "-m", "pytest", *options, *(str(ROOT / "tests" / file) for file in FILES)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-1000:]
    assert re.search(r"\d+ passed", run.stdout)
