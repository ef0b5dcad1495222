"""Our OLMoE and our loop together, against transformers on the same checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from moekernels.models import AutoModelForCausalLM
from tests.generation.adapter import EOS, PAD, prompts, tiny_olmoe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory: Path = tmp_path_factory.mktemp("olmoe")
    tiny_olmoe().save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, progress=False)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"eos_token_id": list(range(2, 20))},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "plain",
)
@pytest.mark.parametrize(("rows", "length", "padded"), [(1, 6, False), (4, 9, True), (1, 1, False)])
def test_greedy_tokens(model: Any, kwargs: dict, rows: int, length: int, padded: bool) -> None:
    ids = prompts(rows, length, padded)
    got = model.generate(ids, max_new_tokens=40, **kwargs)
    same = {name: kwargs[name] for name in kwargs if name not in ("cache_implementation", "prefill_chunk_size")}
    assert torch.equal(got, tiny_olmoe().generate(ids, max_new_tokens=40, **same))


def test_scores(model: Any) -> None:
    kwargs = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    ids = prompts(3, 7, padded=True)
    ours, theirs = model.generate(ids, **kwargs), tiny_olmoe().generate(ids, **kwargs)
    for mine, their in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-4)


def test_sampled_tokens(model: Any) -> None:
    ids = prompts(3, 7, padded=True)
    torch.manual_seed(5)
    got = model.generate(ids, do_sample=True, top_p=0.9, max_new_tokens=20, num_return_sequences=2)
    torch.manual_seed(5)
    expected = tiny_olmoe().generate(ids, do_sample=True, top_p=0.9, max_new_tokens=20, num_return_sequences=2)
    assert torch.equal(got, expected)


def test_prompt_as_embeddings(model: Any) -> None:
    ids = prompts(2, 7)
    embeds = model.get_input_embeddings()(ids).detach()
    got = model.generate(inputs_embeds=embeds, max_new_tokens=10)
    assert torch.equal(got, model.generate(ids, max_new_tokens=10)[:, 7:])


def test_assisted(model: Any) -> None:
    """With our caches, which shrink where a candidate was wrong. One assistant is the model less a layer."""
    assistant = copy.deepcopy(model)
    del assistant.model.layers[1:]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 40, "eos_token_id": None, "num_assistant_tokens": 3}
    for kwargs in ({}, {"attention_mask": mask}):
        ids = prompts(1, 7)
        expected = tiny_olmoe().generate(ids, max_new_tokens=40, eos_token_id=None, **kwargs)
        for helper in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 4}, {"assistant_model": model}):
            out = model.generate(ids, **options, **kwargs, **helper, return_dict_in_generate=True)
            assert torch.equal(out.sequences, expected)
            assert out.past_key_values.get_seq_length() == 46


def test_guided(model: Any) -> None:
    kwargs = {"guidance_scale": 1.5, "negative_prompt_ids": prompts(3, 4), "max_new_tokens": 20}
    ids = prompts(3, 7, padded=True)
    expected = tiny_olmoe().generate(ids, **kwargs)
    assert torch.equal(model.generate(ids, **kwargs), expected)
    kwargs["negative_prompt_ids"] = prompts(1, 4)
    expected = tiny_olmoe().generate(ids[:1], **kwargs)
    assert torch.equal(model.generate(ids[:1], prompt_lookup_num_tokens=3, **kwargs), expected)


def test_defaults_come_from_the_checkpoint(model: Any) -> None:
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (EOS, PAD)
