from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moekernels.bench import quantized
from moekernels.bench.case import measure
from moekernels.bench.shapes import LayerShape, layer_inputs
from moekernels.bench.sweep import layer_of
from moekernels.bench.table import Row, load
from moekernels.cli import main

SHAPE = LayerShape("small", 64, 32, 4, 2)


@pytest.mark.parametrize("format", quantized.FORMATS_TO_MAKE)
def test_a_row_of_every_format(format: str) -> None:
    """Checked against the definition, and beside a layer of the same values."""
    x = layer_inputs(SHAPE, 5, torch.bfloat16, torch.device("cpu"))
    row = measure(quantized.layer_case(x, SHAPE, format), SHAPE, x, "uniform", None, 0.01, check=True)
    assert isinstance(row, Row)
    assert (row.shape, list(row.baselines), row.failures) == (f"small {format} layer", [quantized.WHOLE], {})
    assert layer_of([row]) == "small"
    whole = sum(weight.numel() for weight in (x.up_weight, x.down_weight)) * 2
    assert 0.2 * whole < row.bytes < 0.7 * whole


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"hidden-size": 64, "ffn-size": 32, "experts": 4, "top-k": 2, "tokens": 1, "budget": 0.01, "threads": 1}
    sizes = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["bench", *sizes, "--weights", "int4", "int8", "--json", str(tmp_path / "rows.json")]) == 0
    assert "int4 layer" in capsys.readouterr().out
    assert [row.baselines.keys() for row in load(tmp_path / "rows.json")[0]] == [{quantized.WHOLE}] * 2
    assert main(["bench", *sizes, "--weights", "int4", "--backward"]) == 2
    assert "--weights measures the layer in inference" in capsys.readouterr().err
