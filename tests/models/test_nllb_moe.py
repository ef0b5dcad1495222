"""NLLB-MoE's routing and sparse layers, against transformers 4.56.2; what it shares with M2M100 is in
test_translation.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.nllb_moe import modeling_nllb_moe as reference

from moekernels.models import (
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    NllbMoeSparseMLP,
    NllbMoeTop2Router,
)
from moekernels.nn import EncoderDecoderCache
from tests.models.translation_checkpoints import PAD, VOCAB, assert_close, batch, pair
from tests.tolerance import assert_accurate

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")

T, E, H = 24, 6, 16

FEW_PLACES = {"moe_eval_capacity_token_fraction": 0.15}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normalised-first": {"normalize_router_prob_before_dropping": True},
    "prioritised": {"batch_prioritized_routing": True},
    "few-places": FEW_PLACES,
    "few-places-normalised-first": {**FEW_PLACES, "normalize_router_prob_before_dropping": True},
    "few-places-prioritised": {**FEW_PLACES, "batch_prioritized_routing": True},
    "training-capacity": {"moe_eval_capacity_token_fraction": -1.0, "expert_capacity": 3},
    "even-capacity": {"moe_eval_capacity_token_fraction": -1.0, "expert_capacity": None},
    "routed-padding": {"router_ignore_padding_tokens": True},
    "sampling": {"second_expert_policy": "sampling"},
    "random": {"second_expert_policy": "random"},
    "random-normalised-first": {"second_expert_policy": "random", "normalize_router_prob_before_dropping": True},
    "random-few-places": {**FEW_PLACES, "second_expert_policy": "random"},
}


def sizes(**overrides: Any) -> dict[str, Any]:
    return {"d_model": H, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_experts": E, **overrides}


def routers(**overrides: Any) -> tuple[Any, NllbMoeTop2Router]:
    theirs = reference.NllbMoeTop2Router(transformers.NllbMoeConfig(**sizes(**overrides)))
    ours = NllbMoeTop2Router(NllbMoeConfig(**sizes(**overrides)))
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def layers(ffn_dim: int = 20, **overrides: Any) -> tuple[Any, NllbMoeSparseMLP]:
    """The same sparse layer twice."""
    theirs = reference.NllbMoeSparseMLP(transformers.NllbMoeConfig(**sizes(**overrides)), ffn_dim)
    ours = NllbMoeSparseMLP(NllbMoeConfig(**sizes(**overrides)), ffn_dim)
    with torch.no_grad():
        ours.router.load_state_dict(theirs.router.state_dict())
        for e, expert in enumerate(theirs.experts.values()):
            ours.experts.up_proj[e], ours.experts.up_proj_bias[e] = expert.fc1.weight, expert.fc1.bias
            ours.experts.down_proj[e], ours.experts.down_proj_bias[e] = expert.fc2.weight, expert.fc2.bias
    return theirs.eval(), ours.eval()


# --- the router -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_routing(variant: str, training: bool) -> None:
    theirs, ours = routers(**VARIANTS[variant])
    logits = torch.randn(T, E) * 2
    padding = torch.zeros(T)
    padding[::5] = 1
    for model in (theirs, ours):
        model.train(training)
    for mask in (None, padding):
        torch.manual_seed(7)
        # The reference adds its noise to the logits it is given.
        expected = theirs.route_tokens(logits.clone(), padding_mask=mask)
        torch.manual_seed(7)
        actual = ours.route_tokens(logits, padding_mask=mask)
        assert torch.equal(actual[0], expected[0])
        torch.testing.assert_close(actual[1], expected[1], atol=1e-6, rtol=1e-6)
        theirs.expert_capacity = VARIANTS[variant].get("expert_capacity", 64)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_are_compared_in_the_dtype_of_the_tokens(dtype: torch.dtype) -> None:
    theirs, ours = routers()
    # Nearly equal logits: after rounding, probabilities tie, and the lowest index wins.
    logits = torch.randn(200, E) * 1e-3
    expected, actual = theirs.route_tokens(logits.clone(), dtype), ours.route_tokens(logits, dtype)
    assert torch.equal(actual[0], expected[0])
    assert actual[1].dtype == dtype
    torch.testing.assert_close(actual[1], expected[1], atol=2 * torch.finfo(dtype).eps, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("router_dtype", ["float32", "bfloat16"])
def test_the_router_computes_in_its_own_dtype(router_dtype: str) -> None:
    theirs, ours = routers(router_dtype=router_dtype, router_bias=True)
    ours.bfloat16(), theirs.bfloat16()
    hidden = torch.randn(2, 5, H).bfloat16()
    logits = ours(hidden, dense=False).logits
    assert str(logits.dtype) == f"torch.{router_dtype}" and ours.classifier.weight.dtype == torch.bfloat16
    expected, actual = theirs(hidden), ours(hidden)
    torch.testing.assert_close(actual[1], expected[1], atol=0.01, rtol=0)


@torch.no_grad()
def test_an_evaluation_leaves_nothing_behind() -> None:
    _, ours = routers(expert_capacity=1)
    logits = torch.randn(T, E)
    first = ours.train().route_tokens(logits)
    ours.eval().route_tokens(logits)
    again = ours.train().route_tokens(logits)
    assert torch.equal(first[1], again[1])
    assert (first[1] > 0).sum(0).max() == 1
    _, even = routers(expert_capacity=None)
    for num_tokens in (T, 2 * T):
        top_1_mask, probs = even.train().route_tokens(torch.tensor([[9.0, 8.0, 0, 0, 0, 0]]).repeat(num_tokens, 1))
        assert top_1_mask.sum(0).tolist()[0] == 2 * math.ceil(num_tokens / E) == int((probs[:, 0] > 0).sum())


@torch.no_grad()
def test_sampling_follows_the_probabilities() -> None:
    _, ours = routers(second_expert_policy="sampling")
    logits = torch.tensor([[5.0, 2.0, 1.0, 0.0, -1.0, -30.0]])
    counts = (ours.route_tokens(logits.repeat(20000, 1))[1] > 0).float().mean(0)
    # Conditioned on not being the first expert.
    expected = logits[0, 1:].softmax(0)
    assert counts[0] == 1
    torch.testing.assert_close(counts[1:], expected, atol=0.02, rtol=0)


# --- the sparse layer -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_sparse_layer(variant: str) -> None:
    theirs, ours = layers(**VARIANTS[variant])
    hidden = torch.randn(3, 8, H)
    additive = torch.zeros(3, 1, 8, 8)
    additive[1, ..., 5:] = torch.finfo(torch.float32).min
    for mask in (None, additive):
        torch.manual_seed(7)
        expected, (expected_probs, _) = theirs(hidden, mask)
        torch.manual_seed(7)
        actual, logits = ours(hidden, mask)
        assert_close(actual, expected)
        assert logits.shape == (24, E)
        assert_close(logits, theirs.router.classifier(hidden).view(-1, E))
        unserved = (expected_probs == 0).all(1).view(3, 8)
        assert (actual[unserved] == 0).all()
        theirs.router.expert_capacity = VARIANTS[variant].get("expert_capacity", 64)


@torch.no_grad()
def test_what_training_drops() -> None:
    # Everything dropped needs no luck.
    hidden = torch.randn(3, 8, H)
    _, ours = layers(moe_token_dropout=1.0)
    assert (ours.train()(hidden)[0] == 0).all()
    theirs, ours = layers(moe_token_dropout=0.0, activation_dropout=1.0)
    assert_close(ours.train()(hidden)[0], theirs.train()(hidden, None)[0])
    assert not torch.allclose(ours(hidden)[0], ours.eval()(hidden)[0], atol=1e-3)
    # In the mean, training gives what evaluation gives before its factor.
    _, ours = layers(moe_token_dropout=0.25)
    hidden = torch.randn(1, 2, H).expand(4000, 2, H)
    ours.router.expert_capacity = 10**6
    mean = ours.train()(hidden)[0].mean(0)
    torch.testing.assert_close(mean * 0.75, ours.eval()(hidden[:1])[0][0], atol=5e-3, rtol=0.05)


@torch.no_grad()
def test_masks_of_the_layer() -> None:
    _, ours = layers()
    hidden = torch.randn(2, 4, H)
    padding = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    expected = ours(hidden, padding.reshape(-1))[0]
    assert torch.equal(ours(hidden, padding)[0], expected)
    assert (expected[0, 2:] == 0).all() and (expected[0, :2] != 0).any()
    assert torch.equal(ours(hidden, False)[0], ours(hidden)[0])
    with pytest.raises(ValueError, match=r"one entry per token \(8\), got \[2, 3\]"):
        ours(hidden, padding[:, :3])
    assert ours(hidden[:0])[0].shape == (0, 4, H)
    with pytest.raises(ValueError, match="expert_class must be NllbMoeDenseActDense, got Linear"):
        NllbMoeSparseMLP(NllbMoeConfig(**sizes()), 8, expert_class=nn.Linear)


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest result of any op has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // value.element_size())
        return result


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_memory_grows_with_tokens_and_choices_only(training: bool) -> None:
    """No tensor of experts x capacity x width, nor of tokens x experts x capacity."""
    num_tokens, num_experts, width, inner = 64, 32, 16, 24
    _, ours = layers(inner, num_experts=num_experts, **FEW_PLACES, expert_capacity=8)
    with LargestTensor() as largest:
        ours.train(training)(torch.randn(1, num_tokens, width))
    weights = num_experts * width * inner
    rows = 2 * num_tokens * max(width, inner)
    assert largest.numel <= max(weights, rows, num_tokens * num_experts)
    capacity = math.ceil(0.15 * num_tokens)
    assert num_tokens * num_experts * capacity > max(weights, rows)


@torch.no_grad()
@pytest.mark.parametrize("shape", ["router", "experts"])
def test_a_real_layer(shape: str) -> None:
    """The widths of nllb-moe-54b. All its experts in float32 would be 17 GB, so: all 128 of them with a reduced inner
    width, and two of them in full."""
    num_experts, inner = {"router": (128, 32), "experts": (2, 8192)}[shape]
    theirs, ours = layers(inner, d_model=2048, num_experts=num_experts, encoder_attention_heads=16)
    hidden = torch.randn(2, 20, 2048)
    expected, actual = theirs(hidden, None)[0], ours(hidden)[0]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_real_layer_in_half_precision() -> None:
    theirs, ours = layers(64, d_model=2048, num_experts=128, encoder_attention_heads=16)
    hidden = torch.randn(1, 30, 2048).bfloat16()
    # The same rounded weights for all three.
    for parameter in (*theirs.parameters(), *ours.parameters()):
        parameter.copy_(parameter.bfloat16())
    theirs.router.input_dtype = torch.float32
    truth = exact_layer(ours, hidden)
    actual = ours.bfloat16()(hidden)[0]
    assert_accurate(actual, truth, theirs.bfloat16()(hidden, None)[0])


def exact_layer(layer: NllbMoeSparseMLP, hidden: Tensor) -> Tensor:
    """In float64, with the choices that rounded probabilities give."""
    _, weights, expert_ids = layer.router(hidden, dense=False)
    experts, flat = layer.experts, hidden.reshape(-1, hidden.shape[-1]).double()
    out = torch.zeros_like(flat)
    for token in range(flat.shape[0]):
        for weight, e in zip(weights[token].double(), expert_ids[token].tolist(), strict=True):
            inner = (experts.up_proj[e].double() @ flat[token] + experts.up_proj_bias[e].double()).relu()
            out[token] += 0.8 * weight * (experts.down_proj[e].double() @ inner + experts.down_proj_bias[e].double())
    return out.view(hidden.shape)


# --- the model --------------------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    **{name: fields for name, fields in VARIANTS.items() if "random" not in name and name != "sampling"},
    "all-sparse": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "dense-encoder": {"encoder_sparse_step": 0},
    "router-bias": {"router_bias": True},
    "gelu": {"activation_function": "gelu"},
    "no-token-dropout": {"moe_token_dropout": 0.0},
}


@torch.no_grad()
@pytest.mark.parametrize("variant", MODELS)
def test_variants(tmp_path: Path, variant: str) -> None:
    theirs, ours, _ = pair(tmp_path, "nllb-moe", **MODELS[variant])
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    inputs = {**batch(), "decoder_attention_mask": mask}
    expected, actual = theirs(**inputs), ours(**inputs)
    assert_close(actual.encoder_last_hidden_state, expected.encoder_last_hidden_state)
    assert_close(actual.logits, expected.logits)


@torch.no_grad()
def test_router_losses(tmp_path: Path) -> None:
    _, ours, _ = pair(tmp_path, "nllb-moe", router_aux_loss_coef=0.3)
    inputs = {**batch(), "output_router_logits": True}
    decoder_mask = torch.ones(2, 6)
    decoder_mask[0, 4:] = 0
    for more in ({}, {"decoder_attention_mask": decoder_mask}):
        out = ours(**inputs, **more, labels=batch()["decoder_input_ids"])
        # Layer 1 of the encoder's three is sparse, and both of the decoder.
        assert [len(out[f"{stack}_router_logits"]) for stack in ("encoder", "decoder")] == [1, 2]
        assert out.encoder_router_logits[0].shape == (18, 6) and out.decoder_router_logits[0].shape == (12, 6)
        encoder = load_balancing_loss_func(out.encoder_router_logits, 6, 2, inputs["attention_mask"])
        decoder = load_balancing_loss_func(out.decoder_router_logits, 6, 2, more.get("decoder_attention_mask"))
        assert_close(out.encoder_aux_loss, encoder)
        assert_close(out.decoder_aux_loss, decoder)
        plain = ours(**batch(), **more, labels=batch()["decoder_input_ids"])
        assert_close(out.loss, plain.loss + 0.3 * (encoder + decoder))
        assert plain.encoder_router_logits is None and plain.encoder_aux_loss is None
    assert ours(**inputs).loss is None and ours(**inputs).encoder_aux_loss is not None
    ours.config.output_router_logits = True
    assert ours(**batch()).decoder_router_logits is not None
    encoded = ours.get_encoder()(batch()["input_ids"], batch()["attention_mask"])
    assert_close(encoded.router_logits[0], out.encoder_router_logits[0])


@torch.no_grad()
def test_a_stack_without_experts_has_no_loss(tmp_path: Path) -> None:
    _, ours, _ = pair(tmp_path, "nllb-moe", encoder_sparse_step=0)
    out = ours(**batch(), labels=batch()["decoder_input_ids"], output_router_logits=True)
    assert out.encoder_aux_loss is None and out.decoder_aux_loss is not None


@torch.no_grad()
def test_padding_while_decoding_is_not_routed(tmp_path: Path) -> None:
    """With a cache, transformers takes the padding from the wrong tokens; one full pass is right."""
    theirs, ours, _ = pair(tmp_path, "nllb-moe")
    inputs = batch()
    target = inputs.pop("decoder_input_ids")
    mask = torch.ones_like(target)
    mask[0, -2:] = 0
    target = target.masked_fill(mask == 0, PAD)
    expected = theirs(**inputs, decoder_input_ids=target, decoder_attention_mask=mask, use_cache=False)
    cache = EncoderDecoderCache()
    encoded = ours.get_encoder()(**inputs)
    steps = [
        ours(
            encoder_outputs=encoded,
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=target[:, i : i + 1],
            decoder_attention_mask=mask[:, : i + 1],
            past_key_values=cache,
        ).logits
        for i in range(6)
    ]
    assert_close(torch.cat(steps, 1), expected.logits)


@torch.no_grad()
def test_the_classifier_stays_float32(tmp_path: Path) -> None:
    theirs, _, directory = pair(tmp_path, "nllb-moe")
    ours = NllbMoeForConditionalGeneration.from_pretrained(directory, dtype="bfloat16", progress=False)
    kept = {name for name, parameter in ours.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {name for name, _ in ours.named_parameters() if "classifier" in name} and len(kept) == 3
    assert ours.dtype == torch.bfloat16
    expected = theirs.model.encoder.layers[1].ffn.router.classifier.weight
    assert torch.equal(ours.model.encoder.layers[1].ffn.router.classifier.weight, expected)
    lower = NllbMoeForConditionalGeneration.from_pretrained(
        directory, dtype="bfloat16", router_dtype="bfloat16", progress=False
    )
    assert all(parameter.dtype == torch.bfloat16 for parameter in lower.parameters())
    theirs.bfloat16().save_pretrained(tmp_path / "half")
    half = NllbMoeForConditionalGeneration.from_pretrained(tmp_path / "half", progress=False)
    assert half.dtype == torch.bfloat16
    assert half.model.encoder.layers[1].ffn.router.classifier.weight.dtype == torch.float32


@torch.no_grad()
def test_sharded_pickles_and_stacks(tmp_path: Path) -> None:
    theirs, ours, directory = pair(tmp_path, "nllb-moe")
    expected = theirs(**batch()).logits
    config = (directory / "config.json").read_text()
    for form, state in (("experts", theirs.state_dict()), ("stacks", ours.state_dict())):
        target = tmp_path / form
        target.mkdir()
        (target / "config.json").write_text(config)
        files = {name: f"pytorch_model-{i % 2 + 1:05d}-of-00002.bin" for i, name in enumerate(state)}
        for file in set(files.values()):
            torch.save({name: state[name] for name in state if files[name] == file}, target / file)
        (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
        loaded = NllbMoeForConditionalGeneration.from_pretrained(target, progress=False)
        assert_close(loaded(**batch()).logits, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_capacity": 0}, "expert_capacity must be a positive integer, got 0"),
        ({"num_experts": 1}, "num_experts must be an integer of 2 at least, got 1"),
        ({"router_dtype": "float8"}, "router_dtype must be one of float32, float16, bfloat16, got 'float8'"),
        ({"second_expert_policy": "none"}, "second_expert_policy must be one of all, sampling, random, got 'none'"),
        ({"moe_token_dropout": -0.1}, "moe_token_dropout must be a number from 0.0 to 1.0"),
        ({"encoder_sparse_step": -1}, "encoder_sparse_step must be an integer, 0 for no sparse layer, got -1"),
    ],
)
def test_unusable_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NllbMoeConfig(**fields)


def test_labels_out_of_range_say_so(tmp_path: Path) -> None:
    _, ours, _ = pair(tmp_path, "nllb-moe")
    with pytest.raises(ValueError, match=f"labels must be from 0 to {VOCAB - 1}"):
        ours(**batch(), labels=torch.full((2, 6), VOCAB))
