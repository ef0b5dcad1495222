from __future__ import annotations

import random

from tokenizers import AddedToken
from transformers.tokenization_utils import Trie

from moekernels.tokenizers.added_tokens import AddedTokens
from moekernels.tokenizers.languages import FLORES_200, M2M100


def added(*contents: str, **flags: bool) -> AddedTokens:
    tokens = AddedTokens()
    tokens.update({index: AddedToken(content, **flags) for index, content in enumerate(contents)})
    return tokens


def test_the_longest_of_the_leftmost() -> None:
    tokens = added("ab", "abcd", "bc", "d", "a.")
    assert tokens.split("xabcabcdbcda.b") == ["x", "ab", "c", "abcd", "bc", "d", "a.", "b"]
    assert tokens.split("") == []
    assert AddedTokens().split("ab") == ["ab"]


def test_against_a_trie() -> None:
    """On tokens as models have them: transformers' search misses some that overlap in odder ways."""
    source = random.Random(3)
    words = [*FLORES_200, *(f"__{code}__" for code in M2M100), *(f"<extra_id_{i}>" for i in range(100)), "</s>", "<s>"]
    tokens, trie = added(*words), Trie(words)
    for _ in range(300):
        parts = source.choices(words, k=8)
        text = "".join(source.choice([part, part[:-1], part[1:], f" {part}", "a"]) for part in parts)
        assert tokens.split(text) == trie.split(text), text


def test_white_space_and_words() -> None:
    assert added("<m>", lstrip=True).split("a  <m>  b") == ["a", "<m>", "  b"]
    assert added("<m>", rstrip=True).split("a  <m>  b") == ["a  ", "<m>", "b"]
    assert added("<m>", lstrip=True, rstrip=True).split(" <m> ") == ["<m>"]
    assert added("word", single_word=True).split("a word sword words") == ["a ", "word", " sword", " ", "words"]


def test_later_tokens_replace_earlier_ones() -> None:
    tokens = added("a", "b")
    assert tokens.split("ab") == ["a", "b"]
    tokens.update({1: AddedToken("c"), 5: AddedToken("a")})
    assert tokens.ids == {"c": 1, "a": 5} and {i: t.content for i, t in tokens.by_id.items()} == {1: "c", 5: "a"}
    assert tokens.split("abca") == ["a", "b", "c", "a"]
