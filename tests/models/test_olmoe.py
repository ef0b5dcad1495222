"""OLMoE against transformers 4.56.2, on checkpoints that transformers wrote."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from moekernels.checkpoint import KEY_MAPS, checkpoint_tensors
from moekernels.models import OlmoeConfig, OlmoeForCausalLM, OlmoeModel
from moekernels.nn import DynamicCache, StaticCache
from tests.tolerance import assert_accurate

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")

ROPE_KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "linear-old-key": {"type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-factors": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "clip-qkv": {"clip_qkv": 0.7},
    "normalised": {"norm_topk_prob": True},
    "biased": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "one-choice": {"num_experts_per_tok": 1},
    "gelu": {"hidden_act": "gelu"},
    "gelu-tanh": {"hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu"},
    "theta": {"rope_theta": 500.0},
    **{f"rope-{name}": {"rope_scaling": scaling} for name, scaling in ROPE_KINDS.items()},
}


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def load(directory: Any, **kwargs: Any) -> OlmoeForCausalLM:
    return OlmoeForCausalLM.from_pretrained(directory, progress=False, **kwargs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_output_agrees(
    saved_olmoe: Callable[..., Any], token_ids: Tensor, variant: str, implementation: str
) -> None:
    theirs, directory = saved_olmoe(**VARIANTS[variant])
    ours = load(directory, attn_implementation=implementation)
    wanted = {"output_hidden_states": True, "output_router_logits": True, "labels": token_ids}
    with torch.no_grad():
        expected = theirs(token_ids, output_attentions=True, **wanted)
        actual = ours(token_ids, output_attentions=implementation == "eager", **wanted)
    for name in ("logits", "loss", "aux_loss"):
        assert_close(actual[name], expected[name])
    for name in ("hidden_states", "router_logits"):
        assert len(actual[name]) == len(expected[name])
        for mine, other in zip(actual[name], expected[name], strict=True):
            assert_close(mine, other)
    assert actual.past_key_values.get_seq_length() == token_ids.shape[1]
    if implementation == "eager":
        for mine, other in zip(actual.attentions, expected.attentions, strict=True):
            assert_close(mine, other)
    else:
        assert actual.attentions is None


def test_attentions_under_sdpa_come_from_the_eager_function(saved_olmoe: Callable[..., Any], token_ids: Tensor) -> None:
    theirs, directory = saved_olmoe(num_key_value_heads=2)
    ours = load(directory)
    actual = ours(token_ids, output_attentions=True)
    assert ours.config._attn_implementation == "sdpa"
    for mine, other in zip(actual.attentions, theirs(token_ids, output_attentions=True).attentions, strict=True):
        assert_close(mine, other)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(saved_olmoe: Callable[..., Any], token_ids: Tensor, side: str, implementation: str) -> None:
    theirs, directory = saved_olmoe(num_key_value_heads=2)
    ours = load(directory, attn_implementation=implementation)
    mask = torch.ones_like(token_ids)
    mask[0, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    ids = token_ids.masked_fill(mask == 0, 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "output_router_logits": True}
    with torch.no_grad():
        expected, actual = theirs(**inputs), ours(**inputs)
        alone = ours(token_ids[:1][mask[:1] == 1][None])
    kept = mask.bool()
    assert_close(actual.logits[kept], expected.logits[kept])
    assert_close(actual.aux_loss, expected.aux_loss)
    assert torch.isfinite(actual.logits).all()
    assert_close(actual.logits[0][kept[0]], alone.logits[0])


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_final_masks_are_taken_as_they_are(saved_olmoe: Callable[..., Any], token_ids: Tensor, kind: str) -> None:
    _, directory = saved_olmoe()
    ours = load(directory)
    visible = torch.ones(11, 11, dtype=torch.bool).tril()[None, None].expand(2, -1, -1, -1)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        actual = ours(token_ids, attention_mask=visible if kind == "bool" else additive)
        assert_close(actual.logits, ours(token_ids).logits)


@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_decoding_with_a_cache_equals_one_pass(
    saved_olmoe: Callable[..., Any], token_ids: Tensor, cache_kind: str, padded: bool, implementation: str
) -> None:
    theirs, directory = saved_olmoe(num_key_value_heads=2)
    ours = load(directory, attn_implementation=implementation)
    mask = torch.ones_like(token_ids)
    if padded:
        mask[1, :3] = 0
    with torch.no_grad():
        expected = theirs(token_ids, attention_mask=mask).logits
        cache = DynamicCache() if cache_kind == "dynamic" else StaticCache(ours.config, 2, 16, dtype=torch.float32)
        pieces = []
        # A prompt, a chunk on top of it, then single tokens.
        for start, stop in [(0, 5), (5, 8), (8, 9), (9, 10), (10, 11)]:
            out = ours(
                token_ids[:, start:stop],
                attention_mask=mask[:, :stop] if padded else None,
                past_key_values=cache,
            )
            assert out.past_key_values is cache
            assert cache.get_seq_length() == stop
            pieces.append(out.logits)
    kept = mask.bool()
    assert_close(torch.cat(pieces, dim=1)[kept], expected[kept])


def test_a_cache_is_made_only_when_asked_for(saved_olmoe: Callable[..., Any], token_ids: Tensor) -> None:
    _, directory = saved_olmoe()
    ours = load(directory)
    assert ours(token_ids, use_cache=False).past_key_values is None
    assert isinstance(ours(token_ids).past_key_values, DynamicCache)
    ours.config.use_cache = False
    assert ours(token_ids).past_key_values is None


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_past_the_trained_length(saved_olmoe: Callable[..., Any], kind: str) -> None:
    theirs, directory = saved_olmoe(rope_scaling=ROPE_KINDS[kind], max_position_embeddings=8)
    ours = load(directory)
    # Longer, then shorter again: no state may be left behind.
    for length in (6, 8, 9, 13, 5):
        ids = torch.randint(3, 97, (2, length))
        with torch.no_grad():
            assert_close(ours(ids).logits, theirs(ids).logits)


def test_longrope_trained_length_and_magnitudes(saved_olmoe: Callable[..., Any]) -> None:
    scaling = {**ROPE_KINDS["longrope"], "short_mscale": 1.1, "long_mscale": 1.3, "original_max_position_embeddings": 8}
    _, directory = saved_olmoe()
    rope = load(directory, rope_scaling=scaling).model.rotary_emb
    for length, factors, magnitude in ((8, scaling["short_factor"], 1.1), (9, scaling["long_factor"], 1.3)):
        positions = torch.arange(length)
        cos, sin = rope(positions[None], torch.float32)
        angles = positions[:, None].double() / (
            torch.tensor(factors, dtype=torch.float64) * 10000 ** (torch.arange(4) / 4)
        )
        torch.testing.assert_close(cos[0, :, 0, :4].double(), magnitude * angles.cos(), atol=1e-5, rtol=0)
        torch.testing.assert_close(sin[0, :, 0, 4:].double(), magnitude * angles.sin(), atol=1e-5, rtol=0)


def test_position_ids_and_inputs_embeds(saved_olmoe: Callable[..., Any], token_ids: Tensor) -> None:
    theirs, directory = saved_olmoe()
    ours = load(directory)
    positions = torch.arange(3, 14)[None].expand(2, -1)
    embeds = torch.randn(2, 11, 32)
    with torch.no_grad():
        assert_close(ours(token_ids, position_ids=positions).logits, theirs(token_ids, position_ids=positions).logits)
        assert_close(ours(inputs_embeds=embeds).logits, theirs(inputs_embeds=embeds).logits)


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 3, 10])])
def test_logits_to_keep(saved_olmoe: Callable[..., Any], token_ids: Tensor, keep: int | Tensor) -> None:
    theirs, directory = saved_olmoe()
    ours = load(directory)
    with torch.no_grad():
        assert_close(ours(token_ids, logits_to_keep=keep).logits, theirs(token_ids, logits_to_keep=keep).logits)
    with pytest.raises(ValueError, match="logits_to_keep cannot be combined with labels"):
        ours(token_ids, labels=token_ids, logits_to_keep=keep)


def test_losses(saved_olmoe: Callable[..., Any], token_ids: Tensor) -> None:
    theirs, directory = saved_olmoe()
    ours = load(directory)
    labels = token_ids.clone()
    labels[:, :4] = -100
    ahead = token_ids.roll(-1, dims=1)
    for extra in (
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": 5},
        {"labels": labels, "num_items_in_batch": torch.tensor(7)},
        {"labels": labels, "shift_labels": ahead},
        {"labels": labels, "output_router_logits": True},
    ):
        with torch.no_grad():
            assert_close(ours(token_ids, **extra).loss, theirs(token_ids, **extra).loss)
    with torch.no_grad():
        assert ours(token_ids).loss is None
        assert_close(ours(token_ids, shift_labels=ahead).loss, theirs(token_ids, labels=ahead, shift_labels=ahead).loss)


def test_gradients_agree(saved_olmoe: Callable[..., Any], token_ids: Tensor) -> None:
    theirs, directory = saved_olmoe(num_key_value_heads=2, norm_topk_prob=True)
    ours = load(directory).train()
    theirs.zero_grad()
    for model in (ours, theirs):
        model(token_ids, labels=token_ids, output_router_logits=True).loss.backward()
    for parameter in ours.parameters():
        parameter.data = parameter.grad
    gradients = dict(checkpoint_tensors(ours, KEY_MAPS["olmoe"]))
    expected = dict(theirs.named_parameters())
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        grad = expected[name].grad
        # An expert that no token visits has no gradient there, and a zero one here.
        assert_close(gradient, torch.zeros_like(gradient) if grad is None else grad)


def test_gradient_checkpointing_changes_nothing(saved_olmoe: Callable[..., Any], token_ids: Tensor) -> None:
    _, directory = saved_olmoe()
    plain, checkpointed = load(directory).train(), load(directory).train()
    checkpointed.gradient_checkpointing_enable()
    assert checkpointed.is_gradient_checkpointing
    for model in (plain, checkpointed):
        model(token_ids, labels=token_ids).loss.backward()
    for mine, other in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    assert checkpointed(token_ids).past_key_values is None
    with pytest.raises(ValueError, match="cannot be combined with gradient checkpointing"):
        checkpointed(token_ids, past_key_values=DynamicCache())
    checkpointed.gradient_checkpointing_disable()
    assert not checkpointed.is_gradient_checkpointing
    assert checkpointed(token_ids).past_key_values is not None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(
    saved_olmoe: Callable[..., Any], token_ids: Tensor, dtype: torch.dtype, implementation: str
) -> None:
    # Every token visits every expert: which experts are chosen may not depend on a rounding here.
    _, directory = saved_olmoe(num_key_value_heads=2, num_experts=4, num_experts_per_tok=4, norm_topk_prob=True)
    ours = load(directory, dtype=dtype, attn_implementation=implementation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, truth = (
            transformers.OlmoeForCausalLM.from_pretrained(directory, dtype=kind, attn_implementation=implementation)
            for kind in (dtype, torch.float64)
        )
    # The truth is that of the rounded weights.
    truth.load_state_dict({name: tensor.double() for name, tensor in plain.state_dict().items()})
    with torch.no_grad():
        expected = truth(token_ids).logits
        assert_accurate(ours(token_ids).logits, expected, plain(token_ids).logits)

        cache = ours(token_ids[:, :-1]).past_key_values
        plain_cache = plain(token_ids[:, :-1]).past_key_values
        assert_accurate(
            ours(token_ids[:, -1:], past_key_values=cache).logits,
            expected[:, -1:],
            plain(token_ids[:, -1:], past_key_values=plain_cache).logits,
        )


def test_one_layer_of_real_size() -> None:
    """OLMoE-1B-7B but for its depth and vocabulary; both models look at the same weights."""
    sizes: dict[str, Any] = {"vocab_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1, "eos_token_id": 2}
    ours = OlmoeForCausalLM(OlmoeConfig(**sizes)).eval()
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes)).eval()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    theirs.load_state_dict(dict(checkpoint_tensors(ours, ours.key_map)), assign=True)
    ids = torch.randint(2, 512, (2, 17))
    with torch.no_grad():
        actual, expected = (model(ids, output_router_logits=True) for model in (ours, theirs))
    assert_close(actual.logits, expected.logits)
    assert_close(actual.router_logits[0], expected.router_logits[0])


@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_greedy_generation(
    saved_olmoe: Callable[..., Any], token_ids: Tensor, cache_implementation: str | None
) -> None:
    theirs, directory = saved_olmoe(num_key_value_heads=2)
    ours = load(directory)
    mask = torch.ones_like(token_ids)
    mask[1, :4] = 0
    inputs = {"input_ids": token_ids.masked_fill(mask == 0, 1), "attention_mask": mask, "max_new_tokens": 12}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.generate(**inputs, do_sample=False)
    assert torch.equal(ours.generate(**inputs, cache_implementation=cache_implementation), expected)
    assert torch.equal(ours.generate(**inputs, use_cache=False), expected)


def test_devices(saved_olmoe: Callable[..., Any], token_ids: Tensor, device: torch.device) -> None:
    theirs, directory = saved_olmoe(num_key_value_heads=2)
    ours = load(directory, device=device)
    assert {tensor.device.type for tensor in (*ours.parameters(), *ours.buffers())} == {device.type}
    mask = torch.ones_like(token_ids)
    mask[1, :4] = 0
    inputs = {"attention_mask": mask.to(device), "position_ids": (mask.cumsum(-1) - 1).clamp(min=0).to(device)}
    cache = StaticCache(ours.config, 2, 16, device=device, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(token_ids, **{name: value.cpu() for name, value in inputs.items()}).logits
        for kind in (DynamicCache(), cache):
            actual = ours(token_ids.to(device), past_key_values=kind, **inputs).logits.cpu()
            torch.testing.assert_close(actual[mask == 1], expected[mask == 1], atol=1e-4, rtol=0)


def test_tuples(saved_olmoe: Callable[..., Any], token_ids: Tensor) -> None:
    _, directory = saved_olmoe()
    ours = load(directory)
    with torch.no_grad():
        full = ours(token_ids, labels=token_ids, output_router_logits=True)
        loss, aux_loss, logits, cache, router_logits = ours(
            token_ids, labels=token_ids, output_router_logits=True, return_dict=False
        )
    assert torch.equal(loss, full[0]) and torch.equal(aux_loss, full["aux_loss"]) and torch.equal(logits, full.logits)
    assert len(cache) == len(router_logits) == 3
    ours.config.return_dict = False
    assert isinstance(ours(token_ids), tuple)
    assert isinstance(ours.model(token_ids), tuple)


def test_base_model_alone(saved_olmoe: Callable[..., Any], token_ids: Tensor) -> None:
    theirs, directory = saved_olmoe()
    base = OlmoeModel.from_pretrained(directory, progress=False)
    with torch.no_grad():
        actual, expected = base(token_ids), theirs.model(token_ids)
    assert_close(actual.last_hidden_state, expected.last_hidden_state)
    assert_close(actual[0], expected[0])


def test_wrong_calls(saved_olmoe: Callable[..., Any], token_ids: Tensor) -> None:
    _, directory = saved_olmoe()
    ours = load(directory)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds must be given, got neither"):
        ours()
    with pytest.raises(ValueError, match="got both"):
        ours(token_ids, inputs_embeds=torch.randn(2, 11, 32))
    with pytest.raises(ValueError, match="past_key_values must be a moekernels Cache or None, got list"):
        ours(token_ids, past_key_values=[])
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 11\].*got \[2, 12\]"):
        ours(token_ids, attention_mask=torch.ones(2, 12))
    with pytest.raises(ValueError, match=r"attention_mask must be .*got \[3, 11\]"):
        ours(token_ids, attention_mask=torch.ones(3, 11))


def test_no_rows(saved_olmoe: Callable[..., Any]) -> None:
    _, directory = saved_olmoe()
    with torch.no_grad():
        assert load(directory)(torch.empty(0, 5, dtype=torch.long)).logits.shape == (0, 5, 97)


def test_nan_stays_in_its_sequence(saved_olmoe: Callable[..., Any]) -> None:
    _, directory = saved_olmoe()
    ours = load(directory)
    embeds = torch.randn(2, 6, 32)
    with torch.no_grad():
        expected = ours(inputs_embeds=embeds).logits
        embeds[0, 2] = float("nan")
        actual = ours(inputs_embeds=embeds).logits
    assert torch.isnan(actual[0, 2:]).all()
    assert_close(actual[1], expected[1])


@pytest.mark.parametrize("cache_kind", [None, "static"])
def test_compiles_as_one_graph(saved_olmoe: Callable[..., Any], token_ids: Tensor, cache_kind: str | None) -> None:
    _, directory = saved_olmoe()
    ours = load(directory)
    mask = torch.ones_like(token_ids)
    mask[0, :3] = 0

    def inputs() -> dict[str, Any]:
        if cache_kind is None:
            return {"use_cache": False}
        cache = StaticCache(ours.config, 2, 16, dtype=torch.float32)
        return {"past_key_values": cache, "cache_position": torch.arange(11)}

    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        assert_close(
            compiled(token_ids, attention_mask=mask, **inputs()).logits,
            ours(token_ids, attention_mask=mask, **inputs()).logits,
        )
