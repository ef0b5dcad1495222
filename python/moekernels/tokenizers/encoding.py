"""What a tokenizer returns: token ids and what belongs to them, as lists or tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch


class BatchEncoding(dict[str, Any]):
    """A dictionary whose entries are attributes too; `model(**encoding)` works.

    Args:
        data: the entries, such as `input_ids` and `attention_mask`, as lists.
        encodings: the `tokenizers.Encoding` of every row, which `encoding[row]` gives and the offsets come from.
        tensor_type: `"pt"` or `"np"` to turn the entries into tensors or arrays; None leaves lists.

    Raises:
        ValueError: the rows do not have one length, and tensors are asked for.
    """

    def __init__(
        self,
        data: dict[str, Any] | None = None,
        encodings: Sequence[Any] | None = None,
        tensor_type: str | None = None,
    ) -> None:
        super().__init__(data or {})
        self._encodings = list(encodings) if encodings is not None else None
        self.convert_to_tensors(tensor_type)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        if isinstance(key, int):
            return self._encoding(key)
        if isinstance(key, slice):
            return {name: value[key] for name, value in self.items()}
        raise KeyError(f"an encoding is indexed by name, row or slice, got {type(key).__name__}")

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the encoding has no {name!r}; it has {', '.join(self)}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self), self._encodings)

    @property
    def data(self) -> dict[str, Any]:
        return self

    @property
    def encodings(self) -> list[Any] | None:
        return self._encodings

    @property
    def is_fast(self) -> bool:
        """Whether the rows know their offsets."""
        return self._encodings is not None

    def convert_to_tensors(self, tensor_type: str | None, prepend_batch_axis: bool = False) -> BatchEncoding:
        """Turns the entries into tensors (`"pt"`) or arrays (`"np"`), in place."""
        if tensor_type is None:
            return self
        if tensor_type not in ("pt", "np"):
            raise ValueError(f"return_tensors must be 'pt' or 'np', got {tensor_type!r}")
        for name, value in self.items():
            rows = [value] if prepend_batch_axis else value
            if isinstance(rows, (torch.Tensor, np.ndarray)):
                continue
            lengths = {len(row) for row in rows if isinstance(row, (list, tuple))}
            if len(lengths) > 1:
                raise ValueError(
                    f"cannot make one tensor of {name}, whose rows have {min(lengths)} to {max(lengths)} tokens: "
                    "pass padding=True, and truncation=True where rows are too long"
                )
            # A row of no tokens must not turn into floating point.
            array = np.asarray(rows, dtype=np.int64) if lengths == {0} else np.asarray(rows)
            self[name] = torch.from_numpy(array) if tensor_type == "pt" else array
        return self

    def to(self, device: str | torch.device | int, *, non_blocking: bool = False) -> BatchEncoding:
        """Moves the tensors to a device, in place."""
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(device, non_blocking=non_blocking)
        return self

    def _encoding(self, row: int) -> Any:
        if self._encodings is None:
            raise ValueError("this encoding does not know its offsets: they come only from fast tokenizers")
        return self._encodings[row]

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row, as strings."""
        return self._encoding(batch_index).tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """The word of the input each token of a row belongs to, None for special tokens."""
        return self._encoding(batch_index).word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """Whether each token of a row belongs to the text (0) or its pair (1), None for special tokens."""
        return self._encoding(batch_index).sequence_ids

    def char_to_token(self, row: int, char_index: int, sequence_index: int = 0) -> int | None:
        """The token that covers a character of a row's text."""
        return self._encoding(row).char_to_token(char_index, sequence_index)

    def token_to_chars(self, row: int, token_index: int) -> tuple[int, int] | None:
        """First and one past the last character of a token."""
        return self._encoding(row).token_to_chars(token_index)


def padded(row: Iterable[Any], length: int, filler: Any, side: str) -> list[Any]:
    """A row with as many fillers on a side as it is short of a length."""
    row = list(row)
    filling = [filler] * max(length - len(row), 0)
    return row + filling if side == "right" else filling + row


def as_list(value: Any) -> Any:
    """Tensors and arrays, also inside a list, as lists of integers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [as_list(item) for item in value] if isinstance(value, (list, tuple)) else value
