"""The emulated tile instructions to the bit: against Intel's definition in exact arithmetic, and against the processor
where it has them."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moekernels
from moekernels import ops
from tests.amx.build import product_library
from tests.compiler import Compiler
from tests.isa import needs_isa

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def loaded(path: Path) -> Product:
    """``sums + left @ right`` of [rows, depth], [depth, columns] and [rows, columns] by one instruction: bfloat16 and
    float32, or integers of 8 and 32 bits."""
    library = ctypes.CDLL(str(path))

    def run(left: Tensor, right: Tensor, sums: Tensor) -> Tensor:
        (rows, depth), columns, of_a_word = left.shape, right.shape[1], 4 // left.element_size()
        words = depth // of_a_word
        packed = right.view(words, of_a_word, columns).transpose(1, 2).contiguous()
        left, out = left.contiguous(), sums.clone().contiguous()
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (left, packed, out))
        library.product(*pointers, rows, words, columns, left.dtype == torch.int8)
        return out

    return run


@pytest.fixture(scope="module")
def emulated(compiler: Compiler) -> Product:
    return loaded(product_library(compiler, native=False))


def rounded(exact: Fraction, if_zero: float = 0.0) -> float:
    """To the nearest float32, ties to even; what is subnormal then becomes zero."""
    if exact == 0:
        return if_zero
    exponent = math.floor(math.log2(abs(exact.numerator))) - math.floor(math.log2(exact.denominator))
    while Fraction(2) ** exponent > abs(exact):
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= abs(exact):
        exponent += 1
    unit = Fraction(2) ** (exponent - 23)
    result = round(exact / unit) * unit  # Python rounds halves to even
    sign = -1.0 if exact < 0 else 1.0
    if abs(result) < Fraction(2) ** -126:
        return sign * 0.0
    return sign * math.inf if abs(result) >= Fraction(2) ** 128 else float(result)


def flushed(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def multiplied_and_added(a: float, b: float, c: float) -> float:
    a, b, c = flushed(a), flushed(b), flushed(c)
    if not math.isfinite(c):
        return c + a * b
    product_sign = math.copysign(1.0, a) * math.copysign(1.0, b)
    both_zero = a * b == 0 and c == 0
    zero = product_sign * 0.0 if both_zero and product_sign == math.copysign(1.0, c) else 0.0
    return rounded(Fraction(a) * Fraction(b) + Fraction(c), zero)


def added(a: float, b: float) -> float:
    return multiplied_and_added(a, 1.0, b) if math.isfinite(a) else a + b


def by_definition(left: Tensor, right: Tensor, sums: Tensor) -> Tensor:
    """TDPBF16PS of Intel's Software Developer's Manual, for finite operands."""
    out = sums.clone()
    rows, columns = left.double().tolist(), right.double().T.tolist()
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            parts = [0.0, 0.0]
            for k, (a, b) in enumerate(zip(row, column, strict=True)):
                parts[k % 2] = multiplied_and_added(a, b, parts[k % 2])
            out[i, j] = added(out[i, j].item(), added(*parts))
    return out


def bits(x: Tensor) -> Tensor:
    """All NaN are alike."""
    return torch.where(x.isnan(), torch.nan, x).view(torch.int32)


def random_tiles(rows: int, depth: int, columns: int, scale: float = 1.0, spread: float = 0.0) -> tuple[Tensor, ...]:
    """Normal numbers, times powers of two up to 2 ** (+-spread)."""

    def draw(*shape: int) -> Tensor:
        return scale * torch.randn(shape) * torch.exp2((2 * torch.rand(shape) - 1) * spread)

    return draw(rows, depth).bfloat16(), draw(depth, columns).bfloat16(), draw(rows, columns)


CASES = {
    "full": (16, 32, 16, 1.0, 0.0),
    "small": (3, 6, 5, 1.0, 0.0),
    "one": (1, 2, 1, 1.0, 0.0),
    "orders of magnitude": (16, 32, 16, 1.0, 12.0),
    "subnormal products": (16, 32, 16, 2.0**-63, 3.0),
    "subnormal operands": (16, 32, 16, 2.0**-124, 4.0),
    "large": (16, 32, 16, 2.0**62, 1.0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bits_of_the_definition(case: tuple[int, int, int, float, float], emulated: Product) -> None:
    left, right, sums = random_tiles(*case)
    assert torch.equal(bits(emulated(left, right, sums)), bits(by_definition(left, right, sums)))


def test_pairs_are_summed_apart(emulated: Product) -> None:
    """1 is lost beside 2 ** 24 in a sum of first elements; second ones have a sum of their own."""
    left, right, sums = torch.zeros(1, 32).bfloat16(), torch.ones(32, 1).bfloat16(), torch.zeros(1, 1)
    left[0, 0], left[0, 2], left[0, 4] = 2.0**24, 1.0, -(2.0**24)
    assert emulated(left, right, sums).item() == 0.0
    left[0, 2], left[0, 3] = 0.0, 1.0
    assert emulated(left, right, sums).item() == 1.0


def test_halves_are_rounded_to_even(emulated: Product) -> None:
    left, right = torch.zeros(2, 2).bfloat16(), torch.ones(2, 1).bfloat16()
    left[:, 0] = 1.0
    sums = torch.tensor([[2.0**24], [2.0**24 + 2]])
    assert emulated(left, right, sums).flatten().tolist() == [2.0**24, 2.0**24 + 4]


def test_subnormal_numbers_are_zero(emulated: Product) -> None:
    tiny = torch.tensor([2.0**-130, -(2.0**-130)]).bfloat16()
    left, right = tiny.view(2, 1).repeat(1, 2), torch.full((2, 1), 2.0**20).bfloat16()
    assert not emulated(left, right, torch.full((2, 1), 2.0**-130)).any()


def test_infinities_and_nan(emulated: Product) -> None:
    left, right = torch.ones(4, 2).bfloat16(), torch.ones(2, 1).bfloat16()
    left[0, 1], left[1, 0], left[2, 0], left[2, 1] = math.nan, math.inf, math.inf, -math.inf
    out = emulated(left, right, torch.zeros(4, 1)).flatten()
    assert out.isnan().tolist() == [True, False, True, False] and out[1] == math.inf and out[3] == 2.0


@needs_isa("amx")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bits_of_the_processor(case: tuple[int, int, int, float, float], emulated: Product, compiler: Compiler) -> None:
    path = product_library(compiler, native=True)
    assert ctypes.CDLL(str(path)).request_tiles()
    native = loaded(path)
    for _ in range(20):
        tiles = random_tiles(*case)
        assert torch.equal(bits(emulated(*tiles)), bits(native(*tiles)))


def random_integers(rows: int, depth: int, columns: int) -> tuple[Tensor, ...]:
    left, right = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((rows, depth), (depth, columns)))
    return left, right, torch.randint(-(2**31), 2**31 - 1, (rows, columns), dtype=torch.int32)


SHAPES = [(16, 64, 16), (16, 32, 16), (3, 12, 5), (1, 4, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_integers_by_definition(shape: tuple[int, int, int], emulated: Product) -> None:
    """TDPBSSD: exact, modulo 2 ** 32."""
    left, right, sums = random_integers(*shape)
    left[0], right[:, 0], sums[0, 0] = -128, -128, 2**31 - 1
    assert torch.equal(emulated(left, right, sums), (sums.long() + left.long() @ right.long()).int())


@needs_isa("amx")
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_of_the_processor(shape: tuple[int, int, int], emulated: Product, compiler: Compiler) -> None:
    path = product_library(compiler, native=True)
    assert ctypes.CDLL(str(path)).request_tiles()
    native = loaded(path)
    for _ in range(20):
        tiles = random_integers(*shape)
        assert torch.equal(emulated(*tiles), native(*tiles))


@needs_isa("amx")
@pytest.mark.parametrize("rows", [5, 0])
def test_a_thread_keeps_the_configuration_of_another_library(rows: int, compiler: Compiler) -> None:
    library = ctypes.CDLL(str(product_library(compiler, native=True)))
    assert library.request_tiles()
    weight, offsets = torch.randn(2, 64, 64).bfloat16(), torch.tensor([0, 9, 40], dtype=torch.int32)
    before, after = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with moekernels.cpu_isa("amx"):
            library.configure(rows)
            library.configuration(before)
            ops.grouped_gemm(torch.randn(40, 64).bfloat16(), weight, offsets)
            library.configuration(after)
            library.configure(0)
    finally:
        torch.set_num_threads(threads)
    assert before.raw == after.raw
    assert any(before.raw) == (rows > 0)


RULES = (
    "only palette 1", "a tile larger than 16 rows of 64 bytes", "a product of tiles that do not fit",
    "used without a configuration", "a tile that the configuration leaves out", "a product of a tile with itself",
    "used without a configuration",
)  # fmt: skip


@pytest.mark.parametrize(("rule", "message"), list(enumerate(RULES)))
def test_what_a_processor_refuses(rule: int, message: str, compiler: Compiler) -> None:
    code = f"import ctypes; ctypes.CDLL({str(product_library(compiler, native=False))!r}).break_rule({rule})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode < 0 and f"tile registers: {message}" in run.stderr
