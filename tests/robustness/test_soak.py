"""Some steps of `python -m tests.robustness.soak`; docs/reliability.md has the figures of half an hour.

In processes of their own: where a thousand tests have run before, what the C library takes and gives back of their
memory moves by as much as a leak.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.robustness import soak

_ROOT = Path(__file__).parents[2]
_LEAK = """
import sys, torch
from tests.robustness import soak

def leaking():
    kept = []
    while True:
        kept.append(torch.ones(2**18))
        yield

soak.WORK = {"leak": leaking}
sys.exit(soak.main())
"""


def run(program: list[str], work: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *program, work, "--steps", "40", "--every", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("work", soak.WORK)
def test_memory_is_flat(work: str) -> None:
    ended = run(["-m", "tests.robustness.soak"], work)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_a_leak_is_noticed() -> None:
    ended = run(["-c", _LEAK], "leak")
    assert ended.returncode == 1 and '"samples": 40' in ended.stdout, ended.stdout + ended.stderr
