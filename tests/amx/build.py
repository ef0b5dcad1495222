"""Builds `csrc/cpu` with its tile instructions emulated, as a library that takes the place of the installed one.

Only the kernels for AMX, AVX-512 and any machine are in it; they serve the other names too.
"""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.compiler import Compiler
from tests.isa import missing_isa

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"

# Where the processor has tiles, the ops ran on them, and here it is enough that everything compiles.
OPTIMISATION = "-O2" if missing_isa("amx") else "-O0"
FLAGS = (
    *("-std=c++20", OPTIMISATION, "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"),
    *(f"-I{CSRC / 'include'}", f"-I{CSRC}"),
)
AVX512 = ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
VECTORS = (*AVX512, "-mavx512bf16", "-mavx512vnni")
EMULATED = (*VECTORS, "-DMOEKERNELS_EMULATED_TILES", "-include", str(HERE / "tile_registers.h"))
NATIVE = (*VECTORS, "-mamx-tile", "-mamx-bf16", "-mamx-int8")


def missing_requirement() -> str | None:
    """Why emulated kernels cannot be built or run here, or None."""
    if sys.platform != "linux":
        return "the loader of Linux puts one library in another's place"
    if shutil.which("g++") is None:
        return "no g++"
    return missing_isa("avx512_bf16")  # what the kernels do beside the tiles


def kernel_library(compiler: Compiler) -> Path:
    """All of `csrc/cpu`, with emulated tiles.

    Raises:
        BuildError: it does not compile, for example since a kernel uses an instruction that is not emulated.
    """
    # Without its flags the file of an instruction set is empty.
    flags = {path: (*FLAGS, "-DMOEKERNELS_EMULATED_TILES") for path in sorted((CSRC / "cpu").rglob("*.cpp"))}
    flags[CSRC / "cpu" / "isa" / "portable.cpp"] += ("-O0",)  # no test runs it
    flags[CSRC / "cpu" / "isa" / "avx512.cpp"] = (*FLAGS, *AVX512)
    for path in (CSRC / "cpu" / "isa" / "amx.cpp", HERE / "tile_registers.cpp"):
        flags[path] = (*FLAGS, *EMULATED)
    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(lambda source: compiler.compile(source, flags[source]), flags))
    return compiler.link("libmoekernels_emulated", objects)


def product_library(compiler: Compiler, native: bool) -> Path:
    """One tile product, by the processor or emulated."""
    sources = [HERE / "product.cpp"] if native else [HERE / "product.cpp", HERE / "tile_registers.cpp"]
    flags = (*FLAGS, "-fvisibility=default", *(NATIVE if native else EMULATED))
    return compiler.link("libproduct", [compiler.compile(source, flags) for source in sources])
