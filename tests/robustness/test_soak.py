"""Some seconds of `python -m tests.robustness.soak`; docs/reliability.md has the figures of half an hour."""

from __future__ import annotations

import pytest

from tests.robustness import soak


@pytest.mark.parametrize("work", soak.WORK)
def test_memory_is_flat(work: str) -> None:
    steps = soak.WORK[work]()
    for _ in range(30):
        next(steps)
    before = soak.sample()
    for _ in range(20):
        next(steps)
    after = soak.sample()
    assert after.resident - before.resident < 16, (before, after)
    assert after.objects - before.objects < 2000 and after.threads <= before.threads and after.files <= before.files
