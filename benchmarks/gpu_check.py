"""Everything a machine with a GPU should do, in one command of at most ten minutes.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --parts build tests --minutes 5
    python benchmarks/gpu_check.py --device cpu --quick      # shows that the parts run

Builds this checkout into a temporary folder, runs the tests that need a GPU, compute-sanitizer's tools on small shapes
and the benchmarks. A part that fails or takes too long is recorded, and the others go on. Writes
`<out>/<gpu>-<date>.json` and a readable `.md` after every part; the exit status says whether all parts passed.

Needs torch, nvcc, cmake, ninja, pybind11, scikit-build-core and pytest; no network.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TAIL = 6000  # characters of output that are kept
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
    output: str = ""
    table: str = ""  # Markdown that a benchmark wrote


@dataclass
class Check:
    """The run so far: what is asked for, and the steps that are done."""

    device: str
    quick: bool
    out: Path
    work: Path
    deadline: float
    steps: list[Step] = field(default_factory=list)
    results: dict[str, object] = field(default_factory=dict)

    @property
    def installed(self) -> Path:
        return self.work / "site"

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(self.installed), os.environ.get("PYTHONPATH", "")]))
        return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}

    def run(
        self, part: str, name: str, command: Sequence[str | Path], limit: float,
        summarise: Callable[[str], str] = lambda output: "", env: dict[str, str] | None = None,
    ) -> Step:  # fmt: skip
        """Runs a command for at most `limit` seconds, and never past the deadline."""
        words = [str(word) for word in command]
        step = Step(part, name, " ".join(words), "skipped", summary="no time left")
        limit = min(limit, self.deadline - time.monotonic())
        if limit > 5:
            begin = time.monotonic()
            print(f"{part}: {name} (at most {limit:.0f} s)", flush=True)
            step.status, output = _run(words, limit, {**self.environment(), **(env or {})})
            step.seconds = time.monotonic() - begin
            step.output = output[-TAIL:]
            step.summary = summarise(output)
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
        name = re.sub(r"[^a-z0-9]+", "-", str(about["device"]).lower()).strip("-")
        path = self.out / f"{name}-{date.today().isoformat()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": about, "steps": [asdict(step) for step in self.steps], "results": self.results}
        path.write_text(json.dumps(record, indent=1) + "\n")
        path.with_suffix(".md").write_text(_readable(about, self.steps))


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


def _machine(device: str) -> dict[str, object]:
    """Told by tools alone, so that it can be written even where nothing can be imported."""
    query = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,memory.total"
    gpus = _output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").splitlines()
    cpu = (
        re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        if Path("/proc/cpuinfo").exists()
        else None
    )
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


# ---- the parts ----


def build(check: Check) -> None:
    """Into a temporary folder by pip; where that fails, by cmake alone."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    env = {
        "MOEKERNELS_CUDA": "on" if check.device == "cuda" else "off",
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()),
    }
    options: list[str | Path] = ["-C", f"build-dir={check.work / 'build'}", "--upgrade", "--target", check.installed]
    report = "import moekernels as m; print(m.__file__, m.build_info())"
    if check.run("build", "pip install", [*pip, *options, "."], 290, env=env).status == "passed":
        check.run("build", "import", [sys.executable, "-c", report], 60, _last_line)
        return
    shutil.rmtree(check.installed, ignore_errors=True)
    folder = check.work / "cmake"
    pybind11 = f"-Dpybind11_DIR={_output_of(sys.executable, '-m', 'pybind11', '--cmakedir')}"
    cuda = f"-DMOEKERNELS_CUDA={env['MOEKERNELS_CUDA']}"
    configure = [
        "cmake",
        "-S",
        ".",
        "-B",
        folder,
        "-G",
        "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
        pybind11,
        cuda,
    ]
    if check.run("build", "cmake", configure, 60).status != "passed":
        return
    if check.run("build", "cmake --build", ["cmake", "--build", folder], 280).status != "passed":
        return
    check.run("build", "cmake --install", ["cmake", "--install", folder, "--prefix", check.installed], 30)
    shutil.copytree(REPOSITORY / "python" / "moekernels", check.installed / "moekernels", dirs_exist_ok=True)
    check.run("build", "import", [sys.executable, "-c", report], 60, _last_line)


def tests(check: Check) -> None:
    """The tests marked `gpu`: the suites of ops and of training on CUDA tensors, and tests/gpu."""
    # Another torch may warn where the pinned one does not, and a test may need a package that is not here: neither is
    # what is asked for.
    options = ["-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "--durations=5",
               "--continue-on-collection-errors"]  # fmt: skip
    if check.device == "cuda":
        options += ["-m", "gpu"]
    folders = ["tests/ops/test_permute.py" if check.quick else "tests/ops", "tests/nn/test_training.py", "tests/gpu"]
    for folder in folders:
        check.run("tests", folder, [sys.executable, "-m", "pytest", folder, *options], 150, _last_line)


def _last_line(output: str) -> str:
    lines = [line.strip("= ") for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def sanitize(check: Check) -> None:
    """compute-sanitizer on our kernels; without the caching allocator, so that it knows where tensors end."""
    script: list[str | Path] = [sys.executable, REPOSITORY / "tests" / "gpu" / "sanitize.py", "--device", check.device]
    if check.device != "cuda":
        check.run("sanitize", "without a tool", script, 120, _last_line)
        return
    toolkit = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc").resolve().parent
    tool = shutil.which("compute-sanitizer") or str(toolkit / "compute-sanitizer")
    for name in TOOLS:
        command: list[str | Path] = [
            tool,
            "--tool",
            name,
            "--kernel-regex",
            "kns=moekernels",
            "--error-exitcode",
            "9",
            *script,
        ]
        check.run("sanitize", name, command, 120, _last_line, env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def benchmarks(check: Check) -> None:
    """The tables, most wanted first."""
    few, many = ["1", "8", "32"], ["512", "8192", "32768"]
    olmoe, phi, nllb, switch = "olmoe-1b-7b", "phi-3.5-moe", "nllb-moe-54b", "switch-base-8"
    runs: dict[str, list[str]] = {
        "moe_layer decode": ["moe_layer.py", "--shapes", olmoe, phi, "--tokens", *few, "--budget", "0.5"],
        "moe_layer prefill": ["moe_layer.py", "--shapes", olmoe, phi, "--tokens", *many, "--budget", "0.7"],
        "kernels": ["kernels.py", "--shapes", olmoe, "--tokens", "1", "8", "512", "16384", "--budget", "0.3"],
        "training": ["training.py", "--shapes", olmoe, "--tokens", "8192", "32768", "--skip", "eager", "--budget", "1"],
        "kernels backward": ["kernels.py", "--kernels", *BACKWARD, "--shapes", olmoe, "--tokens", "512", "32768",
                             "--budget", "0.2"],
        "moe_layer with routing": ["moe_layer.py", "--with-routing", "--shapes", olmoe, "--tokens", "1", "8", "512",
                                   "--no-baselines", "--budget", "0.3"],
        "moe_layer skewed": ["moe_layer.py", "--shapes", olmoe, "--routing", "zipf", "one-expert", "--tokens", "32",
                             "8192", "--budget", "0.5"],
        "moe_layer others": ["moe_layer.py", "--shapes", nllb, switch, "--tokens", "1", "512", "8192",
                             "--budget", "0.5"],
    }  # fmt: skip
    if check.quick:
        runs = {
            "kernels": ["kernels.py", "--shapes", switch, "--tokens", "4", "--budget", "0.05"],
            "kernels backward": ["kernels.py", "--kernels", *BACKWARD, "--shapes", switch, "--tokens", "4",
                                 "--budget", "0.05"],
            "moe_layer": ["moe_layer.py", "--shapes", switch, "--tokens", "4", "--budget", "0.05"],
            "training": ["training.py", "--shapes", switch, "--tokens", "4", "--budget", "0.05"],
        }  # fmt: skip
    for name, (script, *options) in runs.items():
        saved = check.work / f"{name.replace(' ', '-')}.json"
        command: list[str | Path] = [
            sys.executable,
            REPOSITORY / "benchmarks" / script,
            "--device",
            check.device,
            *options,
            "--save",
            saved,
        ]
        step = check.run("benchmarks", name, command, 90)
        if saved.exists():
            check.results[name] = json.loads(saved.read_text())
            step.table = saved.with_suffix(".md").read_text()
            check.write()


PARTS: dict[str, Callable[[Check], None]] = {
    "build": build,
    "tests": tests,
    "benchmarks": benchmarks,
    "sanitize": sanitize,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="in this order")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a taste of every part")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--work", type=Path, help="where to build; kept, and used again if it holds a build")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moekernels-") as scratch:
        work = args.work.resolve() if args.work else Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        check = Check(args.device, args.quick, args.out, work, time.monotonic() + 60 * args.minutes)
        for name in args.parts:
            try:
                PARTS[name](check)
            except Exception as error:  # a broken part must not cost the others
                check.add(Step(name, "itself", "", "failed", summary=repr(error)))
        bad = [step for step in check.steps if step.status not in ("passed", "skipped")]
    print(f"{len(check.steps) - len(bad)} steps of {len(check.steps)} passed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
