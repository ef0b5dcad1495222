from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from moekernels import tokenizers
from moekernels.tokenizers import T5Tokenizer
from tests.tokenizers.sentencepiece_builders import TEXTS, t5

NAMES = ("T5Tokenizer", "T5TokenizerFast")


@pytest.mark.parametrize("name", NAMES)
def test_sentinels(name: str, tmp_path: Path) -> None:
    ours = getattr(tokenizers, name).from_pretrained(t5(tmp_path))
    theirs = getattr(transformers, name).from_pretrained(tmp_path)
    # In the order of their numbers; transformers gives them in none.
    assert ours.get_sentinel_tokens() == [f"<extra_id_{number}>" for number in range(100)]
    assert set(ours.get_sentinel_tokens()) == set(theirs.get_sentinel_tokens())
    assert sorted(ours.get_sentinel_token_ids()) == sorted(theirs.get_sentinel_token_ids())
    # As in the released models, with a vocabulary of 32000: 32099 down to 32000.
    last = len(ours) - 1
    assert ours.get_sentinel_token_ids() == list(range(last, last - 100, -1))
    text = "A <extra_id_0> walks into a bar and orders a <extra_id_1> with <extra_id_2> pinch of <extra_id_3>."
    ids = ours(text).input_ids
    assert ids == theirs(text)["input_ids"]
    assert [index for index in ids if index in ours.get_sentinel_token_ids()] == ours.get_sentinel_token_ids()[:4]
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.pad_token_id, ours.eos_token_id, ours.unk_token_id) == (0, 1, 2)


def test_legacy(tmp_path: Path) -> None:
    """What was trained with a space after every special token still gets it, unless the files say otherwise."""
    text = "Hello <extra_id_0>."
    for settings in ({"legacy": True}, {"legacy": False}):
        ours = T5Tokenizer.from_pretrained(t5(tmp_path), **settings)
        theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, **settings)
        assert ours.tokenize(text) == theirs.tokenize(text)
        assert ("\u2581" in ours.tokenize(text)[-2:]) == settings["legacy"]
        ours.save_pretrained(tmp_path / "b")
        assert T5Tokenizer.from_pretrained(tmp_path / "b").legacy == settings["legacy"]
    (tmp_path / "tokenizer_config.json").unlink()
    assert T5Tokenizer.from_pretrained(tmp_path).legacy


def test_slow_and_fast_agree(tmp_path: Path) -> None:
    slow, fast = (getattr(tokenizers, name).from_pretrained(t5(tmp_path)) for name in NAMES)
    for text in (*TEXTS, "A <extra_id_0> walks into a bar and orders a <extra_id_1> drink"):
        assert slow(text).input_ids == fast(text).input_ids
    assert slow.get_sentinel_tokens() == fast.get_sentinel_tokens()


def test_number_of_sentinels(tmp_path: Path) -> None:
    ours = T5Tokenizer.from_pretrained(t5(tmp_path, fast=False), extra_ids=3)
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=3, legacy=True)
    assert ours.get_vocab() == theirs.get_vocab()
    tokens = [*ours.get_sentinel_tokens(), "<x>"]
    assert T5Tokenizer.from_pretrained(tmp_path, extra_ids=3, additional_special_tokens=tokens)("<x>").input_ids == [
        len(ours),
        1,
    ]
    none = T5Tokenizer.from_pretrained(tmp_path, extra_ids=0)
    assert none.get_sentinel_tokens() == [] and len(none) == none.vocab_size
    with pytest.raises(ValueError, match=r"has 3 sentinels <extra_id_\.\.\.>, but extra_ids is 100"):
        T5Tokenizer.from_pretrained(tmp_path, additional_special_tokens=tokens)


def test_the_end_of_text_comes_once(tmp_path: Path) -> None:
    ours = T5Tokenizer.from_pretrained(t5(tmp_path, fast=False))
    once, twice = ours(TEXTS[0]), ours(f"{TEXTS[0]}</s>", return_special_tokens_mask=True)
    assert twice.input_ids == once.input_ids
    assert len(twice.special_tokens_mask) == len(twice.input_ids)
    assert ours(TEXTS[0], TEXTS[1]).input_ids == once.input_ids + ours(TEXTS[1]).input_ids
    assert ours.get_special_tokens_mask([5, 6], [7]) == [0, 0, 1, 0, 1]
    assert ours.create_token_type_ids_from_sequences([5, 6], [7]) == [0] * 5
