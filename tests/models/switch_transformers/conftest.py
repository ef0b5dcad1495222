"""Both models over one checkpoint."""

from __future__ import annotations

import pytest

from tests.models.switch_checkpoints import Pair, pair


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(tmp_path_factory.mktemp("plain"))


@pytest.fixture(params=["sdpa", "eager"])
def models(request: pytest.FixtureRequest, plain: Pair) -> Pair:
    """The two models, ours with each attention function in turn."""
    plain.ours.set_attn_implementation(request.param)
    return plain
