"""Encoder-decoder pipelines, against transformers' on the same checkpoints."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moekernels import AutoModelForSeq2SeqLM, pipeline
from moekernels.pipelines import SummarizationPipeline, TranslationPipeline
from tests.tokenizers.sentencepiece_builders import TEXTS

INPUTS = [TEXTS[index] for index in (0, 5, 2, 9, 12)]
FRENCH = {"src_lang": "en", "tgt_lang": "fr"}


def both(task: str, directory: Path, **kwargs: Any) -> tuple[Any, Any]:
    return (
        pipeline(task, str(directory), device="cpu", **kwargs),
        transformers.pipeline(task, str(directory), device="cpu", **kwargs),
    )


@pytest.fixture(scope="module")
def text2text(switch: Path) -> tuple[Any, Any]:
    return both("text2text-generation", switch)


@pytest.fixture(scope="module")
def translation(m2m100: Path) -> tuple[Any, Any]:
    return both("translation", m2m100)


def same(got: Any, expected: Any) -> bool:
    """Whether results agree, tensors among them too."""
    if isinstance(expected, torch.Tensor):
        return torch.equal(got, expected)
    if isinstance(expected, list):
        return len(got) == len(expected) and all(same(g, e) for g, e in zip(got, expected, strict=True))
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same(got[name], expected[name]) for name in expected)
    return got == expected


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_beams": 1},
        {"num_return_sequences": 3},
        {"return_tensors": True, "num_return_sequences": 2},
        {"return_tensors": True, "num_beams": 1, "eos_token_id": list(range(1, 800, 7))},
        {"return_tensors": True, "num_return_sequences": 2, "eos_token_id": list(range(1, 800, 7))},
        {"clean_up_tokenization_spaces": True, "truncation": True},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "plain",
)
def test_text2text(text2text: tuple[Any, Any], kwargs: dict[str, Any]) -> None:
    ours, theirs = text2text
    kwargs = {"max_new_tokens": 10, **kwargs}
    expected = theirs(INPUTS, **kwargs)
    assert same(ours(INPUTS, **kwargs), expected)
    assert same(ours(INPUTS[0], **kwargs), theirs(INPUTS[0], **kwargs))
    # The capacity of Switch counts by sequence, so that batches change nothing here.
    assert same(ours(INPUTS, batch_size=3, **kwargs), expected)


def test_defaults(text2text: tuple[Any, Any]) -> None:
    ours, theirs = text2text
    assert ours(INPUTS[1]) == theirs(INPUTS[1])
    fields = ("num_beams", "max_new_tokens", "max_length", "pad_token_id", "eos_token_id")
    for name in fields:
        assert getattr(ours.generation_config, name) == getattr(theirs.generation_config, name), name


def test_summarization(switch: Path) -> None:
    """With the prefix and the parameters that the configuration has for the task."""
    ours, theirs = both("summarization", switch)
    assert isinstance(ours, SummarizationPipeline) and ours.prefix == "summarize: "
    # Both have max_new_tokens; only here a max_length of the task matters.
    assert ours(INPUTS, max_new_tokens=8) == theirs(INPUTS, max_new_tokens=8)
    assert set(ours(INPUTS[0], max_new_tokens=2)[0]) == {"summary_text"}


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 1, "max_new_tokens": 6}, {"num_return_sequences": 2}])
def test_translation(translation: tuple[Any, Any], kwargs: dict[str, Any]) -> None:
    ours, theirs = translation
    assert isinstance(ours, TranslationPipeline)
    # Not the five beams of the checkpoint, although transformers' documentation says so; but its length.
    assert ours.generation_config.num_beams == theirs.generation_config.num_beams == 4
    assert ours.generation_config.max_new_tokens is theirs.generation_config.max_new_tokens is None
    expected = theirs(INPUTS, **FRENCH, **kwargs)
    assert ours(INPUTS, **FRENCH, **kwargs) == ours(INPUTS, batch_size=2, **FRENCH, **kwargs) == expected
    assert ours(INPUTS[0], **FRENCH, **kwargs) == theirs(INPUTS[0], **FRENCH, **kwargs)
    german = {"src_lang": "hi", "tgt_lang": "de", "return_tensors": True}
    got = ours(INPUTS[0], **german, **kwargs)
    assert same(got, theirs(INPUTS[0], **german, **kwargs))
    assert got[0]["translation_token_ids"][1] == ours.tokenizer.get_lang_id("de")


def test_iterables(translation: tuple[Any, Any]) -> None:
    ours, theirs = translation
    expected = list(theirs((text for text in INPUTS), **FRENCH))
    assert list(ours((text for text in INPUTS), **FRENCH)) == expected
    assert list(ours(iter(INPUTS), batch_size=2, **FRENCH)) == expected


def test_languages(translation: tuple[Any, Any], m2m100: Path) -> None:
    ours, theirs = translation
    expected = theirs(INPUTS[0], **FRENCH)
    assert pipeline("translation_en_to_fr", m2m100, device="cpu")(INPUTS[0]) == expected
    assert pipeline("translation", m2m100, device="cpu", **FRENCH)(INPUTS[0]) == expected
    own = pipeline("translation", m2m100, device="cpu")
    own.tokenizer.src_lang, own.tokenizer.tgt_lang = "en", "fr"
    assert own(INPUTS[0]) == expected
    own.tokenizer.tgt_lang = None
    with pytest.raises(ValueError, match="which language to translate to"):
        own(INPUTS[0])
    with pytest.raises(ValueError, match="unknown language code 'fra'"):
        ours(INPUTS[0], src_lang="en", tgt_lang="fra")
    with pytest.raises(ValueError, match="unknown language code 'eng'"):
        ours(INPUTS[0], src_lang="eng", tgt_lang="fr")


def test_a_translator_whose_tokenizer_knows_no_languages(switch: Path) -> None:
    ours, theirs = both("translation_en_to_fr", switch)
    assert ours(INPUTS, max_new_tokens=7) == theirs(INPUTS, max_new_tokens=7)


def test_errors(text2text: tuple[Any, Any], olmoe: Path) -> None:
    ours, _ = text2text
    with pytest.raises(TypeError, match="text2text-generation: an input must be text, got int"):
        ours([1])
    with pytest.raises(ValueError, match="max_new_token"):
        ours("a", max_new_token=1)
    with pytest.raises(ValueError, match="text-generation needs a model with a decoder and no encoder"):
        pipeline("text-generation", ours.model, tokenizer=ours.tokenizer)
    with pytest.raises(ValueError, match="no such model for OlmoeConfig"):
        pipeline("translation", olmoe)
    assert isinstance(AutoModelForSeq2SeqLM.from_pretrained(ours.model.config.name_or_path), type(ours.model))


def test_a_call_in_another_language_changes_no_later_one(m2m100: Path) -> None:
    own = pipeline("translation", str(m2m100), device="cpu", max_new_tokens=4, num_beams=1, **FRENCH)
    own.tokenizer.src_lang, own.tokenizer.tgt_lang = "hi", "de"
    english, hindi = own(INPUTS, return_tensors=True), own(INPUTS, src_lang="hi", return_tensors=True)
    assert not same(english, hindi)
    assert same(own(INPUTS, return_tensors=True), english)
    assert (own.tokenizer.src_lang, own.tokenizer.tgt_lang) == ("hi", "de")
    # And the tokenizer's where neither the pipeline nor the call says one.
    bare = pipeline("translation", own.model, tokenizer=own.tokenizer, max_new_tokens=4, num_beams=1)
    german = bare(INPUTS, return_tensors=True)
    bare(INPUTS, src_lang="en", tgt_lang="fr")
    assert same(bare(INPUTS, return_tensors=True), german)


def test_in_threads(m2m100: Path) -> None:
    own = pipeline("translation", str(m2m100), device="cpu", max_new_tokens=4, num_beams=1, return_tensors=True)
    calls = [{"src_lang": source, "tgt_lang": target} for source, target in (("en", "fr"), ("hi", "de"), ("fr", "en"))]
    alone = [own(INPUTS, **call) for call in calls]
    with ThreadPoolExecutor(6) as threads:
        for turn, got in enumerate(threads.map(lambda turn: own(INPUTS, **calls[turn % 3]), range(24))):
            assert same(got, alone[turn % 3])
