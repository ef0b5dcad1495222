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
