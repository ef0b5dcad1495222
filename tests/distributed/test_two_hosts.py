"""Two hosts with a network between them, as namespaces: `torchrun` across it, and a host that is cut off."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import hosts, layers

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hosts")
    command = [str(HERE / "two_hosts.sh"), str(folder), "-m", "tests.distributed.hosts", str(folder)]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(HERE.parents[1])}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if ended.returncode == 77:
        pytest.skip(ended.stdout.strip())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return [torch.load(folder / f"rank-{rank}") for rank in range(2)]


@pytest.mark.parametrize("way", layers.WAYS)
def test_across_a_network(found: list[dict[str, Any]], way: str) -> None:
    for rank in found:
        assert rank["received"] > 10_000
        assert max(rank[way].values()) <= 1e-6


def test_a_host_that_is_cut_off(found: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(found):
        told = (
            rf"rank {number} of 2 of the expert-parallel mesh, in .* of a sparse layer: another rank has ended, cannot"
        )
        assert re.match(told, rank["told"])
        assert rank["seconds"] < 3 * hosts.TIMEOUT
