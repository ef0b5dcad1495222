"""One tokenizer in several threads, as a server has it: every call gives what it gives alone."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from moekernels.tokenizers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from moekernels.tokenizers.backends import Backends
from tests.tokenizers import builders
from tests.tokenizers import sentencepiece_builders as sentencepiece

THREADS, ROUNDS = 8, 40
TEXT = "The quick brown fox jumps over the lazy dog. " * 8
#: Calls that ask for different things, so that one thread's settings would show in another's rows.
CALLS: tuple[dict[str, Any], ...] = (
    {},
    {"truncation": True, "max_length": 7},
    {"padding": "max_length", "max_length": 150},
    {"padding": True, "pad_to_multiple_of": 16, "padding_side": "left"},
    {"truncation": True, "max_length": 11, "padding": "max_length"},
    {"add_special_tokens": False},
    {"split_special_tokens": True},
    {"return_special_tokens_mask": True, "return_token_type_ids": True},
)


@pytest.fixture(autouse=True)
def _threads_change_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def neox(directory: Path) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(builders.neox_json()), pad_token="<|padding|>")


def loaded(build: Callable[..., Path], **settings: Any) -> Callable[[Path], Any]:
    return lambda directory: AutoTokenizer.from_pretrained(build(directory), **settings)


TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "neox": neox,
    "llama": loaded(sentencepiece.llama_fast, pad_token="</s>"),
    "llama slow": loaded(sentencepiece.llama, pad_token="</s>", use_fast=False),
    "t5": loaded(sentencepiece.t5),
    "t5 slow": loaded(sentencepiece.t5, use_fast=False),
    "nllb": loaded(sentencepiece.nllb, src_lang="deu_Latn", tgt_lang="fra_Latn"),
    "nllb slow": loaded(sentencepiece.nllb, src_lang="deu_Latn", tgt_lang="fra_Latn", use_fast=False),
    "m2m_100": loaded(sentencepiece.m2m_100, src_lang="de", tgt_lang="fr"),
}
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def in_threads(work: Callable[[int], None]) -> None:
    """Runs work(0) to work(THREADS - 1) at once, and raises what any of them raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(THREADS)

    def run(index: int) -> None:
        barrier.wait()
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def result(tokenizer: PreTrainedTokenizerBase, index: int) -> Any:
    """What call `index` gives: the entries of sources, of targets, and a text again."""
    options = CALLS[index % len(CALLS)]
    target = {"text_target": [TEXT[5:], "a"]} if hasattr(tokenizer, "tgt_lang") else {}
    encoding = tokenizer(["lazy " * index + TEXT, "short"], **target, **options)
    return dict(encoding), tokenizer.decode(encoding["input_ids"][0], skip_special_tokens=bool(index % 2))


@each_tokenizer
def test_calls(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name](tmp_path)
    alone = [result(tokenizer, index) for index in range(THREADS)]
    assert len({str(entries) for entries, _ in alone}) == THREADS

    def work(index: int) -> None:
        for turn in range(ROUNDS):
            chosen = (index + turn) % THREADS
            assert result(tokenizer, chosen) == alone[chosen]

    in_threads(work)
    assert [result(tokenizer, index) for index in range(THREADS)] == alone


@each_tokenizer
def test_tokens_added_meanwhile(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name](tmp_path)
    expected, before = result(tokenizer, 0), len(tokenizer)

    def work(index: int) -> None:
        for turn in range(ROUNDS // 2):
            if index == 0:
                tokenizer.add_tokens([f"<new_{turn}>"])
                tokenizer.save_pretrained(tmp_path / "saved")
            else:
                assert result(tokenizer, 0) == expected

    in_threads(work)
    assert len(tokenizer) == before + ROUNDS // 2
    for used in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved", use_fast=tokenizer.is_fast)):
        ids = used("a <new_3> b", add_special_tokens=False).input_ids
        assert used.convert_tokens_to_ids("<new_3>") == before + 3 in ids


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@each_tokenizer
def test_a_copy_of_a_tokenizer(name: str, duplicate: Any, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name](tmp_path)
    other = duplicate(tokenizer)
    assert result(other, 3) == result(tokenizer, 3)
    other.add_tokens(["<new>"])
    assert len(other) == len(tokenizer) + 1


def test_copies_are_what_the_tokenizer_is(tmp_path: Path) -> None:
    """Token for token and part for part, also after the tokenizer itself was changed."""
    for name in ("neox", "llama", "t5", "nllb"):
        (tmp_path / name).mkdir()
        main = TOKENIZERS[name](tmp_path / name).backend_tokenizer
        main.add_tokens([main.id_to_token(40), "<between>", main.id_to_token(41)])
        backends = Backends(main)
        first, second = backends.take(), backends.take()
        assert first[0] is main and second[0] is not main
        assert second[0].to_str() == main.to_str()
        backends.give(second)
        assert backends.take()[0] is second[0]
        backends.give(first)
        with backends.changing() as changed:
            changed.add_tokens(["<new>"])
        first, third = backends.take(), backends.take()
        assert third[0] is not second[0] and third[0].token_to_id("<new>") == main.token_to_id("<new>")
