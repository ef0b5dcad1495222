"""`moekernels translate` on a tiny NLLB-style checkpoint."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moekernels.cli import main
from moekernels.models import AutoModelForSeq2SeqLM
from moekernels.tokenizers import AutoTokenizer
from tests.tokenizers.sentencepiece_builders import TEXTS, nllb, t5


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = nllb(tmp_path_factory.mktemp("translator"), fast=False)
    config = transformers.M2M100Config(
        vocab_size=len(AutoTokenizer.from_pretrained(path)),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.M2M100ForConditionalGeneration(config)
    # Numbers and tokens of our own: the translations are the same whatever version of transformers writes them.
    torch.manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.4)
    model.generation_config.max_length = 14
    model.generation_config.num_beams = 3
    model.save_pretrained(path)
    return path


def translate(directory: Path, *args: str) -> int:
    languages = ("--src-lang", "eng_Latn", "--tgt-lang", "fra_Latn")
    return main(["translate", "--model", str(directory), "--device", "cpu", *languages, *args])


def expected(directory: Path, sentences: list[str], **kwargs: Any) -> list[str]:
    """Each sentence by itself."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, src_lang="eng_Latn")
    model = AutoModelForSeq2SeqLM.from_pretrained(directory)
    target = tokenizer.get_lang_id("fra_Latn")
    texts = []
    for sentence in sentences:
        inputs = tokenizer(sentence, return_tensors="pt")
        ids = model.generate(**inputs, forced_bos_token_id=target, **kwargs)
        texts.append(" ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split()))
    return texts


def test_lines_stay_in_order(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentences = TEXTS[:7]
    assert len({len(sentence) for sentence in sentences}) > 3
    (tmp_path / "in.txt").write_text("\n".join([*sentences[:3], "", "  \t", *sentences[3:]]) + "\n", encoding="utf-8")
    assert translate(directory, str(tmp_path / "in.txt"), "--batch-size", "2") == 0
    captured = capsys.readouterr()
    translations = expected(directory, sentences)
    assert len(set(translations)) > 3
    assert captured.out.split("\n") == [*translations[:3], "", "", *translations[3:], ""]
    assert "9 lines in" in captured.err and "tokens/s on cpu" in captured.err and "Translating" not in captured.err


def test_stdin_to_a_file(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TEXTS[0]}\r\n\r\n{TEXTS[1]}"))
    output = tmp_path / "out.txt"
    options = ("--output", str(output), "--num-beams", "1", "--max-new-tokens", "6", "--dtype", "float32")
    assert translate(directory, *options) == 0
    first, second = expected(directory, TEXTS[:2], num_beams=1, max_new_tokens=6)
    assert output.read_text(encoding="utf-8") == f"{first}\n\n{second}\n"
    assert capsys.readouterr().out == ""


def test_a_file_may_be_overwritten(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXTS[2], encoding="utf-8")
    assert translate(directory, str(path), "--output", str(path)) == 0
    assert path.read_text(encoding="utf-8").splitlines() == expected(directory, TEXTS[2:3])


def test_an_empty_file(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("")
    assert translate(directory, str(tmp_path / "empty")) == 0
    assert capsys.readouterr().out == ""


def test_a_progress_bar_on_a_terminal(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    (tmp_path / "in.txt").write_text(f"{TEXTS[0]}\n\n{TEXTS[1]}\n", encoding="utf-8")
    assert translate(directory, str(tmp_path / "in.txt")) == 0
    captured = capsys.readouterr()
    assert "Translating: 100%" in captured.err and "3/3" in captured.err and "Translating" not in captured.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--src-lang", "eng_Latin"), "unknown language code 'eng_Latin': did you mean eng_Latn"),
        (("--tgt-lang", "fr"), "unknown language code 'fr'"),
        (("--batch-size", "0"), "--batch-size must be a positive integer, got 0"),
        (("--num-beams", "0"), "num_beams must be a positive integer, got 0"),
        (("--device", "toaster"), "--device must be auto, cpu or cuda"),
        (("no-such-file",), "no-such-file"),
        (("latin-1", "--errors", "stop"), "latin-1, line 1: not UTF-8: byte 0xe9 at 1"),
        (("--errors", "stop", "-"), "stdin, line 1: not UTF-8: byte 0xe9 at 3"),
        (("--output", "no/such/directory"), "no/such/directory"),
    ],
)
def test_errors_are_one_line(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = "é".encode("latin-1") if "-" in args else b"sentence"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a " + broken)))
    (tmp_path / "latin-1").write_bytes("é".encode("latin-1"))
    assert translate(directory, *args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moekernels: error: ") and message in captured.err
    assert captured.err.count("\n") == 1, captured.err


def test_a_tokenizer_without_languages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert translate(t5(tmp_path)) == 2
    assert "does not translate: its tokenizer, T5Tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["a file", "stdin", "stdin in the C locale"])
@pytest.mark.parametrize("errors", ["skip", "replace"])
def test_a_line_that_is_not_utf8(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    errors: str,
    source: str,
) -> None:
    """It is reported by its number, the others are translated, and the exit code tells."""
    good, broken = [text.encode() for text in TEXTS[:4]], b"caf\xe9 noir"
    data = b"\xef\xbb\xbf" + b"\n".join([*good[:2], broken, good[2], b"", b"\xff", good[3]]) + b"\n"
    arguments = ["--errors", errors] if errors == "replace" else []
    if source == "a file":
        (tmp_path / "in.txt").write_bytes(data)
        arguments.append(str(tmp_path / "in.txt"))
    else:
        how = "surrogateescape" if "locale" in source else "strict"
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors=how))
    output = tmp_path / "out.txt"
    assert translate(directory, *arguments, "--output", str(output), "--batch-size", "2") == 1
    first, second, third, fourth = expected(directory, TEXTS[:4])
    instead = ["", ""] if errors == "skip" else expected(directory, ["caf\ufffd noir", "\ufffd"])
    lines = [first, second, instead[0], third, "", instead[1], fourth]
    assert output.read_text(encoding="utf-8") == "".join(f"{line}\n" for line in lines)
    err = capsys.readouterr().err
    name = str(tmp_path / "in.txt") if source == "a file" else "stdin"
    done = "left blank" if errors == "skip" else "replaced"
    assert f"moekernels: {name}, line 3: not UTF-8: byte 0xe9 at 4; {done}\n" in err
    assert f"moekernels: {name}, line 6: not UTF-8: byte 0xff at 1; {done}\n" in err
    assert "7 lines in" in err and err.count("not UTF-8") == 2
