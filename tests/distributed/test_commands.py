"""`--expert-parallel` of the commands: rank 0 prints what one process prints."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moekernels.cli import main
from tests.distributed import commands
from tests.pipelines import checkpoints
from tests.processes import run_processes
from tests.tokenizers.sentencepiece_builders import TEXTS

LINES = "\n".join([TEXTS[1], "", TEXTS[0]]) + "\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "olmoe": checkpoints.olmoe(tmp_path_factory.mktemp("olmoe")),
        "switch": checkpoints.switch(tmp_path_factory.mktemp("switch")),
    }


@pytest.fixture(scope="module")
def cases(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], str]]:
    output = tmp_path_factory.mktemp("output") / "out.txt"
    generate = ["generate", "--model", str(models["olmoe"]), "--device", "cpu", "--max-new-tokens", "6"]
    run = ["run", "--model", str(models["switch"]), "--task", "text2text-generation", "--device", "cpu"]
    run += ["--max-new-tokens", "6"]
    sizes = ["--hidden-size", "32", "--ffn-size", "16", "--experts", "6", "--top-k", "2", "--tokens", "12"]
    return {
        "generate": ([*generate, "--prompt", "The quick"], ""),
        "sample": ([*generate, "--temperature", "5", "--seed", "3"], "The quick"),
        "sample unseeded": ([*generate, "--temperature", "5", "--prompt", "The quick", "--no-stream"], ""),
        "run": (run, LINES),
        "run to a file": ([*run, "--output", str(output)], LINES),
        "not there": (["generate", "--model", str(output / "nothing"), "--prompt", "x", "--device", "cpu"], ""),
        "bench": (["bench", *sizes, "--budget", "0.01", "--device", "cpu", "--backward"], ""),
    }


@pytest.fixture(scope="module")
def found(cases: dict[str, tuple[list[str], str]]) -> list[dict[str, Any]]:
    return run_processes(commands.run, 2, cases)


@pytest.mark.parametrize("name", ["generate", "sample", "run"])
def test_rank_0_prints_what_one_process_prints(
    name: str,
    found: list[dict[str, Any]],
    cases: dict[str, tuple[list[str], str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, text = cases[name]
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(arguments) == 0
    assert found[0][name][:2] == ([0], capsys.readouterr().out)
    assert found[1][name] == ([0], "", "")


def test_ranks_draw_alike_without_a_seed(found: list[dict[str, Any]]) -> None:
    """Otherwise they would run different numbers of steps, or of tokens, and an exchange would fail."""
    codes, out, _ = found[0]["sample unseeded"]
    assert codes == found[1]["sample unseeded"][0] == [0] and out.strip()


def test_rank_0_writes(found: list[dict[str, Any]], cases: dict[str, tuple[list[str], str]]) -> None:
    path = Path(cases["run to a file"][0][-1])
    assert path.read_text(encoding="utf-8") == found[0]["run"][1]


def test_errors(found: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    for rank in found:
        codes, out, errors = rank["not there"]
        assert codes == [2] and out == "" and "moekernels: error: no such checkpoint directory" in errors


def test_outside_of_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    codes: list[int] = []
    monkeypatch.setattr(sys.modules["moekernels.cli.main"], "leave", codes.append)
    main(["generate", "--model", "x", "--prompt", "y", "--expert-parallel"])
    assert codes == [2]
    assert "needs processes: torchrun --nproc-per-node 2 -m moekernels" in capsys.readouterr().err


def test_bench(found: list[dict[str, Any]]) -> None:
    codes, out, _ = found[0]["bench"]
    rows = [line.split() for line in out.splitlines()[4:]]
    assert codes == [0] and len(rows) == 4
    assert all(float(row[-2]) > 0 for row in rows[1:])


def test_torchrun(models: dict[str, Path], found: list[dict[str, Any]], tmp_path: Path) -> None:
    """The real thing, once."""
    path = tmp_path / "lines.txt"
    path.write_text(LINES, encoding="utf-8")
    options = ["--model", str(models["switch"]), "--task", "text2text-generation", "--max-new-tokens", "6"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*torchrun, "-m", "moekernels", "run", *options, "--device", "cpu", "--expert-parallel", str(path)],
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == found[0]["run"][1]
