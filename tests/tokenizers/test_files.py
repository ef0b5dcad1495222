"""Broken files of a tokenizer end in one error that says which file, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moekernels.checkpoint import CheckpointError
from moekernels.tokenizers import AutoTokenizer
from tests.tokenizers.sentencepiece_builders import m2m_100, nllb

NOT_JSON = [
    (b"", r"Expecting value: line 1 column 1"),
    (b'{"a": 1,', r"line 1 column 9"),
    (b'{"a": "\xff"}', r"not UTF-8 at byte 7"),
    (b"[" * 100_000, r"nested too deeply|not an object"),
    (b'{"n": ' + b"9" * 5000 + b"}", r"limit \(4300"),
    (b"[1]", r"must hold a JSON object, got list"),
]


@pytest.mark.parametrize(("content", "message"), NOT_JSON, ids=lambda value: str(value[:12]))
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "vocab.json"])
def test_what_is_not_json(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    directory = m2m_100(tmp_path)
    (directory / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{directory}/{name}: .*({message})"):
        AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"added_tokens_decoder": []}, "added_tokens_decoder must be an object of tokens by id, got []"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder: 'x' is no token id"),
        ({"added_tokens_decoder": {"-1": {"content": "a"}}}, "added_tokens_decoder: '-1' is no token id"),
        ({"added_tokens_decoder": {"5": "a"}}, "added_tokens_decoder: token 5 must be an object, got 'a'"),
        ({"added_tokens_decoder": {"5": {"content": 3}}}, "token 5 must be a token, a string or an object"),
        ({"added_tokens_decoder": {"5": {"content": "a", "lstrip": 1}}}, "lstrip must be true or false, got 1"),
        ({"bos_token": 7}, "bos_token must be a token, a string or an object with \"content\", got 7"),
        ({"additional_special_tokens": "ab"}, "additional_special_tokens must be a list of tokens, got 'ab'"),
        ({"additional_special_tokens": [None]}, "additional_special_tokens must be a token"),
        ({"model_max_length": "512"}, "model_max_length must be a number, got '512'"),
        ({"padding_side": 3}, "padding_side must be left or right, got 3"),
        ({"padding_side": "up"}, "padding_side"),
        ({"tokenizer_class": ["T5Tokenizer"]}, "tokenizer_class must be a string"),
        ({"sp_model_kwargs": {"nonsense": 1}}, "has a value that NllbTokenizer cannot use"),
        ({"clean_up_tokenization_spaces": "no"}, "clean_up_tokenization_spaces must be true or false"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_values_of_the_wrong_kind(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    directory = nllb(tmp_path, fast=False)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(CheckpointError) as caught:
        AutoTokenizer.from_pretrained(directory)
    assert str(directory) in str(caught.value) and message in str(caught.value)


def test_a_broken_tokenizer_json(tmp_path: Path) -> None:
    directory = nllb(tmp_path)
    path = directory / "tokenizer.json"
    whole = path.read_text(encoding="utf-8")
    normalizer = json.loads(whole)["normalizer"]
    assert "precompiled_charsmap" in str(normalizer)
    for broken in (whole[:-5], whole.replace('"precompiled_charsmap": "', '"precompiled_charsmap": "A', 1), "{}"):
        path.write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"{path} is not a tokenizer\.json"):
            AutoTokenizer.from_pretrained(directory)


def test_what_the_caller_gives_is_the_callers_fault(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="nonsense"):
        AutoTokenizer.from_pretrained(nllb(tmp_path, fast=False), sp_model_kwargs={"nonsense": 1})
