"""PhiMoE against transformers 4.56.2, on checkpoints that transformers wrote."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from moekernels.checkpoint import KEY_MAPS, CheckpointError, checkpoint_tensors
from moekernels.models import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PhimoeModel,
)
from moekernels.nn import DynamicCache, StaticCache
from tests.models.conftest import TINY_PHIMOE
from tests.tolerance import assert_accurate

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")

#: Tokens past which the long rotary factors hold.
TRAINED = TINY_PHIMOE["rope_scaling"]["original_max_position_embeddings"]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-rope-scaling": {"rope_scaling": None, "rope_theta": 1e6},
    "mha": {"num_key_value_heads": None},
    "mqa": {"num_key_value_heads": 1},
    "no-bias": {"attention_bias": False, "lm_head_bias": False},
    "tied": {"tie_word_embeddings": True},
    "gelu": {"hidden_act": "gelu"},
    "many-near-ties": {"router_jitter_noise": 0.4},
    "no-near-ties": {"router_jitter_noise": 0.0},
    "two-experts": {"num_local_experts": 2},
    "window": {"sliding_window": 4},
    "wide-window": {"sliding_window": 64},
    "no-pad-token": {"pad_token_id": None},
}


def assert_close(ours: Tensor, theirs: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def load(directory: Any, **kwargs: Any) -> PhimoeForCausalLM:
    return PhimoeForCausalLM.from_pretrained(directory, progress=False, **kwargs)


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(3, TINY_PHIMOE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(5))


# The forward pass.


@pytest.mark.parametrize("length", [11, TRAINED, TRAINED + 1, 25])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_output_agrees(saved_phimoe: Callable[..., Any], variant: str, implementation: str, length: int) -> None:
    theirs, directory = saved_phimoe(**VARIANTS[variant])
    ours = load(directory, attn_implementation=implementation)
    ids = tokens(2, length)
    wanted = {"output_hidden_states": True, "output_router_logits": True, "labels": ids}
    with torch.no_grad():
        expected = theirs(ids, output_attentions=True, **wanted)
        actual = ours(ids, output_attentions=implementation == "eager", **wanted)
    for name in ("logits", "loss", "aux_loss"):
        assert_close(actual[name], expected[name])
    for name in ("hidden_states", "router_logits"):
        assert len(actual[name]) == len(expected[name])
        for mine, other in zip(actual[name], expected[name], strict=True):
            assert_close(mine, other)
    if implementation == "eager":
        for mine, other in zip(actual.attentions, expected.attentions, strict=True):
            assert_close(mine, other)


@pytest.mark.parametrize("length", [11, 20])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [None, 5])
def test_padding(
    saved_phimoe: Callable[..., Any], side: str, implementation: str, length: int, window: int | None
) -> None:
    """Padding counts where the length decides on the rotary factors, for both."""
    theirs, directory = saved_phimoe(sliding_window=window)
    ours = load(directory, attn_implementation=implementation)
    ids = tokens(2, length)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        expected, actual = (model(**inputs, output_router_logits=True) for model in (theirs, ours))
    kept = mask.bool()
    assert_close(actual.logits[kept], expected.logits[kept])
    assert_close(actual.aux_loss, expected.aux_loss)
    assert torch.isfinite(actual.logits).all()


def test_long_factors_are_used_and_forgotten_again(saved_phimoe: Callable[..., Any]) -> None:
    theirs, directory = saved_phimoe()
    ours = load(directory)
    same = {**TINY_PHIMOE["rope_scaling"], "long_factor": [1.0, 1.1, 1.2, 1.3], "long_mscale": 1.1}
    only_short = load(directory, rope_scaling=same)
    for length in (6, TRAINED, TRAINED + 1, 30, TRAINED, 5):
        ids = tokens(2, length)
        with torch.no_grad():
            logits = ours(ids).logits
            assert_close(logits, theirs(ids).logits)
            differs = (logits - only_short(ids).logits).abs().max() > 0.1
        assert differs == (length > TRAINED)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_decoding_with_a_cache_equals_one_pass(
    saved_phimoe: Callable[..., Any], cache_kind: str, padded: bool, implementation: str, window: int | None
) -> None:
    theirs, directory = saved_phimoe(sliding_window=window)
    ours = load(directory, attn_implementation=implementation)
    ids = tokens(2, 11)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
    cache = DynamicCache() if cache_kind == "dynamic" else StaticCache(ours.config, 2, 14, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        pieces = []
        # A prompt, a chunk on top of it, then single tokens.
        for start, stop in [(0, 5), (5, 8), (8, 9), (9, 10), (10, 11)]:
            seen = mask[:, :stop] if padded else None
            pieces.append(ours(ids[:, start:stop], attention_mask=seen, past_key_values=cache).logits)
    kept = mask.bool()
    assert_close(torch.cat(pieces, dim=1)[kept], expected[kept])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(saved_phimoe: Callable[..., Any], dtype: torch.dtype, implementation: str) -> None:
    # Both experts with weight 1: which are near-ties may not depend on a rounding here.
    _, directory = saved_phimoe(num_local_experts=2, router_jitter_noise=0.0)
    ours = load(directory, dtype=dtype, attn_implementation=implementation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, truth = (
            transformers.PhimoeForCausalLM.from_pretrained(directory, dtype=kind, attn_implementation=implementation)
            for kind in (dtype, torch.float64)
        )
    # The truth is that of the rounded weights.
    truth.load_state_dict({name: tensor.double() for name, tensor in plain.state_dict().items()})
    ids = tokens(2, 20)
    with torch.no_grad():
        assert_accurate(ours(ids).logits, truth(ids).logits, plain(ids).logits)


def test_one_layer_of_real_size() -> None:
    """Phi-3.5-MoE but for its depth, vocabulary and number of experts; both models look at the same weights."""
    sizes: dict[str, Any] = {"vocab_size": 256, "num_hidden_layers": 1, "num_local_experts": 3}
    sizes |= {"attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.2}
    ours = PhimoeForCausalLM(PhimoeConfig(**sizes)).eval()
    shapes = {name: list(tensor.shape) for name, tensor in checkpoint_tensors(ours, ours.key_map)}
    layer = "model.layers.0"
    assert shapes[f"{layer}.block_sparse_moe.experts.2.w1.weight"] == [6400, 4096]
    assert shapes[f"{layer}.block_sparse_moe.experts.0.w2.weight"] == [4096, 6400]
    assert shapes[f"{layer}.self_attn.k_proj.weight"] == [1024, 4096] and shapes["lm_head.bias"] == [256]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**sizes)).eval()
    theirs.load_state_dict(dict(checkpoint_tensors(ours, ours.key_map)), assign=True)
    ids = torch.randint(2, 256, (2, 9))
    with torch.no_grad():
        actual, expected = (model(ids, output_router_logits=True) for model in (ours, theirs))
    assert_close(actual.logits, expected.logits)
    assert_close(actual.router_logits[0], expected.router_logits[0])


def test_devices(saved_phimoe: Callable[..., Any], device: torch.device) -> None:
    theirs, directory = saved_phimoe(sliding_window=5)
    ours = load(directory, device=device)
    assert {tensor.device.type for tensor in (*ours.parameters(), *ours.buffers())} == {device.type}
    for length in (11, 20):
        ids = tokens(2, length)
        with torch.no_grad():
            actual, expected = ours(ids.to(device)).logits.cpu(), theirs(ids).logits
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_tuples(saved_phimoe: Callable[..., Any], token_ids: Tensor) -> None:
    _, directory = saved_phimoe()
    ours = load(directory)
    with torch.no_grad():
        full = ours(token_ids, labels=token_ids, output_router_logits=True)
        loss, aux_loss, logits, cache, router_logits = ours(
            token_ids, labels=token_ids, output_router_logits=True, return_dict=False
        )
    assert torch.equal(loss, full[0]) and torch.equal(aux_loss, full["aux_loss"]) and torch.equal(logits, full.logits)
    assert len(cache) == len(router_logits) == 3


def test_base_model_alone(saved_phimoe: Callable[..., Any], token_ids: Tensor) -> None:
    theirs, directory = saved_phimoe()
    base = AutoModel.from_pretrained(directory, progress=False)
    assert isinstance(base, PhimoeModel)
    with torch.no_grad():
        assert_close(base(token_ids)[0], theirs.model(token_ids)[0])


def test_edges(saved_phimoe: Callable[..., Any]) -> None:
    _, directory = saved_phimoe()
    ours = load(directory)
    embeds = torch.randn(2, 6, 32)
    with torch.no_grad():
        assert ours(torch.empty(0, 5, dtype=torch.long)).logits.shape == (0, 5, 97)
        expected = ours(inputs_embeds=embeds).logits
        embeds[0, 2] = float("nan")
        actual = ours(inputs_embeds=embeds).logits
    assert torch.isnan(actual[0, 2:]).all()
    assert_close(actual[1], expected[1])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds must be given, got neither"):
        ours()


def test_compiles_as_one_graph(saved_phimoe: Callable[..., Any]) -> None:
    _, directory = saved_phimoe(sliding_window=5)
    ours = load(directory)
    ids = tokens(2, 20)
    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        assert_close(compiled(ids, use_cache=False).logits, ours(ids, use_cache=False).logits)


# Training.


@pytest.mark.parametrize("jitter", [0.0, 0.1])
@pytest.mark.parametrize("length", [11, 20])
def test_a_seed_trains_alike(saved_phimoe: Callable[..., Any], length: int, jitter: float) -> None:
    """Loss and all gradients, with drawn experts, straight-through factors and, with it, jitter."""
    saved, directory = saved_phimoe(input_jitter_noise=jitter, router_jitter_noise=0.4)
    theirs, ours = copy.deepcopy(saved).train(), load(directory).train()
    ids = tokens(2, length)
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(4)
        losses.append(model(ids, labels=ids, output_router_logits=True).loss)
        losses[-1].backward()
    assert_close(losses[1], losses[0])
    with torch.no_grad():
        assert (ours.eval()(ids, labels=ids, output_router_logits=True).loss - losses[1]).abs() > 1e-3
    for parameter in ours.parameters():
        parameter.data = parameter.grad
    gradients = dict(checkpoint_tensors(ours, KEY_MAPS["phimoe"]))
    expected = dict(theirs.named_parameters())
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        grad = expected[name].grad
        # An expert that no token visits has no gradient there, and a zero one here.
        assert_close(gradient, torch.zeros_like(gradient) if grad is None else grad)


def test_gradient_checkpointing_draws_the_same(saved_phimoe: Callable[..., Any], token_ids: Tensor) -> None:
    _, directory = saved_phimoe(input_jitter_noise=0.1, router_jitter_noise=0.4)
    plain, checkpointed = load(directory).train(), load(directory).train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        torch.manual_seed(4)
        model(token_ids, labels=token_ids).loss.backward()
    for mine, other in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


# Checkpoints and configurations.


def reread(directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.PhimoeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_transformers_reads_what_is_saved(saved_phimoe: Callable[..., Any], tmp_path: Path, shard: str) -> None:
    theirs, directory = saved_phimoe(sliding_window=7)
    load(directory).save_pretrained(tmp_path, max_shard_size=shard)
    again = reread(tmp_path)
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    for name in TINY_PHIMOE:
        assert getattr(again.config, name) == getattr(theirs.config, name), name
    assert again.config.original_max_position_embeddings == TRAINED and again.config.sliding_window == 7
    ids = tokens(2, 20)
    with torch.no_grad():
        assert_close(load(tmp_path)(ids).logits, theirs(ids).logits)


def released(directory: Path) -> dict[str, Any]:
    """The configuration as it is on the hub, but for sizes, in place of the one that transformers wrote."""
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "architectures": ["PhiMoEForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_phimoe.PhiMoEConfig",
            "AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM",
        },
        "hidden_dropout": 0.0,
        "input_jitter_noise": 0.01,
        "router_aux_loss_coef": 0.0,
        "sliding_window": 131072,
        "eos_token_id": 32000,
        "original_max_position_embeddings": TRAINED,
        "torch_dtype": "bfloat16",
    }
    del config["dtype"], config["rope_scaling"]["rope_type"]
    return config


def test_released_layout(saved_phimoe: Callable[..., Any], tmp_path: Path) -> None:
    theirs, directory = saved_phimoe()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(released(directory)))
    for name in ("configuration_phimoe.py", "modeling_phimoe.py"):
        (tmp_path / name).write_text("raise SystemExit('code of a checkpoint ran')")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, device_map="auto", dtype="auto")
    assert isinstance(ours, PhimoeForCausalLM) and ours.dtype == torch.bfloat16
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.eos_token_id, config.hidden_dropout, config.sliding_window) == (32000, 0.0, 131072)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, trust_remote_code=True)
    ids = tokens(2, 20)
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits)


def test_fused_names_of_transformers_5(saved_phimoe: Callable[..., Any], tmp_path: Path) -> None:
    theirs, directory = saved_phimoe()
    fused: dict[str, Tensor] = {}
    for name, tensor in load(directory).state_dict().items():
        fused[name.replace(".block_sparse_moe.", ".mlp.")] = tensor
    assert "model.layers.2.mlp.experts.gate_up_proj" in fused and "model.layers.0.mlp.router.weight" in fused
    torch.save(fused, tmp_path / "pytorch_model.bin")
    config = theirs.config.to_dict()
    scaling = {**config.pop("rope_scaling"), "rope_theta": config.pop("rope_theta")}
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_parameters": scaling}))
    ids = tokens(2, 20)
    with torch.no_grad():
        assert_close(load(tmp_path)(ids).logits, theirs(ids).logits)


def test_defaults_are_those_of_the_documentation() -> None:
    ours, theirs = PhimoeConfig(), transformers.PhimoeConfig()
    for name in ours.to_dict():
        if name not in ("transformers_version", "torch_dtype"):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.num_experts == 16 and ours.original_max_position_embeddings is None


def test_trained_length_beside_the_dictionary_or_in_it() -> None:
    scaling = copy.deepcopy(TINY_PHIMOE["rope_scaling"])
    del scaling["original_max_position_embeddings"]
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    for fields in ({"rope_scaling": scaling}, {"rope_parameters": {**scaling, "rope_theta": 5.0}}):
        config = PhimoeConfig(**sizes, **fields, original_max_position_embeddings=16)
        assert config.original_max_position_embeddings == config.rope_scaling["original_max_position_embeddings"] == 16
    assert "original_max_position_embeddings" not in scaling, "the caller's dictionary was changed"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": "longrope"}, "rope_scaling must be a dictionary or None, got 'longrope'"),
        ({"rope_scaling": {"type": "spiral"}}, "unknown type 'spiral'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "must be of type 'longrope', got 'linear'"),
        (
            {"rope_scaling": {"short_mscale": None}},
            r"\['short_mscale'\] must be a positive number, got None",
        ),
        ({"rope_scaling": {"long_mscale": "1"}}, r"rope_scaling\['long_mscale'\] must be a positive number, got '1'"),
        ({"rope_scaling": {"original_max_position_embeddings": None}}, "original_max_position_embeddings.*got None"),
        ({"rope_scaling": {"long_factor": [1.0] * 3}}, "must list head_dim / 2 = 4 numbers, got 3"),
        ({"rope_scaling": {"short_factor": [1.0, 1.0, 0, 1.0]}}, r"\['short_factor'\]\[2\] must be a positive.*got 0"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok must be 2, which is what sparsemixer chooses, got 3"),
        ({"num_local_experts": 1}, "num_local_experts must be at least 2, got 1"),
        ({"sliding_window": 0}, "sliding_window must be a positive integer, got 0"),
        ({"input_jitter_noise": 1.5}, "input_jitter_noise must be a number from 0.0 to 1.0, got 1.5"),
        ({"hidden_act": "softplus"}, "unknown activation 'softplus'"),
        ({"pad_token_id": 97}, "pad_token_id must be a token id below vocab_size = 97"),
    ],
)
def test_unusable_values(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    fields = copy.deepcopy(fields)
    if isinstance(scaling := fields.get("rope_scaling"), dict) and "type" not in scaling:
        fields["rope_scaling"] = {**TINY_PHIMOE["rope_scaling"], **scaling}
    fields = {**TINY_PHIMOE, **fields}
    with pytest.raises(ValueError, match=message):
        PhimoeConfig(**fields)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phimoe", **fields}))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        AutoConfig.from_pretrained(tmp_path)
