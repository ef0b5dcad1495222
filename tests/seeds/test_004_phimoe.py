"""The examples of the PhiMoE documentation page. Only what is imported and the checkpoint's path differ."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import transformers

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")


def test_phimoe_config(phi_3_5_moe_instruct: Path) -> None:
    from moekernels import PhimoeConfig, PhimoeModel

    # Initializing a Phi-3 style configuration
    configuration = PhimoeConfig.from_pretrained(phi_3_5_moe_instruct)
    # Initializing a model from the configuration
    model = PhimoeModel(configuration)
    # Accessing the model configuration
    configuration = model.config

    assert configuration.rope_scaling["type"] == "longrope" and configuration.num_local_experts == 4
    theirs = transformers.PhimoeModel(transformers.PhimoeConfig.from_pretrained(phi_3_5_moe_instruct))
    assert model.num_parameters() == theirs.num_parameters()


def test_phimoe_config_defaults() -> None:
    """What the page says of the defaults: similar to the released model."""
    from moekernels import PhimoeConfig, PhimoeForCausalLM

    # Of the released size; on the meta device it has the same shapes.
    with torch.device("meta"):
        model = PhimoeForCausalLM(PhimoeConfig())
        theirs = transformers.PhimoeForCausalLM(transformers.PhimoeConfig())
    assert model.num_parameters() == sum(tensor.numel() for tensor in theirs.parameters()) > 41e9


def test_phimoe_for_causal_lm(phi_3_5_moe_instruct: Path) -> None:
    from moekernels import AutoTokenizer, PhimoeForCausalLM

    model = PhimoeForCausalLM.from_pretrained(phi_3_5_moe_instruct)
    tokenizer = AutoTokenizer.from_pretrained(phi_3_5_moe_instruct)
    prompt = "Hey, are you conscious? Can you talk to me?"
    inputs = tokenizer(prompt, return_tensors="pt")

    # Generate
    generate_ids = model.generate(inputs.input_ids, max_length=100)
    text = tokenizer.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]

    assert generate_ids.shape[1] > model.config.original_max_position_embeddings
    # transformers is asked in float32, where no rounding decides between two tokens.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.PhimoeForCausalLM.from_pretrained(phi_3_5_moe_instruct, dtype=torch.float32).eval()
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(phi_3_5_moe_instruct)
        expected = theirs.generate(their_tokenizer(prompt, return_tensors="pt").input_ids, max_length=100)
    ours = PhimoeForCausalLM.from_pretrained(phi_3_5_moe_instruct, dtype=torch.float32)
    assert torch.equal(ours.generate(inputs.input_ids, max_length=100), expected)
    assert text.startswith(prompt) and model.dtype == torch.bfloat16


def test_trust_remote_code(phi_3_5_moe_instruct: Path) -> None:
    """The page asks for `trust_remote_code=True`, which is accepted; nothing of a checkpoint is run."""
    from moekernels import AutoModelForCausalLM, PhimoeForCausalLM

    torch.random.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        phi_3_5_moe_instruct, device_map="auto", dtype="auto", trust_remote_code=True
    )
    assert isinstance(model, PhimoeForCausalLM) and model.dtype == torch.bfloat16
