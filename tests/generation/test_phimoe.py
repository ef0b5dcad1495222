"""Our PhiMoE and our loop together, across the switch from short to long rotary factors."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from moekernels.models import AutoModelForCausalLM
from moekernels.nn import DynamicCache, StaticCache
from tests.models.conftest import TINY_PHIMOE

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")

TRAINED = TINY_PHIMOE["rope_scaling"]["original_max_position_embeddings"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Ours and that of transformers, whose sdpa attention alone is causal at the switch."""
    directory: Path = tmp_path_factory.mktemp("phimoe")
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.PhimoeConfig(**copy.deepcopy(TINY_PHIMOE), attn_implementation="sdpa")
        theirs = transformers.PhimoeForCausalLM(config).eval()
    theirs.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, progress=False), theirs


def prompt(rows: int, length: int) -> Tensor:
    return torch.randint(3, TINY_PHIMOE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("length", [1, TRAINED - 3, TRAINED, TRAINED + 1])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 6},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "cache_implementation": "static"},
        {"do_sample": True, "top_p": 0.9},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "greedy",
)
def test_tokens(models: tuple[Any, Any], kwargs: dict[str, Any], length: int) -> None:
    ours, theirs = models
    ids = prompt(2, length)
    same = {name: kwargs[name] for name in kwargs if name not in ("cache_implementation", "prefill_chunk_size")}
    torch.manual_seed(5)
    got = ours.generate(ids, max_new_tokens=24 - length, **kwargs)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.generate(ids, max_new_tokens=24 - length, **same)
    assert torch.equal(got, expected)
    assert got.unique().numel() > 6


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_scores_at_the_switch(models: tuple[Any, Any], implementation: str) -> None:
    """With padding too, every step gives what one pass over all tokens gives."""
    ours, _ = models
    ours.set_attn_implementation(implementation)
    ids = prompt(2, TRAINED - 2)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    wanted = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    out = ours.generate(ids.masked_fill(mask == 0, 1), attention_mask=mask, **wanted)
    ours.set_attn_implementation("sdpa")
    for step, logits in enumerate(out.logits):
        end = ids.shape[1] + step
        seen = torch.nn.functional.pad(mask, (0, step), value=1)
        with torch.no_grad():
            whole = ours(
                out.sequences[:, :end], attention_mask=seen, position_ids=(seen.cumsum(-1) - 1).clamp(min=0)
            ).logits[:, -1]
        torch.testing.assert_close(logits, whole, atol=2e-5, rtol=0)


def tokens_run(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every call of the base model from now on."""
    calls: list[int] = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda **kwargs: calls.append(kwargs["input_ids"].shape[1]) or forward(**kwargs)
    )
    return calls


def test_tokens_are_read_again_only_once(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = models
    calls = tokens_run(ours, monkeypatch)
    ours.generate(prompt(2, TRAINED - 2), max_new_tokens=7, eos_token_id=None)
    assert calls == [TRAINED - 2, 1, 1, TRAINED + 1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_given_cache_is_filled_again(models: tuple[Any, Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation that goes on from its cache and outgrows the short factors."""
    ours, _ = models
    cache = DynamicCache() if kind == "dynamic" else StaticCache(ours.config, 2, 40, dtype=torch.float32)
    said = ours.generate(prompt(2, 6), past_key_values=cache, max_new_tokens=5, eos_token_id=None)
    more = torch.cat((said, prompt(2, 4)), dim=1)
    calls = tokens_run(ours, monkeypatch)
    got = ours.generate(more, past_key_values=cache, max_new_tokens=5, eos_token_id=None)
    assert calls == [5, 1, TRAINED + 1, 1, 1] and cache.get_seq_length() == 19
    assert torch.equal(got, ours.generate(more, max_new_tokens=5, eos_token_id=None))


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_a_prompt_of_embeddings_is_read_again(models: tuple[Any, Any], kwargs: dict[str, Any]) -> None:
    ours, _ = models
    ids = prompt(2, TRAINED - 3)
    embeds = ours.get_input_embeddings()(ids).detach()
    options = {"max_new_tokens": 8, "eos_token_id": None, **kwargs}
    expected = ours.generate(ids, **options)
    assert torch.equal(ours.generate(inputs_embeds=embeds, **options), expected[:, TRAINED - 3 :])
    assert torch.equal(ours.generate(ids, inputs_embeds=embeds, **options), expected)


@pytest.mark.parametrize("length", [1, TRAINED - 3, TRAINED, TRAINED + 1])
def test_assisted(models: tuple[Any, Any], length: int) -> None:
    """No run has candidates on both sides of the switch, which would turn all keys by long factors too early."""
    ours, _ = models
    assistant = copy.deepcopy(ours)
    del assistant.model.layers[1:]
    ids, options = prompt(1, length), {"max_new_tokens": 24 - length, "eos_token_id": None}
    expected = ours.generate(ids, **options)
    confident = {"assistant_confidence_threshold": 0.0, "num_assistant_tokens": 5}
    for helper in ({"assistant_model": ours}, {"assistant_model": assistant}, {"prompt_lookup_num_tokens": 4}):
        assert torch.equal(ours.generate(ids, **options, **confident, **helper), expected)
    embeds = ours.get_input_embeddings()(ids).detach()
    got = ours.generate(inputs_embeds=embeds, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(got, expected[:, length:])


@pytest.mark.parametrize("num_beams", [1, 2])
def test_guided(models: tuple[Any, Any], num_beams: int) -> None:
    """The second run switches at a length of its own."""
    ours, _ = models
    options = {"max_new_tokens": 10, "eos_token_id": None, "num_beams": num_beams, "guidance_scale": 1.5}
    negative = {"negative_prompt_ids": prompt(2, TRAINED - 5)}
    got = ours.generate(prompt(2, TRAINED - 2), **options, **negative)
    assert torch.equal(got, ours.generate(prompt(2, TRAINED - 2), use_cache=False, **options, **negative))
    assert not torch.equal(got, ours.generate(prompt(2, TRAINED - 2), **{**options, "guidance_scale": 1.0}))
