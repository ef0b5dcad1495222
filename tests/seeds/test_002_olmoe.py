"""The examples of the OLMoE documentation page. Only what is imported and the checkpoint's path differ.

They run in the checkpoint's bfloat16, or in float16, where rounding decides between tokens; transformers is compared
with in float32.
"""

from __future__ import annotations

import ast
import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.functional import quantize_4bit

from moekernels.quantization import QuantizedWeight
from tests.quantization.bitsandbytes_values import four_bit_values


def expected_warning() -> AbstractContextManager[Any]:
    """What the page's `device=0` gives on a machine without a GPU."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match=r"device 0 is a GPU, but .*; running on the CPU")


def reference(directory: Path, prompt: str, max_length: int) -> tuple[torch.Tensor, str]:
    """What transformers makes of a prompt in float32."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_length=max_length)
    return ids, tokenizer.decode(ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_pipeline(olmoe_1b_7b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moekernels import pipeline

    with expected_warning():
        pipe = pipeline(
            task="text-generation",
            model=olmoe_1b_7b,
            dtype=torch.float16,
            device=0,
        )

    result = pipe("Dionysus is the god of")
    print(result)

    assert ast.literal_eval(capsys.readouterr().out) == result
    assert [list(record) for record in result] == [["generated_text"]]
    assert result[0]["generated_text"].startswith("Dionysus is the god of") and pipe.dtype == torch.float16
    texts = []
    for made in (pipeline, transformers.pipeline):
        pipe = made(task="text-generation", model=str(olmoe_1b_7b), dtype=torch.float32, device="cpu")
        torch.manual_seed(3)
        texts.append(pipe("Dionysus is the god of", max_new_tokens=40))
    assert texts[0] == texts[1]


def test_automodel(olmoe_1b_7b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moekernels import AutoModelForCausalLM, AutoTokenizer, infer_device

    device = infer_device()

    model = AutoModelForCausalLM.from_pretrained(
        olmoe_1b_7b, attn_implementation="sdpa", dtype="auto", device_map="auto"
    ).to(device)
    tokenizer = AutoTokenizer.from_pretrained(olmoe_1b_7b)

    inputs = tokenizer("Bitcoin is", return_tensors="pt")
    inputs = {k: v.to(device) for k, v in inputs.items()}
    output = model.generate(**inputs, max_length=64)
    print(tokenizer.decode(output[0]))

    assert capsys.readouterr().out.startswith("Bitcoin is") and model.dtype == torch.bfloat16
    expected, _ = reference(olmoe_1b_7b, "Bitcoin is", max_length=64)
    assert torch.equal(model.float().generate(**inputs, max_length=64).cpu(), expected)


def test_quantization(olmoe_1b_7b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moekernels import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, infer_device

    device = infer_device()

    quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
    )

    model = AutoModelForCausalLM.from_pretrained(
        olmoe_1b_7b,
        attn_implementation="sdpa",
        dtype="auto",
        device_map="auto",
        quantization_config=quantization_config,
    ).to(device)
    tokenizer = AutoTokenizer.from_pretrained(olmoe_1b_7b)

    inputs = tokenizer("Bitcoin is", return_tensors="pt")
    inputs = {k: v.to(device) for k, v in inputs.items()}
    output = model.generate(**inputs, max_length=64)
    print(tokenizer.decode(output[0]))

    assert capsys.readouterr().out.startswith("Bitcoin is") and output.shape[1] <= 64
    assert model.dtype == torch.bfloat16
    # Attention and experts have the values of bitsandbytes, and compute with them in float16.
    whole = AutoModelForCausalLM.from_pretrained(olmoe_1b_7b, dtype=torch.float32).to(device)
    quantized = [name for name, weight in model.named_parameters() if isinstance(weight, QuantizedWeight)]
    assert len(quantized) == 2 * (4 + 2) and all("self_attn" in name or "experts" in name for name in quantized)
    for name in quantized:
        weight, values = model.get_parameter(name), whole.get_parameter(name)
        assert weight.dtype == torch.float16
        for matrix in values.unbind() if values.ndim == 3 else [values]:
            # The scales of gates and values, which are one stack here, are too few to be quantised.
            options = {"quant_type": "nf4", "compress_statistics": "gate_up" not in name}
            matrix.data.copy_(four_bit_values(*quantize_4bit(matrix.detach().cpu(), **options)))
        torch.testing.assert_close(weight.dequantize(torch.float32), values.detach(), atol=1e-6, rtol=1e-6)
    expected = whole(**inputs).logits
    torch.testing.assert_close(
        model(**inputs).logits.float(), expected, atol=0.02 * expected.abs().max().item(), rtol=0
    )


def test_olmoe_config() -> None:
    from moekernels import OlmoeConfig, OlmoeModel

    # A model of the released size takes 14 GB and minutes to fill; on the meta device it has the same shapes.
    with torch.device("meta"):
        # Initializing a OLMoE 7B A1B style configuration
        configuration = OlmoeConfig()

        # Initializing a model from the OLMoE 7B A1B style configuration
        model = OlmoeModel(configuration)

        # Accessing the model configuration
        configuration = model.config

        theirs = transformers.OlmoeModel(transformers.OlmoeConfig())
    assert (configuration.num_experts, configuration.num_experts_per_tok) == (64, 8)
    assert model.num_parameters() == sum(tensor.numel() for tensor in theirs.parameters())


def test_olmoe_for_causal_lm(olmoe_1b_7b: Path) -> None:
    from moekernels import AutoTokenizer, OlmoeForCausalLM

    model = OlmoeForCausalLM.from_pretrained(olmoe_1b_7b)
    tokenizer = AutoTokenizer.from_pretrained(olmoe_1b_7b)

    prompt = "Hey, are you conscious? Can you talk to me?"
    inputs = tokenizer(prompt, return_tensors="pt")

    # Generate
    generate_ids = model.generate(inputs.input_ids, max_length=30)
    text = tokenizer.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
    assert text.startswith(prompt[:20]) and generate_ids.shape[1] == 30

    expected, expected_text = reference(olmoe_1b_7b, prompt, max_length=30)
    ids = model.float().generate(inputs.input_ids, max_length=30)
    assert torch.equal(ids, expected)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0] == expected_text
