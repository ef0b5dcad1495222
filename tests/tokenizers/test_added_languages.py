"""Languages that were added to a translation tokenizer, against transformers 4.56.2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from moekernels import AutoTokenizer, tokenizers
from moekernels.tokenizers.languages import FLORES_200
from tests.tokenizers.sentencepiece_builders import TEXTS, m2m_100, nllb, t5

CODE = "xyz_Latn"
NAMES = ("NllbTokenizer", "NllbTokenizerFast")
#: The ways to add a language.
WAYS: dict[str, Callable[[Any], int]] = {
    "the whole list": lambda t: t.add_special_tokens(
        {"additional_special_tokens": [*t.additional_special_tokens, CODE]}
    ),
    "in place of the list": lambda t: t.add_special_tokens({"additional_special_tokens": [CODE]}),
    "beside the list": lambda t: t.add_special_tokens(
        {"additional_special_tokens": [CODE]}, replace_additional_special_tokens=False
    ),
    "a special token": lambda t: t.add_tokens([CODE], special_tokens=True),
    "a token": lambda t: t.add_tokens([CODE]),
}


def classes(name: str) -> tuple[Any, Any]:
    return getattr(tokenizers, name), getattr(transformers, name)


def assert_alike(ours: Any, theirs: Any, code: str = CODE) -> None:
    """The code is a language here as there, and the others still are."""
    assert len(ours) == len(theirs)
    assert ours.get_lang_id(code) == theirs.convert_tokens_to_ids(code) == len(ours) - 1
    for source, target in ((code, "fra_Latn"), ("zul_Latn", code), ("eng_Latn", "deu_Latn")):
        for tokenizer in (ours, theirs):
            tokenizer.src_lang, tokenizer.tgt_lang = source, target
        assert dict(ours(TEXTS, text_target=TEXTS)) == dict(theirs(TEXTS, text_target=TEXTS))
        assert ours(TEXTS[0]).input_ids[0] == ours.get_lang_id(source)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_adding_one(name: str, way: str, tmp_path: Path) -> None:
    nllb(tmp_path)
    ours, theirs = (made.from_pretrained(tmp_path) for made in classes(name))
    assert WAYS[way](ours) == WAYS[way](theirs) == 1
    assert ours.additional_special_tokens == theirs.additional_special_tokens
    assert_alike(ours, theirs)
    assert set(ours.lang_code_to_id) == {*FLORES_200, CODE}
    ids = [ours.get_lang_id("eng_Latn"), *ours("a b", add_special_tokens=False).input_ids, ours.get_lang_id(CODE)]
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("writer", ["ours", "theirs"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_files(name: str, way: str, writer: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    nllb(tmp_path / "a")
    made, of_transformers = classes(name)
    tokenizer = (made if writer == "ours" else of_transformers).from_pretrained(tmp_path / "a")
    WAYS[way](tokenizer)
    tokenizer.save_pretrained(tmp_path / "b")
    for settings in ({}, {"src_lang": CODE}):
        ours, theirs = (
            made.from_pretrained(tmp_path / "b", **settings),
            of_transformers.from_pretrained(tmp_path / "b", **settings),
        )
        assert ours.src_lang == theirs.src_lang
        assert_alike(ours, theirs)
    ours.save_pretrained(tmp_path / "c")
    assert_alike(made.from_pretrained(tmp_path / "c"), of_transformers.from_pretrained(tmp_path / "c"))


@pytest.mark.parametrize("name", NAMES)
def test_a_code_of_another_form(name: str, tmp_path: Path) -> None:
    nllb(tmp_path)
    settings = {"additional_special_tokens": [*FLORES_200, "myv"]}
    ours, theirs = (made.from_pretrained(tmp_path, **settings) for made in classes(name))
    assert_alike(ours, theirs, "myv")
    for wrong in ("</s>", "<mask>", "xyz_Latn"):
        with pytest.raises(ValueError, match="unknown language code"):
            ours.src_lang = wrong


def test_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    """A single new code is one more language, not the only one."""
    ours = tokenizers.NllbTokenizer.from_pretrained(nllb(tmp_path, fast=False), additional_special_tokens=[CODE])
    assert set(ours.lang_code_to_id) == {*FLORES_200, CODE}
    assert ours.get_lang_id(CODE) == ours.mask_token_id + 1 == len(ours) - 1


def test_a_tokenizer_of_transformers_5(tmp_path: Path) -> None:
    """It lists added tokens, if at all, under another name."""
    nllb(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["additional_special_tokens"]
    path.write_text(json.dumps({**config, "extra_special_tokens": [CODE]}))
    ours = AutoTokenizer.from_pretrained(tmp_path)
    assert set(ours.lang_code_to_id) == {*FLORES_200, CODE}  # type: ignore[attr-defined]


def test_m2m_100(tmp_path: Path) -> None:
    """Where transformers knows a fixed set of languages, a token of their form is one more."""
    (tmp_path / "a").mkdir()
    tokenizer: Any = AutoTokenizer.from_pretrained(m2m_100(tmp_path / "a"))
    with pytest.raises(ValueError, match="unknown language code 'xyz'"):
        tokenizer.src_lang = "xyz"
    assert tokenizer.add_tokens(["__xyz__"], special_tokens=True) == 1
    tokenizer.save_pretrained(tmp_path / "b")
    for used in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "b")):
        used.src_lang, used.tgt_lang = "xyz", "fr"
        assert used.get_lang_token("xyz") == "__xyz__" and used.get_lang_id("xyz") == len(used) - 1
        encoding = used("a b", text_target="c")
        assert (encoding.input_ids[0], encoding.labels[0]) == (len(used) - 1, used.get_lang_id("fr"))


@pytest.mark.parametrize("name", ["NllbTokenizer", "NllbTokenizerFast", "M2M100Tokenizer"])
def test_the_languages_of_one_call(name: str, tmp_path: Path) -> None:
    nllb(tmp_path) if name.startswith("Nllb") else m2m_100(tmp_path)
    ours, theirs = (made.from_pretrained(tmp_path) for made in classes(name))
    ours.tgt_lang = before = ours.src_lang
    languages = ("deu_Latn", "fra_Latn") if name.startswith("Nllb") else ("de", "fr")
    theirs.src_lang, theirs.tgt_lang = languages
    got = ours(TEXTS, text_target=TEXTS[::-1], src_lang=languages[0], tgt_lang=languages[1])
    assert dict(got) == dict(theirs(TEXTS, text_target=TEXTS[::-1]))
    theirs.src_lang = theirs.tgt_lang = before
    assert dict(ours(TEXTS, text_target=TEXTS)) == dict(theirs(TEXTS, text_target=TEXTS))
    with pytest.raises(ValueError, match="unknown language code 'xx'"):
        ours("a", src_lang="xx")


def test_languages_for_a_tokenizer_without(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="T5TokenizerFast knows no languages, got 'en'"):
        AutoTokenizer.from_pretrained(t5(tmp_path))("a", src_lang="en")
