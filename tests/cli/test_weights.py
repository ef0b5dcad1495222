"""`--weights` of the commands that load a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moekernels import AutoModelForCausalLM, AutoTokenizer, pipeline
from moekernels.cli import main
from tests.pipelines import checkpoints

INT8 = {"quantization_config": {"format": "int8"}}
TEXT = "Модель выбирает экспертов"


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = checkpoints.olmoe(tmp_path)
    arguments = ["--prompt", TEXT, "--temperature", "0", "--max-new-tokens", "12", "--no-stream", "--device", "cpu"]
    assert main(["generate", "--model", str(directory), "--weights", "int8", *arguments]) == 0
    captured = capsys.readouterr()
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory, **INT8)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert captured.out == tokenizer.decode(new, skip_special_tokens=True) + "\n"
    assert "M weights, int8 on cpu" in captured.err


def test_run_and_translate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = checkpoints.m2m100(tmp_path)
    (tmp_path / "text").write_text(TEXT)
    languages = ["--src-lang", "en", "--tgt-lang", "fr"]
    options = ["--model", str(directory), "--weights", "int8", "--device", "cpu", str(tmp_path / "text")]
    assert main(["run", "--task", "translation", "--json", *languages, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = pipeline("translation_en_to_fr", directory, device="cpu", model_kwargs=INT8)(TEXT)
    assert found == expected
    assert main(["translate", *languages, *options]) == 0
    assert capsys.readouterr().out.split() == expected[0]["translation_text"].split()


def test_activations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = checkpoints.olmoe(tmp_path)
    arguments = ["--prompt", TEXT, "--temperature", "0", "--max-new-tokens", "4", "--no-stream", "--device", "cpu"]
    options = ["--model", str(directory), "--activations", "int8"]
    assert main(["generate", *options, "--weights", "int8", *arguments]) == 0
    capsys.readouterr()
    assert main(["generate", *options, "--weights", "nf4", *arguments]) == 2
    assert "--activations int8 goes with --weights int4 or int8, got nf4" in capsys.readouterr().err
    config = {"format": "int8", "activations": "int8"}
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    assert model.model.layers[0].mlp.experts.down_proj.format.activations == "int8"


def test_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--model", "x", "--prompt", "y", "--weights", "int3"])
    assert "argument --weights: invalid choice: 'int3'" in capsys.readouterr().err
