from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moekernels import tokenizers
from moekernels.tokenizers import NllbTokenizer, NllbTokenizerFast
from moekernels.tokenizers.languages import FLORES_200
from tests.tokenizers.sentencepiece_builders import PROBES, TEXTS, nllb

SOURCE, TARGET = TEXTS[0], TEXTS[10]
NAMES = ("NllbTokenizer", "NllbTokenizerFast")


def both(name: str, directory: Path, **settings: Any) -> tuple[Any, Any]:
    return (
        getattr(tokenizers, name).from_pretrained(directory, **settings),
        getattr(transformers, name).from_pretrained(directory, **settings),
    )


@pytest.mark.parametrize("name", NAMES)
def test_languages(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name, nllb(tmp_path))
    expected = {code: theirs.convert_tokens_to_ids(code) for code in FLORES_200}
    assert ours.lang_code_to_id == expected
    # As in the released models, where the vocabulary is 256001: eng_Latn is 256047, fra_Latn 256057, <mask> 256203.
    first = ours.vocab_size
    assert [ours.get_lang_id(code) - first for code in ("eng_Latn", "fra_Latn", "ron_Latn")] == [46, 56, 144]
    assert ours.mask_token_id == theirs.mask_token_id == first + 202
    assert (ours.src_lang, ours.tgt_lang) == (theirs.src_lang, theirs.tgt_lang) == ("eng_Latn", None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("legacy", [False, True])
def test_the_place_of_the_language(name: str, legacy: bool, tmp_path: Path) -> None:
    settings = {"src_lang": "ron_Latn", "tgt_lang": "deu_Latn", "legacy_behaviour": legacy}
    ours, theirs = both(name, nllb(tmp_path), **settings)
    got, expected = (t(SOURCE, text_target=TARGET, return_tensors="pt") for t in (ours, theirs))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    place = -1 if legacy else 0
    assert got.input_ids[0, place] == ours.get_lang_id("ron_Latn")
    assert got.labels[0, place] == ours.get_lang_id("deu_Latn")
    assert got.input_ids[0, -2 if legacy else -1] == ours.eos_token_id
    ours.src_lang = theirs.src_lang = "hin_Deva"
    assert dict(ours(SOURCE, TARGET)) == dict(theirs(SOURCE, TARGET))
    assert ours.prefix_tokens == theirs.prefix_tokens and ours.suffix_tokens == theirs.suffix_tokens
    ours.save_pretrained(tmp_path / "b")
    again, theirs = both(name, tmp_path / "b")
    assert (again.legacy_behaviour, again.src_lang, again.tgt_lang) == (legacy, "hin_Deva", "deu_Latn")
    assert dict(again(TEXTS)) == dict(theirs(TEXTS)) == dict(ours(TEXTS))


def test_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    """The ids of the released models, though transformers 4.56.2 puts `<mask>` before the languages."""
    ours = NllbTokenizer.from_pretrained(nllb(tmp_path, fast=False))
    (tmp_path / "fast").mkdir()
    theirs = transformers.NllbTokenizerFast.from_pretrained(nllb(tmp_path / "fast"))
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text)["input_ids"]
    other = transformers.NllbTokenizer.from_pretrained(tmp_path)
    assert other.mask_token_id == ours.vocab_size != ours.mask_token_id


def test_the_mask_before_the_languages(tmp_path: Path) -> None:
    """Files say where their tokens are, also where transformers put them elsewhere."""
    transformers.NllbTokenizer.from_pretrained(nllb(tmp_path, fast=False)).save_pretrained(tmp_path / "b")
    ours, theirs = both("NllbTokenizer", tmp_path / "b")
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.mask_token_id == ours.vocab_size
    assert ours.get_lang_id("eng_Latn") == theirs.convert_tokens_to_ids("eng_Latn") == ours.vocab_size + 47


def test_slow_and_fast_agree(tmp_path: Path) -> None:
    slow, fast = (made.from_pretrained(nllb(tmp_path)) for made in (NllbTokenizer, NllbTokenizerFast))
    same = [text for text in PROBES if not any(space in text for space in ("\n", "\t")) and text.strip() == text]
    assert len(same) > 15
    agreeing = [text for text in same if slow(text).input_ids == fast(text).input_ids]
    # Around special tokens in the middle of a text they differ, in transformers too.
    assert set(TEXTS[::4]) <= set(agreeing)
    assert slow.lang_code_to_id == fast.lang_code_to_id


def test_fewer_and_further_languages(tmp_path: Path) -> None:
    codes = ["eng_Latn", "fra_Latn"]
    few = NllbTokenizer.from_pretrained(nllb(tmp_path, fast=False), additional_special_tokens=codes)
    assert list(few.lang_code_to_id) == codes and len(few) == few.vocab_size + 3
    more = NllbTokenizer.from_pretrained(tmp_path, additional_special_tokens=[*FLORES_200, "tlh_Latn"])
    assert more.get_lang_id("tlh_Latn") == more.mask_token_id + 1
    assert more.get_lang_id("zul_Latn") == more.mask_token_id - 1
    other = NllbTokenizer.from_pretrained(tmp_path, additional_special_tokens=["<x>"])
    assert list(other.lang_code_to_id) == list(FLORES_200) and other.convert_tokens_to_ids("<x>") == len(other) - 1


@pytest.mark.parametrize("name", NAMES)
def test_older_ways_of_preparing(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name, nllb(tmp_path))
    batch = {"src_texts": TEXTS[:3], "tgt_texts": TEXTS[10:13], "max_length": 20}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old in transformers too
        expected = theirs.prepare_seq2seq_batch(**batch)
    assert dict(ours.prepare_seq2seq_batch(**batch)) == dict(expected)
    kwargs = {"src_lang": "hin_Deva", "tgt_lang": "fra_Latn", "return_tensors": "pt"}
    got, expected = (t._build_translation_inputs(SOURCE, **kwargs) for t in (ours, theirs))
    assert torch.equal(got.input_ids, expected.input_ids)
    assert got["forced_bos_token_id"] == expected["forced_bos_token_id"] == ours.get_lang_id("fra_Latn")


@pytest.mark.parametrize("name", NAMES)
def test_errors(name: str, tmp_path: Path) -> None:
    made = getattr(tokenizers, name)
    with pytest.raises(ValueError, match="unknown language code 'fr': did you mean fra_Latn"):
        made.from_pretrained(nllb(tmp_path), src_lang="fr")
    tokenizer = made.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown language code 'deu_latn': did you mean deu_Latn"):
        tokenizer.get_lang_id("deu_latn")
    with pytest.raises(ValueError, match="unknown language code 'Klingon'"):
        tokenizer.tgt_lang = "Klingon"
    with pytest.raises(ValueError, match="target texts need a target language"):
        tokenizer(SOURCE, text_target=TARGET)
    assert tokenizer(SOURCE).input_ids[0] == tokenizer.get_lang_id("eng_Latn")
