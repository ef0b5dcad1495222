"""Every kernel file compiles for GPUs, and into the machine code it is meant to be."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simt.build import CUDA_SOURCES, KERNELS, families
from tests.simt.hardware import HardwareLibrary, compile_program
from tests.simt.nvcc import (
    INCLUDES,
    Compiler,
    default_architectures,
    disassembler,
    instructions,
    loop_lengths,
    missing_compiler,
)

SOURCES = {path.name: (path,) for path in sorted(CUDA_SOURCES.rglob("*.cu"))} | families()
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
    compiler.start((SOURCES[str(params["source"])], str(params["architecture"])) for params in wanted)
    yield compiler
    compiler.close()


def test_sources_ask_only_whether_a_gpu_is_hopper_or_newer() -> None:
    """So the others share their PTX (`Compiler._ptx`)."""
    for path in CUDA_SOURCES.rglob("*.cu*"):
        text = path.read_text()
        for known in ("__CUDA_ARCH_FEAT_SM90_ALL", "defined(__CUDA_ARCH__)", "__CUDA_ARCH__ >= 900"):
            text = text.replace(known, "")
        assert "__CUDA_ARCH" not in text, path


def architectures_of(source: str) -> list[str]:
    """Hopper; for the tiles of 8.0 that GPU and one with less shared memory too. Of the rest Hopper has the most paths,
    and no more registers."""
    return [name for name in ARCHITECTURES if name == "90a" or ("_sm80" in source and name in ("80", "89"))]


@pytest.mark.parametrize(
    ("source", "architecture"), [(source, each) for source in SOURCES for each in architectures_of(source)]
)
def test_no_warnings_and_no_spills(compiler: Compiler, source: str, architecture: str) -> None:
    compiled = compiler.compiled(SOURCES[source], architecture)
    assert compiled.warnings == []
    for kernel in compiled.kernels:
        assert kernel.spill_stores == kernel.spill_loads == 0, kernel
        assert kernel.static_smem <= MAX_STATIC_SMEM, kernel


@pytest.mark.parametrize(
    "kernels",
    [
        "basics",
        "copies",
        "crosscheck",
        "hopper_gemm",
        "overlap",
        "cluster",
        pytest.param("tensor_cores", marks=pytest.mark.slow),
    ],
)
def test_the_tests_of_the_emulator_are_programs_for_a_gpu(tmp_path: Path, kernels: str) -> None:
    """Nothing of them runs here, but their library loads."""
    if missing_compiler() is not None:
        pytest.skip(str(missing_compiler()))
    HardwareLibrary(compile_program(KERNELS / f"{kernels}.cu", "90a", tmp_path / "program.so"))


def test_a_build_for_plain_sm_90_knows_that_it_has_no_code_for_hopper(tmp_path: Path) -> None:
    if missing_compiler() is not None:
        pytest.skip(str(missing_compiler()))
    source = tmp_path / "plain.cu"
    source.write_text('#include "cuda/gemm/warp_specialized.cuh"\nstatic_assert(!moekernels::has_sm90_code());\n')
    command = ["nvcc", "-std=c++20", "-arch=sm_90", *INCLUDES, "--cuda", str(source), "-o", str(tmp_path / "plain.ii")]
    subprocess.run(command, check=True)


def cubin(compiler: Compiler, source: str, architecture: str) -> Path:
    if disassembler() is None:
        pytest.skip("no nvdisasm on PATH and no package nvidia-cuda-nvdisasm")
    return compiler.compiled(SOURCES[source], architecture).cubin


def opcodes(compiler: Compiler, source: str, architecture: str) -> dict[str, Counter[str]]:
    """How often each opcode stands in each kernel; `HMMA.16816.F32.BF16` counts as `HMMA` and as `HMMA.16816` too."""
    found = {}
    for name, code in instructions(cubin(compiler, source, architecture)).items():
        found[name] = Counter(".".join(op.split(".")[:n]) for op in code for n in range(1, op.count(".") + 2))
    assert found
    return found


@pytest.mark.parametrize(
    ("type_", "opcode"),
    [("I13__nv_bfloat16", "HMMA.16816.F32.BF16"), ("I6__half", "HMMA.16816.F32"), ("If", "HMMA.1688.F32.TF32")],
    ids=["bf16", "fp16", "tf32"],
)
@pytest.mark.parametrize(("source", "num_kernels"), [("grouped_gemm_sm80", 8), ("grouped_weight_grad_sm80", 4)])
def test_sm80_kernels_use_tensor_cores(
    compiler: Compiler, source: str, num_kernels: int, type_: str, opcode: str
) -> None:
    kernels = {name: count for name, count in opcodes(compiler, source, "80").items() if type_ in name}
    assert len(kernels) == num_kernels
    for name, count in kernels.items():
        assert count[opcode] == count["HMMA"] > 0, name
        # ldmatrix cannot transpose 32-bit elements, and neither operand of a weight gradient is K-major.
        assert (count["LDSM"] > 0) == (type_ != "If" or "weight_grad" not in source), name
        # All but the one for rows of any alignment copy without registers.
        assert (count["LDGSTS"] > 0) == ("Lb1E" in name), name


# Instructions of a step of the ring, in which a warp of the large tile has 64 multiplications; 241 with a plain weight.
WIDENING_BUDGETS = {"HalvesCodes": 400, "PairCodes": 460, "ByteCodes": 480}


@pytest.mark.parametrize("codes", WIDENING_BUDGETS)
def test_quantized_kernels_widen_codes_between_multiplications(compiler: Compiler, codes: str) -> None:
    source = "quantized_gemm_sm80"
    lengths = loop_lengths(cubin(compiler, source, "80"), "HMMA")
    kernels = {name: count for name, count in opcodes(compiler, source, "80").items() if codes in name}
    assert len(kernels) == 12  # two types, forwards and transposed: small tiles, and large ones of 3 and 4 stages
    for name, count in kernels.items():
        opcode = "HMMA.16816.F32.BF16" if "__nv_bfloat16" in name else "HMMA.16816.F32"
        is_large = "Li128E" in name
        assert count[opcode] == count["HMMA"] == (64 if is_large else 32), name  # one loop, that of the steps
        assert count["LDSM"] == (16 if is_large else 12), name
        assert count["LDGSTS"] == count["LDGSTS.E.BYPASS.LTC128B.128"] > 0, name  # codes as rows, 16 bytes at a time
        assert lengths[name] <= WIDENING_BUDGETS[codes], (name, lengths[name])


@pytest.mark.parametrize("source", ["grouped_gemm_f32.cu", "grouped_gemm", "grouped_weight_grad_f32.cu"])
def test_float32_kernels_use_full_precision(compiler: Compiler, source: str) -> None:
    for name, count in opcodes(compiler, source, "90a").items():
        assert count["HMMA"] == 0, name
        assert count["FFMA"] >= 128, name


@pytest.mark.parametrize("source", ["grouped_gemm_sm90", "grouped_weight_grad_sm90"])
def test_sm90_kernels_multiply_by_warpgroups(compiler: Compiler, source: str) -> None:
    for name, count in opcodes(compiler, source, "90a").items():
        assert count["HGMMA"] > 0, name
        assert count["UTMALDG"] > 0, name
        assert count["USETMAXREG"] == 2, name  # producer and consumers
        assert count["LDL"] == count["STL"] == 0, name
        # A wait and a fence per multiplication would mean that ptxas has serialised them.
        assert count["WARPGROUP.DEPBAR"] < count["HGMMA"], name
        # A fence beyond the block stands before a barrier of the whole cluster, and nowhere else.
        assert count["MEMBAR.ALL.GPU"] + count["MEMBAR.SC.GPU"] == count["UCGABAR_ARV"], name
        # Consumers in turn: one arrives where the other waits.
        assert count["BAR.ARV"] == ("grouped_gemm" in name), name


# Instructions of a step of the ring in a consumer warp, around the multiplications: a budget that a change raises on
# purpose, or not at all. The tensor cores need 1024 clocks for a step of the wide tile; four warps share a scheduler's.
@pytest.mark.parametrize(
    ("source", "num_kernels", "budget"), [("grouped_gemm_sm90", 12, 75), ("grouped_weight_grad_sm90", 4, 150)]
)
def test_the_step_around_wgmma_stays_within_its_budget(
    compiler: Compiler, source: str, num_kernels: int, budget: int
) -> None:
    lengths = loop_lengths(cubin(compiler, source, "90a"), "HGMMA")
    assert len(lengths) == num_kernels
    for name, length in lengths.items():
        assert length <= budget, (name, length)


# The same of a producer warp where both operands of a weight gradient are gathered, by the columns of a tile.
GATHER_BUDGETS = {128: 470, 256: 600}


def test_gathering_for_a_weight_gradient_stays_within_its_budget(compiler: Compiler) -> None:
    lengths = loop_lengths(cubin(compiler, "grouped_weight_grad_sm90", "90a"), "LDGSTS")
    for columns, budget in GATHER_BUDGETS.items():
        found = [length for name, length in lengths.items() if f"Li{columns}E" in name]
        assert len(found) == 2 and max(found) <= budget, (columns, found)  # bfloat16, float16


# ---- overlapping launches: see csrc/cuda/common/overlap.cuh ----

GLOBAL_ACCESS = re.compile(r"LDG|LD$|LD\.|STG|ST$|ST\.|ATOM|RED|LDGSTS|UBLK|UTMA(?!CCTL\.PF)")  # not map prefetches
WITHOUT_OVERLAP = re.compile(r"(gemm|weight_grad)_(sm80|f32)|grouped_bias_grad")  # long kernels


@pytest.mark.parametrize("source", SOURCES)
def test_overlapping_kernels_wait_before_they_touch_memory(compiler: Compiler, source: str) -> None:
    for name, code in instructions(cubin(compiler, source, "90a")).items():
        waits = [i for i, op in enumerate(code) if op.startswith("ACQBULK")]
        allows = [i for i, op in enumerate(code) if op.startswith("PREEXIT")]
        expected = 0 if WITHOUT_OVERLAP.search(name) else 1
        assert len(waits) == len(allows) == expected, name
        if expected:
            assert not any(GLOBAL_ACCESS.match(op) or op == "EXIT" for op in code[: waits[0]]), name


# Loads of a decode kernel of 8 tokens before its first of weights, by tiles: those of the experts' offsets, and not yet
# of where the tokens are.
LOADS_BEFORE_WEIGHTS = {1: 14, 2: 18}


@pytest.mark.parametrize("source", SOURCES)
def test_only_weights_are_read_as_constant(compiler: Compiler, source: str) -> None:
    """The decode path's alone: 2 halves of each tile, as many chunks ahead as in a round of the loop."""
    for name, code in instructions(cubin(compiler, source, "90a")).items():
        constant = ["CONSTANT" in op for op in code if op.startswith("LDG")]
        decode = re.search(r"grouped_gemm_decode_kernel.*?Li(\d+)ELi(\d+)ELi(\d+)E", name)
        tokens, tiles, depth = map(int, decode.groups()) if decode else (0, 0, 0)
        assert sum(constant) == 2 * 2 * tiles * depth, name
        if tokens == 8 and re.search("PlainWeightI(13__nv_bfloat16|6__half)E", name):
            assert constant.index(True) <= LOADS_BEFORE_WEIGHTS[tiles], name
