from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moekernels.bench import quantized
from moekernels.bench.case import measure
from moekernels.bench.check import Mismatch, check_definition
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


@pytest.mark.parametrize("format", quantized.INTEGER_FORMATS)
def test_a_row_with_rounded_rows(format: str) -> None:
    """Checked against a definition that rounds them too, which is another one than without."""
    x = layer_inputs(SHAPE, 5, torch.float32, torch.device("cpu"))
    x.hidden[::2, 7] = 30.0
    case = quantized.layer_case(x, SHAPE, format, "int8")
    row = measure(case, SHAPE, x, "uniform", None, 0.01, check=True)
    assert isinstance(row, Row)
    columns = [quantized.WHOLE, quantized.UNROUNDED]
    assert (row.shape, list({**row.baselines, **row.failures})) == (f"small {format} int8-rows layer", columns)
    assert layer_of([row]) == "small"
    plain = quantized.layer_case(x, SHAPE, format)
    torch.testing.assert_close(case.baselines[quantized.UNROUNDED](), plain.ours())
    with pytest.raises(Mismatch, match="differs from its definition"):
        check_definition("rows", case.ours(), plain.definition)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"hidden-size": 64, "ffn-size": 32, "experts": 4, "top-k": 2, "tokens": 1, "budget": 0.01, "threads": 1}
    sizes = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["bench", *sizes, "--weights", "int4", "int8", "--json", str(tmp_path / "rows.json")]) == 0
    assert "int4 layer" in capsys.readouterr().out
    assert [row.baselines.keys() for row in load(tmp_path / "rows.json")[0]] == [{quantized.WHOLE}] * 2
    assert main(["bench", *sizes, "--weights", "int4", "--backward"]) == 2
    assert "--weights measures the layer in inference" in capsys.readouterr().err
    assert main(["bench", *sizes, "--weights", "int4", "--activations", "int8"]) == 0
    printed = capsys.readouterr().out
    assert "int4 int8-rows layer" in printed and quantized.UNROUNDED in printed
    for weights, found in ((["int4", "nf4"], "int4, nf4"), ([], "none")):
        options = ["--weights", *weights] if weights else []
        assert main(["bench", *sizes, *options, "--activations", "int8"]) == 2
        message = f"--activations int8 goes with --weights int4, int8, int8_groups, got {found}"
        assert message in capsys.readouterr().err
