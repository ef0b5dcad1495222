"""The examples of the documentation page of Switch Transformers. Only imports and the checkpoint's path differ."""

from __future__ import annotations

import ast
import contextlib
import os
import shlex
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

#: The page's first GPU, where there is one.
DEVICE = 0 if torch.cuda.is_available() else "cpu"


def expected_warning() -> AbstractContextManager[Any]:
    """What the page's `device=0` gives on a machine without a GPU."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match="device 0 is a GPU, but .*; running on the CPU")


def test_pipeline(switch_base_8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moekernels import pipeline

    with expected_warning():
        pipeline = pipeline(
            task="text2text-generation",
            model=switch_base_8,
            dtype=torch.float16,
            device=0,
        )
    print(pipeline("The capital of France is ."))

    assert [list(record) for record in ast.literal_eval(capsys.readouterr().out)] == [["generated_text"]]
    assert pipeline.dtype == torch.float16
    # In float16 rounding decides between beams.
    theirs = transformers.pipeline("text2text-generation", str(switch_base_8), dtype=torch.float32, device="cpu")
    pipeline.model.float()
    assert pipeline("The capital of France is .") == theirs("The capital of France is .")


def test_command_line(switch_base_8: Path) -> None:
    command = (
        f'echo -e "The capital of France is ." | {shlex.quote(sys.executable)} -m moekernels run '
        f"--task text2text-generation --model {shlex.quote(str(switch_base_8))} --device 0"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    theirs = transformers.pipeline("text2text-generation", str(switch_base_8), device="cpu")
    assert ast.literal_eval(result.stdout) == theirs("The capital of France is .")
    assert torch.cuda.is_available() or result.stderr.startswith("moekernels: warning: device 0 is a GPU, but PyTorch")


def test_automodel(switch_base_8: Path) -> None:
    from moekernels.models import AutoModelForSeq2SeqLM
    from moekernels.tokenizers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(switch_base_8)
    model = AutoModelForSeq2SeqLM.from_pretrained(switch_base_8, device_map="auto", dtype=torch.float16)

    input_text = "The capital of France is ."
    input_ids = tokenizer(input_text, return_tensors="pt").input_ids.to(DEVICE)

    outputs = model.generate(input_ids)
    text = tokenizer.decode(outputs[0])

    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(switch_base_8, dtype=torch.float16).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(switch_base_8)
    expected = theirs.generate(their_tokenizer(input_text, return_tensors="pt").input_ids)
    assert torch.equal(outputs.cpu(), expected)
    assert text == their_tokenizer.decode(expected[0]) and text.startswith("<pad>")


def test_quantization(switch_base_8: Path) -> None:
    from moekernels import AutoModelForSeq2SeqLM, AutoTokenizer, BitsAndBytesConfig
    from moekernels.quantization import QuantizedWeight

    tokenizer = AutoTokenizer.from_pretrained(switch_base_8)
    quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForSeq2SeqLM.from_pretrained(
        switch_base_8, device_map="auto", quantization_config=quantization_config
    )

    input_text = "The capital of France is ."
    input_ids = tokenizer(input_text, return_tensors="pt").input_ids.to(DEVICE)

    outputs = model.generate(input_ids)
    text = tokenizer.decode(outputs[0])

    # Experts and all are in 8 bits, and a whole model with their values says the same.
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(switch_base_8).eval()
    experts = model.encoder.block[1].layer[1].mlp.experts
    assert experts.up_proj.format.name == experts.down_proj.format.name == "int8"
    for layer in theirs.modules():
        if isinstance(layer, torch.nn.Linear) and layer not in _kept(theirs):
            row = layer.weight.detach().half().float().abs().amax(dim=1, keepdim=True)
            layer.weight.data = (layer.weight * (127 / row)).round() * row / 127
    assert sum(isinstance(weight, QuantizedWeight) for weight in model.parameters()) == 64
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(switch_base_8)
    ids = their_tokenizer(input_text, return_tensors="pt").input_ids
    expected = theirs.generate(ids)
    assert torch.equal(outputs.cpu(), expected) and text == their_tokenizer.decode(expected[0])


def _kept(model: Any) -> list[torch.nn.Module]:
    """The head and the routers' classifiers, which stay whole."""
    return [model.lm_head, *(module for name, module in model.named_modules() if name.endswith("classifier"))]


def test_switch_transformers_config() -> None:
    """What the page says of the defaults."""
    from moekernels.models import SwitchTransformersConfig, SwitchTransformersModel

    # Of the released size; on the meta device it has the same shapes.
    with torch.device("meta"):
        model = SwitchTransformersModel(SwitchTransformersConfig())
        theirs = transformers.SwitchTransformersModel(transformers.SwitchTransformersConfig())
    assert model.config.d_kv == model.config.d_model // model.config.num_heads
    assert sum(tensor.numel() for tensor in model.parameters()) == sum(t.numel() for t in theirs.parameters())


def test_sentinel_prompts(switch_base_8: Path) -> None:
    """Masked spans, for which the page's models were trained: source and labels with sentinel tokens."""
    from moekernels.models import SwitchTransformersForConditionalGeneration
    from moekernels.tokenizers import T5Tokenizer

    model = SwitchTransformersForConditionalGeneration.from_pretrained(switch_base_8)
    tokenizer = T5Tokenizer.from_pretrained(switch_base_8)
    source = tokenizer("The <extra_id_0> walks in <extra_id_1> park", return_tensors="pt")
    labels = tokenizer("<extra_id_0> cute dog <extra_id_1> the <extra_id_2>", return_tensors="pt").input_ids
    outputs = model(input_ids=source.input_ids, labels=labels)

    theirs = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(switch_base_8).eval()
    their_tokenizer = transformers.T5Tokenizer.from_pretrained(switch_base_8, legacy=True)
    their_labels = their_tokenizer("<extra_id_0> cute dog <extra_id_1> the <extra_id_2>", return_tensors="pt").input_ids
    assert torch.equal(labels, their_labels)
    expected = theirs(input_ids=source.input_ids, labels=labels, output_router_logits=False)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-5, atol=1e-5)
