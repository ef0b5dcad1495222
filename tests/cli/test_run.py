"""`moekernels run`, against the pipelines it runs."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import pytest

from moekernels import pipeline
from moekernels.cli import main
from tests.pipelines import checkpoints
from tests.tokenizers.sentencepiece_builders import TEXTS, m2m_100

LINES = [TEXTS[1], TEXTS[4], "", TEXTS[0]]


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.switch(tmp_path_factory.mktemp("switch"))


@pytest.fixture(scope="module")
def m2m100(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.m2m100(tmp_path_factory.mktemp("m2m100"))


def run(task: str, directory: Path, *args: str) -> int:
    return main(["run", "--task", task, "--model", str(directory), "--device", "cpu", *args])


def test_standard_input(switch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = pipeline("text2text-generation", switch, device="cpu")
    expected = [pipe(line, max_new_tokens=8) if line else [] for line in LINES]
    for options in ((), ("--batch-size", "3")):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(LINES) + "\n"))
        assert run("text2text-generation", switch, "--max-new-tokens", "8", *options) == 0
        captured = capsys.readouterr()
        assert [ast.literal_eval(line) for line in captured.out.splitlines()] == expected
        assert captured.err == ""
    assert set(expected[0][0]) == {"generated_text"}


def test_files_and_json(m2m100: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = pipeline("translation_en_to_fr", m2m100, device="cpu")
    options = {"num_beams": 2, "num_return_sequences": 2}
    expected = [pipe(line, **options) if line else [] for line in LINES]
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    args = ("--num-beams", "2", "--num-return-sequences", "2", "--json", str(path), "--output", str(path))
    assert run("translation", m2m100, "--src-lang", "en", "--tgt-lang", "fr", *args) == 0
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == expected
    assert capsys.readouterr().out == ""


def test_a_tokenizer_from_elsewhere(
    m2m100: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / name).symlink_to(m2m100 / name)
    (tmp_path / "tokenizer").mkdir()
    m2m_100(tmp_path / "tokenizer")
    outputs = []
    for directory, more in ((m2m100, ()), (tmp_path, ("--tokenizer", str(tmp_path / "tokenizer")))):
        monkeypatch.setattr("sys.stdin", io.StringIO(LINES[0]))
        assert run("translation_en_to_fr", directory, *more) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != ""


@pytest.mark.parametrize(
    ("task", "args", "message"),
    [
        ("fill-mask", (), "task must be one of text-generation"),
        ("text-generation", (), "no such model for SwitchTransformersConfig"),
        ("text2text-generation", ("--num-beams", "0"), "num_beams must be a positive integer"),
        ("text2text-generation", ("--batch-size", "0"), "batch_size must be a positive integer, got 0"),
        ("text2text-generation", ("--src-lang", "en"), "src_lang"),
        ("text2text-generation", ("no-such-file",), "no-such-file"),
        ("text-classification", ("--num-beams", "2"), "--num-beams cannot apply"),
    ],
)
def test_errors_are_one_line(
    switch: Path,
    task: str,
    args: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a line"))
    assert run(task, switch, *args) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured
    assert captured.err.startswith("moekernels: error: ") and message in captured.err
