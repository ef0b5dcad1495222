"""Some of the trials of `python -m tests.robustness.corruption`; docs/reliability.md has the figures of many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.robustness import children, corruption, mutations


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of resident memory")
def test_a_broken_checkpoint_gives_a_clear_error_or_runs(tmp_path: Path) -> None:
    report = corruption.run(tmp_path, trials=100, seed=7)
    assert report["failures"] == [], json.dumps(report["failures"], indent=1)
    # The program finds something: most mutations matter, and not all break everything.
    assert report["counts"]["model clear error, loading"] > 20 and report["counts"]["model runs"] > 20


def test_a_child_that_runs_a_command_is_found_out(tmp_path: Path) -> None:
    """What the trials rely on."""
    import faulthandler
    import mmap
    import os
    import pickle

    def crash() -> None:
        faulthandler.disable()  # or a report of this one stands among the results
        os.kill(os.getpid(), 11)

    content = pickle.dumps(mutations.Evil(tmp_path / "EXECUTED"))
    assert children.run(lambda: pickle.loads(content), seconds=5, memory=2**28).died == "exit 66"
    assert children.run(lambda: (tmp_path / "x").write_text("x"), seconds=5, memory=2**28).died == "exit 66"
    assert not list(tmp_path.iterdir())
    assert children.run(lambda: len(bytearray(2**29)), seconds=5, memory=2**28).died == "exit 3"
    # Pages that no one has had before: the heap may hold free ones.
    assert children.run(lambda: mmap.mmap(-1, 2**26).write(bytes(2**26)), seconds=5, memory=2**28).memory > 2**25
    assert children.run(crash, seconds=5, memory=2**28).died == "SIGSEGV"
