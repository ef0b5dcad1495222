"""The training loop of the demo, as plain as such a loop is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from moekernels.demo.corpus import Corpus, Pair
from moekernels.demo.learners import Learner


def train(
    learner: Learner,
    corpus: Corpus,
    *,
    num_steps: int,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Iterator[float]:
    """Trains the learner's model, and yields the loss of every step; in the end the model is in evaluation mode."""
    model = learner.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = 0.105  # OneCycleLR divides by warm_up * num_steps - 1, which must not be zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps, pct_start=warm_up)
    batches = corpus.batches(batch_size, seed)
    for _ in range(num_steps):
        loss = model(**learner.batch(next(batches))).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
    model.eval()


def exact_matches(learner: Learner, pairs: Sequence[Pair], batch_size: int = 500, **options: object) -> int:
    """How many pairs are translated right to the letter."""
    right = 0
    for begin in range(0, len(pairs), batch_size):
        batch = pairs[begin : begin + batch_size]
        texts = learner.translate(batch, **options)
        right += sum(text == pair.target for text, pair in zip(texts, batch, strict=True))
    return right
