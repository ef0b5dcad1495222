"""Compiles kernel files for real GPUs and reads what the compiler and the machine code say about them.

Results are kept in a cache folder under the hash of everything that went into them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from threading import Lock

from tests.simt.build import CUDA_SOURCES, REPOSITORY, located

WORKERS = 2
# As CMakeLists.txt compiles them; -Wextra only talks more.
FLAGS = (
    '-DMOEKERNELS_CUDA_ARCHS="80"',
    "-std=c++20",
    "-O3",
    "-DNDEBUG",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-Wall,-Wextra",
)
INCLUDES = (f"-I{CUDA_SOURCES.parent}", f"-I{REPOSITORY / 'csrc' / 'include'}")


class CompileError(RuntimeError):
    """A kernel file does not compile; the message is the compiler's."""


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one entry point, in bytes but for the registers."""

    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_smem: int


@dataclass(frozen=True)
class Compiled:
    cubin: Path
    log: str
    kernels: tuple[Kernel, ...]

    @property
    def warnings(self) -> list[str]:
        """All that is neither the resource report nor advice on code that is not ours."""
        said = [line for line in self.log.splitlines() if line.strip() and not line.startswith(("ptxas info", "    "))]
        return said + re.findall(r"ptxas info\s*:.*\((?:C\d+)\).*", self.log)


def missing_compiler() -> str | None:
    """Why nothing can be compiled for a GPU here, or None."""
    return None if shutil.which("nvcc") else "no nvcc"


def default_architectures() -> list[str]:
    """What a wheel is built for: the list in third_party/CudaOption.cmake, as `80` or `90a`."""
    option = (REPOSITORY / "third_party" / "CudaOption.cmake").read_text()
    match = re.search(r"set\(MOEKERNELS_CUDA_ARCHS (\d[^)]*)\)", option)
    assert match is not None
    return [name.removesuffix("-real") for name in match[1].split()]


@cache
def disassembler() -> str | None:
    """nvdisasm: from PATH, or from the package nvidia-cuda-nvdisasm."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    return shutil.which("nvdisasm") or next((str(p) for p in packages.glob("*/bin/nvdisasm")), None)


def _kernels(log: str) -> tuple[Kernel, ...]:
    found = []
    for report in re.split(r"(?=ptxas info\s*: Compiling entry function)", log)[1:]:
        mangled = re.search(r"Compiling entry function '(\S+)'", report)
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        registers = re.search(r"Used (\d+) registers", report)
        smem = re.search(r"(\d+) bytes smem", report)
        assert mangled and spills and registers, report
        stack, stores, loads = map(int, spills.groups())
        found.append(Kernel(mangled[1], int(registers[1]), stack, stores, loads, int(smem[1]) if smem else 0))
    names = subprocess.run(
        ["c++filt"], input="\n".join(k.name for k in found), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return tuple(Kernel(**{**asdict(k), "name": _short(name)}) for k, name in zip(found, names, strict=True))


def _short(name: str) -> str:
    """Without return type, parameters and namespaces."""
    name = re.sub(r"^void ", "", name.replace("moekernels::", "").replace("(anonymous namespace)::", ""))
    return re.sub(r">\(.*\)$", ">", name) if "<" in name else re.sub(r"\(.*\)$", "", name)


class Compiler:
    """Compiles into ``cache_dir``, in the background."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._pool = ThreadPoolExecutor(max_workers=WORKERS)
        self._results: dict[tuple[tuple[Path, ...], str], Future[Compiled]] = {}
        self._lock, self._locks = Lock(), dict[str, Lock]()
        # A copy: pytest writes to the environment before each test, while other threads start processes with it.
        self._environment = dict(os.environ)

    def start(self, wanted: Iterable[tuple[tuple[Path, ...], str]]) -> None:
        """Begins to compile these pairs of source, or instances of a template, and architecture, in this order."""
        for sources, architecture in wanted:
            self._submit(sources, architecture)

    def compiled(self, sources: tuple[Path, ...], architecture: str) -> Compiled:
        """The result for one of them; waits for it.

        Raises:
            CompileError: the source does not compile.
        """
        return self._submit(sources, architecture).result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, sources: tuple[Path, ...], architecture: str) -> Future[Compiled]:
        key = (sources, architecture)
        if key not in self._results:
            self._results[key] = self._pool.submit(self._compile, sources, architecture)
        return self._results[key]

    def _compile(self, sources: tuple[Path, ...], architecture: str) -> Compiled:
        (source,) = located(sources, self._cache_dir)
        ptx, options = self._ptx(source, architecture), ["-cubin", "-Xptxas=-v", f"-arch=sm_{architecture}"]
        cubin = self._made(f"{ptx.stem}-{architecture}.cubin", ptx, options)
        said = [json.loads(path.with_suffix(".json").read_text()) for path in (ptx, cubin)]
        return Compiled(cubin, "".join(said), _kernels(said[1]))

    def _ptx(self, source: Path, architecture: str) -> Path:
        """What is assembled: the same for 8.0 to 8.9, as sources may only ask whether a GPU is Hopper or newer, and for
        Hopper where the tiles are those of 8.0, which do not ask."""
        virtual = architecture if architecture.startswith("9") and "_sm80" not in source.stem else "80"
        name = f"{source.stem}-{virtual}-{_fingerprint(source)}.ptx"
        with self._lock:
            lock = self._locks.setdefault(name, Lock())
        with lock:  # of two that need it, one waits
            return self._made(name, source, [*FLAGS, *INCLUDES, "-ptx", f"-arch=compute_{virtual}"])

    def _made(self, name: str, source: Path, options: list[str]) -> Path:
        """A file of the cache, and beside it what nvcc said."""
        target = self._cache_dir / name
        log = target.with_suffix(".json")
        if not log.exists():
            with tempfile.TemporaryDirectory(dir=self._cache_dir) as scratch:
                built = Path(scratch) / f"out{target.suffix}"
                command = ["nvcc", *options, str(source), "-o", str(built)]
                result = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
                if result.returncode != 0:
                    raise CompileError(result.stderr)
                record = Path(scratch) / "log.json"
                record.write_text(json.dumps(result.stdout + result.stderr))
                os.replace(built, target)
                os.replace(record, log)
        return target


@cache
def _compiler_version() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout


def _fingerprint(source: Path) -> str:
    """Of the source, every header it may include, the flags and the compiler."""
    digest = hashlib.sha256("\0".join([_compiler_version(), *FLAGS]).encode())
    headers = [p for folder in ("cuda", "include") for p in (REPOSITORY / "csrc" / folder).rglob("*.*h")]
    for path in [source, *sorted(headers)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _sections(cubin: Path) -> dict[str, str]:
    """The machine code of each kernel as text, under the kernel's mangled name."""
    nvdisasm = disassembler()
    assert nvdisasm is not None
    text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"(?=^\s*\.section\s+\.text\.)", text, flags=re.MULTILINE)[1:]
    names = [re.match(r"\s*\.section\s+\.text\.([^\s,]+)", section) for section in sections]
    return {name[1]: section for name, section in zip(names, sections, strict=True) if name is not None}


@cache
def instructions(cubin: Path) -> dict[str, list[str]]:
    """The opcodes of each kernel's machine code, in order, under the kernel's mangled name."""
    pattern = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", re.MULTILINE)
    return {name: [*map(sys.intern, pattern.findall(section))] for name, section in _sections(cubin).items()}


def loop_lengths(cubin: Path, opcode: str) -> dict[str, int]:
    """Of each kernel with this opcode, how many instructions the smallest loop around all of them has."""
    found = {}
    for name, section in _sections(cubin).items():
        labels: dict[str, int] = {}
        code: list[str] = []
        for line in section.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(code)
            elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
                code.append(instruction[1])
        places = [i for i, text in enumerate(code) if re.search(rf"\b{opcode}\b", text)]
        branches = [(i, re.search(r"BRA.*`\((\.L_x_\d+)\)", code[i])) for i in range(max(places, default=0), len(code))]
        around = [i + 1 - labels[b[1]] for i, b in branches if b and labels[b[1]] <= places[0]] if places else []
        if around:
            found[name] = min(around)
    return found
