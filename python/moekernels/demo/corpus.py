"""What the demo's models learn: to translate numbers that are written out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

from moekernels.demo.numbers import LANGUAGES, LIMIT


@dataclass(frozen=True)
class Pair:
    """A text, its translation, and the codes of their languages."""

    source_language: str
    target_language: str
    source: str
    target: str


class Corpus:
    """All numbers below :data:`LIMIT`; some are held out, in every language.

    Args:
        num_held_out: how many.
        seed: which.
    """

    directions = tuple(permutations(LANGUAGES, 2))

    def __init__(self, num_held_out: int = 500, seed: int = 0) -> None:
        numbers = list(range(LIMIT))
        random.Random(seed).shuffle(numbers)
        self.held_out = numbers[:num_held_out]
        self.train = numbers[num_held_out:]

    def texts(self) -> Iterator[str]:
        """Everything a tokenizer may learn from."""
        for number in self.train:
            yield from (spell(number) for spell in LANGUAGES.values())

    def batches(self, batch_size: int, seed: int = 0) -> Iterator[list[Pair]]:
        """Pairs of numbers to learn from, drawn without end."""
        draw = random.Random(seed)
        while True:
            yield [_pair(draw.choice(self.train), *draw.choice(self.directions)) for _ in range(batch_size)]

    def held_out_pairs(self) -> list[Pair]:
        """Every number that is held out, in every direction."""
        return [_pair(number, *direction) for number in self.held_out for direction in self.directions]


def _pair(number: int, source: str, target: str) -> Pair:
    return Pair(source, target, LANGUAGES[source](number), LANGUAGES[target](number))
