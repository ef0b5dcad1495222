"""Switch Transformers against transformers 4.56.2, on checkpoints that transformers wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.switch_transformers import modeling_switch_transformers as reference
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from moekernels.checkpoint import CheckpointError, checkpoint_tensors
from moekernels.models import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    SwitchTransformersConfig,
    SwitchTransformersEncoderModel,
    SwitchTransformersForConditionalGeneration,
    SwitchTransformersModel,
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
)
from moekernels.nn import DynamicCache, EncoderDecoderCache, StaticCache
from tests.models.switch_checkpoints import HIDDEN, PAD, TINY, VOCAB, Pair, assert_close, batch, pair, write
from tests.tolerance import assert_accurate

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")

IMPLEMENTATIONS = ("sdpa", "eager")
E, H = TINY["num_experts"], HIDDEN

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


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(tmp_path_factory.mktemp("plain"))


@pytest.fixture(params=IMPLEMENTATIONS)
def models(request: pytest.FixtureRequest, plain: Pair) -> Pair:
    """The two models, ours with each attention function in turn."""
    plain.ours.set_attn_implementation(request.param)
    return plain


def all_close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other)


def sparse_only(router_outputs: tuple[tuple[Tensor, ...], ...]) -> tuple[Tensor, ...]:
    """The logits that transformers 4.56.2 returns, without its entries for dense layers."""
    return tuple(entry[0] for entry in router_outputs if len(entry) == 2)


def reloaded(directory: Path) -> Any:
    return SwitchTransformersForConditionalGeneration.from_pretrained(directory, progress=False)


# --- the router and the sparse layer ----------------------------------------------------------------------------------


def layers(**overrides: Any) -> tuple[Any, SwitchTransformersSparseMLP]:
    """The same sparse layer twice."""
    fields = {**TINY, **overrides}
    theirs = reference.SwitchTransformersSparseMLP(transformers.SwitchTransformersConfig(**fields))
    ours = SwitchTransformersSparseMLP(SwitchTransformersConfig(**fields))
    with torch.no_grad():
        theirs.router.classifier.weight.normal_()
        ours.router.load_state_dict(theirs.router.state_dict())
        for e, expert in enumerate(theirs.experts.values()):
            ours.experts.up_proj[e], ours.experts.down_proj[e] = expert.wi.weight, expert.wo.weight
    return theirs.eval(), ours.eval()


@torch.no_grad()
@pytest.mark.parametrize("capacity", [1, 3, 64])
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_router_and_layer(capacity: int, skewed: bool, bias: bool) -> None:
    theirs, ours = layers(expert_capacity=capacity, router_bias=bias)
    # Every other element of a wider tensor; rows are limited one by one.
    hidden = torch.randn(3, 11, 2 * H)[..., ::2]
    if skewed:
        hidden = hidden[:, :1].expand(-1, 11, -1)
    for mine, other in zip(ours.router(hidden), theirs.router(hidden), strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        assert_close(mine, other)
    out, logits = ours(hidden)
    expected, (expected_logits, _) = theirs(hidden)
    assert_close(out, expected)
    assert_close(logits, expected_logits)
    dropped = ours.router(hidden)[0].sum(-1) == 0
    assert (out[dropped] == 0).all()
    if skewed or capacity != 3:
        assert bool(dropped.any()) == (capacity < 64)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (4, 1)])
def test_few_tokens(shape: tuple[int, int]) -> None:
    theirs, ours = layers(expert_capacity=1)
    hidden = torch.randn(*shape, H)
    out, logits = ours(hidden)
    assert out.shape == hidden.shape and logits.shape == (*shape, E)
    dispatched, probs, _ = ours.router(hidden)
    assert dispatched.shape == (*shape, E) and probs.shape == (*shape, 1)
    if out.numel():
        # One token of a sequence always finds a place, whatever the other sequences choose.
        assert_close(out, theirs(hidden)[0])
        assert dispatched.sum() == 4


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_are_compared_in_the_dtype_of_the_tokens(dtype: torch.dtype) -> None:
    theirs, ours = layers()
    # Nearly equal logits: after rounding, probabilities tie, and the lowest index wins.
    hidden = (torch.randn(2, 40, H) * 1e-4).to(dtype)
    for mine, other in zip(ours.router(hidden), theirs.router(hidden), strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other) or mine.is_floating_point()
    assert torch.equal(ours.router(hidden)[1], theirs.router(hidden)[1])


@torch.no_grad()
def test_jitter_is_of_the_routers_input() -> None:
    theirs, ours = layers(router_jitter_noise=0.3, dropout_rate=0.0)
    hidden = torch.randn(2, 9, H).bfloat16()
    ours.train(), theirs.train()
    torch.manual_seed(7)
    expected = theirs.router(hidden)[2]
    torch.manual_seed(7)
    actual = ours.router(hidden)[2]
    assert_close(actual, expected)
    assert not torch.allclose(actual, ours.eval().router(hidden)[2], atol=1e-3)
    # In float32 too the experts get the tokens as they are.
    before = hidden.float()
    after = before.clone()
    ours.train()(after)
    assert torch.equal(before, after)


@torch.no_grad()
def test_padding_may_be_left_out() -> None:
    _, routed = layers(expert_capacity=2)
    _, ignoring = layers(expert_capacity=2, router_ignore_padding_tokens=True)
    ignoring.load_state_dict(routed.state_dict())
    hidden = torch.randn(1, 1, H).expand(2, 5, H)
    kept = torch.tensor([[False, False, True, True, True], [True, False, True, True, True]])
    assert (routed(hidden, kept)[0].abs().sum(-1) > 0).tolist() == [[True, True, False, False, False]] * 2
    served = (ignoring(hidden, kept)[0].abs().sum(-1) > 0).tolist()
    assert served == [[False, False, True, True, False], [True, False, True, False, False]]


def test_a_gate_which_transformers_cannot_build() -> None:
    fields = {**TINY, "dense_act_fn": "gated-gelu"}
    with pytest.raises(KeyError):
        reference.SwitchTransformersDenseActDense(transformers.SwitchTransformersConfig(**fields))
    ours = SwitchTransformersSparseMLP(SwitchTransformersConfig(**fields)).eval()
    t5 = transformers.T5Config(d_model=H, d_ff=TINY["d_ff"], feed_forward_proj="gated-gelu")
    experts = [T5DenseGatedActDense(t5).eval() for _ in range(E)]
    hidden = torch.randn(2, 7, H)
    with torch.no_grad():
        for e, expert in enumerate(experts):
            ours.experts.gate_up_proj[e] = torch.cat((expert.wi_0.weight, expert.wi_1.weight))
            ours.experts.down_proj[e] = expert.wo.weight
        one_hot, probs, _ = ours.router(hidden)
        expected = torch.stack([expert(hidden) for expert in experts], -1) @ one_hot.float()[..., None]
        assert_close(ours(hidden)[0], probs * expected[..., 0])


REAL: dict[str, dict[str, int]] = {
    "switch-base-8": {"num_experts": 8, "d_model": 768, "d_ff": 3072},
    "switch-base-128": {"num_experts": 128, "d_model": 768, "d_ff": 3072},
}


@torch.no_grad()
@pytest.mark.parametrize("name", REAL)
def test_layers_of_the_released_sizes(name: str) -> None:
    # Few tokens reach few of the experts; the limit of 4 drops some.
    fields = {**REAL[name], "expert_capacity": 4}
    theirs = reference.SwitchTransformersSparseMLP(transformers.SwitchTransformersConfig(**REAL["switch-base-8"]))
    ours = SwitchTransformersSparseMLP(SwitchTransformersConfig(**fields)).eval()
    theirs.router = reference.SwitchTransformersTop1Router(transformers.SwitchTransformersConfig(**fields))
    theirs.router.load_state_dict(ours.router.state_dict())
    hidden = torch.randn(2, 24, 768)
    hidden[:, ::3] = hidden[:, :1]
    for e in ours.router(hidden)[0].sum((0, 1)).nonzero()[:, 0].tolist():
        expert = reference.SwitchTransformersDenseActDense(
            transformers.SwitchTransformersConfig(**{**REAL[name], "num_experts": 1})
        )
        expert.wi.weight, expert.wo.weight = (
            torch.nn.Parameter(stack[e]) for stack in (ours.experts.up_proj, ours.experts.down_proj)
        )
        theirs.experts[f"expert_{e}"] = expert
    expected = theirs.eval()(hidden)[0]
    out = ours(hidden)[0]
    assert (out.abs().sum(-1) == 0).any()
    assert_close(out, expected)
    rounded = ours.to(torch.bfloat16)(hidden.bfloat16())[0]
    plain = theirs.to(torch.bfloat16)(hidden.bfloat16())[0]
    # In the lower precision other experts may win; those tokens are left out.
    same = (ours.router(hidden.bfloat16())[0] == ours.router(hidden)[0]).all(-1)
    assert_accurate(rounded[same], expected[same].double(), plain[same])


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
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'decoder\.block\.2"):
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
    cache = EncoderDecoderCache(StaticCache(models.ours.config, 2, 8) if cache_kind == "static" else DynamicCache())
    encoded = models.ours.get_encoder()(**inputs)
    pieces = []
    # A prefix, a chunk on top of it, then a single token.
    for start, stop in [(0, 3), (3, 5), (5, 6)]:
        out = models.ours(
            encoder_outputs=encoded,
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=target[:, start:stop],
            decoder_attention_mask=mask[:, :stop] if padded else None,
            past_key_values=cache,
        )
        assert out.past_key_values is cache and cache.get_seq_length() == stop
        pieces.append(out.logits)
    actual = torch.cat(pieces, dim=1)
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
    _, sparse = layers(dropout_rate=1.0)
    assert (sparse.train()(torch.randn(1, 4, H))[0] == 0).all()


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


# --- checkpoints ------------------------------------------------------------------------------------------------------


def rewrite(plain: Pair, directory: Path, tensors: dict[str, Tensor], pickled: bool = False) -> Path:
    (directory / "config.json").write_text((plain.directory / "config.json").read_text())
    if pickled:
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
def test_transformers_reads_what_we_save(plain: Pair, tmp_path: Path, gated: bool) -> None:
    ours = plain.ours
    if gated:
        torch.manual_seed(0)
        ours = SwitchTransformersForConditionalGeneration(
            SwitchTransformersConfig(**{**TINY, "dense_act_fn": "gated-gelu"})
        ).eval()
    ours.save_pretrained(tmp_path, max_shard_size="20KB")
    saved: dict[str, Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        saved |= load_file(file)
    assert_close(reloaded(tmp_path)(**batch()).logits, ours(**batch()).logits)
    if gated:
        for name in ("wi_0", "wi_1", "wo"):
            assert f"encoder.block.1.layer.1.mlp.experts.expert_4.{name}.weight" in saved
            assert f"decoder.block.0.layer.2.mlp.{name}.weight" in saved
        return
    assert saved.keys() == load_file(plain.directory / "model.safetensors").keys()
    theirs, info = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info
    assert_close(theirs(**batch()).logits, plain.theirs(**batch()).logits)


@torch.no_grad()
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("tied", ["all", "shared.weight", "encoder.embed_tokens.weight", "lm_head.weight"])
def test_layouts_of_the_hub(plain: Pair, tmp_path: Path, tied: str, pickled: bool) -> None:
    tensors = dict(plain.theirs.state_dict())
    for name in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        if tied not in ("all", name):
            del tensors[name]
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(8, 4)
    # Released files are in half precision, but for the routers that ran once.
    half = {n: t if "classifier" in n else t.bfloat16() for n, t in tensors.items()}
    rewrite(plain, tmp_path, half, pickled)
    ours = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16, progress=False)
    router = "encoder.block.1.layer.1.mlp.router.classifier.weight"
    assert torch.equal(ours.get_parameter(router), tensors[router]) and ours.shared.weight.dtype == torch.bfloat16
    rewrite(plain, tmp_path, tensors, pickled)
    assert_close(reloaded(tmp_path)(**batch()).logits, plain.theirs(**batch()).logits)


@torch.no_grad()
def test_sharded_pickles(plain: Pair, tmp_path: Path) -> None:
    plain.theirs.save_pretrained(tmp_path, safe_serialization=False, max_shard_size="30KB")
    assert len(list(tmp_path.glob("pytorch_model-*.bin"))) > 1
    assert_close(reloaded(tmp_path)(**batch()).logits, plain.theirs(**batch()).logits)


def test_incomplete_checkpoints(plain: Pair, tmp_path: Path) -> None:
    tensors = load_file(plain.directory / "model.safetensors")
    name = "encoder.block.1.layer.1.mlp.experts.expert_3.wo.weight"
    del tensors[name]
    rewrite(plain, tmp_path, tensors)
    with pytest.raises(CheckpointError, match=f"missing tensor '{name}'"):
        reloaded(tmp_path)


@torch.no_grad()
def test_resizing_the_vocabulary(tmp_path: Path) -> None:
    theirs, ours, _ = pair(tmp_path)
    embedding = ours.resize_token_embeddings(VOCAB + 7)
    assert embedding is ours.shared is ours.decoder.embed_tokens
    assert ours.lm_head.weight is embedding.weight and ours.config.vocab_size == VOCAB + 7
    assert_close(ours(**batch()).logits[..., :VOCAB], theirs(**batch()).logits)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_new_weights_are_spread_as_in_the_reference(factor: float) -> None:
    fields = {**TINY, "d_model": 96, "d_kv": 16, "d_ff": 128, "initializer_factor": factor}
    fields |= {"tie_word_embeddings": False, "dense_act_fn": "relu"}
    ours = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**fields))
    theirs = transformers.SwitchTransformersForConditionalGeneration(transformers.SwitchTransformersConfig(**fields))
    expected = dict(theirs.named_parameters())
    for name, tensor in checkpoint_tensors(ours, ours.key_map):
        if "norm" in name:
            assert torch.equal(tensor, expected[name])
        else:
            # Few numbers are a poor estimate.
            low, high = (0.85, 1.15) if tensor.numel() > 1000 else (0.5, 2.0)
            assert low < (tensor.std() / expected[name].std()).item() < high, name


# --- configurations ---------------------------------------------------------------------------------------------------


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


def test_other_experts_cannot_be_fused() -> None:
    with pytest.raises(ValueError, match="expert_class must be SwitchTransformersDenseActDense, got Linear"):
        SwitchTransformersSparseMLP(SwitchTransformersConfig(**TINY), torch.nn.Linear)
    assert SwitchTransformersTop1Router(SwitchTransformersConfig(**TINY)).num_experts == E


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


def test_flash_attention_has_no_position_bias(plain: Pair) -> None:
    with pytest.raises(ValueError, match="attn_implementation must be one of sdpa, eager, got 'flash_attention_2'"):
        AutoModelForSeq2SeqLM.from_pretrained(plain.directory, attn_implementation="flash_attention_2", progress=False)
