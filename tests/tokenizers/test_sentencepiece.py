"""What the sentencepiece tokenizers share, against transformers' tokenizers on the same files."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers

from moekernels import tokenizers
from moekernels.tokenizers import M2M100Tokenizer, NllbTokenizer, T5Tokenizer
from tests.tokenizers.sentencepiece_builders import (
    PROBES,
    TEXTS,
    bpe_model,
    llama,
    llama_fast,
    m2m_100,
    nllb,
    t5,
    unigram_model,
)


class Kind(NamedTuple):
    name: str
    write: Callable[..., Path]
    settings: Mapping[str, Any] = MappingProxyType({})


KINDS = {
    "m2m100": Kind("M2M100Tokenizer", m2m_100),
    "wmt21": Kind("M2M100Tokenizer", m2m_100, {"language_codes": "wmt21", "src_lang": "is"}),
    "nllb": Kind("NllbTokenizer", nllb),
    "nllb-legacy": Kind("NllbTokenizer", nllb, {"legacy_behaviour": True, "src_lang": "ron_Latn"}),
    "nllb-fast": Kind("NllbTokenizerFast", nllb),
    "nllb-fast-legacy": Kind("NllbTokenizerFast", nllb, {"legacy_behaviour": True, "src_lang": "hin_Deva"}),
    "t5": Kind("T5Tokenizer", t5, {"legacy": True}),
    "t5-not-legacy": Kind("T5Tokenizer", t5, {"legacy": False}),
    "t5-no-prefix": Kind("T5Tokenizer", t5, {"legacy": False, "add_prefix_space": False}),
    "t5-fast": Kind("T5TokenizerFast", t5),
    "llama": Kind("LlamaTokenizer", llama),
    "llama-legacy": Kind("LlamaTokenizer", llama, {"legacy": True, "add_eos_token": True}),
    "llama-fast": Kind("LlamaTokenizerFast", llama_fast),
    "llama-fast-eos": Kind("LlamaTokenizerFast", llama_fast, {"legacy": True, "add_eos_token": True}),
    "llama-no-prefix": Kind("LlamaTokenizer", llama, {"add_prefix_space": False, "add_bos_token": False}),
}
Pair = tuple[Any, Any]


def both(name: str, directory: Path, **settings: Any) -> Pair:
    return (
        getattr(tokenizers, name).from_pretrained(directory, **settings),
        getattr(transformers, name).from_pretrained(directory, **settings),
    )


@pytest.fixture(params=KINDS, scope="module")
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    kind = KINDS[request.param]
    return kind.name, kind.write(tmp_path_factory.mktemp(request.param), **kind.settings)


@pytest.fixture(scope="module")
def pair(directory: tuple[str, Path]) -> Pair:
    """Ours and theirs, for tests that do not change them."""
    return both(*directory)


@pytest.fixture
def own_pair(directory: tuple[str, Path]) -> Pair:
    return both(*directory)


@pytest.mark.filterwarnings("ignore:This sequence already has </s>")
def test_ids_of_every_probe(pair: Pair) -> None:
    ours, theirs = pair
    for text in PROBES:
        assert dict(ours(text)) == dict(theirs(text)), text
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.tokenize(text) == theirs.tokenize(text)
    assert dict(ours(list(TEXTS))) == dict(theirs(list(TEXTS)))


def test_the_probes_are_hard(pair: Pair) -> None:
    ours, _ = pair
    ids = [index for text in PROBES for index in ours(text).input_ids]
    assert ours.unk_token_id in ids
    assert any(index >= ours.vocab_size for index in ids) or ours.is_fast


def test_texts_of_every_probe(pair: Pair) -> None:
    ours, theirs = pair
    for text in PROBES:
        ids = theirs(text)["input_ids"]
        for part in (ids, [*ids[1:-1], *ids[:2], ours.pad_token_id, ours.unk_token_id]):
            assert ours.decode(part) == theirs.decode(part), (text, part)
            if set(part) <= set(ours.all_special_ids):  # transformers' T5 cannot decode nothing
                assert ours.decode(part, skip_special_tokens=True) == "" == ours.decode([])
                continue
            for clean in (False, True):
                kwargs = {"skip_special_tokens": True, "clean_up_tokenization_spaces": clean}
                assert ours.decode(part, **kwargs) == theirs.decode(part, **kwargs), (text, part)
    batch = ours(TEXTS[:20], padding=True, return_tensors="pt").input_ids
    assert ours.batch_decode(batch) == theirs.batch_decode(batch)
    decoded = ours.batch_decode(batch, skip_special_tokens=True)
    assert decoded == theirs.batch_decode(batch, skip_special_tokens=True)
    assert TEXTS[7] == decoded[7]


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
        {"return_special_tokens_mask": True, "padding": True},
        {"return_attention_mask": False},
        {"add_special_tokens": False, "padding": True},
    ],
    ids="-".join,
)
def test_arguments(pair: Pair, kwargs: dict) -> None:
    ours, theirs = pair
    for texts in (TEXTS[:9], TEXTS[0], [TEXTS[20]]):
        assert dict(ours(texts, **kwargs)) == dict(theirs(texts, **kwargs))
    # The setting of one call does not reach the next.
    assert dict(ours(TEXTS[0])) == dict(theirs(TEXTS[0]))


def test_further_entries(pair: Pair) -> None:
    ours, theirs = pair
    assert ours(TEXTS[0], return_length=True)["length"] == theirs(TEXTS[0], return_length=True)["length"]
    text = "a</s>b"
    got = ours(text, split_special_tokens=True).input_ids
    assert got == theirs(text, split_special_tokens=True)["input_ids"]
    assert got != ours(text).input_ids or ours.is_fast
    kwargs = {"truncation": True, "max_length": 10, "stride": 3, "return_overflowing_tokens": True}
    assert dict(ours(TEXTS[0], **kwargs)) == dict(theirs(TEXTS[0], **kwargs))
    assert dict(ours(TEXTS[:3], **kwargs)) == dict(theirs(TEXTS[:3], **kwargs))
    # The ids and their types have one length, which transformers' slow tokenizers do not ensure.
    rows = ours([TEXTS[0], TEXTS[1]], TEXTS[2:4], return_token_type_ids=True)
    assert [len(ids) for ids in rows.input_ids] == [len(types) for types in rows.token_type_ids]


def test_truncation_from_the_left(own_pair: Pair) -> None:
    ours, theirs = own_pair
    for tokenizer in own_pair:
        tokenizer.truncation_side = "left"
    kwargs = {"truncation": True, "max_length": 8}
    assert dict(ours(TEXTS[:5], **kwargs)) == dict(theirs(TEXTS[:5], **kwargs))
    assert dict(ours(TEXTS[0], TEXTS[1], **kwargs)) == dict(theirs(TEXTS[0], TEXTS[1], **kwargs))


@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
def test_pairs(pair: Pair, strategy: str) -> None:
    ours, theirs = pair
    first, second = TEXTS[:3], TEXTS[13:16]
    assert dict(ours(first[0], second[0])) == dict(theirs(first[0], second[0]))
    assert dict(ours(first, second, padding=True)) == dict(theirs(first, second, padding=True))
    for length in (48, 55, 60):
        kwargs = {"truncation": strategy, "max_length": length}
        assert dict(ours(first, second, **kwargs)) == dict(theirs(first, second, **kwargs))
    pairs = list(zip(first, second, strict=True))
    assert dict(ours.batch_encode_plus(pairs)) == dict(theirs.batch_encode_plus(pairs))
    assert ours.tokenize(first[0], second[0], add_special_tokens=True) == ours.convert_ids_to_tokens(
        ours(first[0], second[0]).input_ids
    )


def test_words(pair: Pair) -> None:
    ours, theirs = pair
    words = [text.split() for text in TEXTS[:4]]
    assert dict(ours(words, is_split_into_words=True)) == dict(theirs(words, is_split_into_words=True))
    assert dict(ours(words[0], is_split_into_words=True)) == dict(theirs(words[0], is_split_into_words=True))
    got = ours(words[0], words[1], is_split_into_words=True)
    assert dict(got) == dict(theirs(words[0], words[1], is_split_into_words=True))


def test_tensors(pair: Pair) -> None:
    ours, _ = pair
    for name in ("pt", "np"):
        got, expected = (t(list(TEXTS), padding=True, return_tensors=name) for t in pair)
        assert got.keys() == expected.keys()
        for key in got:
            assert got[key].dtype == expected[key].dtype
            assert np.array_equal(np.asarray(got[key]), np.asarray(expected[key]))
    assert ours(TEXTS[0], return_tensors="pt").input_ids.shape[0] == 1
    assert ours("", return_tensors="pt", add_special_tokens=False).input_ids.dtype == torch.int64
    assert dict(ours([])) == {"input_ids": [], "attention_mask": []}
    with pytest.raises(ValueError, match=r"input_ids, whose rows have .* pass padding=True"):
        ours(TEXTS, return_tensors="pt")


def test_tokens_and_their_table(pair: Pair) -> None:
    ours, theirs = pair
    assert ours.get_vocab() == theirs.get_vocab() == ours.vocab
    assert (ours.vocab_size, len(ours)) == (theirs.vocab_size, len(theirs))
    for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token"), name
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id"), name
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert sorted(ours.all_special_ids) == sorted(theirs.all_special_ids)
    assert ours.added_tokens_encoder == theirs.added_tokens_encoder == ours.get_added_vocab()
    tokens = theirs.tokenize(TEXTS[0])
    assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    assert ours.convert_tokens_to_ids("no such token") == theirs.convert_tokens_to_ids("no such token")
    ids = list(range(len(theirs)))
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert ours.convert_ids_to_tokens(ids, skip_special_tokens=True) == theirs.convert_ids_to_tokens(ids, True)
    assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(list(tokens))
    assert ours.num_special_tokens_to_add() == theirs.num_special_tokens_to_add()
    assert ours.num_special_tokens_to_add(pair=True) == theirs.num_special_tokens_to_add(pair=True)
    assert ours.model_input_names == theirs.model_input_names


def test_ids_past_the_vocabulary_decode_to_nothing(pair: Pair) -> None:
    ours, _ = pair
    ids = ours(TEXTS[0]).input_ids
    expected = ours.decode(ids, skip_special_tokens=True)
    # The models' vocabularies are larger than the tokenizers'.
    assert ours.decode([*ids, len(ours) + 3, 10**6], skip_special_tokens=True) == expected


def test_special_tokens_mask(pair: Pair) -> None:
    ours, theirs = pair
    first, second = ours.encode(TEXTS[0], add_special_tokens=False), ours.encode(TEXTS[1], add_special_tokens=False)
    ids = ours(TEXTS[0]).input_ids
    if ours.is_fast:
        assert ours.get_special_tokens_mask(ids) == theirs.get_special_tokens_mask(ids, already_has_special_tokens=True)
        return
    assert ours.build_inputs_with_special_tokens(first) == ids == theirs.build_inputs_with_special_tokens(first)
    assert ours.build_inputs_with_special_tokens(first, second) == theirs.build_inputs_with_special_tokens(
        first, second
    )
    assert ours.get_special_tokens_mask(first) == theirs.get_special_tokens_mask(first)
    assert ours.get_special_tokens_mask(first, second) == theirs.get_special_tokens_mask(first, second)
    assert ours.get_special_tokens_mask(torch.tensor(ids), already_has_special_tokens=True) == (
        theirs.get_special_tokens_mask(ids, already_has_special_tokens=True)
    )
    with pytest.raises(ValueError, match="got token_ids_1 too"):
        ours.get_special_tokens_mask(ids, second, already_has_special_tokens=True)


def test_adding_tokens(own_pair: Pair) -> None:
    ours, theirs = own_pair
    whole = transformers.AddedToken("whole", single_word=True, lstrip=True, rstrip=True)
    for tokenizer in own_pair:
        assert tokenizer.add_tokens(["<new>", whole]) == 2
        assert tokenizer.add_special_tokens({"sep_token": "<sep>", "additional_special_tokens": ["<a>"]}, False) == 2
        assert tokenizer.add_tokens("<new>") == 0
        assert tokenizer.add_tokens(["<b>"], special_tokens=True) == 1
    for text in ("a <new>b <sep> c<a> <b>the river", "the whole river, wholesome  whole  it is"):
        assert dict(ours(text)) == dict(theirs(text))
        ids = ours(text).input_ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.sep_token_id, len(ours)) == (theirs.sep_token_id, len(theirs))
    assert ours.added_tokens_encoder == theirs.added_tokens_encoder


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_saving(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    ours, _ = both(kind.name, kind.write(tmp_path / "a", **kind.settings))
    ours.add_special_tokens({"additional_special_tokens": ["<a>"]}, replace_additional_special_tokens=False)
    written = ours.save_pretrained(tmp_path / "b")
    assert {Path(path).name for path in written} == {path.name for path in (tmp_path / "b").iterdir()}
    again, theirs = both(kind.name, tmp_path / "b")
    for text in (*TEXTS, *PROBES[-13:-3], "b<a>c"):
        assert again(text) == ours(text)
        if not text.endswith("</s>"):
            assert dict(again(text)) == dict(theirs(text))
    assert again.special_tokens_map == ours.special_tokens_map
    assert again.init_kwargs == ours.init_kwargs
    assert type(tokenizers.AutoTokenizer.from_pretrained(tmp_path / "b")) is type(ours)
    assert tokenizers.AutoTokenizer.from_pretrained(tmp_path / "b")(TEXTS[0]) == ours(TEXTS[0])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_reading_what_transformers_saves(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    _, theirs = both(kind.name, kind.write(tmp_path / "a", **kind.settings))
    theirs.add_tokens(["<new>"])
    theirs.save_pretrained(tmp_path / "b")
    ours, theirs = both(kind.name, tmp_path / "b")
    for text in (*TEXTS, *PROBES[-13:-3], "a <new> b"):
        assert dict(ours(text)) == dict(theirs(text))
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.get_vocab() == theirs.get_vocab()


def test_saving_a_vocabulary_alone(tmp_path: Path) -> None:
    tokenizer = M2M100Tokenizer.from_pretrained(m2m_100(tmp_path))
    (tmp_path / "out").mkdir()
    paths = tokenizer.save_vocabulary(str(tmp_path / "out"), "mine")
    assert [Path(path).name for path in paths] == ["mine-vocab.json", "mine-sentencepiece.bpe.model"]
    again = M2M100Tokenizer(*paths)
    assert again(TEXTS) == tokenizer(TEXTS)
    assert Path(paths[1]).read_bytes() == bpe_model()
    # What changes how T5 reads its model is not in what it saves.
    unlike = T5Tokenizer.from_pretrained(t5(tmp_path), legacy=False)
    assert Path(unlike.save_vocabulary(tmp_path / "out")[0]).read_bytes() == unigram_model()
    with pytest.raises(NotADirectoryError, match=r"no such directory to save a vocabulary in: .*nowhere"):
        tokenizer.save_vocabulary(tmp_path / "nowhere")


def test_copies(pair: Pair) -> None:
    ours, _ = pair
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for text in PROBES:
            assert again(text) == ours(text)
        again.add_tokens("<only here>")
        assert len(again) == len(ours) + 1


def test_sampling(tmp_path: Path) -> None:
    options = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}
    tokenizer = T5Tokenizer.from_pretrained(t5(tmp_path), sp_model_kwargs=options)
    seen = {tuple(tokenizer(TEXTS[0]).input_ids) for _ in range(20)}
    assert len(seen) > 1
    assert {tokenizer.decode(ids, skip_special_tokens=True) for ids in seen} == {TEXTS[0]}
    assert T5Tokenizer.from_pretrained(tmp_path)(TEXTS[0]) == T5Tokenizer.from_pretrained(tmp_path)(TEXTS[0])
    tokenizer.save_pretrained(tmp_path / "b")
    assert T5Tokenizer.from_pretrained(tmp_path / "b").sp_model_kwargs == options
    with pytest.raises(TypeError, match="temperature"):
        T5Tokenizer.from_pretrained(tmp_path, sp_model_kwargs={"temperature": 1})


def test_tokens_added_in_older_files(tmp_path: Path) -> None:
    """Where the settings do not list added tokens, other files do."""
    nllb(tmp_path)
    ids = NllbTokenizer.from_pretrained(tmp_path).added_tokens_encoder
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "NllbTokenizer"}')
    (tmp_path / "added_tokens.json").write_text('{"<new>": 1150, "<mask>": 7}')
    ours, theirs = both("NllbTokenizer", tmp_path)
    assert ours.added_tokens_encoder == {**ids, "<new>": 1150}
    assert dict(ours("a <new> b <mask> c")) == dict(theirs("a <new> b <mask> c"))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (["a"], {"return_offsets_mapping": True}, ValueError, "needs a fast tokenizer"),
        (
            ["the long river"],
            {"max_length": 1},
            ValueError,
            r"cannot truncate to max_length=1 with truncation='longest",
        ),
        (["river", "water"], {"max_length": 2, "truncation": "only_second"}, ValueError, "a pair of 3"),
        (["river"], {"max_length": 2, "truncation": "only_second"}, ValueError, "from a text of"),
        (["a", "b"], {"max_length": 1, "truncation": True}, ValueError, "and a pair of 1"),
        ([[["a", "b", "c"]]], {}, ValueError, "a string or a pair of them, got 3 in one"),
        ([5], {}, TypeError, "text must be a string or a list of strings, got int"),
    ],
)
def test_errors(args: list, kwargs: dict, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        NllbTokenizer.from_pretrained(nllb(tmp_path, fast=False))(*args, **kwargs)


def test_truncating_everything_away(tmp_path: Path) -> None:
    tokenizer = NllbTokenizer.from_pretrained(nllb(tmp_path, fast=False))
    assert tokenizer(TEXTS[0], max_length=2).input_ids == [tokenizer.get_lang_id("eng_Latn"), tokenizer.eos_token_id]


@pytest.mark.parametrize("made", [M2M100Tokenizer, NllbTokenizer, T5Tokenizer])
def test_errors_of_files(made: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no .*(sentencepiece\.bpe|spiece)\.model in .*Tokenizer reads"):
        made.from_pretrained(tmp_path)
    for name in made.vocab_files_names.values():
        (tmp_path / name).write_text('{"<unk>": 0}')
    with pytest.raises(ValueError, match=r"\.model is not a sentencepiece model"):
        made.from_pretrained(tmp_path)
    for name in made.vocab_files_names.values():
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"\.model is not a sentencepiece model|vocab\.json: not valid JSON"):
        made.from_pretrained(tmp_path)
    arguments = [tmp_path / "nowhere"] * len(made.vocab_files_names)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        made(*arguments)
