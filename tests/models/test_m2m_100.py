"""What only M2M100 does; what it shares with NLLB-MoE is in test_translation.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from moekernels.models import M2M100Config, M2M100ForConditionalGeneration
from moekernels.models.m2m_100 import M2M100EncoderLayer
from moekernels.models.translation import LayerContext, clamp_float16
from moekernels.nn import AttentionMask
from tests.models.translation_checkpoints import assert_close, batch, pair

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")


@torch.no_grad()
@pytest.mark.parametrize(
    "overrides",
    [
        {"activation_function": "gelu"},
        {"activation_function": "gelu_new"},
        {"activation_function": "silu"},
        {"scale_embedding": False},
        {"d_model": 27, "encoder_attention_heads": 3, "decoder_attention_heads": 1},
        {"pad_token_id": 5},
    ],
    ids=lambda overrides: "-".join(map(str, overrides.values())),
)
def test_variants(tmp_path: Path, overrides: dict) -> None:
    theirs, ours, _ = pair(tmp_path, "m2m_100", **overrides)
    assert_close(ours(**batch()).logits, theirs(**batch()).logits)


@torch.no_grad()
def test_a_real_layer() -> None:
    """The width of m2m100_418M, one layer of either stack, with padding."""
    config = M2M100Config(vocab_size=64, encoder_layers=1, decoder_layers=1)
    ours = M2M100ForConditionalGeneration(config).eval()
    theirs = transformers.M2M100ForConditionalGeneration(
        transformers.M2M100Config(vocab_size=64, encoder_layers=1, decoder_layers=1)
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(3, 64, (3, 33))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask, "decoder_input_ids": ids.flip(0)}
    expected, actual = (model(**inputs, output_hidden_states=True) for model in (theirs, ours))
    for name in ("encoder_hidden_states", "decoder_hidden_states"):
        for mine, other in zip(actual[name], expected[name], strict=True):
            assert_close(mine, other)


def test_float16_stays_finite() -> None:
    values = torch.tensor([60000.0, -65000.0, 1.0])
    assert clamp_float16(values) is values
    half = values.half()
    assert clamp_float16(half).equal(half)
    assert clamp_float16(half, always=True).tolist() == [60000.0, -64512.0, 1.0]
    infinite = torch.tensor([float("inf"), -65000.0, 1.0]).half()
    assert clamp_float16(infinite).tolist() == [64512.0, -64512.0, 1.0]

    layer = M2M100EncoderLayer(M2M100Config(d_model=16, encoder_ffn_dim=8, encoder_attention_heads=2)).half().eval()
    torch.nn.init.constant_(layer.fc2.bias, 65504.0)
    context = LayerContext("eager", AttentionMask())
    hidden = torch.full((1, 2, 16), 65504.0, dtype=torch.float16)
    assert layer(hidden, context)[0].isfinite().all()
