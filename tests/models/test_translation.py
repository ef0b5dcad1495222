"""What M2M100 and NLLB-MoE share, against transformers 4.56.2 on checkpoints that transformers wrote."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moekernels.checkpoint import CheckpointError, checkpoint_tensors
from moekernels.models import AutoModel, AutoModelForSeq2SeqLM
from moekernels.models.outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput, Seq2SeqMoEOutput
from moekernels.models.translation import shift_tokens_right
from moekernels.nn import DynamicCache, EncoderDecoderCache
from tests.models.encoder_decoder import decode_in_pieces, rewrite
from tests.models.translation_checkpoints import HIDDEN, OURS, PAD, THEIRS, VOCAB, Pair, assert_close, batch, pair
from tests.nn.test_attention import FakeFlashAttention
from tests.tolerance import assert_accurate

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")

KINDS = ("m2m_100", "nllb-moe")
IMPLEMENTATIONS = ("sdpa", "eager")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(tmp_path_factory.mktemp("plain"), kind)


@pytest.fixture(params=IMPLEMENTATIONS)
def models(request: pytest.FixtureRequest, plain: Pair) -> Pair:
    """The two models, ours with each attention function in turn."""
    plain.ours.set_attn_implementation(request.param)
    return plain


def all_close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other)


# --- the forward pass -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_output_agrees(models: Pair) -> None:
    labels = batch()["decoder_input_ids"].clone()
    labels[1, -2:] = -100
    inputs = {**batch(), "labels": labels, "output_hidden_states": True, "output_attentions": True}
    expected, actual = models.theirs(**inputs), models.ours(**inputs)
    for name in ("logits", "loss", "encoder_last_hidden_state"):
        assert_close(actual[name], expected[name])
    for stack in ("encoder", "decoder"):
        all_close(actual[f"{stack}_hidden_states"], expected[f"{stack}_hidden_states"])
        all_close(actual[f"{stack}_attentions"], expected[f"{stack}_attentions"])
    all_close(actual.cross_attentions, expected.cross_attentions)
    assert actual.past_key_values.get_seq_length() == 6
    del inputs["output_attentions"]
    without = models.ours(**inputs)
    assert without.decoder_attentions is None and without.cross_attentions is None
    assert_close(without.logits, expected.logits)


@torch.no_grad()
def test_fields_come_in_the_order_of_transformers(plain: Pair) -> None:
    for more in ({}, {"output_hidden_states": True}, {"labels": batch()["decoder_input_ids"]}):
        expected = plain.theirs(**batch(), **more)
        assert list(plain.ours(**batch(), **more)) == list(expected)
        as_tuple = plain.ours(**batch(), return_dict=False, **more)
        assert isinstance(as_tuple, tuple) and len(as_tuple) == len(expected)
        assert_close(as_tuple[1 if "labels" in more else 0], expected.logits)
    base = plain.ours.model(**batch())
    assert list(base) == list(plain.theirs.model(**batch()))
    assert_close(base.last_hidden_state, plain.theirs.model(**batch()).last_hidden_state)


@torch.no_grad()
def test_embeddings_instead_of_tokens(models: Pair) -> None:
    source, target = torch.randn(2, 7, HIDDEN), torch.randn(2, 5, HIDDEN)
    inputs = {"inputs_embeds": source, "decoder_inputs_embeds": target}
    assert_close(models.ours(**inputs).logits, models.theirs(**inputs).logits)
    ids = batch()["input_ids"]
    assert_close(models.ours.get_input_embeddings()(ids), models.theirs.get_input_embeddings()(ids))


@torch.no_grad()
def test_labels_become_the_decoders_input(plain: Pair) -> None:
    labels = batch()["decoder_input_ids"].clone()
    labels[0, -3:] = -100
    source = {name: value for name, value in batch().items() if name != "decoder_input_ids"}
    expected, actual = plain.theirs(**source, labels=labels), plain.ours(**source, labels=labels)
    assert_close(actual.logits, expected.logits)
    assert_close(actual.loss, expected.loss)
    shifted = shift_tokens_right(labels, PAD, 2)
    assert shifted[0].tolist() == [2, *labels[0, :3].tolist(), PAD, PAD]
    assert_close(plain.ours(**source, decoder_input_ids=shifted).logits, expected.logits)


@torch.no_grad()
def test_sequences_longer_than_the_position_table(plain: Pair) -> None:
    # Longer, then shorter again: what has grown stays right.
    for length in (24, 60, 5):
        ids = torch.randint(3, VOCAB, (1, length))
        inputs = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
        assert_close(plain.ours(**inputs).logits, plain.theirs(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("form", ["bool", "additive"])
def test_final_masks_are_taken_as_they_are(models: Pair, form: str) -> None:
    inputs = batch()
    visible = inputs["attention_mask"].bool()[:, None, None].expand(-1, 1, 9, -1)
    triangle = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    masks = {"attention_mask": visible, "decoder_attention_mask": triangle}
    if form == "additive":
        low = torch.finfo(torch.float32).min
        masks = {name: torch.zeros(mask.shape).masked_fill(~mask, low) for name, mask in masks.items()}
    assert_close(models.ours(**{**inputs, **masks}).logits, models.ours(**inputs).logits)


@torch.no_grad()
def test_head_masks(models: Pair) -> None:
    masks = {
        "head_mask": torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.5, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]),
        "decoder_head_mask": torch.tensor([[0.0, 1.0], [1.0, 0.3]]),
        "cross_attn_head_mask": torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
    }
    inputs = {**batch(), **masks, "output_attentions": True}
    expected, actual = models.theirs(**inputs), models.ours(**inputs)
    assert_close(actual.logits, expected.logits)
    all_close(actual.cross_attentions, expected.cross_attentions)
    del inputs["output_attentions"]
    # Under sdpa too, where transformers ignores them.
    assert_close(models.ours(**inputs).logits, expected.logits)
    one_row = models.ours(**batch(), head_mask=masks["head_mask"][0]).logits
    assert_close(one_row, models.theirs(**batch(), head_mask=masks["head_mask"][:1].expand(3, -1)).logits)


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 3, 5])])
def test_logits_to_keep(plain: Pair, keep: int | Tensor) -> None:
    kept = slice(-keep, None) if isinstance(keep, int) else keep
    assert_close(plain.ours(**batch(), logits_to_keep=keep).logits, plain.theirs(**batch()).logits[:, kept])
    with pytest.raises(ValueError, match="logits_to_keep cannot be combined with labels"):
        plain.ours(**batch(), labels=batch()["decoder_input_ids"], logits_to_keep=keep)


# --- the cache --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_with_a_cache_equals_one_pass(models: Pair, cache_kind: str, padded: bool) -> None:
    inputs = batch()
    target, mask = inputs.pop("decoder_input_ids"), torch.ones(2, 6, dtype=torch.long)
    if padded:
        mask[1, :2] = 0
        target = target.masked_fill(mask == 0, PAD)
    expected = models.theirs(**inputs, decoder_input_ids=target, decoder_attention_mask=mask, use_cache=False).logits
    actual = decode_in_pieces(models.ours, inputs, target, mask if padded else None, cache_kind)
    assert_close(actual[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_one_source_serves_several_targets(models: Pair) -> None:
    inputs = batch()
    targets = torch.randint(3, VOCAB, (6, 4))
    repeated = {name: inputs[name].repeat_interleave(3, 0) for name in ("input_ids", "attention_mask")}
    expected = models.theirs(**repeated, decoder_input_ids=targets, output_attentions=True)
    encoded = models.ours.get_encoder()(inputs["input_ids"], inputs["attention_mask"])
    for mask in (inputs["attention_mask"], repeated["attention_mask"]):
        cache = EncoderDecoderCache()
        step = {"encoder_outputs": encoded, "attention_mask": mask, "past_key_values": cache}
        first = models.ours(decoder_input_ids=targets[:, :3], **step)
        last = models.ours(decoder_input_ids=targets[:, 3:], **step)
        assert_close(torch.cat((first.logits, last.logits), 1), expected.logits)
        assert cache.cross_attention_cache[0][0].shape[0] == 2
    with_maps = models.ours(
        encoder_outputs=encoded,
        attention_mask=inputs["attention_mask"],
        decoder_input_ids=targets,
        output_attentions=True,
    )
    all_close(with_maps.cross_attentions, expected.cross_attentions)


@torch.no_grad()
def test_keys_of_the_source_are_computed_once(plain: Pair) -> None:
    encoded = plain.ours.get_encoder()(batch()["input_ids"])
    cache = EncoderDecoderCache()
    step = {"encoder_outputs": encoded, "past_key_values": cache, "decoder_input_ids": torch.tensor([[2], [2]])}
    plain.ours(**step)
    before = [cache.cross(layer)[0] for layer in range(2)]
    calls: list[Any] = []
    hooks = [
        module.register_forward_hook(lambda *_: calls.append(1))
        for name, module in plain.ours.named_modules()
        if name.endswith(("encoder_attn.k_proj", "cross_attention.k_proj"))
    ]
    plain.ours(**step)
    for hook in hooks:
        hook.remove()
    assert len(hooks) == 2 and not calls
    assert all(cache.cross(layer)[0] is not None for layer in range(2))
    assert [cache.cross(layer)[0].data_ptr() for layer in range(2)] == [key.data_ptr() for key in before]


@torch.no_grad()
def test_a_cache_is_made_only_when_asked_for(plain: Pair) -> None:
    assert plain.ours(**batch(), use_cache=False).past_key_values is None
    cache = plain.ours(**batch()).past_key_values
    assert isinstance(cache, EncoderDecoderCache) and len(cache.cross_attention_cache) == 2


@torch.no_grad()
def test_what_the_encoder_returned_may_be_passed_on(plain: Pair) -> None:
    inputs = batch()
    expected = plain.ours(**inputs).logits
    encoded = plain.ours.get_encoder()(inputs.pop("input_ids"), inputs["attention_mask"], output_hidden_states=True)
    for form in (encoded, encoded.to_tuple(), (encoded[0],), BaseModelOutput(last_hidden_state=encoded[0])):
        out = plain.ours(**inputs, encoder_outputs=form)
        assert_close(out.logits, expected)
        assert_close(out.encoder_last_hidden_state, encoded[0])
    assert len(plain.ours(**inputs, encoder_outputs=encoded).encoder_hidden_states) == 4


# --- training ---------------------------------------------------------------------------------------------------------

NO_DROPOUT = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}


def without_dropout(kind: str, **overrides: float) -> dict[str, float]:
    more = {"moe_token_dropout": 0.0} if kind == "nllb-moe" else {}
    return {**NO_DROPOUT, **more, **overrides}


def gradients(model: Any) -> dict[str, Tensor]:
    """By the names of the checkpoint."""
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return {name.removeprefix("model."): tensor for name, tensor in checkpoint_tensors(model, model.key_map)}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_agree(kind: str, tmp_path: Path, implementation: str) -> None:
    theirs, ours, _ = pair(tmp_path, kind, implementation, **without_dropout(kind))
    for model in (theirs, ours):
        model.train()(**batch(), labels=batch()["decoder_input_ids"]).loss.backward()
    expected = {name.removeprefix("model."): parameter.grad for name, parameter in theirs.named_parameters()}
    actual = gradients(ours)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        # An expert that no token visits has no gradient there, and a zero one here.
        assert_close(gradient, torch.zeros_like(gradient) if expected[name] is None else expected[name])


def test_gradient_checkpointing_changes_nothing(kind: str, tmp_path: Path) -> None:
    _, ours, directory = pair(tmp_path, kind, **without_dropout(kind))
    checkpointed = OURS[kind].from_pretrained(directory, progress=False).train()
    checkpointed.gradient_checkpointing_enable()
    for model in (ours.train(), checkpointed):
        out = model(**batch(), labels=batch()["decoder_input_ids"])
        out.loss.backward()
    assert out.past_key_values is None
    for mine, other in zip(checkpointed.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    with pytest.raises(ValueError, match="cannot be combined with gradient checkpointing"):
        checkpointed(**batch(), past_key_values=EncoderDecoderCache())


@torch.no_grad()
@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "activation_dropout"])
def test_every_dropout_is_where_it_belongs(kind: str, tmp_path: Path, name: str) -> None:
    # Dropping everything needs no luck to agree.
    theirs, ours, _ = pair(tmp_path, kind, "eager", **without_dropout(kind, **{name: 1.0}))
    evaluated = ours(**batch()).logits
    assert_close(evaluated, theirs(**batch()).logits)
    trained = ours.train()(**batch()).logits
    assert_close(trained, theirs.train()(**batch()).logits)
    assert not torch.allclose(trained, evaluated, atol=1e-2)


@torch.no_grad()
def test_layers_are_left_out_in_training(kind: str, tmp_path: Path) -> None:
    drops = without_dropout(kind, encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    theirs, ours, _ = pair(tmp_path, kind, **drops)
    seen = set()
    for seed in range(6):
        results = []
        for model in (theirs.train(), ours.train()):
            torch.manual_seed(seed)
            results.append(model(**batch(), use_cache=False).logits)
        assert_close(results[1], results[0])
        seen.add(round(results[1].sum().item(), 3))
    assert len(seen) > 1
    # A layer that is not there would leave a gap in a cache.
    assert ours(**batch()).past_key_values is None
    kept = ours(**batch(), past_key_values=EncoderDecoderCache(), encoder_outputs=(torch.ones(2, 9, HIDDEN),)).logits
    expected = ours.eval()(**batch(), encoder_outputs=(torch.ones(2, 9, HIDDEN),)).logits
    assert_close(kept, expected)


# --- half precision ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "flash_attention_2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(
    kind: str, tmp_path: Path, dtype: torch.dtype, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", FakeFlashAttention())
    # With two experts every token visits both: which are chosen may not depend on a rounding here.
    sparse = {"num_experts": 2} if kind == "nllb-moe" else {}
    theirs, _, directory = pair(tmp_path, kind, **sparse)
    ours = OURS[kind].from_pretrained(directory, dtype=dtype, attn_implementation=implementation, progress=False)
    assert ours.dtype == dtype
    plain = THEIRS[kind][1].from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
    kept = batch()["attention_mask"].bool()
    # Float32 is exact enough to be the truth here.
    expected, rough, actual = (model(**batch()) for model in (theirs, plain, ours))
    assert_accurate(actual.logits, expected.logits.double(), rough.logits)
    # Piece by piece, too.
    inputs = batch()
    target, cache = inputs.pop("decoder_input_ids"), EncoderDecoderCache()
    step = {"encoder_outputs": ours.get_encoder()(**inputs), "attention_mask": inputs["attention_mask"]}
    pieces = [ours(decoder_input_ids=part, past_key_values=cache, **step).logits for part in target.split([3, 2, 1], 1)]
    assert_accurate(torch.cat(pieces, dim=1), expected.logits.double(), rough.logits)
    assert_accurate(
        actual.encoder_last_hidden_state[kept],
        expected.encoder_last_hidden_state[kept].double(),
        rough.encoder_last_hidden_state[kept],
    )


# --- checkpoints ------------------------------------------------------------------------------------------------------


def reloaded(kind: str, directory: Path) -> Any:
    return OURS[kind].from_pretrained(directory, progress=False)


@torch.no_grad()
def test_transformers_reads_what_we_save(plain: Pair, kind: str, tmp_path: Path) -> None:
    plain.ours.save_pretrained(tmp_path, max_shard_size="20KB")
    saved: dict[str, Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        saved |= load_file(file)
    assert saved.keys() == load_file(plain.directory / "model.safetensors").keys()
    theirs, info = THEIRS[kind][1].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_close(theirs(**batch()).logits, plain.theirs(**batch()).logits)
    assert_close(reloaded(kind, tmp_path)(**batch()).logits, plain.theirs(**batch()).logits)


@torch.no_grad()
@pytest.mark.parametrize(("prefix", "pickled"), [(True, False), (False, True)])
@pytest.mark.parametrize("tied", ["all", "shared", "encoder", "head"])
def test_layouts_of_the_hub(plain: Pair, kind: str, tmp_path: Path, prefix: bool, tied: str, pickled: bool) -> None:
    tensors = dict(plain.theirs.state_dict())
    same = {
        "shared": "model.shared.weight",
        "encoder": "model.encoder.embed_tokens.weight",
        "decoder": "model.decoder.embed_tokens.weight",
        "head": "lm_head.weight",
    }
    for name in same.values():
        if tied not in ("all", *(key for key, value in same.items() if value == name)):
            del tensors[name]
    # What older files hold besides.
    for stack in ("encoder", "decoder"):
        tensors[f"model.{stack}.embed_positions.weights"] = torch.randn(26, HIDDEN)
        tensors[f"model.{stack}.version"] = torch.tensor([3.0])
        tensors[f"model.{stack}.embed_positions._float_tensor"] = torch.zeros(1)
    if not prefix:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    rewrite(plain.directory, tmp_path, tensors, pickled)
    expected = plain.theirs(**batch()).logits
    assert_close(reloaded(kind, tmp_path)(**batch()).logits, expected)
    if tied != "head":
        base = AutoModel.from_pretrained(tmp_path, progress=False)
        assert_close(base(**batch()).last_hidden_state, plain.ours.model(**batch()).last_hidden_state)


@torch.no_grad()
def test_an_untied_head(kind: str, tmp_path: Path) -> None:
    theirs, ours, _ = pair(tmp_path, kind, tie_word_embeddings=False)
    assert ours.lm_head.weight is not ours.model.shared.weight
    assert_close(ours(**batch()).logits, theirs(**batch()).logits)
    ours.save_pretrained(tmp_path / "again")
    assert_close(reloaded(kind, tmp_path / "again")(**batch()).logits, theirs(**batch()).logits)


def test_incomplete_checkpoints(plain: Pair, kind: str, tmp_path: Path) -> None:
    tensors = load_file(plain.directory / "model.safetensors")
    del tensors["model.encoder.layers.0.self_attn.q_proj.bias"]
    rewrite(plain.directory, tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"missing tensor 'model.encoder.layers.0.self_attn.q_proj.bias'"):
        reloaded(kind, tmp_path)


@torch.no_grad()
def test_auto_classes(plain: Pair, kind: str) -> None:
    ours = AutoModelForSeq2SeqLM.from_pretrained(plain.directory, progress=False)
    assert type(ours) is OURS[kind]
    assert type(AutoModel.from_pretrained(plain.directory, progress=False)) is type(ours.model)
    assert isinstance(ours(**batch()), Seq2SeqLMOutput if kind == "m2m_100" else Seq2SeqMoEOutput)
    if kind == "m2m_100":
        assert isinstance(ours.model(**batch()), Seq2SeqModelOutput)
        assert isinstance(ours.get_encoder()(batch()["input_ids"]), BaseModelOutput)


def test_model_types_are_spelled_in_two_ways(plain: Pair, kind: str, tmp_path: Path) -> None:
    for file in plain.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = kind.replace("-", "_")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path, progress=False)) is OURS[kind]


@torch.no_grad()
def test_resizing_the_vocabulary(kind: str, tmp_path: Path) -> None:
    theirs, ours, _ = pair(tmp_path, kind)
    embedding = ours.resize_token_embeddings(VOCAB + 7)
    assert embedding is ours.get_input_embeddings() is ours.get_encoder().embed_tokens
    assert ours.lm_head.weight is embedding.weight and ours.config.vocab_size == VOCAB + 7
    assert_close(ours(**batch()).logits[..., :VOCAB], theirs(**batch()).logits)


# --- configurations ---------------------------------------------------------------------------------------------------


def test_defaults_and_aliases(kind: str) -> None:
    ours, theirs = OURS[kind].config_class(), THEIRS[kind][0]()
    for name, value in ours.to_dict().items():
        if name not in ("id2label", "label2id", "torch_dtype", "transformers_version"):
            assert value == getattr(theirs, name), name
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "model_type"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_configurations_are_read_and_written(kind: str, plain: Pair, tmp_path: Path) -> None:
    config_class = OURS[kind].config_class
    # The file also has num_hidden_layers, which may not win over what is asked for.
    assert config_class.from_pretrained(plain.directory, encoder_layers=5).encoder_layers == 5
    config_class.from_pretrained(plain.directory).save_pretrained(tmp_path)
    theirs, written = plain.theirs.config.to_dict(), THEIRS[kind][0].from_pretrained(tmp_path).to_dict()
    skipped = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
    for name in theirs.keys() - set(skipped):
        assert written[name] == theirs[name], name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 30}, "d_model must be a multiple of 16 encoder heads"),
        ({"decoder_layers": 0}, "decoder_layers must be a positive integer"),
        ({"encoder_layerdrop": 1.5}, "encoder_layerdrop must be a number from 0.0 to 1.0"),
        ({"pad_token_id": None}, "pad_token_id must be a token id"),
        ({"activation_function": "mish"}, "unknown activation 'mish'"),
    ],
)
def test_unusable_configurations(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OURS[kind].config_class(**fields)


# --- bad input --------------------------------------------------------------------------------------------------------


def cached(model: Any) -> EncoderDecoderCache:
    return model(**batch()).past_key_values


BAD_INPUT: dict[str, tuple[Any, str]] = {
    "no target": (
        lambda m: {"decoder_input_ids": None},
        r"decoder_inputs_embeds must be given, got neither \(and no lab",
    ),
    "two targets": (lambda m: {"decoder_inputs_embeds": torch.ones(2, 6, HIDDEN)}, "must be given, got both"),
    "two sources": (lambda m: {"inputs_embeds": torch.ones(2, 9, HIDDEN)}, "input_ids and inputs_embeds must be given"),
    "no source": (lambda m: {"input_ids": None}, "input_ids and inputs_embeds must be given, got neither"),
    "short mask": (lambda m: {"attention_mask": torch.ones(2, 8)}, r"attention_mask must be \[2, 9\].*got \[2, 8\]"),
    "target mask": (lambda m: {"decoder_attention_mask": torch.ones(2, 9)}, r"must be \[2, 6\].*got \[2, 9\]"),
    "head mask": (lambda m: {"head_mask": torch.ones(2, 4)}, r"head_mask must be \[3, 4\] \(layers, heads\) or \[4\]"),
    "cross heads": (lambda m: {"cross_attn_head_mask": torch.ones(5)}, r"cross_attn_head_mask must be \[2, 2\]"),
    "labels": (
        lambda m: {"labels": torch.full((2, 6), VOCAB)},
        f"labels must be from 0 to {VOCAB - 1}, or -100.*{VOCAB}",
    ),
    "negative labels": (lambda m: {"labels": torch.full((2, 6), -3)}, "labels must be from 0.*got -3"),
    "label shape": (lambda m: {"labels": torch.ones(2, 5, dtype=torch.long)}, "labels must have the shape"),
    "not an output": (lambda m: {"encoder_outputs": "x"}, "encoder_outputs must be what the encoder returns, got str"),
    "source width": (
        lambda m: {"encoder_outputs": (torch.ones(2, 9, HIDDEN + 1),)},
        rf"must begin with a tensor \[batch, length, {HIDDEN}\], got \[2, 9, {HIDDEN + 1}\]",
    ),
    "source rows": (lambda m: {"encoder_outputs": (torch.ones(3, 9, HIDDEN),)}, "has 3 rows, which must be as many as"),
    "other source": (
        lambda m: {
            "encoder_outputs": (torch.ones(2, 7, HIDDEN),),
            "attention_mask": None,
            "past_key_values": cached(m),
        },
        "belongs to other encoder_outputs: it has 2 rows of 9 source tokens, got 2 of 7",
    ),
    "cache": (lambda m: {"past_key_values": DynamicCache()}, "must be a moekernels EncoderDecoderCache.*DynamicCache"),
}


@torch.no_grad()
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(plain: Pair, case: str) -> None:
    make, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        plain.ours(**{**batch(), **make(plain.ours)})


def test_labels_need_a_start_token() -> None:
    with pytest.raises(ValueError, match="pad_token_id and decoder_start_token_id, got 1 and None"):
        shift_tokens_right(torch.ones(1, 2, dtype=torch.long), 1, None)


def test_flash_attention_says_what_to_install(plain: Pair, kind: str) -> None:
    with warnings.catch_warnings(), pytest.raises(ImportError, match="pip install flash-attn"):
        OURS[kind].from_pretrained(plain.directory, attn_implementation="flash_attention_2")
