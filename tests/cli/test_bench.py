from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from moekernels import ops
from moekernels.bench import baselines, sweep
from moekernels.bench.roofs import Roofs
from moekernels.bench.table import Row, record
from moekernels.cli import bench, main
from moekernels.cli.main import build_parser
from tests.generators import OLMOE, REAL_LAYERS

SMALL = ("--hidden-size", "24", "--ffn-size", "16", "--experts", "6", "--top-k", "2")
QUICK = ("bench", *SMALL, "--tokens", "1", "5", "--budget", "1e-9", "--device", "cpu")
ROOFS = Roofs(1e9, 1e9, {"float32": 1e9, "bfloat16": 1e9}, probe_bytes=64, matmul_size=8)


@pytest.fixture(autouse=True)
def _roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure_roofs", lambda *args: ROOFS)


def exit_code(*args: str) -> int:
    try:
        return main(args)
    except SystemExit as end:  # argparse ends this way
        return int(end.code or 0)


def test_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["moekernels", "bench", "--hidden-size", "24"])
    path = tmp_path / "rows.json"
    options = ("--dtype", "float32", "bfloat16", "--routing", "zipf", "one-expert", "--check", "--json", str(path))
    threads = torch.get_num_threads()
    assert exit_code(*QUICK, *options, "--threads", "1") == 0
    assert torch.get_num_threads() == threads
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split(None, 1) == [
        "layer",
        "24x16, 2 of 6: hidden size 24, 6 experts of 16 (silu, gated), 2 per token, routed by softmax",
    ]
    assert "clock wall clock, threads 1" in lines[1] and lines[2].startswith("roofs    read 1.0 GB/s")
    assert lines[4].split("  ")[0] == "shape" and "% of roof" in lines[4] and "× torch grouped_mm" in lines[4]
    assert lines[-1] == "all results are those of the definitions" and captured.err == ""
    content = json.loads(path.read_text())
    assert content["mismatches"] == [] and content["roofs"]["read_bandwidth"] == 1e9
    assert content["command"] == "moekernels bench --hidden-size 24"
    parts = [part.replace("-", " ") for part in sweep.PARTS]
    assert [(row["dtype"], row["routing"], row["tokens"], row["shape"]) for row in content["rows"]] == [
        (dtype, routing, tokens, f"24x16, 2 of 6 {part}")
        for dtype in ("float32", "bfloat16")
        for routing in ("zipf", "one-expert")
        for tokens in (1, 5)
        for part in parts
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_backward(capsys: pytest.CaptureFixture[str]) -> None:
    def names(*options: str) -> list[str]:
        assert exit_code(*QUICK, "--dtype", "float32", "--no-baselines", *options) == 0
        lines = capsys.readouterr().out.splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith("---")) + 1
        return list(dict.fromkeys(line.split("  ")[0].replace(" ", "-") for line in lines[first:]))

    assert names() == list(sweep.PARTS)
    assert names("--backward") == [*sweep.PARTS, *sweep.BACKWARD_PARTS]
    assert names("--kernels", "up-rows-grad", "plan") == ["plan", "up-rows-grad"]
    assert names("--kernels", "plan", "--backward") == ["plan", *sweep.BACKWARD_PARTS]


def test_memory_that_gradients_take() -> None:
    def needed(**options: bool) -> int:
        return sweep.memory_needed(OLMOE, 1, torch.bfloat16, **options)

    weights = 2 * 64 * OLMOE.expert_size
    assert weights < needed() < 1.3 * weights < 3 * weights < needed(backward=True)
    assert needed(backward=True) < needed(backward=True, check=True) < 10 * weights


def test_a_wrong_kernel_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, path = ops.unpermute, tmp_path / "rows.json"
    monkeypatch.setattr(ops, "unpermute", lambda *args: right(*args) + 0.1)
    assert exit_code(*QUICK, "--check", "--no-baselines", "--json", str(path)) == 1
    out = capsys.readouterr().out
    failed = [line for line in out.splitlines() if line.startswith("FAILED: ")]
    assert len(failed) == 2 and all("unpermute" in line and "allowed is" in line for line in failed)
    assert "all results" not in out
    content = json.loads(path.read_text())
    assert len(content["mismatches"]) == 2
    assert [row["shape"].rsplit(" ", 1)[1] for row in content["rows"]].count("unpermute") == 0
    assert exit_code(*QUICK, "--no-baselines", "--kernels", "unpermute") == 0  # nobody asked


@pytest.mark.parametrize("kind", ["fails", "differs"])
def test_a_wrong_baseline_is_said_and_the_others_go_on(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, path = baselines.unpermute, tmp_path / "rows.json"

    def wrong(rows: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        return right(rows, *args)[0 if kind == "differs" else "first"]

    monkeypatch.setattr(baselines, "unpermute", wrong)
    options = (*QUICK, "--dtype", "float32", "--json", str(path), "--kernels", "permute", "unpermute")
    assert exit_code(*options, "--check") == 1
    out = capsys.readouterr().out
    cells = {
        line.split()[0]: line.split()[-1] for line in out.splitlines() if line.startswith(("permute", "unpermute"))
    }
    assert cells["unpermute"] == kind and float(cells["permute"]) > 0
    failed = [line for line in out.splitlines() if line.startswith("FAILED: ")]
    assert len(failed) == 2 and all(f"unpermute, {n} tokens" in line for n, line in zip((1, 5), failed, strict=True))
    assert all(f"torch eager {kind}: " in line for line in failed) and "all results" not in out
    content = json.loads(path.read_text())
    assert content["mismatches"] == [line.removeprefix("FAILED: ") for line in failed]
    assert [row["failures"] != {} for row in content["rows"]] == [False, True] * 2
    assert exit_code("bench", "--from", str(path)) == 0 and kind in capsys.readouterr().out
    assert exit_code(*options) == (1 if kind == "differs" else 0)


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    assert exit_code(*QUICK, "--plot", str(path), "--kernels", "up", "layer") == 0
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_saved_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`--from` prints the table of the run, and draws the same picture."""
    pytest.importorskip("matplotlib")
    rows, first, again = tmp_path / "rows.json", tmp_path / "first.svg", tmp_path / "again.svg"
    assert exit_code(*QUICK, "--backward", "--json", str(rows), "--plot", str(first)) == 0
    lines = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(bench, "measure_roofs", None)
    assert exit_code("bench", "--from", str(rows), "--plot", str(again)) == 0
    found = capsys.readouterr().out.splitlines()
    assert found[0].split(None, 1) == ["layer", "24x16, 2 of 6"] and found[1:] == lines[1:]
    assert again.read_bytes() == first.read_bytes() and first.read_bytes().startswith(b"<?xml")


def test_rows_of_several_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row(name, 1, "uniform", "float32", 1.0, 1.0, 1.0, 0.5) for name in ("a up", "a layer with routing", "b up")]
    path = tmp_path / "rows.json"
    path.write_text(record(rows, ROOFS, {}, ""))
    assert exit_code("bench", "--from", str(path)) == 2
    assert capsys.readouterr().err == "moekernels: error: rows of one layer are wanted, got those of a, b\n"
    path.write_text(record(rows[:2], ROOFS, {}, ""))
    assert exit_code("bench", "--from", str(path)) == 0


def test_plot_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert exit_code(*QUICK, "--plot", str(tmp_path / "plot.png")) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "pip install 'moekernels[plot]'" in captured.err and captured.err.count("\n") == 1


def test_models() -> None:
    assert bench.resolve_shape(build_parser().parse_args(["bench"])) == OLMOE
    for shape in REAL_LAYERS:
        assert bench.resolve_shape(build_parser().parse_args(["bench", "--model", shape.name])) == shape


def test_given_sizes_replace_those_of_the_model() -> None:
    def shape(*options: str):  # type: ignore[no-untyped-def]
        return bench.resolve_shape(build_parser().parse_args(["bench", "--model", "nllb-moe-54b", *options]))

    given = shape("--experts", "4", "--gated", "--no-bias", "--activation", "silu")
    assert (given.num_experts, given.hidden_size, given.gated, given.bias) == (4, 2048, True, False)
    assert (given.activation, given.scoring, given.name) == ("silu", "top2_gate", "2048x8192, 2 of 4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "gpt-5"), "invalid choice: 'gpt-5'"),
        (("--top-k", "65"), "--top-k 65: there are 64 experts"),
        (("--model", "phi-3.5-moe", "--top-k", "3"), "phi-3.5-moe routes by sparsemixer, which chooses 2 experts"),
        (("--hidden-size", "0"), "--hidden-size must be a positive integer, got 0"),
        (("--tokens", "1", "-3"), "--tokens must be a positive integer, got -3"),
        (("--tokens", "1000000000"), "olmoe-1b-7b with 1000000000 tokens in bfloat16 takes about"),
        (("--hidden-size", "99999999"), "GiB are free on cpu"),
        (("--threads", "0"), "--threads must be a positive integer, got 0"),
        (("--budget", "nan"), "--budget must be greater than 0"),
        (("--device", "cuda"), "no CUDA device"),
        (("--device", "toaster"), "--device must be"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--kernels", "softmax"), "invalid choice: 'softmax'"),
        (("--from", "no-such.json"), "No such file or directory: 'no-such.json'"),
        (("--from", "rows.json", "--check"), "--from measures nothing"),
        (("--json", "no/such/place.json"), "--json: there is no directory 'no/such'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_errors_are_one_line(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert exit_code("bench", *options) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("moekernels: error: ") and message in captured.err
    assert captured.err.count("\n") == 1, captured.err
