"""`moekernels chat` over a pipe, and in a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moekernels import AutoModelForCausalLM, AutoTokenizer
from moekernels.cli import main
from moekernels.cli.chat import Conversation
from tests.pipelines import checkpoints


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.olmoe(tmp_path_factory.mktemp("olmoe"))


@pytest.fixture
def conversation(directory: Path) -> Conversation:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    return Conversation(model, tokenizer, {"max_new_tokens": 9, "do_sample": False})


def chat(directory: Path, *args: str) -> int:
    return main(["chat", "--model", str(directory), "--device", "cpu", "--max-new-tokens", "9", *args])


def answers(directory: Path, *messages: str, system: str | None = None) -> list[str]:
    """What the model says to messages, one after the other."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    said = [] if system is None else [{"role": "system", "content": system}]
    for message in messages:
        said.append({"role": "user", "content": message})
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt")
        new = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
        said.append({"role": "assistant", "content": tokenizer.decode(new, skip_special_tokens=True)})
    return [message["content"] for message in said if message["role"] == "assistant"]


def test_a_conversation(directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = "Hello,,And then?,/reset,Hello,/system Be kind.,Hello,/system,Hello,/exit,never read"
    monkeypatch.setattr("sys.stdin", io.StringIO(script.replace(",", "\n")))
    assert chat(directory, "--system", "Be brief.") == 0
    brief = answers(directory, "Hello", "And then?", system="Be brief.")
    expected = [*brief, brief[0], *answers(directory, "Hello", system="Be kind."), *answers(directory, "Hello")]
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{answer}\n" for answer in expected)
    assert len(set(expected)) == 4
    assert re.fullmatch(r"loaded .* on cpu\n", captured.err)


def test_options(directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    drawn = ("--temperature", "2", "--seed", "1")
    for options in (drawn, drawn, ("--temperature", "0")):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/help\n/frobnicate\n"))
        assert chat(directory, *options) == 0
        captured = capsys.readouterr()
        outputs.append(captured.out)
        assert "/system TEXT" in captured.err and "no such command: /frobnicate" in captured.err
    assert outputs[0] == outputs[1] != outputs[2] == answers(directory, "Hello")[0] + "\n"


def test_a_terminal(directory: Path) -> None:
    keyboard, terminal = pty.openpty()
    command = [sys.executable, "-m", "moekernels", "chat", "--model", str(directory), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdin": terminal, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*command, "--max-new-tokens", "9"], **pipes, env=environment)
    # Too long a message is an error that does not end the conversation; end of input does.
    os.write(keyboard, b"Hello\n" + b"too " * 200 + b"\nHello\n\x04")
    out, err = process.communicate(timeout=120)
    os.close(keyboard)
    os.close(terminal)
    assert process.returncode == 0, err
    first, second = answers(directory, "Hello", "Hello")
    text = out.decode().replace("\r\n", "\n")
    assert text.startswith(f"> {first}\n> ") and f"> {second}\n> " in text, text
    assert re.search(rb"error: the message has \d+ tokens, and with --max-new-tokens 9 there is room for 247", err)


def test_a_conversation_that_becomes_too_long(conversation: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    conversation.begin("Be brief.")
    text = "a b c d e f g " * 4
    for _ in range(8):
        conversation.answer(text)
    assert "its beginning is forgotten" in capsys.readouterr().err
    messages = conversation.messages
    assert [message["role"] for message in messages[:3]] == ["system", "user", "assistant"] and len(messages) < 17
    ids = conversation.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
    assert len(ids) + 9 <= conversation.model.config.max_position_embeddings
    before = list(messages)
    with pytest.raises(ValueError, match="there is room for 247"):
        conversation.answer("too " * 200)
    assert conversation.messages == before


def test_an_answer_cut_short(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(*, streamer: Any, **kwargs: Any) -> None:
        streamer.put(torch.zeros(1, 3, dtype=torch.long))
        streamer.put(torch.tensor(conversation.tokenizer("one two", add_special_tokens=False).input_ids))
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation.model, "generate", generate)
    assert conversation.answer("Hello") == "one two" and capsys.readouterr().out == "one two\n"
    assert conversation.messages[-1] == {"role": "assistant", "content": "one two"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--temperature", "0", "--top-k", "3"), "--top-k cannot apply"),
        (("--top-p", "1.5"), "top_p must be between 0 and 1"),
        (("--max-new-tokens", "300"), "there is room for 0"),
    ],
)
def test_errors(
    directory: Path,
    args: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))
    assert chat(directory, *args) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("moekernels: error: ") and message in last


def test_a_model_that_does_not_chat(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    assert chat(tmp_path) == 2
    assert "has no chat template; `moekernels generate` continues texts with it" in capsys.readouterr().err
