"""The examples of the PhiMoE documentation page that use a pipeline. Only imports and the checkpoint's path differ."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import transformers

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")


def test_how_to_use_phimoe(phi_3_5_moe_instruct: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moekernels import AutoModelForCausalLM, AutoTokenizer, pipeline

    torch.random.manual_seed(0)

    model = AutoModelForCausalLM.from_pretrained(
        phi_3_5_moe_instruct,
        device_map="auto",
        dtype="auto",
    )

    tokenizer = AutoTokenizer.from_pretrained(phi_3_5_moe_instruct)

    messages = [
        {"role": "system", "content": "You are a helpful AI assistant."},
        {"role": "user", "content": "Can you provide ways to eat combinations of bananas and dragonfruits?"},
        {
            "role": "assistant",
            "content": "Sure! Here are some ways to eat bananas and dragonfruits together: 1. Banana and dragonfruit "
            "smoothie: Blend bananas and dragonfruits together with some milk and honey. 2. Banana and dragonfruit "
            "salad: Mix sliced bananas and dragonfruits together with some lemon juice and honey.",
        },
        {"role": "user", "content": "What about solving an 2x + 3 = 7 equation?"},
    ]

    pipe = pipeline(
        "text-generation",
        model=model,
        tokenizer=tokenizer,
    )

    generation_args = {
        "max_new_tokens": 500,
        "return_full_text": False,
        "temperature": 0.0,
        "do_sample": False,
    }

    with pytest.warns(UserWarning, match=r"no effect with the others given: temperature=0\.0"):
        output = pipe(messages, **generation_args)
    print(output[0]["generated_text"])

    assert len(output) == 1 and list(output[0]) == ["generated_text"]
    assert capsys.readouterr().out == output[0]["generated_text"] + "\n"
    assert model.dtype == torch.bfloat16

    # transformers is asked in float32, where no rounding decides between two tokens, and for less.
    generation_args = {"max_new_tokens": 60, "return_full_text": False, "do_sample": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(phi_3_5_moe_instruct, dtype=torch.float32)
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(phi_3_5_moe_instruct)
        their_pipe = transformers.pipeline("text-generation", model=theirs, tokenizer=their_tokenizer)
        expected = their_pipe(messages, **generation_args)
    model.float()
    assert pipe(messages, **generation_args) == expected
