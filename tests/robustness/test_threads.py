"""Eight threads over one model and one tokenizer: each gets the bits that it would get alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from moekernels.demo.corpus import Corpus, Pair
from moekernels.demo.learners import LEARNERS, Learner

THREADS, ROUNDS = 8, 2


def work(learner: Learner, pairs: list[Pair]) -> tuple[torch.Tensor, list[str]]:
    """Logits of a batch, and translations."""
    with torch.no_grad():
        logits = learner.model(**learner.batch(pairs)).logits
    return logits, learner.translate(pairs)


@pytest.mark.parametrize("name", LEARNERS)
def test_eight_threads_over_one_model(name: str) -> None:
    corpus = Corpus()
    learner = LEARNERS[name].create(corpus)
    learner.model.eval()
    pairs = corpus.held_out_pairs()
    # Batches of other sizes and lengths, so that every thread has shapes of its own.
    batches: list[Any] = [pairs[7 * i : 7 * i + 1 + i % 4] for i in range(THREADS * ROUNDS)]
    alone = [work(learner, batch) for batch in batches]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(lambda batch: work(learner, batch), batches))
    for i, (expected, actual) in enumerate(zip(alone, together, strict=True)):
        assert torch.equal(expected[0], actual[0]), f"batch {i}: other bits"
        assert expected[1] == actual[1], f"batch {i}: another translation"
