"""What a machine with a GPU should do while it is there: fifteen minutes, in two calls.

    MOEKERNELS_CUDA_ARCHS=90a python benchmarks/gpu_check.py --parts build --work gpu-work    # beforehand, anywhere
    python benchmarks/gpu_check.py --call 1 --work gpu-work --out results-1
    python benchmarks/gpu_check.py --call 2 --work gpu-work --out results-2 --again results-1/failed-tests.txt
    python benchmarks/gpu_check.py --call 1 --device cpu --quick      # a rehearsal: shows that the parts run

The first call (at most 330 s) asks whether everything is right: the emulator's own kernels on hardware, which names a
wrong idea of it directly, then the tests that need a GPU and compute-sanitizer's memcheck. The second (400 s) runs the
failed tests again and the launches that overlap, with overlap on and off; then it measures, most wanted first. A part
that fails or takes too long is recorded, and the others go on.

`--work` names a folder that holds `site`, the built package; where it holds none, this checkout is built first. A site
that another Python built gets a compiled module for this one. `--out` gets, after every part, a .json named after GPU,
date and call, a readable .md, the whole output of every command in one .log, and failed-tests.txt. The exit status says
whether all parts passed.

Needs torch, nvcc, cmake, ninja, pybind11, scikit-build-core, pytest and pytest-timeout; no network.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TAIL = 6000  # characters of output in the summary; the log has all
SECONDS_PER_TEST = 60
# moekernels.bench.backward.BACKWARD: nothing of the package can be imported before it is built.
BACKWARD = (
    "unpermute-grad", "activation", "activation-grad", "router-stats", "router-stats-grad", "route-grad",
    "down-rows-grad", "down-weight-grad", "up-rows-grad", "up-weight-grad",
)  # fmt: skip


@dataclass
class Step:
    """One command of a part, and how it went."""

    part: str
    name: str
    command: str
    status: str  # passed, failed, timed out, missing, skipped
    seconds: float = 0.0
    summary: str = ""
    output: str = ""  # its end
    table: str = ""  # Markdown that a benchmark wrote


@dataclass
class Check:
    """The run so far: what is asked for, and the steps that are done."""

    device: str
    quick: bool
    call: str
    out: Path
    work: Path
    again: Path | None
    deadline: float
    steps: list[Step] = field(default_factory=list)
    results: dict[str, object] = field(default_factory=dict)
    failed_tests: list[str] = field(default_factory=list)

    @property
    def site(self) -> Path:
        return self.work / "site"

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(self.site), os.environ.get("PYTHONPATH", "")]))
        return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}

    def run(
        self, part: str, name: str, command: Sequence[str | Path], limit: float,
        summarise: Callable[[str], str] = lambda output: "", env: dict[str, str] | None = None,
    ) -> Step:  # fmt: skip
        """Runs a command for at most `limit` seconds, and never past the deadline."""
        words = [str(word) for word in command]
        step = Step(part, name, shlex.join(words), "skipped", summary="no time left")
        limit = min(limit, self.deadline - time.monotonic())
        if limit > 5:
            begin = time.monotonic()
            print(f"{part}: {name} (at most {limit:.0f} s)", flush=True)
            step.status, output = _run(words, limit, {**self.environment(), **(env or {})})
            step.seconds = time.monotonic() - begin
            step.output = output[-TAIL:]
            step.summary = summarise(output)
            self.failed_tests += re.findall(r"^(?:FAILED|ERROR) (tests/\S+?::.*?)(?: - .*)?$", output, re.MULTILINE)
            with self._path(".log").open("a") as log:
                log.write(f"==== {part}: {name}\n{step.command}\n{output}\n{step.status}, {step.seconds:.1f} s\n\n")
        self.add(step)
        return step

    def add(self, step: Step) -> None:
        self.steps.append(step)
        print(f"  {step.status} after {step.seconds:.0f} s  {step.summary}", flush=True)
        if step.status not in ("passed", "skipped"):
            print(step.output[-1500:], flush=True)
        self.write()

    def write(self) -> None:
        about = _machine(self.device)
        record = {"machine": about, "steps": [asdict(step) for step in self.steps], "results": self.results}
        self._path(".json").write_text(json.dumps(record, indent=1) + "\n")
        self._path(".md").write_text(_readable(about, self.steps))
        (self.out / "failed-tests.txt").write_text("".join(f"{name}\n" for name in self.failed_tests))

    def _path(self, suffix: str) -> Path:
        device = re.sub(r"[^a-z0-9]+", "-", str(_machine(self.device)["device"]).lower()).strip("-")
        self.out.mkdir(parents=True, exist_ok=True)
        return self.out / f"{device}-{date.today().isoformat()}-{self.call}{suffix}"


def _run(words: list[str], limit: float, env: dict[str, str]) -> tuple[str, str]:
    """Status and output; the whole process group ends with the time limit."""
    try:
        process = subprocess.Popen(
            words, cwd=REPOSITORY, env=env, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return "missing", str(error)
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return "timed out", output
    return ("passed" if process.returncode == 0 else "failed"), output


def _output_of(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False, cwd=REPOSITORY).stdout.strip()
    except OSError:
        return ""


@cache
def _machine(device: str) -> dict[str, object]:
    """Told by tools alone, so that it can be written even where nothing can be imported."""
    query = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,memory.total"
    gpus = _output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").splitlines()
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    name = gpus[0].split(",")[0] if device == "cuda" and gpus else (cpu[1] if cpu else "cpu")
    return {
        "device": name.strip(),
        "gpus": gpus,
        "nvcc": _output_of("nvcc", "--version").splitlines()[-1:],
        "python": sys.version.split()[0],
        "revision": _output_of("git", "rev-parse", "--short=12", "HEAD"),
        "date": date.today().isoformat(),
    }


def _readable(about: dict[str, object], steps: Sequence[Step]) -> str:
    lines = [f"# {about['device']}, {about['date']}", "", ", ".join(f"{k} {v}" for k, v in about.items()), ""]
    lines += ["| part | step | status | s | summary |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {s.part} | {s.name} | {s.status} | {s.seconds:.0f} | {s.summary} |" for s in steps]
    for step in steps:
        if step.table:
            lines += ["", f"## {step.name}", "", step.table.strip()]
    for step in steps:
        if step.status not in ("passed", "skipped"):
            lines += ["", f"## {step.part}: {step.name} {step.status}", "", f"`{step.command}`", ""]
            lines += ["```", step.output.strip(), "```"]
    return "\n".join(lines) + "\n"


def _last_line(output: str) -> str:
    lines = [line.strip("= ") for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else ""


# ---- building ----


def build(check: Check) -> None:
    """Into the work folder, unless it holds a build; one of another Python gets this one's compiled module."""
    built = check.site / "moekernels"
    if not built.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
        env = {
            "MOEKERNELS_CUDA": "on" if check.device == "cuda" else "off",
            "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()),
        }
        options: list[str | Path] = ["-C", f"build-dir={check.work / 'build'}", "--upgrade", "--target", check.site]
        check.run("build", "pip install", [*pip, *options, "."], 3600, env=env)
        header = check.work / "build" / "generated" / "build_info.h"
        if header.exists():
            shutil.copy(header, check.site)
    elif not list(built.glob(f"_C*{sysconfig.get_config_var('EXT_SUFFIX')}")):
        check.run("build", "module for this Python", _module_command(check.site), 120)
    report = "import moekernels as m; print(m.__file__, m.build_info())"
    check.run("build", "import", [sys.executable, "-c", report], 60, _last_line)


def _module_command(site: Path) -> list[str | Path]:
    """Compiles moekernels._C, all that depends on the version of Python."""
    package = site / "moekernels"
    headers = _output_of(sys.executable, "-m", "pybind11", "--includes").split()
    csrc = REPOSITORY / "csrc"
    folders = [f"-I{folder}" for folder in (site, csrc, csrc / "include")]
    return [
        "c++", "-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", *folders, *headers,
        *sorted((csrc / "python").glob("*.cpp")), f"-L{package}", "-lmoekernels", "-Wl,-rpath,$ORIGIN",
        "-o", package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}",
    ]  # fmt: skip


# ---- is it right? ----


def _pytest(check: Check, part: str, name: str, what: Sequence[str], limit: float, **env: str) -> None:
    """Tests that need the device, or with a stand-in those that do not. A hang ends its test, a fault its process."""
    # Another torch may warn where the pinned one does not, and a test may need a package that is not here: neither is
    # what is asked for.
    options = ["-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "--durations=5",
               "--continue-on-collection-errors", "--max-worker-restart=20"]  # fmt: skip
    if importlib.util.find_spec("pytest_timeout") is not None:
        seconds = SECONDS_PER_TEST if check.device == "cuda" else 10 * SECONDS_PER_TEST
        options += [f"--timeout={seconds}", "--timeout-method=thread"]
    options += ["-m", "gpu" if check.device == "cuda" else "not gpu and not slow"]
    check.run(part, name, [sys.executable, "-m", "pytest", *what, *options], limit, _last_line, env)


def emulator(check: Check) -> None:
    """The kernels that test the emulator, by the emulated instructions' real counterparts."""
    names = ["cluster"] if check.quick else ["crosscheck", "runtime", "overlap", "cluster"]
    _pytest(check, "emulator", "its kernels on hardware", [f"tests/simt/test_{name}.py" for name in names], 120)


def tests(check: Check) -> None:
    """What only a GPU can show, then every op on CUDA tensors, then training."""
    ops = "tests/ops/test_permute.py" if check.quick else "tests/ops"
    for folder in ("tests/gpu", ops, "tests/nn/test_training.py"):
        if check.device != "cuda" and folder == "tests/gpu":
            continue  # it has nothing for a stand-in
        _pytest(check, "tests", folder, [folder], 120)


def again(check: Check) -> None:
    """The tests that failed in an earlier call."""
    names = check.again.read_text().splitlines() if check.again and check.again.exists() else []
    if names:
        _pytest(check, "again", f"{len(names)} failed tests", names, 90)
    else:
        check.add(Step("again", "failed tests", "", "skipped", summary="none given"))


def overlap(check: Check) -> None:
    """Our ops alone at a few tokens, where one kernel starts while the one before it runs; and without that."""
    test = "tests/gpu/test_overlap.py" if check.device == "cuda" else "tests/ops/test_permute.py"
    for setting in ("on", "off"):
        _pytest(check, "overlap", setting, [test], 60, MOEKERNELS_CUDA_OVERLAP=setting)


def _sanitize(check: Check, tool: str, limit: float) -> None:
    """compute-sanitizer on our kernels; without the caching allocator, so that it knows where tensors end."""
    script: list[str | Path] = [sys.executable, REPOSITORY / "tests" / "gpu" / "sanitize.py", "--device", check.device]
    if check.device != "cuda":
        check.run(tool, "without the tool", script, limit, _last_line)
        return
    toolkit = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc").resolve().parent
    program = shutil.which("compute-sanitizer") or str(toolkit / "compute-sanitizer")
    options = ["--tool", tool, "--kernel-regex", "kns=moekernels", "--error-exitcode", "9"]
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    check.run(tool, "small shapes", [program, *options, *script], limit, _last_line, env)


def memcheck(check: Check) -> None:
    _sanitize(check, "memcheck", 120)


def racecheck(check: Check) -> None:
    _sanitize(check, "racecheck", 120)


# ---- how fast is it? ----

OLMOE, PHI, NLLB, SWITCH = "olmoe-1b-7b", "phi-3.5-moe", "nllb-moe-54b", "switch-base-8"
QUANTISED = "--weights int4 nf4 int8"


def _benchmark(check: Check, part: str, name: str, script: str, options: Sequence[str]) -> None:
    saved = check.work / f"{name.replace(' ', '-')}.json"
    saved.unlink(missing_ok=True)
    command = [sys.executable, REPOSITORY / "benchmarks" / script, "--device", check.device, *options, "--save", saved]
    step = check.run(part, name, command, 90)
    if saved.exists():
        check.results[name] = json.loads(saved.read_text())
        step.table = saved.with_suffix(".md").read_text()
        check.write()


def _benchmarks(check: Check, part: str, runs: dict[str, str]) -> None:
    """Each a script and its options; quick, a taste of it on the smallest shape."""
    for name, words in runs.items():
        script, *options = words.split()
        if check.quick:
            chosen = {"--kernels", "--weights"} & set(options)  # what is measured, which stands before the shapes
            what = [word for name in chosen for word in options[options.index(name) : options.index("--shapes")]]
            options = [*what, "--shapes", SWITCH, "--tokens", "4", "--budget", "0.05"]
        _benchmark(check, part, name, script, options)


def decode(check: Check) -> None:
    runs = {
        "layer, few tokens": f"moe_layer.py --shapes {OLMOE} {PHI} --tokens 1 8 32 --budget 0.5",
        "layer, few tokens, quantised": f"moe_layer.py {QUANTISED} --shapes {OLMOE} --tokens 1 8 --budget 0.2",
        "layer with routing": f"moe_layer.py --with-routing --shapes {OLMOE} --tokens 1 8 --no-baselines --budget 0.3",
    }
    _benchmarks(check, "decode", runs)


def prefill(check: Check) -> None:
    runs = {
        "layer, many tokens": f"moe_layer.py --shapes {OLMOE} {PHI} --tokens 512 8192 32768 --budget 0.7",
        "kernels": f"moe_layer.py --kernels all --shapes {OLMOE} --tokens 1 8 512 16384 --budget 0.3",
        "layer, many tokens, quantised": f"moe_layer.py {QUANTISED} --shapes {OLMOE} --tokens 512 8192 --budget 0.2",
    }
    _benchmarks(check, "prefill", runs)


def training(check: Check) -> None:
    kernels = " ".join(BACKWARD)
    runs = {
        "training": f"training.py --shapes {OLMOE} --tokens 8192 32768 --skip eager --budget 1",
        "kernels backward": f"moe_layer.py --kernels {kernels} --shapes {OLMOE} --tokens 512 32768 --budget 0.2",
    }
    _benchmarks(check, "training", runs)


def others(check: Check) -> None:
    skewed = f"moe_layer.py --shapes {OLMOE} --routing zipf one-expert --tokens 32 8192 --budget 0.5"
    runs = {
        "layer, skewed routing": skewed,
        "layer, other models": f"moe_layer.py --shapes {NLLB} {SWITCH} --tokens 1 512 8192 --budget 0.5",
    }
    _benchmarks(check, "others", runs)


PARTS: dict[str, Callable[[Check], None]] = {
    part.__name__: part
    for part in (build, emulator, tests, memcheck, again, overlap, decode, prefill, training, racecheck, others)
}
CALLS = {
    "1": (["build", "emulator", "tests", "memcheck"], 330.0),
    "2": (["build", "again", "overlap", "decode", "prefill", "training", "racecheck", "others"], 400.0),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--call", choices=CALLS, help="the parts and the time of one call; without it, all of both")
    which.add_argument("--parts", nargs="+", choices=PARTS, help="in this order")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a taste of every part")
    parser.add_argument("--seconds", type=float, help="for all parts together; with --parts, no limit unless given")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--work", type=Path, help="where to build; kept, and used again if it holds a build")
    parser.add_argument("--again", type=Path, help="failed-tests.txt of an earlier call")
    args = parser.parse_args()
    parts, seconds = args.parts or list(PARTS), 86400.0 if args.parts else 730.0
    if args.call:
        parts, seconds = CALLS[args.call]
    name = f"call-{args.call}" if args.call else "-".join(parts) if args.parts else "all"
    with tempfile.TemporaryDirectory(prefix="moekernels-") as scratch:
        work = args.work.resolve() if args.work else Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + (args.seconds or seconds)
        check = Check(args.device, args.quick, name, args.out.resolve(), work, args.again, deadline)
        for part in parts:
            try:
                PARTS[part](check)
            except Exception as error:  # a broken part must not cost the others
                check.add(Step(part, "itself", "", "failed", summary=repr(error)))
        bad = [step for step in check.steps if step.status not in ("passed", "skipped")]
    print(f"{len(check.steps) - len(bad)} steps of {len(check.steps)} passed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
