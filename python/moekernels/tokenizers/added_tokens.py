"""The tokens that are found in a text before it is cut into pieces."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tokenizers import AddedToken


class AddedTokens:
    """Tokens with ids of their own. Finds them in a text, leftmost first, the longest of those that begin there."""

    def __init__(self) -> None:
        self.by_id: dict[int, AddedToken] = {}
        self.ids: dict[str, int] = {}
        self._pattern: re.Pattern[str] | None = None

    def update(self, tokens: Mapping[int, AddedToken]) -> None:
        """Adds tokens by id; they replace what has their id, or their text."""
        # Other threads may be reading the tables that there are.
        by_id, ids = dict(self.by_id), dict(self.ids)
        for index, token in tokens.items():
            replaced = by_id.get(index)
            if replaced is not None:
                ids.pop(replaced.content, None)
            previous = ids.get(token.content, index)
            if previous != index:
                del by_id[previous]
            by_id[index] = token
            ids[token.content] = index
        self.by_id, self.ids, self._pattern = by_id, ids, None

    def split(self, text: str) -> list[str]:
        """`text` cut around the tokens in it, without the white space and the words that the tokens claim."""
        by_id, ids, pattern = self.by_id, self.ids, self._pattern
        if not ids:
            return [text] if text else []
        if pattern is None:
            pattern = self._pattern = re.compile(f"({_alternatives([content for content in ids if content])})")
        parts = [part for part in pattern.split(text) if part]
        for position, part in enumerate(parts):
            if part in ids:
                self._claim(parts, position, by_id[ids[part]])
        return [part for part in parts if part]

    @staticmethod
    def _claim(parts: list[str], position: int, token: AddedToken) -> None:
        """Applies how the token at a position wants to be matched to its neighbours."""
        left = parts[position - 1] if position > 0 else ""
        right = parts[position + 1] if position + 1 < len(parts) else ""
        if token.rstrip and right:
            parts[position + 1] = right.lstrip()
        if token.lstrip and left:
            parts[position - 1] = left.rstrip()
        # A single word is one between spaces; as part of another it is text like any other.
        if token.single_word and left and left[-1] != " ":
            parts[position - 1] += parts[position]
            parts[position] = ""
        elif token.single_word and right and right[0] != " ":
            parts[position + 1] = parts[position] + parts[position + 1]
            parts[position] = ""


def _alternatives(words: list[str]) -> str:
    """A pattern that matches the longest of `words`; common beginnings are shared, so that many words cost little."""
    if len(words) == 1:
        return re.escape(words[0])
    by_first: dict[str, list[str]] = {}
    for word in words:
        if word:
            by_first.setdefault(word[0], []).append(word[1:])
    pattern = "|".join(re.escape(first) + _alternatives(rests) for first, rests in by_first.items())
    return f"(?:{pattern})?" if "" in words else f"(?:{pattern})"
