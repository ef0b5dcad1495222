"""Passes, caches, gradients and bad input of whole models against transformers 4.56.2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from moekernels.checkpoint import CheckpointError, checkpoint_tensors
from moekernels.models import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    SwitchTransformersEncoderModel,
    SwitchTransformersForConditionalGeneration,
    SwitchTransformersModel,
)
from moekernels.nn import DynamicCache, EncoderDecoderCache
from tests.models.encoder_decoder import decode_in_pieces
from tests.models.switch_checkpoints import HIDDEN, PAD, VOCAB, Pair, assert_close, batch, pair, reloaded, write
from tests.tolerance import assert_accurate

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")

IMPLEMENTATIONS = ("sdpa", "eager")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "few-places": {"expert_capacity": 3},
    "untied": {"tie_word_embeddings": False},
    "all-sparse": {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 3},
    "no-sparse": {"num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0},
    "step-from-file": {"encoder_sparse_step": 1, "decoder_sparse_step": 0},
    "gelu": {"dense_act_fn": "gelu"},
    "router-bias": {"router_bias": True, "router_dtype": "float32"},
    "as-deep": {"num_decoder_layers": None},
}


def all_close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other)


def sparse_only(router_outputs: tuple[tuple[Tensor, ...], ...]) -> tuple[Tensor, ...]:
    """The logits that transformers 4.56.2 returns, without its entries for dense layers."""
    return tuple(entry[0] for entry in router_outputs if len(entry) == 2)


# --- the forward pass -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_output_agrees(variant: str, tmp_path: Path) -> None:
    theirs, ours, _ = pair(tmp_path, **VARIANTS[variant])
    labels = batch()["decoder_input_ids"].clone()
    labels[1, -2:] = -100
    inputs = {**batch(), "labels": labels, "output_hidden_states": True, "output_attentions": True}
    expected = theirs(**inputs, output_router_logits=variant != "step-from-file")
    for implementation in IMPLEMENTATIONS:
        ours.set_attn_implementation(implementation)
        actual = ours(**inputs, output_router_logits=True)
        all_close((actual.logits, actual.encoder_last_hidden_state), (expected[1], expected.encoder_last_hidden_state))
        for stack in ("encoder", "decoder"):
            all_close(actual[f"{stack}_hidden_states"], expected[f"{stack}_hidden_states"])
            all_close(actual[f"{stack}_attentions"], expected[f"{stack}_attentions"])
            if expected.encoder_router_logits is not None:
                logits = sparse_only(expected[f"{stack}_router_logits"])
                all_close(actual[f"{stack}_router_logits"], logits)
                if ours.config.num_sparse_encoder_layers != 4:
                    assert_close(actual[f"{stack}_z_loss"], expected[f"{stack}_z_loss"])
                # transformers 4.56.2 counts what was dropped as expert 0.
                if variant not in ("few-places", "all-sparse"):
                    assert_close(actual[f"{stack}_aux_loss"], expected[f"{stack}_aux_loss"])
                    assert_close(actual.loss, expected.loss)
        all_close(actual.cross_attentions, expected.cross_attentions)
        del inputs["output_attentions"]
        assert_close(ours(**inputs).logits, expected.logits)
        inputs["output_attentions"] = True
    has_decoder_experts = variant != "step-from-file"
    assert ("decoder_z_loss" in actual) == has_decoder_experts and "encoder_z_loss" in actual


@torch.no_grad()
def test_losses_of_the_routers(plain: Pair) -> None:
    labels = batch()["decoder_input_ids"]
    without = plain.ours(**batch(), labels=labels)
    assert without.encoder_z_loss is None and without.encoder_router_logits is None
    assert_close(without.loss, plain.theirs(**batch(), labels=labels, output_router_logits=False).loss)
    plain.ours.config.add_router_probs = True
    try:
        expected = plain.theirs(**batch(), labels=labels)
        actual = plain.ours(**batch(), labels=labels)
        assert list(actual) == list(expected)
        assert_close(actual.loss, expected.loss)
        no_labels = plain.ours(**batch())
        assert no_labels.loss is None
        assert_close(no_labels.decoder_aux_loss, expected.decoder_aux_loss)
        as_tuple = plain.ours(**batch(), labels=labels, return_dict=False)
        assert len(as_tuple) == len(expected)
        assert_close(as_tuple[1], expected.logits)
    finally:
        plain.ours.config.add_router_probs = False


@torch.no_grad()
def test_model_without_head(plain: Pair) -> None:
    theirs = transformers.SwitchTransformersModel.from_pretrained(plain.directory).eval()
    ours = SwitchTransformersModel.from_pretrained(plain.directory, progress=False)
    expected = theirs(**batch(), output_router_logits=True)
    actual = ours(**batch(), output_router_logits=True)
    assert list(actual) == list(expected)
    assert_close(actual.last_hidden_state, expected.last_hidden_state)
    all_close(actual.decoder_router_logits, sparse_only(expected.decoder_router_logits))
    assert type(AutoModel.from_pretrained(plain.directory, progress=False)) is SwitchTransformersModel
    with pytest.raises(CheckpointError, match=r"num_decoder_layers .* must be 3, .* got 2"):
        SwitchTransformersModel.from_pretrained(plain.directory, num_decoder_layers=2, progress=False)


@torch.no_grad()
def test_the_encoder_alone(plain: Pair, tmp_path: Path) -> None:
    theirs = transformers.SwitchTransformersEncoderModel.from_pretrained(plain.directory).eval()
    ours = SwitchTransformersEncoderModel.from_pretrained(plain.directory, progress=False)
    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    options = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    expected, actual = theirs(**inputs, **options), ours(**inputs, **options)
    assert_close(actual.last_hidden_state, expected.last_hidden_state)
    all_close(actual.hidden_states, expected.hidden_states)
    all_close(actual.attentions, expected.attentions)
    logits = sparse_only(expected.router_probs)
    all_close(actual.router_logits, logits)
    all_close(actual.router_probs, tuple(layer.softmax(-1) for layer in logits))
    assert list(ours(**inputs)) == ["last_hidden_state"]
    with pytest.raises(ValueError, match="an encoder has no cache"):
        ours(**inputs, use_cache=True)
    # Its own checkpoint has no decoder.
    ours.save_pretrained(tmp_path)
    assert not any(name.startswith("decoder") for name in load_file(tmp_path / "model.safetensors"))
    again = transformers.SwitchTransformersEncoderModel.from_pretrained(tmp_path).eval()
    assert_close(again(**inputs).last_hidden_state, expected.last_hidden_state)


@torch.no_grad()
def test_distances_beyond_the_last_bucket(tmp_path: Path) -> None:
    theirs, ours, _ = pair(tmp_path, relative_attention_num_buckets=32, relative_attention_max_distance=128)
    ids = torch.randint(3, VOCAB, (1, 150))
    inputs = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    assert_close(ours(**inputs).logits, theirs(**inputs).logits)
    assert_close(ours(**inputs).encoder_last_hidden_state, theirs(**inputs).encoder_last_hidden_state)


@torch.no_grad()
def test_embeddings_labels_and_head_masks(models: Pair) -> None:
    embeds = {"inputs_embeds": torch.randn(2, 7, HIDDEN), "decoder_inputs_embeds": torch.randn(2, 5, HIDDEN)}
    assert_close(models.ours(**embeds).logits, models.theirs(**embeds).logits)
    labels = batch()["decoder_input_ids"].clone()
    labels[0, -3:] = -100
    source = {name: value for name, value in batch().items() if name != "decoder_input_ids"}
    expected = models.theirs(**source, labels=labels, output_router_logits=False)
    actual = models.ours(**source, labels=labels)
    assert_close(actual.loss, expected.loss)
    assert_close(actual.logits, expected.logits)
    shifted = models.ours.prepare_decoder_input_ids_from_labels(labels)
    assert torch.equal(shifted, models.theirs.prepare_decoder_input_ids_from_labels(labels))
    heads = {
        "head_mask": torch.rand(4, 4),
        "decoder_head_mask": torch.tensor([[0.0, 1.0, 1.0, 0.5]]).expand(3, -1),
        "cross_attn_head_mask": torch.tensor([[1.0, 0.0, 1.0, 1.0]]).expand(3, -1),
    }
    assert_close(models.ours(**batch(), **heads).logits, models.theirs(**batch(), **heads).logits)


# --- the cache --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_with_a_cache_equals_one_pass(models: Pair, cache_kind: str, padded: bool) -> None:
    inputs = batch()
    target, mask = inputs.pop("decoder_input_ids"), torch.ones(2, 6, dtype=torch.long)
    if padded:
        mask[1, :2] = 0
    expected = models.theirs(**inputs, decoder_input_ids=target, decoder_attention_mask=mask, use_cache=False).logits
    actual = decode_in_pieces(models.ours, inputs, target, mask if padded else None, cache_kind)
    assert torch.isfinite(actual).all()
    assert_close(actual[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_one_source_serves_several_targets(models: Pair) -> None:
    inputs = batch()
    targets = torch.randint(3, VOCAB, (6, 4))
    repeated = {name: inputs[name].repeat_interleave(3, 0) for name in ("input_ids", "attention_mask")}
    expected = models.theirs(**repeated, decoder_input_ids=targets).logits
    encoded = models.ours.get_encoder()(inputs["input_ids"], inputs["attention_mask"])
    step = {"encoder_outputs": encoded, "attention_mask": inputs["attention_mask"]}
    cache = EncoderDecoderCache()
    first = models.ours(decoder_input_ids=targets[:, :3], past_key_values=cache, **step)
    last = models.ours(decoder_input_ids=targets[:, 3:], past_key_values=cache, **step)
    assert_close(torch.cat((first.logits, last.logits), 1), expected)


@torch.no_grad()
@pytest.mark.parametrize("search", [{}, {"num_beams": 3, "length_penalty": 0.7, "num_return_sequences": 2}])
def test_generation_finds_the_same_tokens(plain: Pair, search: dict[str, Any]) -> None:
    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    options = {**search, "max_new_tokens": 7, "do_sample": False}
    assert torch.equal(plain.ours.generate(**inputs, **options), plain.theirs.generate(**inputs, **options))


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_agree(tmp_path: Path, implementation: str) -> None:
    overrides = {"dropout_rate": 0.0, "router_jitter_noise": 0.0}
    theirs, ours, _ = pair(tmp_path, implementation, **overrides)
    inputs = {**batch(), "labels": batch()["decoder_input_ids"], "output_router_logits": True}
    theirs.train()(**inputs).loss.backward()
    checkpointed = reloaded(tmp_path).train()
    checkpointed.gradient_checkpointing_enable()
    expected = dict(theirs.named_parameters())
    for model in (ours.train(), checkpointed):
        model(**inputs).loss.backward()
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        actual = dict(checkpoint_tensors(model, model.key_map))
        assert actual.keys() == expected.keys()
        for name, gradient in actual.items():
            # An expert that no token visits has no gradient there, and a zero one here.
            other = expected[name].grad
            torch.testing.assert_close(
                gradient, torch.zeros_like(gradient) if other is None else other, atol=2e-5, rtol=1e-4
            )


@torch.no_grad()
def test_dropouts_are_where_they_belong(tmp_path: Path) -> None:
    # Without experts, whose rows are sorted here, both draw the same numbers in the same order.
    theirs, ours, _ = pair(tmp_path, "eager", dropout_rate=0.3, encoder_sparse_step=0, decoder_sparse_step=0)
    evaluated = ours(**batch()).logits
    logits = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(9)
        logits.append(model(**batch(), output_router_logits=False).logits)
    assert_close(logits[0], logits[1])
    assert not torch.allclose(logits[0], evaluated, atol=1e-2)


# --- half precision ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype, implementation: str) -> None:
    # With one expert no rounding can choose another one.
    theirs, _, directory = pair(tmp_path, num_experts=1, expert_capacity=4)
    ours = SwitchTransformersForConditionalGeneration.from_pretrained(
        directory, dtype=dtype, attn_implementation=implementation, progress=False
    )
    assert ours.dtype == dtype
    assert ours.encoder.block[1].layer[1].mlp.router.classifier.weight.dtype == torch.float32
    plain = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(directory, dtype=dtype).eval()
    kept = batch()["attention_mask"].bool()
    expected, rough, actual = (model(**batch()) for model in (theirs, plain, ours))
    assert_accurate(actual.logits, expected.logits.double(), rough.logits)
    assert_accurate(
        actual.encoder_last_hidden_state[kept],
        expected.encoder_last_hidden_state[kept].double(),
        rough.encoder_last_hidden_state[kept],
    )


@torch.no_grad()
def test_overflow_in_float16_is_clamped(plain: Pair) -> None:
    ours = SwitchTransformersForConditionalGeneration.from_pretrained(
        plain.directory, dtype=torch.float16, progress=False
    )
    for block in ours.encoder.block:
        block.layer[-1].layer_norm.weight.mul_(2000)
    assert torch.isfinite(ours(**batch()).logits).all()


# --- bad input --------------------------------------------------------------------------------------------------------

BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "no target": ({"decoder_input_ids": None}, "exactly one of decoder_input_ids and decoder_inputs_embeds"),
    "two sources": (
        {"inputs_embeds": torch.ones(2, 23, HIDDEN)},
        "input_ids and inputs_embeds must be given, got both",
    ),
    "short mask": ({"attention_mask": torch.ones(2, 8)}, r"attention_mask must be \[2, 23\].*got \[2, 8\]"),
    "target mask": ({"decoder_attention_mask": torch.ones(2, 9)}, r"must be \[2, 6\].*got \[2, 9\]"),
    "head mask": ({"head_mask": torch.ones(2, 4)}, r"head_mask must be \[4, 4\] \(layers, heads\) or \[4\]"),
    "labels": ({"labels": torch.full((2, 6), VOCAB)}, f"labels must be from 0 to {VOCAB - 1}, or -100"),
    "source width": (
        {"encoder_outputs": (torch.ones(2, 23, 3),)},
        rf"must begin with a tensor \[batch, length, {HIDDEN}\], got \[2, 23, 3\]",
    ),
    "source rows": ({"encoder_outputs": (torch.ones(3, 23, HIDDEN),)}, "has 3 rows, which must be as many as"),
    "cache": ({"past_key_values": DynamicCache()}, "must be a moekernels EncoderDecoderCache.*DynamicCache"),
}


@torch.no_grad()
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(plain: Pair, case: str) -> None:
    change, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        plain.ours(**{**batch(), **change})


def test_labels_need_a_start_token(tmp_path: Path) -> None:
    write(tmp_path, decoder_start_token_id=None)
    with pytest.raises(ValueError, match=f"pad_token_id and decoder_start_token_id, got {PAD} and None"):
        reloaded(tmp_path)._shift_right(torch.ones(1, 2, dtype=torch.long))


def test_the_position_bias_lies_as_kernels_read_it(plain: Pair) -> None:
    for stack in (plain.ours.get_encoder(), plain.ours.get_decoder()):
        attention = stack.block[0].layer[0].SelfAttention
        bias = attention.position_bias(torch.arange(3), 7)
        assert bias.shape == (1, plain.ours.config.num_heads, 3, 7) and bias.is_contiguous()


def test_flash_attention_has_no_position_bias(plain: Pair) -> None:
    with pytest.raises(ValueError, match="attn_implementation must be one of sdpa, eager, got 'flash_attention_2'"):
        AutoModelForSeq2SeqLM.from_pretrained(plain.directory, attn_implementation="flash_attention_2", progress=False)
