"""`--expert-memory` of the commands, and `moekernels repack`."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from moekernels import NllbMoeConfig, NllbMoeForConditionalGeneration
from moekernels.cli import main
from moekernels.tokenizers import AutoTokenizer
from tests.pipelines import checkpoints
from tests.tokenizers.sentencepiece_builders import TEXTS, nllb

LINE = re.compile(r"^experts: \d+ of \d+ in memory \(.* GiB\); \d+ hits, [1-9]\d* misses \(.* % hits\); .* waited$")


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.olmoe(tmp_path_factory.mktemp("olmoe"))


@pytest.fixture(scope="module")
def nllb_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = nllb(tmp_path_factory.mktemp("nllb-moe"), fast=False)
    config = NllbMoeConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(path)),
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_experts=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        init_std=0.4,
    )
    NllbMoeForConditionalGeneration(config).save_pretrained(path)
    return path


def outputs(capsys: pytest.CaptureFixture[str], *command: str, stdin: str = "") -> tuple[str, list[str]]:
    """What a command prints, and its last lines on stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO(stdin))
        assert main([*command, "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err.splitlines()[-1:]


@pytest.mark.parametrize("command", ["generate", "chat", "run"])
def test_same_text(command: str, olmoe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [command, "--model", str(olmoe), "--max-new-tokens", "5"]
    if command == "generate":
        options += ["--prompt", TEXTS[1]]
    if command == "run":
        options += ["--task", "text-generation", "--no-do-sample"]
    stdin = "" if command == "generate" else f"{TEXTS[1]}\n"
    expected, _ = outputs(capsys, *options, stdin=stdin)
    printed, last = outputs(capsys, *options, "--expert-memory", "16KiB", stdin=stdin)
    assert printed == expected
    assert LINE.match(last[0]), last


def test_translate_after_repack(nllb_moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--src-lang", "eng_Latn", "--tgt-lang", "fra_Latn", "--max-new-tokens", "6", "--num-beams", "2"]
    stdin = "\n".join(TEXTS[:3])
    expected, _ = outputs(capsys, "translate", "--model", str(nllb_moe), *options, stdin=stdin)
    assert main(["repack", "--model", str(nllb_moe), "--output", str(tmp_path / "packed")]) == 0
    assert "wrote" in capsys.readouterr().err
    command = ("translate", "--model", str(tmp_path / "packed"), *options, "--expert-memory", "auto")
    printed, last = outputs(capsys, *command, stdin=stdin)
    assert printed == expected
    assert LINE.match(last[0]), last


def test_a_budget_that_is_too_small(olmoe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", str(olmoe), "--prompt", TEXTS[1], "--expert-memory", "1KB", "--device", "cpu"]
    assert main(command) == 2
    assert re.search(
        r"error: expert_memory: expert 0 of .* takes \d+ bytes, and the budget is 1000", capsys.readouterr().err
    )
