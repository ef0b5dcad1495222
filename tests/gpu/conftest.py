"""What only a GPU can show. Everything here is marked `gpu`: skipped where there is none, or no CUDA build."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")
