"""Streamed text against the text of all tokens at once."""

from __future__ import annotations

import asyncio
import threading
from functools import cache
from queue import Empty
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moekernels.generation import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer
from tests.generation.adapter import Adapted, prompts, tiny_olmoe

TEXT = "One two, three!\nTabs\tand   spaces. 日本語の文章です。 你好世界 Привет, мир 👩\u200d🚀🌍 done"


@cache
def tokenizer() -> Tokenizer:
    """Bytes, and one special token: every character outside ASCII takes several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<end>"])
    return built


class Collecting(TextStreamer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pieces: list[str] = []
        self.ended = 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self.ended += stream_end


def stream(ids: list[int], prompt: int = 3, **kwargs: Any) -> Collecting:
    streamer = Collecting(tokenizer(), **kwargs)
    streamer.put(torch.tensor([ids[:prompt]]))
    for token in ids[prompt:]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return streamer


def test_pieces_are_whole_words_and_add_up() -> None:
    ids = tokenizer().encode(TEXT).ids
    streamer = stream(ids)
    assert "".join(streamer.pieces) == TEXT
    assert streamer.ended == 1 and len(streamer.pieces) > 12
    for piece in streamer.pieces[:-1]:
        assert piece[-1].isspace() or 0x4E00 <= ord(piece[-1]) <= 0x9FFF, repr(piece)
        assert "\ufffd" not in piece
    assert "\u65e5" in streamer.pieces and "One " in streamer.pieces  # as soon as they are there


def test_prompt_can_be_skipped() -> None:
    ids = tokenizer().encode(TEXT).ids
    assert "".join(stream(ids, prompt=8, skip_prompt=True).pieces) == tokenizer().decode(ids[8:])


def test_special_tokens_can_be_skipped() -> None:
    ids = tokenizer().encode("ab<end> cd<end><end>").ids
    assert "".join(stream(ids, prompt=1, skip_special_tokens=True).pieces) == "ab cd"
    assert "".join(stream(ids, prompt=1, skip_special_tokens=False).pieces) == "ab<end> cd<end><end>"


def test_spaces_after_skipped_tokens() -> None:
    class Pieces:
        """As sentencepiece decodes: the space before the first piece is left out."""

        def decode(self, ids: list[int]) -> str:
            return "".join({0: "", 1: " one", 2: " two"}[i] for i in ids).removeprefix(" ")

    streamer = Collecting(Pieces())
    for token in (0, 1, 0, 0, 2, 0, 1):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(streamer.pieces) == "one two one"


def test_broken_characters_come_out_at_the_end() -> None:
    ids = tokenizer().encode("a \u65e5").ids[:-1]
    streamer = stream(ids, prompt=1)
    assert "".join(streamer.pieces) == "a \ufffd" and streamer.pieces[0] == "a "


def test_cost_does_not_grow_with_the_text() -> None:
    lengths = []

    class Counting:
        def decode(self, ids: list[int], **kwargs: Any) -> str:
            lengths.append(len(ids))
            return tokenizer().decode(ids, **kwargs)

    streamer = Collecting(Counting())
    for token in tokenizer().encode("x" * 3000).ids:  # one word without an end
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(streamer.pieces) == "x" * 3000
    assert max(lengths) <= 4


def test_a_streamer_can_be_used_again() -> None:
    streamer = Collecting(tokenizer(), skip_prompt=True)
    for _ in range(2):
        streamer.put(torch.tensor([[1, 2, 3]]))
        streamer.put(torch.tensor([5]))
        streamer.end()
    assert streamer.ended == 2 and streamer.pieces[0] == streamer.pieces[1]


def test_one_sequence_only() -> None:
    with pytest.raises(ValueError, match=r"one sequence.*\[2, 3\]"):
        TextStreamer(tokenizer()).put(torch.zeros(2, 3, dtype=torch.long))


def test_printing(capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TextStreamer(tokenizer())
    for token in tokenizer().encode("to be").ids:
        streamer.put(torch.tensor([token]))
    assert capsys.readouterr().out == "to "
    streamer.end()
    assert capsys.readouterr().out == "be\n"


def test_iterating_in_another_thread() -> None:
    model = Adapted(tiny_olmoe())
    ids = prompts(1, 4)
    expected = tokenizer().decode(model.generate(ids, max_new_tokens=20)[0].tolist())
    streamer = TextIteratorStreamer(tokenizer(), timeout=60)
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs={"max_new_tokens": 20, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()
    with pytest.raises(Empty):
        next(iter(TextIteratorStreamer(tokenizer(), timeout=0.01)))


def test_iterating_asynchronously() -> None:
    model, ids = Adapted(tiny_olmoe()), prompts(1, 4)
    expected = tokenizer().decode(model.generate(ids, max_new_tokens=20)[0].tolist())

    async def read() -> list[str]:
        streamer = AsyncTextIteratorStreamer(tokenizer(), timeout=60)
        generation = asyncio.to_thread(model.generate, ids, max_new_tokens=20, streamer=streamer)
        task = asyncio.create_task(generation)
        pieces = [piece async for piece in streamer]
        await task
        return pieces

    assert "".join(asyncio.run(read())) == expected

    async def wait() -> str:
        return await anext(aiter(AsyncTextIteratorStreamer(tokenizer(), timeout=0.01)))

    with pytest.raises(TimeoutError, match=r"for 0.01 seconds"):
        asyncio.run(wait())


def test_the_text_is_that_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    ids = tokenizer().encode("Some words, printed <end>as they come\nin lines of \u4f60\u597d text.").ids
    for kwargs in ({}, {"skip_prompt": True}, {"skip_special_tokens": True}):
        theirs = transformers.TextStreamer(tokenizer(), **kwargs)
        theirs.put(torch.tensor([ids[:4]]))
        for token in ids[4:]:
            theirs.put(torch.tensor([token]))
        theirs.end()
        assert "".join(stream(ids, prompt=4, **kwargs).pieces) + "\n" == capsys.readouterr().out
