"""Some kills of `python -m tests.robustness.kills`; tests/checkpoint/test_saving.py ends a save at every step."""

from __future__ import annotations

from pathlib import Path

from tests.robustness import kills


def test_what_is_on_disk_is_the_old_or_the_new(tmp_path: Path) -> None:
    report = kills.run(tmp_path, kills=6, seed=0)
    assert report["wrong"] == []
    assert report["kills"] == 6
