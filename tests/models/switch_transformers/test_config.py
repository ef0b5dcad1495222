"""The configuration, with its quirks on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moekernels.models import (
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from tests.models.switch_checkpoints import HIDDEN, TINY

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")


def test_defaults_and_aliases() -> None:
    ours, theirs = SwitchTransformersConfig(), transformers.SwitchTransformersConfig()
    for name, value in ours.to_dict().items():
        if name not in ("id2label", "label2id", "torch_dtype", "transformers_version"):
            assert value == getattr(theirs, name), name
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "model_type"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert SwitchTransformersConfig(layer_norm_eps=0.5).layer_norm_epsilon == 0.5


@pytest.mark.parametrize(
    "fields",
    [
        {"num_layers": 12, "num_sparse_encoder_layers": 6},
        {"num_layers": 5, "num_sparse_encoder_layers": 3},
        {"num_layers": 3, "num_sparse_encoder_layers": 0},
        {"num_layers": 1, "num_sparse_encoder_layers": 0},
        {"num_layers": 3, "num_sparse_encoder_layers": 5},
        {"num_layers": 4, "encoder_sparse_step": 2},
        {"num_layers": 4, "encoder_sparse_step": 0, "num_decoder_layers": None},
    ],
)
def test_which_layers_are_sparse(fields: dict[str, Any]) -> None:
    fields = {**TINY, **fields}
    with torch.device("meta"):
        ours = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**fields))
        theirs = transformers.SwitchTransformersForConditionalGeneration(
            transformers.SwitchTransformersConfig(**fields)
        )
    for stack in ("encoder", "decoder"):
        kinds = [
            [hasattr(block.layer[-1].mlp, "router") for block in getattr(model, stack).block]
            for model in (ours, theirs)
        ]
        assert kinds[0] == kinds[1]


def test_quirks_of_the_hub(tmp_path: Path) -> None:
    # google/switch-c-2048, in small.
    quirks = {
        "router_type": "tokens_masked",
        "num_selected_experts": 1,
        "feed_forward_proj": "relu",
        "is_gated_act": False,
        "n_positions": 512,
        "num_layers": 3,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 0,
        "num_heads": 3,
        "d_kv": 10,
    }
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **quirks, "model_type": "switch_transformers"}))
    config = SwitchTransformersConfig.from_pretrained(tmp_path)
    for name, value in quirks.items():
        assert getattr(config, name) == value
    config.save_pretrained(tmp_path)
    theirs = transformers.SwitchTransformersConfig.from_pretrained(tmp_path)
    assert (theirs.encoder_sparse_step, theirs.decoder_sparse_step, theirs.router_type) == (1, 0, "tokens_masked")
    model = SwitchTransformersForConditionalGeneration(config)
    assert all(hasattr(block.layer[-1].mlp, "router") for block in model.encoder.block)
    assert model.encoder.block[0].layer[0].SelfAttention.q.weight.shape == (30, HIDDEN)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_capacity": 0}, "expert_capacity must be a positive integer, got 0"),
        ({"num_experts": 0}, "num_experts must be a positive integer"),
        ({"num_sparse_decoder_layers": -1}, "num_sparse_decoder_layers must be a number of layers, got -1"),
        ({"encoder_sparse_step": -2}, "encoder_sparse_step must be a number of layers, 0 for"),
        ({"router_dtype": "float64"}, "router_dtype must be one of float32, float16, bfloat16, got 'float64'"),
        ({"dropout_rate": 1.5}, "dropout_rate must be a number from 0.0 to 1.0"),
        ({"dense_act_fn": "mish"}, "unknown activation 'mish'"),
        ({"dense_act_fn": "gated-mish"}, "unknown activation 'mish'"),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets must be an integer of at least 4"),
        ({"relative_attention_max_distance": 16}, "relative_attention_max_distance must be an integer above 16"),
        ({"decoder_start_token_id": 40000}, "decoder_start_token_id must be a token id"),
    ],
)
def test_unusable_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SwitchTransformersConfig(**fields)
