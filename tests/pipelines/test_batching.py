from __future__ import annotations

from moekernels.pipelines.batching import batches_by_length, stack, windows


def test_windows() -> None:
    assert list(windows("abcde", 2)) == [["a", "b"], ["c", "d"], ["e"]]
    assert list(windows("abcd", 2)) == [["a", "b"], ["c", "d"]] and list(windows("", 2)) == []


def test_batches_by_length() -> None:
    assert batches_by_length([3, 9, 3, 5, 1], 2) == [[1, 3], [0, 2], [4]]
    assert batches_by_length([3, 9, 3], 1) == [[0], [1], [2]] and batches_by_length([], 4) == []


def test_stack() -> None:
    assert stack([[1, 2, 3], [4]], 7, "left").tolist() == [[1, 2, 3], [7, 7, 4]]
    assert stack([[1], [2, 3], []], 0, "right").tolist() == [[1, 0], [2, 3], [0, 0]]
