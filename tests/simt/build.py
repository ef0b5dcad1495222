"""Compiles kernel sources, together with the runtime that stands in for the GPU, by g++.

Results are kept in a cache folder under the hash of everything that went into them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RUNTIME = Path(__file__).resolve().parent / "runtime"
CUDA_SOURCES = REPOSITORY / "csrc" / "cuda"

COMMON_FLAGS = ("-std=c++20", "-O2", "-g1", "-fPIC", "-fno-gnu-unique", "-fno-strict-aliasing", "-Wall", "-Wextra")
# The calls that the sanitizers' instrumentation makes arrive in runtime/hooks.cpp; no sanitizer library is linked.
KERNEL_FLAGS = (
    "-x",
    "c++",
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


class BuildError(RuntimeError):
    """A source does not compile; the message is the compiler's."""


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


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{result.stderr}")


class Builder:
    """Builds into ``cache_dir``; safe to use from several processes at once."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._runtime: Path | None = None
        cache_dir.mkdir(parents=True, exist_ok=True)

    def runtime(self) -> Path:
        """The shared library of the runtime."""
        if self._runtime is not None:
            return self._runtime
        sources = sorted(RUNTIME.glob("*.cpp"))
        flags = (*COMMON_FLAGS, "-march=native", *self._include_flags())
        with ThreadPoolExecutor(max_workers=2) as pool:
            objects = list(pool.map(lambda source: self._compile(source, flags), sources))
        # -Bsymbolic: the runtime uses its own copies of inline functions, not a kernel's instrumented ones.
        self._runtime = self._link("libsimt", objects, ("-Wl,-Bsymbolic", "-ldl"))
        return self._runtime

    def kernel(self, *sources: Path, defines: Sequence[str] = ()) -> Path:
        """A shared library of kernel sources and the launchers in them.

        Args:
            sources: ``.cu`` files.
            defines: macros, as ``NAME`` or ``NAME=VALUE``.
        Raises:
            BuildError: a source does not compile.
        """
        runtime = self.runtime()
        flags = (*COMMON_FLAGS, *KERNEL_FLAGS, *(f"-D{define}" for define in defines), *self._include_flags())
        with ThreadPoolExecutor(max_workers=2) as pool:
            objects = list(pool.map(lambda source: self._compile(source, flags), sources))
        link = (f"-L{runtime.parent}", f"-l:{runtime.name}", f"-Wl,-rpath,{runtime.parent}")
        return self._link(sources[0].stem, objects, link)

    def _include_flags(self) -> list[str]:
        include = cuda_include()
        if include is None:
            raise BuildError(missing_requirement())
        folders = (RUNTIME, CUDA_SOURCES, REPOSITORY / "csrc" / "include")
        return [*(f"-I{folder}" for folder in folders), "-isystem", str(include)]

    def _compile(self, source: Path, flags: Sequence[str]) -> Path:
        key = hashlib.sha256("\0".join([str(source), *flags]).encode()).hexdigest()[:16]
        manifest = self._cache_dir / f"{source.stem}-{key}.json"
        if manifest.exists():
            known = json.loads(manifest.read_text())
            found = self._cache_dir / known["object"]
            inputs: dict[str, str] = known["inputs"]
            if found.exists() and all(Path(p).exists() and _digest(Path(p)) == d for p, d in inputs.items()):
                return found
        with tempfile.TemporaryDirectory(dir=self._cache_dir) as scratch:
            built = Path(scratch) / "out.o"
            depends = Path(scratch) / "out.d"
            _run(["g++", *flags, "-MMD", "-MF", str(depends), "-c", str(source), "-o", str(built)])
            names = depends.read_text().split(":", 1)[1].replace("\\\n", " ").split()
            inputs = {name: _digest(Path(name)) for name in names}
            content = hashlib.sha256(json.dumps([key, sorted(inputs.items())]).encode()).hexdigest()[:16]
            target = self._cache_dir / f"{source.stem}-{content}.o"
            os.replace(built, target)
            record = Path(scratch) / "manifest.json"
            record.write_text(json.dumps({"object": target.name, "inputs": inputs}))
            os.replace(record, manifest)
        return target

    def _link(self, name: str, objects: Sequence[Path], flags: Sequence[str]) -> Path:
        key = hashlib.sha256("\0".join([*(o.name for o in objects), *flags]).encode()).hexdigest()[:16]
        target = self._cache_dir / f"{name}-{key}.so"
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=self._cache_dir) as scratch:
                built = Path(scratch) / "out.so"
                _run(["g++", "-shared", "-o", str(built), *map(str, objects), *flags])
                os.replace(built, target)
        return target
