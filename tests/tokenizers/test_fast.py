"""Ids, masks and texts against transformers' tokenizers on the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from moekernels.tokenizers import (
    AutoTokenizer,
    GPTNeoXTokenizerFast,
    LlamaTokenizerFast,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from tests.robustness import children
from tests.tokenizers.builders import PROBES, neox_json, olmoe, phimoe, write

TEXT = "Twenty-three experts."
KINDS: dict[str, Callable[..., Path]] = {
    "olmoe": olmoe,
    "phimoe": phimoe,
    "olmoe-with-ends": lambda directory, **changes: olmoe(
        directory, add_bos_token=True, add_eos_token=True, bos_token="<|endoftext|>", **changes
    ),
    "generic": lambda directory, **changes: write(
        directory, neox_json(), {"pad_token": "<|padding|>", "tokenizer_class": "PreTrainedTokenizerFast", **changes}
    ),
}


def both(directory: Path, **kwargs: Any) -> tuple[PreTrainedTokenizerBase, Any]:
    return (
        AutoTokenizer.from_pretrained(directory, **kwargs),
        transformers.AutoTokenizer.from_pretrained(directory, **kwargs),
    )


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedTokenizerBase, Any]:
    return both(KINDS[request.param](tmp_path))


def test_ids_of_every_probe(pair: tuple) -> None:
    ours, theirs = pair
    for text in PROBES:
        assert dict(ours(text)) == dict(theirs(text)), text
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.tokenize(text) == theirs.tokenize(text)


def test_texts_of_every_probe(pair: tuple) -> None:
    ours, theirs = pair
    for text in PROBES:
        ids = theirs(text)["input_ids"]
        for skip in (False, True):
            for clean in (None, False, True):
                kwargs = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean}
                assert ours.decode(ids, **kwargs) == theirs.decode(ids, **kwargs)
        for prefix in range(0, len(ids), 7):  # halves of characters too
            assert ours.decode(ids[:prefix]) == theirs.decode(ids[:prefix])
    batch = [theirs(text)["input_ids"] for text in PROBES]
    assert ours.batch_decode(batch) == theirs.batch_decode(batch)


def test_clean_up(pair: tuple) -> None:
    ours, theirs = pair
    text = "I do n't ' know ' , it 's here . Is n't it ? They 're ; we 've , I 'm !"
    assert ours.clean_up_tokenization(text) == theirs.clean_up_tokenization(text) != text
    ids = theirs(text)["input_ids"]
    for clean in (False, True):
        got = ours.decode(ids, clean_up_tokenization_spaces=clean)
        assert got == theirs.decode(ids, clean_up_tokenization_spaces=clean)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"padding": True},
        {"padding": True, "padding_side": "left"},
        {"padding": "max_length", "max_length": 33},
        {"padding": "longest", "pad_to_multiple_of": 16},
        {"truncation": True, "max_length": 11},
        {"max_length": 9},
        {"padding": "max_length", "truncation": True, "max_length": 12, "padding_side": "left"},
        {"truncation": True, "max_length": 10, "stride": 3, "return_overflowing_tokens": True},
        {"return_special_tokens_mask": True, "return_offsets_mapping": True, "return_length": True},
        {"return_token_type_ids": True, "return_attention_mask": False},
        {"add_special_tokens": False, "padding": True},
        {"split_special_tokens": True},
    ],
    ids="-".join,
)
def test_arguments(pair: tuple, kwargs: dict, recwarn: pytest.WarningsRecorder) -> None:
    ours, theirs = pair
    for texts in (list(PROBES), PROBES[0], [PROBES[1]]):
        got, expected = ours(texts, **kwargs), theirs(texts, **kwargs)
        assert dict(got) == dict(expected)
    # The setting of one call does not reach the next.
    assert dict(ours(PROBES[0])) == dict(theirs(PROBES[0]))


@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
def test_pairs(pair: tuple, strategy: str) -> None:
    ours, theirs = pair
    first, second = list(PROBES[:3]), list(PROBES[2:5])
    assert dict(ours(first[0], second[0])) == dict(theirs(first[0], second[0]))
    assert dict(ours(first, second, padding=True)) == dict(theirs(first, second, padding=True))
    kwargs = {"truncation": strategy, "max_length": 150}
    assert dict(ours(first, second, **kwargs)) == dict(theirs(first, second, **kwargs))
    pairs = list(zip(first, second, strict=True))
    assert dict(ours.batch_encode_plus(pairs)) == dict(theirs.batch_encode_plus(pairs))


def test_tensors(pair: tuple) -> None:
    ours, theirs = pair
    for name in ("pt", "np"):
        got, expected = (t(list(PROBES), padding=True, return_tensors=name) for t in (ours, theirs))
        assert got.keys() == expected.keys()
        for key in got:
            assert got[key].dtype == expected[key].dtype
            assert np.array_equal(np.asarray(got[key]), np.asarray(expected[key]))
    assert ours(PROBES[0], return_tensors="pt").input_ids.shape[0] == 1
    assert ours("", return_tensors="pt", add_special_tokens=False).input_ids.dtype == torch.int64
    with pytest.raises(ValueError, match=r"input_ids, whose rows have .* pass padding=True"):
        ours(list(PROBES), return_tensors="pt")


def test_words_of_their_own(tmp_path: Path) -> None:
    ours, theirs = both(olmoe(tmp_path, add_prefix_space=True))
    words = [["Hello", "there,", "world"], ["one"]]
    assert dict(ours(words, is_split_into_words=True)) == dict(theirs(words, is_split_into_words=True))
    assert ours(words[0], is_split_into_words=True).word_ids() == theirs(words[0], is_split_into_words=True).word_ids()
    assert (
        ours("Hello").input_ids
        == theirs("Hello")["input_ids"]
        != GPTNeoXTokenizerFast.from_pretrained(tmp_path, add_prefix_space=False)("Hello").input_ids
    )


def test_tokens_and_their_table(pair: tuple) -> None:
    ours, theirs = pair
    assert ours.get_vocab() == theirs.get_vocab() == ours.vocab
    assert (ours.vocab_size, len(ours)) == (theirs.vocab_size, len(theirs))
    for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token"), name
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id"), name
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert sorted(ours.all_special_ids) == sorted(theirs.all_special_ids)
    assert ours.added_tokens_encoder == theirs.added_tokens_encoder
    tokens = theirs.tokenize(PROBES[0])
    assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    assert ours.convert_tokens_to_ids("no such token") == theirs.convert_tokens_to_ids("no such token")
    ids = list(range(len(theirs)))
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert ours.convert_ids_to_tokens(ids, skip_special_tokens=True) == theirs.convert_ids_to_tokens(ids, True)
    assert ours.convert_ids_to_tokens(5) == theirs.convert_ids_to_tokens(5)
    assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)
    assert ours.num_special_tokens_to_add() == theirs.num_special_tokens_to_add()
    assert ours.num_special_tokens_to_add(pair=True) == theirs.num_special_tokens_to_add(pair=True)
    for side in ("padding_side", "truncation_side", "model_max_length", "clean_up_tokenization_spaces"):
        assert getattr(ours, side) == getattr(theirs, side), side


def test_ids_of_olmoe_kind_begin_with_nothing(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(olmoe(tmp_path))
    assert type(tokenizer) is GPTNeoXTokenizerFast
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token) == (0, 1, None)
    assert tokenizer.decode(tokenizer("plain text").input_ids) == "plain text"


def test_adding_tokens(pair: tuple) -> None:
    ours, theirs = pair
    for tokenizer in (ours, theirs):
        assert tokenizer.add_tokens(["<new>", "quick"]) == 2
        assert tokenizer.add_special_tokens({"mask_token": "<mask>", "additional_special_tokens": ["<a>"]}) == 2
        assert tokenizer.add_tokens("<new>") == 0
        tokenizer.eos_token = "<a>"
        tokenizer.pad_token_id = 3
    text = "a <new>b <mask> c<a> the quick fox"
    assert dict(ours(text)) == dict(theirs(text))
    ids = ours(text).input_ids
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.eos_token_id, ours.pad_token_id, len(ours)) == (theirs.eos_token_id, theirs.pad_token_id, len(theirs))
    assert ours.additional_special_tokens_ids == theirs.additional_special_tokens_ids
    with pytest.raises(ValueError, match="got nose_token"):
        ours.add_special_tokens({"nose_token": "x"})
    with pytest.raises(TypeError, match="eos_token must be a string"):
        ours.eos_token = 5


@pytest.mark.parametrize("kind", KINDS)
def test_saving(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    ours = AutoTokenizer.from_pretrained(KINDS[kind](tmp_path / "a", chat_template="{{ messages[0]['content'] }}"))
    ours.add_special_tokens({"additional_special_tokens": ["<a>"]})
    ours(PROBES[0], padding="max_length", max_length=20, truncation=True)  # is not what is saved
    written = ours.save_pretrained(tmp_path / "b")
    assert {Path(path).name for path in written} == {path.name for path in (tmp_path / "b").iterdir()}
    again, theirs = both(tmp_path / "b")
    assert type(again) is type(ours)
    for text in (*PROBES, "b<a>c"):
        assert again(text) == ours(text)
        assert dict(again(text)) == dict(theirs(text))
    assert again.special_tokens_map == ours.special_tokens_map
    assert {**theirs.special_tokens_map} == ours.special_tokens_map
    assert again.chat_template == ours.chat_template == theirs.chat_template
    assert again.add_prefix_space == ours.add_prefix_space  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_reading_what_transformers_saves(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    transformers.AutoTokenizer.from_pretrained(KINDS[kind](tmp_path / "a")).save_pretrained(tmp_path / "b")
    ours, theirs = both(tmp_path / "b")
    for text in PROBES:
        assert dict(ours(text)) == dict(theirs(text))
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_old_files_name_tokens_in_a_map(tmp_path: Path) -> None:
    tokens = {
        "eos_token": {"content": "<|endoftext|>", "lstrip": False},
        "pad_token": "<|padding|>",
        "sep_token": "<sep>",
    }
    write(tmp_path, neox_json(), {"tokenizer_class": "GPTNeoXTokenizer"}, special_tokens_map__json=json.dumps(tokens))
    ours, theirs = both(tmp_path)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.sep_token_id == theirs.sep_token_id == len(theirs) - 1
    assert dict(ours("a <sep> b<|padding|>")) == dict(theirs("a <sep> b<|padding|>"))


def test_without_a_config(tmp_path: Path) -> None:
    write(tmp_path, neox_json(), None)
    ours, theirs = (
        AutoTokenizer.from_pretrained(tmp_path),
        transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path),
    )
    assert type(ours) is PreTrainedTokenizerFast
    assert dict(ours(list(PROBES))) == dict(theirs(list(PROBES)))
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is GPTNeoXTokenizerFast
    (tmp_path / "config.json").write_text('{"model_type": "phimoe"}')
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is LlamaTokenizerFast


def test_pad(pair: tuple) -> None:
    ours, theirs = pair
    rows = [ours(text) for text in PROBES[:4]]
    their_rows = [theirs(text) for text in PROBES[:4]]
    for kwargs in (
        {},
        {"padding_side": "left"},
        {"padding": "max_length", "max_length": 200},
        {"pad_to_multiple_of": 8},
        {"return_tensors": "pt"},
        {"padding": False, "return_attention_mask": True},
    ):
        got, expected = ours.pad(rows, **kwargs), theirs.pad(their_rows, **kwargs)
        assert {k: _plain(v) for k, v in got.items()} == {k: _plain(v) for k, v in expected.items()}
    one = {"input_ids": torch.tensor([5, 6, 7])}
    assert ours.pad(one, padding="max_length", max_length=5, padding_side="right")["attention_mask"] == [1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="pad needs input_ids, got words"):
        ours.pad({"words": [1]})


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def test_targets_become_labels(pair: tuple) -> None:
    ours, theirs = pair
    got = ours("source", text_target="the target", return_tensors="pt")
    expected = theirs("source", text_target="the target", return_tensors="pt")
    assert got.keys() == expected.keys() and torch.equal(got.labels, expected.labels)
    assert dict(ours(text_target="the target")) == dict(theirs(text_target="the target"))


def test_a_text_too_long_for_the_model(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(olmoe(tmp_path, model_max_length=8))
    with pytest.warns(UserWarning, match="more than the 8 the model can take"):
        tokenizer(PROBES[0])
    assert len(tokenizer(PROBES[0], truncation=True).input_ids) == 8
    assert len(tokenizer("a", padding="max_length").input_ids) == 8


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ([], {}, ValueError, "text or text_target"),
        ([5], {}, TypeError, "text must be a string or a list of strings, got int"),
        ([["a", "b"], "c"], {}, ValueError, "one entry for each of the 2 of text, got str"),
        ([["a", "b"], ["c"]], {}, ValueError, "got 1 texts"),
        (["a"], {"padding": "everything"}, ValueError, "padding must be"),
        (["a"], {"truncation": "head"}, ValueError, "truncation must be"),
        (["a"], {"padding_side": "top"}, ValueError, "padding_side must be 'left' or 'right'"),
        (["a"], {"return_tensors": "tf"}, ValueError, "'pt' or 'np', got 'tf'"),
        (
            ["a"],
            {"padding": True, "truncation": True, "max_length": 9, "pad_to_multiple_of": 4},
            ValueError,
            "multiple",
        ),
    ],
)
def test_errors(args: list, kwargs: dict, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        AutoTokenizer.from_pretrained(olmoe(tmp_path))(*args, **kwargs)


def test_no_padding_token(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(olmoe(tmp_path, pad_token=None))
    with pytest.raises(ValueError, match="no pad_token; set one"):
        tokenizer(["a", "b c d"], padding=True)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer(["a", "b c d"], padding=True).input_ids[0][-1] == 0


def test_errors_of_directories(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint directory.*allenai/OLMoE"):
        AutoTokenizer.from_pretrained("allenai/OLMoE-1B-7B-0924")
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "MarianTokenizer"}')
    with pytest.raises(FileNotFoundError, match="class MarianTokenizer is not supported"):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="add_eos_token is set, but there is no eos_token"):
        AutoTokenizer.from_pretrained(olmoe(tmp_path, eos_token=None, add_eos_token=True))


def test_an_absurd_id_takes_no_memory(tmp_path: Path) -> None:
    """Written out, a tokenizer takes memory by its largest id; loading one writes nothing out."""
    true, absurd = tmp_path / "true", tmp_path / "absurd"
    true.mkdir()
    absurd.mkdir()
    definition = json.loads(olmoe(true).joinpath("tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    unused = next(token for token in vocabulary if token not in TEXT and token not in str(definition["added_tokens"]))
    vocabulary[unused] = 2**31
    (olmoe(absurd) / "tokenizer.json").write_text(json.dumps(definition))
    expected = AutoTokenizer.from_pretrained(true)(TEXT).input_ids
    outcome = children.run(lambda: AutoTokenizer.from_pretrained(absurd)(TEXT).input_ids, seconds=20, memory=2**28)
    assert outcome.result == expected
