"""Rules about the source tree that a compiler does not check."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moekernels.integrations.transformers.experts import _ACTIVATIONS
from moekernels.nn.activations import _OP_ACTIVATIONS
from moekernels.ops import ACTIVATIONS

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
PYTHON = ROOT / "python" / "moekernels"


@pytest.mark.parametrize("directory", ["include", "cpu", "cuda"])
def test_kernels_know_no_torch(directory: str) -> None:
    for path in (CSRC / directory).rglob("*.*"):
        assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', path.read_text()), path


def test_inline_ptx_lives_in_one_place() -> None:
    for path in (CSRC / "cuda").rglob("*.*"):
        if path.parent != CSRC / "cuda" / "ptx":
            assert not re.search(r"\basm\b", path.read_text()), path


# What the files of a folder of csrc may include by path, beside moekernels/*.h and the folder's own.
INCLUDES = {
    "cpu": (),
    "cpu/isa": ("cpu/kernel_table.h",),
    "cpu/isa/amx": ("cpu/kernel_table.h", "cpu/isa"),
    "cuda/ptx": (),
    "cuda/common": ("cuda/ptx",),
    "cuda/rows": ("cuda/common", "cuda/ptx"),
    "cuda/routing": ("cuda/common", "cuda/ptx"),
    "cuda/gemm": ("cuda/common", "cuda/ptx"),
    "cuda/weight_grad": ("cuda/common", "cuda/ptx", "cuda/gemm"),
}


@pytest.mark.parametrize("folder", INCLUDES)
def test_folders_of_kernels_depend_one_way(folder: str) -> None:
    allowed = {folder, *INCLUDES[folder]}
    for path in (CSRC / folder).glob("*.*"):
        # The sources of cpu/isa, one per instruction set, are where its folders come together.
        more = {"cpu/isa/amx"} if (folder, path.suffix) == ("cpu/isa", ".cpp") else set()
        for name in re.findall(r'^#include "((?:cpu|cuda)/.*)"', path.read_text(), re.MULTILINE):
            assert {name, name.rpartition("/")[0]} & (allowed | more), f"{path} includes {name}"


def test_every_folder_of_kernels_has_its_rule() -> None:
    folders = {path.parent for side in ("cpu", "cuda") for path in (CSRC / side).rglob("*.[ch]*")}
    assert {str(folder.relative_to(CSRC)) for folder in folders} == {*INCLUDES, "cuda"}
    assert {path.name for path in (CSRC / "cuda").glob("*.*")} == {"instance.cu.in", "instances.txt"}


def test_kernels_of_one_instruction_set_use_nothing_from_elsewhere() -> None:
    for path in (CSRC / "cpu" / "isa").rglob("*.*"):
        code = re.sub(r"//.*", "", path.read_text())
        assert not re.search(r"\bstd::|#include <(?!stdint\.h|immintrin\.h)", code), path


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    ("isa", "flags"),
    [
        ("avx2", "-march=haswell"),
        ("amx", "-march=skylake-avx512 -mavx512bf16 -mavx512vnni -mamx-tile -mamx-bf16 -mamx-int8"),
    ],
)
def test_kernels_of_one_instruction_set_share_no_function(isa: str, flags: str, tmp_path: Path) -> None:
    """The linker keeps one copy of an inline function, perhaps the one for a machine that is not there (isa/simd.h)."""
    made, includes = tmp_path / "made.o", ("-I", CSRC, "-I", CSRC / "include")
    source = CSRC / "cpu" / "isa" / f"{isa}.cpp"
    subprocess.run(["g++", "-std=c++20", "-O0", *flags.split(), *includes, "-c", source, "-o", made], check=True)
    symbols = subprocess.run(["nm", "-C", "--defined-only", made], check=True, capture_output=True, text=True).stdout
    shared = re.findall(r"^\S+ [^a-z] (.*)", symbols, re.MULTILINE)
    assert [name for name in shared if name != "DW.ref.__gxx_personality_v0"] == [f"moekernels::cpu::{isa}_kernels()"]


@pytest.mark.parametrize("op", ["route", "permute", "unpermute", "activation", "plan", "router_stats", "grouped_gemm"])
def test_an_op_has_one_name_in_every_folder(op: str) -> None:
    assert (CSRC / "cpu" / f"{op}.cpp").exists()
    assert len(list((CSRC / "cuda").glob(f"*/{op}.cu"))) == 1
    assert (CSRC / "torch" / f"{op}.cpp").exists()


def test_lines_of_cpp_end_by_column_120() -> None:
    for path in CSRC.rglob("*.*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):  # the formatter leaves comments as they are
            assert not re.search(r"^.{121,}", path.read_text(), re.MULTILINE), path


def test_activations_have_one_list_of_names() -> None:
    header = (CSRC / "include" / "moekernels" / "params.h").read_text()
    kinds = re.findall(r"k(\w+) =", re.findall(r"enum class Activation.*?};", header, re.DOTALL)[0])
    table = re.findall(r'{"(\w+)", Activation::k(\w+)}', (CSRC / "torch" / "checks.cpp").read_text())
    assert [kind for _, kind in table] == kinds[:-1] and kinds[-1] == "Swiglu"
    assert tuple(name for name, _ in table) == ACTIVATIONS
    for aliases in (_OP_ACTIVATIONS, _ACTIVATIONS):  # of configurations, of modules of transformers
        assert set(aliases.values()) <= set(ACTIVATIONS)


# Each package may import those before it, and itself.
LAYERS = (
    "quantization",
    "checkpoint",
    "ops",
    "nn",
    "expert_memory",
    "distributed",
    "bench",
    "generation",
    "tokenizers",
    "models",
    "pipelines",
    "demo",
    "cli",
)


def test_imports_point_one_way() -> None:
    for position, layer in enumerate(LAYERS):
        later = "|".join(LAYERS[position + 1 :]) or "nothing"
        for path in (PYTHON / layer).rglob("*.py"):
            found = re.search(rf"^\s*(from|import) moekernels\.({later})\b", path.read_text(), re.MULTILINE)
            assert not found, f"{path}: {found and found[0]}"


def test_integrations_stand_apart() -> None:
    for path in PYTHON.rglob("*.py"):
        text = path.read_text()
        if path.is_relative_to(PYTHON / "integrations"):
            found = re.findall(r"^\s*(?:from|import) moekernels\.(\w+)", text, re.MULTILINE)
            assert set(found) <= {"_files", "_version", "integrations", "nn", "ops", "quantization"}, path
        else:
            assert "moekernels.integrations" not in text, path


def test_only_the_command_measures() -> None:
    for path in PYTHON.rglob("*.py"):
        if path.relative_to(PYTHON).parts[0] not in ("bench", "cli"):
            assert "moekernels.bench" not in path.read_text(), path
