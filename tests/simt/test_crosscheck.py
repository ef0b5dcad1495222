"""The emulator and the kernels' index maps against an independent source.

The emulator and the kernels have the same authors and could share a misreading of the hardware. CuTe states the same
maps independently: operands are placed, and results read, by its tables alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.simt.build import KERNELS
from tests.simt.crosscheck.tables import cute_tables, missing
from tests.simt.device import Simt, SimtLibrary, poisoned
from tests.simt.hardware import Machine
from tests.simt.params import DType

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

K_BLOCK = 64  # elements of K in a stage


@pytest.fixture(scope="module")
def tables(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    cache = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
    return cute_tables(Path(cache.mkdir("cute")) if cache is not None else tmp_path_factory.mktemp("cute"))


@pytest.fixture(scope="module")
def library(simt: Simt) -> SimtLibrary:
    return simt.library(KERNELS / "crosscheck.cu")


def integers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Small ones: their products and sums are exact in every dtype."""
    return torch.randint(-8, 9, shape).to(dtype)


@pytest.mark.parametrize(
    ("a", "b", "columns"),
    [
        *[("k128", "k128", columns) for columns in (8, 64, 128, 192, 256)],
        *[("k128", "mn128", columns) for columns in (64, 128, 256)],
        *[("mn128", "mn128", columns) for columns in (64, 128, 256)],
        ("k128", "mn128 rows first", 128),
        ("k64", "k64", 64),
        ("k32", "k32", 64),
        ("k16", "k16", 64),
        ("mn64", "mn64", 64),
    ],
)
def test_wgmma(tables: dict[str, Tensor], machine: Machine, a: str, b: str, columns: int) -> None:
    rows, weight = integers(64, K_BLOCK), integers(columns, K_BLOCK)
    out = poisoned((columns, 64), torch.float32)
    placed_a = [tables[f"{a} 64 places"], tables[f"{a} 64 descriptors"]]
    placed_b = [tables[f"{b} {columns} places"], tables[f"{b} {columns} descriptors"]]
    transposed = [int(kind.startswith("mn")) for kind in (a, b)]
    machine("crosscheck.cu").call(
        "wgmma_by_tables", columns, *transposed, rows, *placed_a, weight, *placed_b,
        tables[f"wgmma sums {columns}"], out,
    )  # fmt: skip
    assert torch.equal(out.T, rows.float() @ weight.float().T)


@pytest.mark.parametrize(("dtype", "depth"), [(torch.bfloat16, 16), (torch.float16, 16), (torch.float32, 8)])
def test_mma(tables: dict[str, Tensor], machine: Machine, dtype: torch.dtype, depth: int) -> None:
    a, b = integers(depth, 16, dtype=dtype), integers(depth, 8, dtype=dtype)  # m + 16 k and n + 8 k
    out = poisoned((8, 16), torch.float32)
    name = f"mma {str(dtype).removeprefix('torch.')}"
    places = [tables[f"{name} {operand}"] for operand in "abd"]
    machine("crosscheck.cu").call("mma_by_tables", int(DType.of(dtype)), a, b, *places, out)
    assert torch.equal(out, b.float().T @ a.float())


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(tables: dict[str, Tensor], machine: Machine, transposed: bool) -> None:
    rows = torch.arange(256, dtype=torch.int16)
    registers = poisoned((256,), torch.int16)
    machine("crosscheck.cu").call("ldmatrix", rows, registers, int(transposed))
    assert torch.equal(registers, rows[tables["ldmatrix transposed" if transposed else "ldmatrix"]])


def test_stmatrix(tables: dict[str, Tensor], machine: Machine) -> None:
    registers = torch.arange(256, dtype=torch.int16)
    rows = poisoned((256,), torch.int16)
    machine("crosscheck.cu").call("stmatrix", registers, rows)
    assert torch.equal(rows[tables["stmatrix"]], registers)


# ---- what the kernels make of it: grouped_gemm_sm90.cuh and grouped_weight_grad_sm90.cuh ----


def swizzled(library: SimtLibrary, num_rows: int) -> Tensor:
    """Where the kernels put 16-byte chunks [num_rows, 8] of rows of 128 bytes."""
    places = poisoned((num_rows, 8), torch.int64)
    library.call("swizzle_places", num_rows, places)
    return places


def descriptors(library: SimtLibrary, leading: int, step: int) -> list[int]:
    """Of the four k16 steps, as the kernels make them."""
    first = poisoned((1,), torch.int64)
    library.call("descriptor", leading, 1024, first)
    return [int(first) + step * k for k in range(4)]


def without_leading(descriptor: Tensor) -> list[int]:
    return [bits & ~(0x3FFF << 16) for bits in descriptor.tolist()]


@pytest.mark.parametrize("num_rows", [64, 128, 256])
def test_stages_of_rows_and_weights(tables: dict[str, Tensor], library: SimtLibrary, num_rows: int) -> None:
    """K-major rows of 128 bytes."""
    elements = swizzled(library, num_rows)[:, :, None] + 2 * torch.arange(8)
    assert torch.equal(elements.flatten(), tables[f"k128 {num_rows} places"])
    assert descriptors(library, leading=16, step=2) == tables[f"k128 {num_rows} descriptors"].tolist()


@pytest.mark.parametrize("columns", [64, 128, 256])
def test_stages_of_transposed_operands(tables: dict[str, Tensor], library: SimtLibrary, columns: int) -> None:
    """Blocks of 64 columns by 64 rows of K."""
    block_bytes = K_BLOCK * 128
    block = swizzled(library, K_BLOCK)[:, :, None] + 2 * torch.arange(8)  # [k, chunk, element]
    blocks = block.flatten(1).T + block_bytes * torch.arange(columns // 64)[:, None, None]
    assert torch.equal(blocks.flatten(), tables[f"mn128 {columns} places"])
    ours, cute = descriptors(library, block_bytes, step=128), tables[f"mn128 {columns} descriptors"]
    if columns == 64:  # one block: the distance to the next one is not used
        assert without_leading(torch.tensor(ours)) == without_leading(cute)
    else:
        assert ours == cute.tolist()


@pytest.mark.parametrize(
    ("name", "source", "box_rows"),
    [
        ("weight 256", (1000, 384, 5, 1024, 400000), 256),
        ("weight 128", (1000, 384, 5, 1024, 400000), 128),
        ("transposed", (384, 1000, 5, 512, 600000), 64),
        ("rows", (1000, 777, 1, 1008, 777 * 1008), 64),
    ],
)
def test_tensor_maps(
    tables: dict[str, Tensor], library: SimtLibrary, name: str, source: tuple[int, ...], box_rows: int
) -> None:
    somewhere = torch.zeros(64, dtype=torch.uint8)
    library.call("encode", somewhere, *source, K_BLOCK, box_rows)
    assert library.tensor_maps == [tables[f"encode {name}"].tolist()]
