"""Every kernel file compiles for every GPU a wheel is built for, and into the machine code it is meant to be."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simt.build import CUDA_SOURCES
from tests.simt.nvcc import Compiler, default_architectures, disassembler, instructions, missing_compiler

SOURCES = sorted(CUDA_SOURCES.glob("*.cu"))
ARCHITECTURES = default_architectures()
MAX_STATIC_SMEM = 48 * 1024  # anything more has to be dynamic


@pytest.fixture(scope="module")
def compiler(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    reason = missing_compiler()
    if reason is not None:
        pytest.skip(reason)
    cache = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
    compiler = Compiler(Path(cache.mkdir("nvcc")) if cache is not None else tmp_path_factory.mktemp("nvcc"))
    # All that this session will ask for, so that two compilers stay busy whatever the order of the tests.
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    wanted = [item.callspec.params for item in items if item.originalname == "test_no_warnings_and_no_spills"]
    compiler.start((Path(str(params["source"])), str(params["architecture"])) for params in wanted)
    yield compiler
    compiler.close()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_warnings_and_no_spills(compiler: Compiler, source: Path, architecture: str) -> None:
    compiled = compiler.compiled(source, architecture)
    assert compiled.warnings == []
    for kernel in compiled.kernels:
        assert kernel.spill_stores == kernel.spill_loads == 0, kernel
        assert kernel.static_smem <= MAX_STATIC_SMEM, kernel


def opcodes(compiler: Compiler, source: str, architecture: str) -> dict[str, Counter[str]]:
    """How often each opcode stands in each kernel; `HMMA.16816.F32.BF16` counts as `HMMA` and as `HMMA.16816` too."""
    if disassembler() is None:
        pytest.skip("no nvdisasm on PATH and no package nvidia-cuda-nvdisasm")
    found = {}
    for name, code in instructions(compiler.compiled(CUDA_SOURCES / source, architecture).cubin).items():
        found[name] = Counter(".".join(op.split(".")[:n]) for op in code for n in range(1, op.count(".") + 2))
    assert found
    return found


@pytest.mark.parametrize(
    ("dtype", "opcode"), [("bf16", "HMMA.16816.F32.BF16"), ("fp16", "HMMA.16816.F32"), ("tf32", "HMMA.1688.F32.TF32")]
)
@pytest.mark.parametrize(
    "source", ["grouped_gemm_sm80_{}", "grouped_gemm_sm80_{}_transposed", "grouped_weight_grad_sm80_{}"]
)
def test_sm80_kernels_use_tensor_cores(compiler: Compiler, source: str, dtype: str, opcode: str) -> None:
    kernels = opcodes(compiler, f"{source.format(dtype)}.cu", "80")
    for name, count in kernels.items():
        assert count[opcode] == count["HMMA"] > 0, name
        # ldmatrix cannot transpose 32-bit elements, and neither operand of a weight gradient is K-major.
        assert (count["LDSM"] > 0) == (dtype != "tf32" or "weight_grad" not in source), name
    # All but the one for rows of any alignment copy without registers.
    assert sum(count["LDGSTS"] > 0 for count in kernels.values()) == len(kernels) - 1


@pytest.mark.parametrize("source", ["grouped_gemm_f32", "grouped_gemm_f32_transposed", "grouped_weight_grad_f32"])
def test_float32_kernels_use_full_precision(compiler: Compiler, source: str) -> None:
    for name, count in opcodes(compiler, f"{source}.cu", "80").items():
        assert count["HMMA"] == 0, name
        assert count["FFMA"] >= 128, name


@pytest.mark.parametrize(
    "source", [s.name for s in SOURCES if re.match(r"grouped_(gemm|weight_grad)_sm90_(bf16|fp16)", s.name)]
)
def test_sm90_kernels_multiply_by_warpgroups(compiler: Compiler, source: str) -> None:
    for name, count in opcodes(compiler, source, "90a").items():
        assert count["HGMMA"] > 0, name
        assert count["UTMALDG"] > 0, name
        assert count["USETMAXREG"] == 2, name  # producer and consumers
        assert count["LDL"] == count["STL"] == 0, name
        # A wait and a fence per multiplication would mean that ptxas has serialised them.
        assert count["WARPGROUP.DEPBAR"] < count["HGMMA"], name
