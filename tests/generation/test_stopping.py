from __future__ import annotations

import pytest
import torch
from transformers.generation import stopping_criteria as oracle

from moekernels.generation import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from moekernels.generation.stopping import build_stopping_criteria

IDS = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 2]])


@pytest.mark.parametrize("eos", [3, [3, 6], [9], torch.tensor(6)])
def test_eos(eos: object) -> None:
    expected = oracle.EosTokenCriteria(eos)(IDS, None)  # type: ignore[arg-type]
    assert torch.equal(EosTokenCriteria(eos)(IDS, None), expected)  # type: ignore[arg-type]


def test_length_and_time() -> None:
    assert [MaxLengthCriteria(n)(IDS, None) for n in (2, 3, 4)] == [True, True, False]
    assert MaxTimeCriteria(5.0, initial_timestamp=0.0)(IDS, None)
    assert not MaxTimeCriteria(1000.0)(IDS, None)


def test_any_criterion_stops_a_row() -> None:
    criteria = StoppingCriteriaList([EosTokenCriteria(3), EosTokenCriteria(6), lambda ids, scores: ids[:, 0] == 99])
    assert criteria(IDS, None).tolist() == [True, True, False]
    assert StoppingCriteriaList()(IDS, None).tolist() == [False] * 3
    assert StoppingCriteriaList([lambda ids, scores: True])(IDS, None).tolist() == [True] * 3


def test_the_list_knows_the_length() -> None:
    assert StoppingCriteriaList([MaxLengthCriteria(9), MaxLengthCriteria(7)]).max_length == 7
    assert StoppingCriteriaList([EosTokenCriteria(1)]).max_length is None


class Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join("abc\u00e9"[i] for i in ids)


def test_stop_strings_end_with_the_newest_token() -> None:
    stop = StopStringCriteria(Letters(), ["bc", "\u00e9a"])
    rows = torch.tensor([[0, 1, 2], [1, 2, 0], [2, 3, 0], [2, 2, 1]])
    assert stop(rows, None).tolist() == [True, False, True, False]
    assert StopStringCriteria(Letters(), "a")(rows[:, :1], None).tolist() == [True, False, False, False]
    for bad in ("", [], ["a", ""]):
        with pytest.raises(ValueError, match="non-empty strings"):
            StopStringCriteria(Letters(), bad)


def test_built_from_a_config() -> None:
    mine = EosTokenCriteria(4)
    config = GenerationConfig(eos_token_id=3, max_length=9, max_time=4.0, stop_strings="x")
    built = build_stopping_criteria(config, custom=[mine], tokenizer=Letters())
    assert [type(criterion) for criterion in built] == [
        MaxLengthCriteria,
        MaxTimeCriteria,
        StopStringCriteria,
        EosTokenCriteria,
    ]
    assert built[-1] is mine
    with pytest.raises(ValueError, match="tokenizer"):
        build_stopping_criteria(config)


class Pieces:
    """Tokens of several characters, as a vocabulary has them; the last is half of a character."""

    vocabulary = ("\n", "\n\n", ".", "..", "#", "##", " a", "a.\n", "\n#", "ab", "ba", "aab")

    def decode(self, ids: list[int]) -> str:
        return "".join(self.vocabulary[i] for i in ids)

    def get_vocab(self) -> dict[str, int]:
        return {piece: index for index, piece in enumerate(self.vocabulary)}

    # What transformers' criterion needs of a tokenizer: it looks at every token behind a text of its own.

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        self.text = text
        return {"input_ids": [-1]}

    def _convert_id_to_token(self, index: int) -> str:
        return self.text


@pytest.mark.parametrize("strings", [["\n\n"], ["..."], ["##"], ["aab", "aa"], ["\n\n", "\n#"], ["a.\n\n"], ["abab"]])
def test_stop_strings_that_overlap_themselves(strings: list[str]) -> None:
    """Every text of up to four tokens, against transformers' own criterion."""
    tokenizer = Pieces()
    stop = StopStringCriteria(tokenizer, strings)
    theirs = oracle.StopStringCriteria(tokenizer, strings)
    count = len(tokenizer.vocabulary)
    for length in (1, 2, 3, 4):
        rows = torch.cartesian_prod(*[torch.arange(count)] * length).reshape(-1, length)
        assert torch.equal(stop(rows, None), theirs(rows, None))
    assert stop(torch.tensor([[1, 0]]), None).item() is ("\n\n" in strings)


class HalfCharacters(Pieces):
    """What follows completes a character, so that the text before is no beginning of the text after."""

    def decode(self, ids: list[int]) -> str:
        return b"".join((b"\xc3", b"\xa9", b"a", b"\n")[i] for i in ids).decode(errors="replace")


def test_stop_strings_of_tokens_that_are_half_a_character() -> None:
    stop = StopStringCriteria(HalfCharacters(), ["\u00e9", "a\n"])
    rows = [[2, 0, 1], [0, 1, 2], [3, 0, 1], [1, 2, 3], [2, 3, 0], [0, 2, 3]]
    assert [stop(torch.tensor([row]), None).item() for row in rows] == [True, False, True, True, False, True]
