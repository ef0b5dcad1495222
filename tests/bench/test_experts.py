"""The experts of models of transformers, small: measured as stored, with the values of their own loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moekernels.bench import experts
from moekernels.cli import main
from tests.integrations.transformers_models import MAJOR

pytestmark = pytest.mark.skipif(MAJOR < 5, reason="the experts interface came with transformers 5")


def small(model: experts.ModelExperts) -> experts.ModelExperts:
    sizes = {name: {2880: 48, 4096: 48, 2688: 48, 2048: 32, 1856: 32}.get(v, v) for name, v in model.config.items()}
    widths = [value for value in sizes.values() if value in (48, 32)]
    return replace(model, config=sizes, num_experts=8, hidden_size=widths[0], ffn_size=widths[1])


@pytest.mark.parametrize("model", experts.MODELS.values(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(model: experts.ModelExperts, dtype: torch.dtype) -> None:
    made = experts.make_experts(small(model), dtype, torch.device("cpu"))
    assert sum(p.numel() for p in made.parameters() if p.dim() == 3) * dtype.itemsize == small(model).num_bytes(dtype)
    for tokens, contestants in ((3, 4), (40, 3)):
        row = experts.measure(made, small(model), tokens, 1e-9)
        assert row.tokens == tokens and len(row.seconds) == contestants and row.speedup > 0 and row.reading > 0
        assert row.error <= experts.TOLERANCES[dtype]


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(experts.MODELS, "nemotron-h", small(experts.NEMOTRON_H))
    command = ("bench", "--model", "nemotron-h", "--tokens", "1", "20", "--budget", "1e-9", "--device", "cpu")
    assert main((*command, "--experts", "6")) == 0
    assert "6 experts of 32 (relu2), 6 per token" in (out := capsys.readouterr().out)
    assert len([line for line in out.splitlines() if "bfloat16" in line]) == 2
    assert "reading the weights ms" in out
    for wrong, message in (
        (("--experts", "5"), "--experts must be between 6 and 8, got 5"),
        (("--backward",), "goes with --experts, --tokens and --dtype, not with backward"),
    ):
        assert main((*command, *wrong)) == 2
        assert message in capsys.readouterr().err
