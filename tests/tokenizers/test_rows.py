"""`prepare_for_model`: encoding that begins with ids, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moekernels.tokenizers import M2M100Tokenizer
from tests.tokenizers.sentencepiece_builders import m2m_100

CALLS: list[dict[str, Any]] = [
    {},
    {"add_special_tokens": False},
    {"max_length": 30},
    {"max_length": 30, "truncation": "only_first", "stride": 1, "return_overflowing_tokens": True},
    {"padding": "max_length", "max_length": 200, "padding_side": "left", "return_special_tokens_mask": True},
    {"padding": True, "pad_to_multiple_of": 8, "return_length": True, "return_attention_mask": True},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[M2M100Tokenizer, Any]:
    directory: Path = m2m_100(tmp_path_factory.mktemp("m2m"))
    return (
        M2M100Tokenizer.from_pretrained(directory, src_lang="fr"),
        transformers.M2M100Tokenizer.from_pretrained(directory, src_lang="fr"),
    )


@pytest.mark.parametrize("pair", [None, "a second text"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_prepare_for_model(tokenizers: tuple[M2M100Tokenizer, Any], call: dict[str, Any], pair: str | None) -> None:
    ours, theirs = tokenizers
    first, second = (
        None if text is None else theirs.convert_tokens_to_ids(theirs.tokenize(text))
        for text in ("hello world " * 9, pair)
    )
    assert dict(ours.prepare_for_model(first, second, **call)) == dict(theirs.prepare_for_model(first, second, **call))


def test_as_calling_does(tokenizers: tuple[M2M100Tokenizer, Any]) -> None:
    ours, _ = tokenizers
    ids = ours.convert_tokens_to_ids(ours.tokenize("hello world"))
    assert dict(ours.prepare_for_model(ids)) == dict(ours("hello world"))
    tensors = ours.prepare_for_model(ids, return_tensors="pt", prepend_batch_axis=True)
    assert torch.equal(tensors["input_ids"], ours("hello world", return_tensors="pt")["input_ids"])
    assert torch.equal(ours.prepare_for_model(ids, return_tensors="pt")["input_ids"], tensors["input_ids"][0])
    with pytest.raises(ValueError, match="truncation must be"):
        ours.prepare_for_model(ids, truncation="some")


def test_files_with_a_prefix(tokenizers: tuple[M2M100Tokenizer, Any], tmp_path: Path) -> None:
    for tokenizer, name in zip(tokenizers, ("ours", "theirs"), strict=True):
        paths = tokenizer.save_pretrained(tmp_path / name, filename_prefix="big")
        assert all(Path(path).exists() for path in paths)
        assert all(path.name.startswith("big-") for path in (tmp_path / name).iterdir())
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert names - {"big-added_tokens.json"} <= {path.name for path in (tmp_path / "ours").iterdir()}
    for path in list((tmp_path / "ours").iterdir()):
        path.rename(path.with_name(path.name.removeprefix("big-")))
    again = M2M100Tokenizer.from_pretrained(tmp_path / "ours")
    assert again("hello world") == tokenizers[0]("hello world")


def test_what_it_shows(tokenizers: tuple[M2M100Tokenizer, Any]) -> None:
    ours, theirs = (repr(tokenizer) for tokenizer in tokenizers)
    assert ours.startswith(theirs.partition("special_tokens=")[0])
    assert "special_tokens={'bos_token': '<s>'" in ours and "added_tokens_decoder={" in ours
