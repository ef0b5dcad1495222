"""Text that appears while it is being generated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from queue import Queue
from typing import Any

from torch import Tensor

# The decoder's stand-in for bytes that are not UTF-8 (yet).
_REPLACEMENT = "\ufffd"
# CJK ideographs are words of their own: nothing that follows changes them. Unicode 15, blocks named CJK ... Ideographs.
_IDEOGRAPHS = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2EBEF),
    (0x2F800, 0x2FA1F),
    (0x30000, 0x323AF),
)


def _is_ideograph(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _IDEOGRAPHS)


class BaseStreamer:
    """Receives the prompt and then every token as it is chosen."""

    def put(self, value: Tensor) -> None:
        """Called with the prompt `[B, length]`, then with every step's tokens `[B]`, on the CPU."""
        raise NotImplementedError

    def end(self) -> None:
        """Called once, after the last token."""
        raise NotImplementedError


class _IncrementalDecoder:
    """Turns tokens into text piece by piece, at a cost that does not grow with the text.

    What a token decodes to depends on the ones before it, so every piece is the difference of two decodings that start
    together: of the tokens up to the last complete piece, and of those and the new ones.
    """

    def __init__(self, tokenizer: Any, **decode_kwargs: Any) -> None:
        self._tokenizer = tokenizer
        self._kwargs = decode_kwargs
        self._tokens: list[int] = []
        self._read = 0

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, **self._kwargs)

    def push(self, tokens: list[int], last: bool = False) -> str:
        """The text that `tokens` complete. Half a character waits for its other half, unless these are the last."""
        self._tokens.extend(tokens)
        before = self._decode(self._tokens[: self._read])
        text = self._decode(self._tokens)
        # A token that adds nothing (a skipped special one) stays, so that the next one is not decoded as the first.
        if len(text) <= len(before) or (text.endswith(_REPLACEMENT) and not last):
            return ""
        self._tokens = self._tokens[self._read :]
        self._read = len(self._tokens)
        return text[len(before) :]


class TextStreamer(BaseStreamer):
    """Prints text to stdout in complete words.

    Args:
        tokenizer: has `decode(ids, **decode_kwargs) -> str`.
        skip_prompt: leave out the prompt.
        decode_kwargs: for `decode`, such as `skip_special_tokens=True`.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self._reset()

    def _reset(self) -> None:
        self._decoder = _IncrementalDecoder(self.tokenizer, **self.decode_kwargs)
        self._pending = ""
        self._at_prompt = True

    def put(self, value: Tensor) -> None:
        """Takes the next tokens.

        Raises:
            ValueError: there is more than one sequence.
        """
        if value.dim() > 1 and value.shape[0] > 1:
            raise ValueError(f"{type(self).__name__} can print one sequence, got tokens of shape {list(value.shape)}")
        at_prompt, self._at_prompt = self._at_prompt, False
        if at_prompt and self.skip_prompt:
            return
        self._pending += self._decoder.push(value.reshape(-1).tolist())
        end = self._end_of_last_word(self._pending)
        if end:
            text, self._pending = self._pending[:end], self._pending[end:]
            self.on_finalized_text(text)

    def end(self) -> None:
        """Passes on what is left, complete or not."""
        text = self._pending + self._decoder.push([], last=True)
        self._reset()
        self.on_finalized_text(text, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints `text`; override it to send the text elsewhere."""
        print(text, flush=True, end="\n" if stream_end else "")

    @staticmethod
    def _end_of_last_word(text: str) -> int:
        for position in range(len(text) - 1, -1, -1):
            if text[position].isspace() or _is_ideograph(text[position]):
                return position + 1
        return 0


class TextIteratorStreamer(TextStreamer):
    """An iterator over the text, for another thread than the one that generates.

    Args:
        timeout: seconds to wait for the next piece before `queue.Empty` is raised; None to wait for ever.
    """

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self._queue: Queue[str | None] = Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Queues `text`."""
        self._queue.put(text)
        if stream_end:
            self._queue.put(None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        text = self._queue.get(timeout=self.timeout)
        if text is None:
            raise StopIteration
        return text


class AsyncTextIteratorStreamer(TextStreamer):
    """An asynchronous iterator over the text, made in the event loop that reads it, for generation in another thread.

    Args:
        timeout: seconds to wait for the next piece before `TimeoutError` is raised; None to wait for ever.
    """

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Queues `text`, from any thread."""
        for piece in (text, None) if stream_end else (text,):
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        try:
            text = await asyncio.wait_for(self._pieces.get(), self.timeout)
        except asyncio.TimeoutError:  # not the built-in one before Python 3.11
            raise TimeoutError(f"no text came for {self.timeout} seconds") from None
        if text is None:
            raise StopAsyncIteration
        return text
