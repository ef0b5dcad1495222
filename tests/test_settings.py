"""Switches that hold for the whole process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moekernels import ops
from moekernels._settings import allows_tf32


@pytest.fixture
def precision() -> Iterator[None]:
    """Whatever a test says about precision is forgotten afterwards."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.usefixtures("precision")
@pytest.mark.filterwarnings("ignore")  # torch's, about its older switches
@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ("pass", False),
        ("old.allow_tf32 = True", True),
        ("old.allow_tf32 = False", False),
        ("set_float32_matmul_precision('high')", True),
        ("set_float32_matmul_precision('highest')", False),
        ("backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("backends.cuda.matmul.fp32_precision = 'ieee'", False),
        ("backends.fp32_precision = 'tf32'", True),
        ("backends.fp32_precision = 'tf32'; backends.cuda.matmul.fp32_precision = 'ieee'", False),
        ("backends.fp32_precision = 'ieee'; backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("backends.cuda.matmul.fp32_precision = 'tf32'; old.allow_tf32 = False", False),
        ("backends.cuda.matmul.fp32_precision = 'ieee'; old.allow_tf32 = True", True),
        ("old.allow_tf32 = True; backends.cuda.matmul.fp32_precision = 'ieee'", False),
        ("set_float32_matmul_precision('high'); backends.cuda.matmul.fp32_precision = 'ieee'", False),
        ("set_float32_matmul_precision('high'); old.allow_tf32 = False", False),
    ],
)
def test_tf32_by_every_switch_of_torch(switches: str, expected: bool) -> None:
    names = {"backends": torch.backends, "old": torch.backends.cuda.matmul}
    exec(switches, {**names, "set_float32_matmul_precision": torch.set_float32_matmul_precision})
    assert allows_tf32() is expected
    out = ops.grouped_gemm(torch.ones(2, 3), torch.ones(1, 4, 3), torch.tensor([0, 2], dtype=torch.int32))
    assert torch.equal(out, torch.full((2, 4), 3.0))


@pytest.mark.usefixtures("precision")
def test_compiled_code_follows_the_switch() -> None:
    compiled = torch.compile(lambda x: x + (1 if allows_tf32() else 0), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 0
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert compiled(torch.zeros(1)).item() == 1
