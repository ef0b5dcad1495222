"""The command as a user runs it: in a process of its own, or by its entry point where only messages matter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moekernels import __version__, build_info
from moekernels.cli import main
from moekernels.cli.checks import LayerCheck
from moekernels.demo.corpus import Corpus
from moekernels.demo.learners import LEARNERS
from moekernels.demo.numbers import LANGUAGES
from moekernels.models import AutoModelForCausalLM
from moekernels.tokenizers import AutoTokenizer


def run(*args: str, stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """No network, no cache directories: what a command needs must be in the package."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "moekernels", *args],
        input=stdin,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def exit_code(*args: str) -> int:
    try:
        return main(args)
    except SystemExit as end:  # argparse ends this way
        return int(end.code or 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small OLMoE with new weights, and its tokenizer."""
    directory = tmp_path_factory.mktemp("cli") / "checkpoint"
    torch.manual_seed(0)
    LEARNERS["olmoe"].create(Corpus()).save(directory)
    return directory


def demo(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """The demo with few numbers and few steps, which learns next to nothing."""
    monkeypatch.setattr("moekernels.cli.demo.Corpus", lambda: Corpus(num_held_out=8))
    return exit_code("demo", "--steps", "3", "--device", "cpu", *options)


def test_demo_that_learns_too_little_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo(monkeypatch, "--keep", str(tmp_path / "kept")) == 1
    text = capsys.readouterr().out
    assert re.search(r"held out +0 of 48 translations are right to the letter \(0\.00%\): FAILED, less than 99%", text)
    assert re.search(r"A CHECK FAILED, \d+\.\d s$", text.strip())
    assert len(re.findall(r"^model\.(?:en|de)coder\.layers\.1\.ffn +0 .* ok$", text, re.MULTILINE)) == 2
    for language in LANGUAGES:
        assert len(re.findall(rf"^(?:en|de)coder 0 +{language}(?: +\d+){{8}}$", text, re.MULTILINE)) == 2
    assert re.search(r"\d+\.\d% of [\d,]+ choices find no place", text)
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert {"config.json", "model.safetensors", "sentencepiece.bpe.model"} <= names
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]  # nothing else was written


def test_demo_of_a_learner_that_knows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        "moekernels.demo.learners.NllbMoeLearner.translate", lambda self, pairs, **options: [p.target for p in pairs]
    )
    assert demo(monkeypatch) == 0
    assert "48 of 48 translations are right to the letter (100.00%)" in (text := capsys.readouterr().out)
    assert re.search(r"all checks passed, \d+\.\d s$", text.strip())

    failed = LayerCheck("model.encoder.layers.1.ffn", misrouted=0, error=1.0, plain_error=0.1, allowed=0.2)
    monkeypatch.setattr("moekernels.cli.demo.check_layers", lambda model, inputs: [failed])
    assert demo(monkeypatch) == 1
    assert "A CHECK FAILED" in (text := capsys.readouterr().out) and "all checks passed" not in text


def test_generate(checkpoint: Path) -> None:
    directory = checkpoint
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    prompt = "eng_Latnfour hundred"
    inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs.input_ids.shape[1]
    expected = tokenizer.decode(model.generate(**inputs, max_new_tokens=9)[0, length:], skip_special_tokens=True)
    common = ("generate", "--model", str(directory), "--max-new-tokens", "9", "--device", "cpu")
    for more, stdin in ((("--prompt", prompt), ""), (("--no-stream",), prompt)):
        result = run(*common, *more, stdin=stdin)
        assert result.returncode == 0, result.stderr
        assert result.stdout == expected + "\n"
        assert re.search(rf"prefill {length} tokens, [\d.]+ tokens/s; decode 8 tokens, [\d.]+ tokens/s", result.stderr)
        assert "warning" not in result.stderr


def test_generate_samples(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*options: str) -> str:
        command = (
            "generate",
            "--model",
            str(checkpoint),
            "--prompt",
            "eng_Latnfour",
            "--max-new-tokens",
            "12",
            "--device",
            "cpu",
        )
        assert exit_code(*command, *options) == 0
        return capsys.readouterr().out

    sampling = ("--temperature", "1.5", "--top-k", "0", "--min-p", "0.01", "--seed")
    assert text(*sampling, "1") == text(*sampling, "1") != text(*sampling, "2")
    assert text(*sampling, "1", "--no-stream") == text(*sampling, "1")
    greedy = text()
    assert text("--temperature", "0") == greedy == text("--temperature", "0.001", "--seed", "3")
    assert text("--repetition-penalty", "3.0") != greedy
    text("--dtype", "float32", "--attn-implementation", "eager")


def test_info() -> None:
    result = run("info", "--json")
    assert result.returncode == 0, result.stderr
    info = json.loads(result.stdout)
    assert {name: info[name] for name in build_info()} == build_info()
    assert info["devices"][0]["device"] == "cpu" and info["devices"][0]["threads"] >= 1
    text = run("info").stdout
    for expected in (
        __version__,
        info["torch_running"],
        info["cpu_isa"],
        info["cxx_compiler"],
        info["devices"][0]["name"],
    ):
        assert expected in text
    if not info["cuda_archs"]:
        assert f"none: {info['cuda_reason']}" in text


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    def text(*args: str) -> str:
        assert exit_code(*args) == 0
        return capsys.readouterr().out

    top = text("--help")
    for word in ("info", "generate", "chat", "translate", "run", "repack", "demo", "bench", "--version", "examples:"):
        assert word in top
    assert text("--version") == f"moekernels {__version__}\n"
    for command in ("info", "generate", "chat", "translate", "run", "repack", "demo", "bench"):
        assert f"usage: moekernels {command}" in text(command, "--help")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("frobnicate",), "invalid choice: 'frobnicate'"),
        (("generate",), "required: --model"),
        (("generate", "--model", "no/such/place", "--prompt", "a"), "no/such/place"),
        (("generate", "--model", ".", "--prompt", "a"), "no tokenizer in"),
        (("generate", "--model", ".", "--prompt", ""), "there is no prompt"),
        (("repack", "--model", "no/such/place", "--output", "x"), "no/such/place"),
        (("repack", "--model", ".", "--output", "x", "--dtype", "int3"), "dtype must be"),
        (("generate", "--model", ".", "--prompt", "a", "--top-k", "many"), "invalid int value: 'many'"),
        (("generate", "--model", ".", "--prompt", "a", "--device", "toaster"), "--device must be auto, cpu or cuda"),
        (("generate", "--model", ".", "--prompt", "a", "--device", "cuda"), "no CUDA device"),
        (("generate", "--model", ".", "--prompt", "a", "--temperature", "0", "--top-k", "3"), "--top-k cannot apply"),
        (("demo", "--keep", "a-file"), "a-file"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_errors_are_one_line(
    args: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a-file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert exit_code(*args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moekernels: error: ") and message in captured.err
    assert captured.err.count("\n") == 1, captured.err


def test_an_error_in_a_process_of_its_own(tmp_path: Path) -> None:
    result = run("generate", "--model", "no/such/place", "--prompt", "a", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"moekernels: error: no such checkpoint directory: 'no/such/place'.*\n", result.stderr)


def test_a_reader_that_stops_reading() -> None:
    """Whether each line is written at once, or all of them as the command ends."""
    command = f"{sys.executable} -m moekernels info | true; exit ${{PIPESTATUS[0]}}"
    for unbuffered in ("", "1"):
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300, env=environment)
        assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", "-1", "temperature must be greater than 0"),
        ("--top-p", "1.5", "top_p must be between 0 and 1"),
        ("--max-new-tokens", "0", "max_new_tokens must be a positive integer"),
        ("--dtype", "int3", "dtype must be"),
        ("--attn-implementation", "magic", "attn_implementation must be one of sdpa, eager"),
    ],
)
def test_wrong_parameters(
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    message: str,
) -> None:
    assert exit_code("generate", "--model", str(checkpoint), "--prompt", "a", "--device", "cpu", option, value) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("moekernels: error: ") and message in last
