"""The methods that all models of transformers have, held against it on the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import moekernels as mk
from tests.models.tiny import CONFIGS, base_class, head_class, inputs

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")

NAMES = list(CONFIGS)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Our model with a head and theirs, with the same weights."""
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(3)
        theirs = getattr(transformers, head_class(name).__name__)(transformers.AutoConfig.for_model(**config.to_dict()))
        directory = tmp_path_factory.mktemp("saved")
        theirs.save_pretrained(directory)
        made[name] = head_class(name).from_pretrained(directory), theirs.eval()
    return made


@pytest.fixture(params=NAMES)
def pair(request: pytest.FixtureRequest, pairs: dict[str, tuple[Any, Any]]) -> tuple[Any, Any]:
    return copy.deepcopy(pairs[request.param])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs(model.config.model_type)).logits
    return found


def test_sizes(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.get_memory_footprint(return_buffers=False) == theirs.get_memory_footprint(return_buffers=False)
    buffers = sum(buffer.nbytes for buffer in ours.buffers())
    assert ours.get_memory_footprint() == 4 * ours.num_parameters() + buffers
    for parameter in ours.parameters():
        parameter.requires_grad_(False)
    assert ours.num_parameters(only_trainable=True) == 0


def test_kinds(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    assert ours.can_generate() and type(ours).can_generate()
    assert ours.base_model_prefix == theirs.base_model_prefix or type(ours).__name__.startswith("Switch")
    assert ours.main_input_name == theirs.main_input_name
    ours.add_model_tags("first")
    ours.add_model_tags(["first", "second"])
    assert ours.model_tags == ["first", "second"]
    assert ours.name_or_path == theirs.name_or_path or ours.name_or_path == ours.config.name_or_path
    assert ours.device == theirs.device and ours.dtype == theirs.dtype
    for name in NAMES:
        assert not base_class(name).can_generate()


def test_embeddings(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    for access in ("get_input_embeddings", "get_output_embeddings"):
        torch.testing.assert_close(getattr(ours, access)().weight, getattr(theirs, access)().weight)
    before = logits(ours)
    new = torch.nn.Embedding.from_pretrained(ours.get_input_embeddings().weight.detach() * 2, freeze=False)
    ours.set_input_embeddings(new)
    theirs.set_input_embeddings(copy.deepcopy(new))
    for model in pair:
        model.tie_weights()
    assert ours.get_input_embeddings().weight is new.weight
    if type(ours).__name__.startswith(("M2M100", "Nllb")):
        # Theirs replaces the scaled embedding by the one given, and forgets the scale.
        assert not torch.allclose(logits(ours), before)
    else:
        torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-4)
    head = torch.nn.Linear(16, 61, bias=False)
    ours.set_output_embeddings(head)
    assert ours.get_output_embeddings() is head is ours.lm_head


def test_stacks(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    assert type(ours.get_decoder()).__name__.removesuffix("Stack") in (
        type(theirs.get_decoder()).__name__.removesuffix("Stack"),
        "SwitchTransformersDecoder",
    )
    base = ours.base_model
    assert ours.get_decoder() is base.get_decoder()
    if ours.config.is_encoder_decoder:
        assert ours.get_encoder() is base.get_encoder() is base.encoder


@pytest.mark.parametrize("size", [80, 50])
@pytest.mark.parametrize("mean_resizing", [True, False])
def test_resize_token_embeddings(pair: tuple[Any, Any], size: int, mean_resizing: bool) -> None:
    ours, theirs = pair
    before = logits(ours)
    for model in pair:
        model.resize_token_embeddings(size, mean_resizing=mean_resizing)
    kept = min(size, 61)
    assert ours.config.vocab_size == theirs.config.vocab_size == size
    assert logits(ours).shape == logits(theirs).shape
    torch.testing.assert_close(logits(ours)[..., :kept], before[..., :kept])
    for access in ("get_input_embeddings", "get_output_embeddings"):
        mine, other = (getattr(model, access)().weight.detach() for model in pair)
        assert mine.shape == other.shape == (size, 16)
        torch.testing.assert_close(mine[:kept], other[:kept])
        if mean_resizing:
            # Theirs adds noise of 3e-5 standard deviations to the mean.
            torch.testing.assert_close(mine[kept:], other[kept:], atol=3e-4 * mine.std().item(), rtol=0)
        elif size > kept:
            assert 0.5 < mine[kept:].std() / other[kept:].std() < 2


def test_resize_pads(pair: tuple[Any, Any]) -> None:
    for model in pair:
        assert model.resize_token_embeddings(62, pad_to_multiple_of=8).weight.shape[0] == 64
        assert model.resize_token_embeddings().weight.shape[0] == 64


def test_a_bias_of_the_head_grows_too() -> None:
    model = head_class("olmoe")(copy.deepcopy(CONFIGS["olmoe"]))
    model.lm_head.bias = torch.nn.Parameter(torch.arange(61.0))
    model.resize_token_embeddings(63)
    assert model.lm_head.bias.tolist() == [*range(61), 30.0, 30.0]
    model.resize_token_embeddings(64, mean_resizing=False)
    assert model.lm_head.bias[-1] == 0


def test_gradients_of_a_frozen_model(pair: tuple[Any, Any]) -> None:
    """As training of adapters sets it up: nothing requires a gradient but the output of the embedding."""
    ours, _ = pair
    ours.train()
    for parameter in ours.parameters():
        parameter.requires_grad_(False)
    ours.enable_input_require_grads()
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert ours.is_gradient_checkpointing
    given = inputs(ours.config.model_type)
    assert ours(**given).logits.requires_grad
    ours.disable_input_require_grads()
    ours.gradient_checkpointing_disable()
    assert not ours.is_gradient_checkpointing and not ours(**given).logits.requires_grad


def test_dtypes(pair: tuple[Any, Any]) -> None:
    ours, _ = pair
    expected = logits(ours)
    for convert, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("float", torch.float32)):
        converted = getattr(copy.deepcopy(ours), convert)()
        assert converted.dtype == dtype and logits(converted).dtype == dtype
        scale = float(expected.abs().max())
        # A token may go to another expert; the mean says that the rest is right.
        assert float((logits(converted).float() - expected).abs().mean()) < 0.03 * scale
    assert ours.to("cpu") is ours and ours.eval() is ours and not ours.training


def test_names_of_weights(pair: tuple[Any, Any]) -> None:
    ours, _ = pair
    for name, parameter in ours.named_parameters():
        assert ours.get_parameter_or_buffer(name) is parameter
    for name, buffer in ours.named_buffers():
        assert ours.get_parameter_or_buffer(name) is buffer
    with pytest.raises(AttributeError):
        ours.get_parameter_or_buffer("no.such.weight")


def test_dummy_inputs(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    assert torch.equal(ours.dummy_inputs["input_ids"], theirs.dummy_inputs["input_ids"])
    with torch.no_grad():
        assert ours(**ours.dummy_inputs).logits.shape == (3, 5, 61)


def test_init_weights() -> None:
    model = head_class("olmoe")(CONFIGS["olmoe"])
    with torch.no_grad():
        model.lm_head.weight.fill_(9)
    model.init_weights()
    assert model.lm_head.weight.std() < 0.03


# Configurations.


@pytest.mark.parametrize("name", NAMES)
def test_configurations(name: str, tmp_path: Path) -> None:
    ours = copy.deepcopy(CONFIGS[name])
    theirs = transformers.AutoConfig.for_model(**ours.to_dict())
    assert ours.get_text_config() is ours and ours.get_text_config(decoder=True) is ours
    theirs.save_pretrained(tmp_path)
    again = mk.AutoConfig.from_pretrained(tmp_path)
    for key, value in ours.to_dict().items():
        if key not in ("architectures", "transformers_version", "torch_dtype"):
            assert again.to_dict()[key] == value == getattr(theirs, key), key
    ours.update({"vocab_size": 77, "own_field": 3})
    assert (ours.vocab_size, ours.own_field) == (77, 3)
    with pytest.raises(ValueError, match="vocab_size must be"):
        ours.update({"own_field": 4, "vocab_size": 0})
    assert (ours.vocab_size, ours.own_field) == (77, 3)
    assert type(ours).from_dict(ours.to_dict()) == ours
    assert '"own_field": 3' in ours.to_json_string()
