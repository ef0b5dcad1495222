"""Our NLLB-MoE and Switch with our loop, against transformers on the same checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from moekernels.models import AutoModelForSeq2SeqLM
from tests.generation.adapter import VOCAB

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "nllb-moe": (
        "NllbMoe",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "num_experts": 4,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "init_std": 0.3,
            "tie_word_embeddings": False,
        },
    ),
    "switch": (
        "SwitchTransformers",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_heads": 4,
            "num_experts": 4,
            "expert_capacity": 3,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": False,
            "initializer_factor": 1.5,
        },
    ),
}


@pytest.fixture(scope="module", params=TINY)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    prefix, fields = TINY[request.param]
    torch.manual_seed(5)
    config = getattr(transformers, f"{prefix}Config")(**fields)
    theirs = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    directory = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory)
    return AutoModelForSeq2SeqLM.from_pretrained(directory, progress=False), theirs


def sources(model: Any) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(8))
    ids[1, 5:] = ids[2, 4:] = model.config.pad_token_id
    return ids


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_cache": False},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 3, "early_stopping": True, "eos_token_id": list(range(1, 12)), "length_penalty": 0.6},
        {"num_beams": 3, "no_repeat_ngram_size": 2, "forced_bos_token_id": 9, "min_new_tokens": 6},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "greedy",
)
def test_tokens(models: tuple[Any, Any], kwargs: dict[str, Any]) -> None:
    ours, theirs = models
    ids = sources(ours)
    got = ours.generate(ids, max_new_tokens=16, **kwargs)
    assert torch.equal(got, theirs.generate(ids, max_new_tokens=16, **kwargs))
    assert got[:, 1:].unique().numel() > 4


@pytest.mark.parametrize("helper", ["assistant_model", "prompt_lookup_num_tokens"])
def test_assisted(models: tuple[Any, Any], helper: str) -> None:
    """Switch has room for three tokens per expert here: no run is longer, or else tokens would be left out."""
    ours, theirs = models
    ids = sources(ours)[1:2]
    helped = {helper: ours if helper == "assistant_model" else 3}
    expected = theirs.generate(ids, max_new_tokens=24)
    assert torch.equal(ours.generate(ids, max_new_tokens=24, assistant_confidence_threshold=0.0, **helped), expected)
