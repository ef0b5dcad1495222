"""Compiles kernel sources, together with the runtime that stands in for the GPU, by g++."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from tests.compiler import BuildError, Compiler

REPOSITORY = Path(__file__).resolve().parents[2]
RUNTIME = Path(__file__).resolve().parent / "runtime"
KERNELS = Path(__file__).resolve().parent / "kernels"  # that test the emulator
CUDA_SOURCES = REPOSITORY / "csrc" / "cuda"

COMMON_FLAGS = ("-std=c++20", "-g1", "-fPIC", "-fno-gnu-unique", "-fno-strict-aliasing", "-Wall", "-Wextra")
# The calls that the sanitizers' instrumentation makes arrive in runtime/hooks.cpp; no sanitizer library is linked.
KERNEL_FLAGS = (
    "-x",
    "c++",
    "-O1",  # more takes longer than it saves; but a fault in a builtin is to name the kernel's line
    "-finline-functions",
    "-finline-small-functions",
    "-DMOEKERNELS_SIMT",
    "-ffp-contract=off",
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=alignment,bounds",
    "-fno-sanitize-recover=all",
    "-Wno-unknown-pragmas",
    "-Wno-tsan",
    "-Wno-psabi",
    "-include",
    "cuda_builtins.h",
)


@cache
def cuda_include() -> Path | None:
    """The folder of the CUDA toolkit's headers, or None where there is no toolkit."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        roots.append(Path(nvcc).resolve().parents[1])
    roots.append(Path("/usr/local/cuda"))
    for root in roots:
        for include in (root / "include", root / "targets" / "x86_64-linux" / "include"):
            if (include / "cuda_bf16.h").exists() and (include / "cuda_runtime.h").exists():
                return include
    return None


def missing_requirement() -> str | None:
    """Why kernels cannot be compiled here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    if cuda_include() is None:
        return "no CUDA toolkit with headers (looked at CUDA_HOME, CUDA_PATH, nvcc and /usr/local/cuda)"
    return None


def instances(kind: str = "") -> list[Path]:
    """The instances of the GEMM templates whose names begin so, as ``located`` takes them."""
    lines = (CUDA_SOURCES / "instances.txt").read_text().splitlines()
    return [Path("instances") / f"{line.split()[0]}.cu" for line in lines if re.match(f"{kind}[a-z]", line)]


def families() -> dict[str, tuple[Path, ...]]:
    """All instances, those of a template that ``located`` makes one source of together, by what their names share."""
    found: dict[str, tuple[Path, ...]] = {}
    for path in instances():
        name = re.sub(r"_(bf16|fp16|f32|tf32)_?.*", "", path.stem)
        found[name] = (*found.get(name, ()), path)
    return found


def _line(instance: str) -> tuple[str, str]:
    """The header of an instance, and what its ``MOEKERNELS_INSTANCE`` gets."""
    line = re.search(f"^{instance} +(\\S+) +(.*)$", (CUDA_SOURCES / "instances.txt").read_text(), re.MULTILINE)
    assert line is not None, instance
    return line[1], line[2]


def located(sources: Sequence[str | Path], cache_dir: Path) -> list[Path]:
    """Where sources are: a relative path is one in ``csrc/cuda``, or an instance, written here as CMake writes it.

    Instances of the same header are one source here, since it takes long to read.
    """
    paths = [CUDA_SOURCES / source for source in sources]
    instances: dict[str, list[str]] = {}
    for path in paths:
        if path.parent == CUDA_SOURCES / "instances":
            header, arguments = _line(path.stem)
            instances.setdefault(header, []).append(arguments)
    found = [path for path in paths if path.parent != CUDA_SOURCES / "instances"]
    for header, arguments in instances.items():
        calls = re.sub(r"(\([^)]*\)) *", r"MOEKERNELS_INSTANCE\1;\n", "".join(arguments))
        text = (CUDA_SOURCES / "instance.cu.in").read_text().replace("@header@", header).replace("@instances@", calls)
        written = cache_dir / f"{Path(header).stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.cu"
        if not written.exists():
            with tempfile.NamedTemporaryFile("w", dir=cache_dir, delete=False) as scratch:
                scratch.write(text)
            os.replace(scratch.name, written)
        found.append(written)
    return found


class Builder(Compiler):
    """Builds into ``cache_dir``; safe to use from several processes at once."""

    def __init__(self, cache_dir: Path) -> None:
        super().__init__(cache_dir)
        self._runtime: Path | None = None

    def runtime(self) -> Path:
        """The shared library of the runtime."""
        if self._runtime is not None:
            return self._runtime
        sources = sorted(RUNTIME.glob("*.cpp"))
        flags = (*COMMON_FLAGS, "-O2", "-march=native", *self._include_flags())
        with ThreadPoolExecutor(max_workers=2) as pool:
            objects = list(pool.map(lambda source: self.compile(source, flags), sources))
        # -Bsymbolic: the runtime uses its own copies of inline functions, not a kernel's instrumented ones.
        self._runtime = self.link("libsimt", objects, ("-Wl,-Bsymbolic", "-ldl"))
        return self._runtime

    def kernel(self, *sources: str | Path, defines: Sequence[str] = ()) -> Path:
        """A shared library of kernel sources and the launchers in them.

        Args:
            sources: ``.cu`` files (``located``).
            defines: macros of the first source, as ``NAME`` or ``NAME=VALUE``; others are compiled once for all tests.
        Raises:
            BuildError: a source does not compile.
        """
        runtime = self.runtime()
        flags = [*COMMON_FLAGS, *KERNEL_FLAGS, *self._include_flags()]
        paths = located(sources, self._cache_dir)
        macros = [[f"-D{define}" for define in defines], *([] for _ in paths[1:])]
        with ThreadPoolExecutor(max_workers=2) as pool:
            objects = list(pool.map(lambda path, extra: self.compile(path, [*flags, *extra]), paths, macros))
        link = (f"-L{runtime.parent}", f"-l:{runtime.name}", f"-Wl,-rpath,{runtime.parent}")
        return self.link(paths[0].stem, objects, link)

    def _include_flags(self) -> list[str]:
        include = cuda_include()
        if include is None:
            raise BuildError(missing_requirement())
        folders = (RUNTIME, CUDA_SOURCES.parent, REPOSITORY / "csrc" / "include")
        return [*(f"-I{folder}" for folder in folders), "-isystem", str(include)]
