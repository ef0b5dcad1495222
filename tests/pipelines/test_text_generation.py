"""Continuing texts and chats, against transformers' pipeline on the same checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moekernels import AutoModelForCausalLM, AutoTokenizer, pipeline
from moekernels.pipelines import TextGenerationPipeline

TEXTS = ["The quick brown fox", "def route(logits, top_k):", "naïve", "it ? yes , I 'm here", "The quick", "words"]
USER = {"role": "user", "content": "How do experts choose ?"}
CHAT = [{"role": "system", "content": "Be brief."}, USER]
PREFILLED = [USER, {"role": "assistant", "content": "They do"}]


@pytest.fixture(scope="module")
def pair(olmoe: Path) -> tuple[Any, Any]:
    return (
        pipeline("text-generation", str(olmoe), device="cpu"),
        transformers.pipeline("text-generation", str(olmoe), device="cpu"),
    )


GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"return_full_text": False},
        {"return_tensors": True},
        {"clean_up_tokenization_spaces": False, "skip_special_tokens": False},
        {"num_beams": 3, "num_return_sequences": 2},
        {"add_special_tokens": True, "repetition_penalty": 1.3},
        {"prefix": "Once , "},
        {"truncation": True, "tokenizer_encode_kwargs": {"max_length": 2}},
        {"eos_token_id": list(range(0, 423, 9))},
        {"eos_token_id": None, "return_tensors": True},
        {"eos_token_id": list(range(0, 423, 9)), "num_beams": 2, "num_return_sequences": 2, "return_tensors": True},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "plain",
)
def test_texts(pair: tuple[Any, Any], kwargs: dict[str, Any]) -> None:
    ours, theirs = pair
    expected = theirs(TEXTS, **GREEDY, **kwargs)
    assert ours(TEXTS, **GREEDY, **kwargs) == expected
    assert ours(TEXTS[0], **GREEDY, **kwargs) == theirs(TEXTS[0], **GREEDY, **kwargs) == expected[0]
    # Batches change neither results nor their order.
    for batch_size in (2, 4, 100):
        assert ours(TEXTS, batch_size=batch_size, **GREEDY, **kwargs) == expected


@pytest.mark.parametrize("kwargs", [{}, {"return_full_text": False}, {"return_tensors": True}])
@pytest.mark.parametrize("chat", [CHAT, PREFILLED, [USER]], ids=["chat", "prefilled", "one"])
def test_chats(pair: tuple[Any, Any], chat: list[dict[str, str]], kwargs: dict[str, Any]) -> None:
    ours, theirs = pair
    before = [dict(message) for message in chat]
    expected = theirs(chat, **GREEDY, **kwargs)
    assert ours(chat, **GREEDY, **kwargs) == expected and chat == before
    chats = [chat, CHAT, PREFILLED]
    assert ours(chats, batch_size=2, **GREEDY, **kwargs) == theirs(chats, **GREEDY, **kwargs)
    new_message = {"continue_final_message": False}
    assert ours(chat, **GREEDY, **kwargs, **new_message) == theirs(chat, **GREEDY, **kwargs, **new_message)


def test_defaults_sample(pair: tuple[Any, Any]) -> None:
    results = []
    for pipe in pair:
        torch.manual_seed(7)  # not for a list: there transformers' data loader draws numbers too
        results.append([pipe(TEXTS[0], num_return_sequences=2), pipe(TEXTS[0], temperature=1.5, max_new_tokens=5)])
    assert results[0] == results[1]
    first, second = results[0][0]
    assert first != second
    ids = pair[0](TEXTS[0], return_tensors=True, eos_token_id=422)[0]["generated_token_ids"]
    assert len(ids) == 256 + len(pair[0].tokenizer(TEXTS[0]).input_ids) or ids[-1] == 422


def test_iterables(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    taken = []

    def texts() -> Iterator[str]:
        for text in TEXTS:
            taken.append(text)
            yield text

    results = ours(texts(), **GREEDY)
    assert not taken
    first = next(results)
    assert len(taken) == 1  # no further than needed
    expected = theirs(TEXTS, **GREEDY)
    assert [first, *results] == expected
    chats = [CHAT, PREFILLED]
    assert list(ours(iter(chats), batch_size=2, **GREEDY)) == theirs(chats, **GREEDY)
    subset: Any = torch.utils.data.Subset(TEXTS, [2, 0])  # type: ignore[arg-type]
    assert list(ours(subset, **GREEDY)) == [expected[2], expected[0]]
    assert ours(tuple(TEXTS), **GREEDY) == expected and ours([], **GREEDY) == []


def test_lengths(pair: tuple[Any, Any]) -> None:
    """A `max_length` in the call counts, although the pipeline has a default for `max_new_tokens`."""
    ours, _ = pair
    ids = ours(TEXTS[0], do_sample=False, max_length=12, return_tensors=True, eos_token_id=422)
    assert len(ids[0]["generated_token_ids"]) == 12
    own = pipeline("text-generation", ours.model, tokenizer=ours.tokenizer, max_new_tokens=3, do_sample=False)
    length = len(ours.tokenizer(TEXTS[0]).input_ids)
    assert len(own(TEXTS[0], return_tensors=True, eos_token_id=422)[0]["generated_token_ids"]) == length + 3
    ids = own(TEXTS[0], return_tensors=True, max_new_tokens=5, eos_token_id=422)
    assert len(ids[0]["generated_token_ids"]) == length + 5


def test_long_prompts(pair: tuple[Any, Any], olmoe: Path) -> None:
    tokenizers = (AutoTokenizer, transformers.AutoTokenizer)
    ours, theirs = (
        type(pipe)(model=pipe.model, tokenizer=made.from_pretrained(olmoe, model_max_length=16))
        for pipe, made in zip(pair, tokenizers, strict=True)
    )
    options = {"handle_long_generation": "hole", "do_sample": False, "max_new_tokens": 10}
    with pytest.warns(UserWarning, match="more than the 16 the model can take"):
        got = ours(" ".join(TEXTS), **options)
    assert got == theirs(" ".join(TEXTS), **options)
    with pytest.raises(ValueError, match="16 new tokens leave no room for a prompt within the 16"):
        ours("a", handle_long_generation="hole", max_new_tokens=16)


def test_stop_sequence(pair: tuple[Any, Any]) -> None:
    ours, _ = pair
    text = ours(TEXTS[1], **GREEDY, return_full_text=False, clean_up_tokenization_spaces=False)[0]["generated_text"]
    stopped = ours(TEXTS[1], **GREEDY, return_full_text=False, stop_sequence=text[2:4])[0]["generated_text"]
    assert text[2:4] in stopped and len(stopped) < len(text) and text.startswith(stopped)
    options = {**GREEDY, "stop_sequence": text[2:4], "return_tensors": True}
    assert ours(TEXTS, batch_size=6, **options) == ours(TEXTS, **options)


def test_one_model_for_several(olmoe: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(olmoe)
    first = pipeline("text-generation", model, **GREEDY)
    assert isinstance(first, TextGenerationPipeline) and first.model is model
    assert first.generation_config is not model.generation_config
    assert model.generation_config.do_sample is False
    assert first(TEXTS[0]) == pipeline("text-generation", model, tokenizer=str(olmoe))(TEXTS[0], **GREEDY)
    assert first.device == model.device and first.dtype == first.torch_dtype == torch.float32


def test_saving(pair: tuple[Any, Any], tmp_path: Path) -> None:
    pair[0].save_pretrained(tmp_path)
    assert transformers.pipeline("text-generation", str(tmp_path))(CHAT, **GREEDY) == pair[0](CHAT, **GREEDY)


@pytest.mark.parametrize(
    ("inputs", "kwargs", "message"),
    [
        (3, {}, "inputs must be text or several, got int"),
        ([3], {}, "a prompt must be text or a list of messages, got int"),
        ([{"role": "user"}], {}, "needs a role and content, got {'role': 'user'}"),
        ("", {}, "the prompt is empty, and the model has no bos_token_id"),
        ("a", {"return_full_text": True, "return_tensors": True}, "return_full_text cannot apply"),
        ("a", {"return_full_text": True, "return_text": True}, "not both"),
        ("a", {"handle_long_generation": "loop"}, "must be None or 'hole', got 'loop'"),
        ("a", {"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens must be a positive integer, got 0"),
        ("a", {"max_new_token": 1}, "max_new_token"),
    ],
)
def test_errors(pair: tuple[Any, Any], inputs: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        pair[0](inputs, **kwargs)
    assert message in str(caught.value)
