from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moekernels.tokenizers import M2M100Tokenizer
from moekernels.tokenizers.languages import M2M100, WMT21
from tests.tokenizers.sentencepiece_builders import TEXTS, m2m_100, m2m_vocab

SOURCE, TARGET = TEXTS[0], TEXTS[10]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return m2m_100(tmp_path)


def both(directory: Path, **settings: Any) -> tuple[M2M100Tokenizer, Any]:
    return (
        M2M100Tokenizer.from_pretrained(directory, **settings),
        transformers.M2M100Tokenizer.from_pretrained(directory, **settings),
    )


def test_languages(directory: Path) -> None:
    ours, theirs = both(directory)
    first = len(m2m_vocab())
    assert ours.lang_code_to_id == theirs.lang_code_to_id == {code: first + i for i, code in enumerate(M2M100)}
    assert ours.lang_token_to_id == theirs.lang_token_to_id
    assert ours.id_to_lang_token == theirs.id_to_lang_token
    assert ours.lang_code_to_token == theirs.lang_code_to_token
    assert ours.get_lang_id("fr") == theirs.get_lang_id("fr") == ours.convert_tokens_to_ids("__fr__") == first + 24
    assert ours.get_lang_token("fr") == theirs.get_lang_token("fr") == "__fr__"
    assert (ours.src_lang, ours.tgt_lang) == (theirs.src_lang, theirs.tgt_lang) == ("en", None)
    assert (ours.encoder, ours.decoder) == (theirs.encoder, theirs.decoder)


def test_wmt21(tmp_path: Path) -> None:
    ours, theirs = both(m2m_100(tmp_path, language_codes="wmt21"))
    assert list(ours.lang_code_to_id) == list(WMT21)
    assert ours.lang_code_to_id == theirs.lang_code_to_id
    with pytest.raises(ValueError, match="unknown language code 'fr'"):
        ours.src_lang = "fr"


def test_the_language_comes_first(directory: Path) -> None:
    ours, theirs = both(directory, src_lang="hi", tgt_lang="fr")
    got, expected = (t(SOURCE, text_target=TARGET, return_tensors="pt") for t in (ours, theirs))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert got.input_ids[0, 0] == ours.get_lang_id("hi") and got.labels[0, 0] == ours.get_lang_id("fr")
    assert got.input_ids[0, -1] == got.labels[0, -1] == ours.eos_token_id
    # Encoding a target does not last.
    assert ours.prefix_tokens == theirs.prefix_tokens == [ours.get_lang_id("hi")]
    assert ours(text_target=TARGET).input_ids == theirs(text_target=TARGET)["input_ids"]
    for tokenizer in (ours, theirs):
        tokenizer.src_lang, tokenizer.tgt_lang = "zh", "ro"
    assert dict(ours(SOURCE, text_target=TARGET)) == dict(theirs(SOURCE, text_target=TARGET))


def test_a_bad_target_leaves_the_source_language(directory: Path) -> None:
    ours, _ = both(directory, src_lang="hi", tgt_lang="fr")
    with pytest.raises(TypeError):
        ours(text_target=7)
    assert ours(SOURCE).input_ids[0] == ours.get_lang_id("hi")
    with pytest.raises(ValueError, match="unknown language code 'eng_Latn': did you mean en"):
        ours.src_lang = "eng_Latn"
    with pytest.raises(ValueError, match="unknown language code 'fre'"):
        ours.tgt_lang = "fre"
    assert (ours.src_lang, ours.tgt_lang) == ("hi", "fr")
    ours.tgt_lang = None
    with pytest.raises(ValueError, match=r"target texts need a target language: set tokenizer\.tgt_lang"):
        ours(SOURCE, text_target=TARGET)


def test_token_types(directory: Path) -> None:
    tokenizer = M2M100Tokenizer.from_pretrained(directory)
    types = tokenizer.create_token_type_ids_from_sequences
    # As transformers 5 documents them; 4.56.2 gives one too few.
    assert types([5, 6]) == [0, 0, 0, 0]
    assert types([5, 6], [7]) == [0, 0, 0, 0, 1]
    assert len(types([5, 6], [7])) == len(tokenizer.build_inputs_with_special_tokens([5, 6], [7]))
    tokenizer.token_type_ids_include_special_tokens = False
    assert types([5, 6], [7]) == [0, 0, 1]
    tokenizer.token_type_ids_pattern = "all_zeros"
    assert types([5, 6], [7]) == [0, 0, 0]


def test_languages_are_special_without_being_listed(tmp_path: Path) -> None:
    """transformers takes a language in a text for text, and does not skip it, unless the files list it."""
    ours, theirs = both(m2m_100(tmp_path, languages_listed=False))
    assert ours(SOURCE).input_ids == theirs(SOURCE)["input_ids"]
    ids = ours(SOURCE).input_ids
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids[1:], skip_special_tokens=True)
    assert theirs.decode(ids, skip_special_tokens=True).startswith("__en__")
    assert ours("a __fr__ b").input_ids[2] == ours.get_lang_id("fr")


def test_older_ways_of_preparing(directory: Path) -> None:
    ours, theirs = both(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old in transformers too
        expected = theirs.prepare_seq2seq_batch(TEXTS[:3], "de", TEXTS[10:13], "fr", return_tensors="pt")
    got = ours.prepare_seq2seq_batch(TEXTS[:3], "de", TEXTS[10:13], "fr", return_tensors="pt")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    short = ours.prepare_seq2seq_batch(TEXTS[:3], tgt_texts=TEXTS[10:13], max_length=9, max_target_length=7)
    assert {len(row) for row in short.input_ids} == {9} and {len(row) for row in short.labels} == {7}
    assert (ours.src_lang, ours.tgt_lang) == ("en", "ro")
    assert "labels" not in ours.prepare_seq2seq_batch(TEXTS[:3])

    got, expected = (t._build_translation_inputs(SOURCE, src_lang="hi", tgt_lang="fr") for t in (ours, theirs))
    assert dict(got) == dict(expected)
    assert got["forced_bos_token_id"] == ours.get_lang_id("fr")
    with pytest.raises(ValueError, match="translation needs src_lang and tgt_lang, got 'hi' and None"):
        ours._build_translation_inputs(SOURCE, src_lang="hi", tgt_lang=None)


def test_settings_are_saved(directory: Path, tmp_path: Path) -> None:
    ours = M2M100Tokenizer.from_pretrained(directory, src_lang="hi", tgt_lang="fr", num_madeup_words=0)
    ours.src_lang = "zh"
    ours.save_pretrained(tmp_path / "b")
    again, theirs = both(tmp_path / "b")
    assert (again.src_lang, again.tgt_lang, again.num_madeup_words) == ("zh", "fr", 0)
    assert (theirs.src_lang, theirs.tgt_lang, theirs.num_madeup_words) == ("zh", "fr", 0)


def test_errors(directory: Path) -> None:
    with pytest.raises(ValueError, match="language_codes must be m2m100 or wmt21, got 'flores'"):
        M2M100Tokenizer.from_pretrained(directory, language_codes="flores")
    with pytest.raises(ValueError, match="unknown language code 'fra_Latn': did you mean fr"):
        M2M100Tokenizer.from_pretrained(directory, src_lang="fra_Latn")
    (directory / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(ValueError, match=r"vocab\.json has no unknown token '<unk>'"):
        M2M100Tokenizer.from_pretrained(directory)
    (directory / "vocab.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        M2M100Tokenizer.from_pretrained(directory)
    (directory / "vocab.json").unlink()
    (directory / "sentencepiece.bpe.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"no vocab\.json and no sentencepiece\.bpe\.model in"):
        M2M100Tokenizer.from_pretrained(directory)
