"""The CPU stand-in for a GPU itself: right programs give right results, and each broken rule is found."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.simt.build import CUDA_SOURCES, KERNELS, REPOSITORY
from tests.simt.device import Settings, Simt, SimtError, SimtLibrary, Timing, poisoned
from tests.simt.hardware import HardwareLibrary, Machine
from tests.simt.params import STRUCTS, DType

TIMINGS: tuple[Timing, ...] = ("eager", "late", "random")


@pytest.fixture(scope="module")
def basics(simt: Simt) -> SimtLibrary:
    return simt.library(KERNELS / "basics.cu")


@pytest.fixture(scope="module")
def faults(simt: Simt) -> SimtLibrary:
    return simt.library(KERNELS / "faults.cu")


@pytest.fixture(scope="module")
def copies(simt: Simt) -> SimtLibrary:
    return simt.library(KERNELS / "copies.cu")


@pytest.fixture(scope="module")
def hopper(simt: Simt) -> SimtLibrary:
    return simt.library(KERNELS / "hopper_gemm.cu")


# ---- the interface ----


def test_parameter_structs_are_laid_out_as_in_cpp(basics: SimtLibrary) -> None:
    found = []
    for struct in STRUCTS.values():
        found.append(f"{struct.__name__} . {ctypes.sizeof(struct)} 0")
        for field in struct._fields_:
            member = getattr(struct, field[0])
            found.append(f"{struct.__name__} {field[0]} {member.size} {member.offset}")
    assert found == basics.params_layout.splitlines()


def test_the_layout_names_every_field_of_the_header() -> None:
    header = (REPOSITORY / "csrc" / "include" / "moekernels" / "params.h").read_text()
    for struct in STRUCTS.values():
        match = re.search(rf"struct {struct.__name__} {{(.*?)\n}};", header, re.DOTALL)
        assert match is not None, struct
        fields = re.findall(r"^\s+[\w:][\w:\s*]*[\s*](\w+);", match[1], re.MULTILINE)
        assert fields == [field[0] for field in struct._fields_]


def test_device_properties_follow_the_settings(basics: SimtLibrary) -> None:
    for capability, smem in ((80, 166912), (90, 232448)):
        out = poisoned((3,), torch.int32)
        basics.call("device_query", out, settings=Settings(compute_capability=capability, sm_count=capability + 1))
        assert out.tolist() == [capability + 1, capability, smem]


def test_launches_are_logged(basics: SimtLibrary) -> None:
    basics.call("block_sum", torch.ones(2, 64), poisoned((2,), torch.float32), 2, 64)
    assert basics.launches == ["block_sum_kernel <<<(2, 1, 1), (64, 1, 1), 0>>>"]
    basics.call("block_sum", torch.ones(2, 64), poisoned((2,), torch.float32), 0, 64)
    assert basics.launches == []  # an empty grid launches nothing


# ---- built-ins ----


@pytest.mark.parametrize("seed", range(3))
def test_shuffles_and_shared_memory_sum_each_row(machine: Machine, seed: int) -> None:
    values = torch.randint(-8, 9, (5, 1024)).float()
    for threads in (32, 96, 1024):
        out = poisoned((5,), torch.float32)
        rows = values[:, :threads].contiguous()
        machine("basics.cu").call("block_sum", rows, out, 5, threads, settings=Settings(seed=seed))
        assert torch.equal(out, rows.sum(1))


@pytest.mark.parametrize("active", [32, 20, 9])
def test_warp_wide_instructions(basics: SimtLibrary, active: int) -> None:
    out = poisoned((32, 16), torch.int32)
    basics.call("warp", out, active)
    lanes = range(active)
    for lane in lanes:
        down = lane if lane % 8 == 7 else lane + 1
        expected = [
            3,
            lane - 2 if lane >= 2 else lane,
            down if down < active else -1,  # what a lane outside the mask gives is undefined: here -1
            lane ^ 1 if lane ^ 1 < active else -1,
            sum(1 << i for i in lanes if i % 3 == 0),
            1,
            int(active <= 7),
            sum(1 << i for i in lanes if i // 4 == lane // 4),
            sum(lanes),
            0,
            1,
            active + 4 + 31,
        ]
        found = out[lane, : len(expected)].tolist()
        assert [v % 2**32 for v in found] == [v % 2**32 for v in expected]
    assert torch.equal(out[active:], poisoned((32 - active, 16), torch.int32))


def test_parts_of_a_warp_shuffle_among_themselves(basics: SimtLibrary) -> None:
    out = poisoned((64,), torch.int32)
    basics.call("divergent", out)
    assert out[:32].tolist() == [i ^ 1 for i in range(16)] + [i ^ 2 for i in range(16, 32)]
    assert out[32:].tolist() == [10 * 100 + 0 * 10 + 1] * 32


@pytest.mark.parametrize("seed", range(3))
def test_the_last_block_sees_what_all_others_wrote(machine: Machine, seed: int) -> None:
    counts, finished, total = (torch.zeros(n, dtype=torch.int32) for n in (8, 1, 1))
    machine("basics.cu").call("last_block", counts, finished, total, 9, settings=Settings(seed=seed))
    assert counts.tolist() == [72] * 8
    assert total.item() == 9 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dynamic_shared_memory_and_grids_of_two_dimensions(machine: Machine, dtype: torch.dtype) -> None:
    values = torch.randn(6, 256).to(dtype)
    out = poisoned((6, 256), dtype)
    machine("basics.cu").call("reverse", values, out, DType.of(dtype), 3, 2)
    assert torch.equal(out, values.flip(1))


def test_shared_memory_is_poisoned_before_each_block(basics: SimtLibrary) -> None:
    out = torch.zeros(6, dtype=torch.int32)
    basics.call("uninitialised", out, 3)
    assert out.tolist() == [-1] * 6


def test_device_variables_and_assertions(basics: SimtLibrary) -> None:
    out = poisoned((1,), torch.int32)
    basics.call("assertion", out, 3)
    assert out.item() == 3
    with pytest.raises(SimtError, match=r"assertion 'device_variable == expected' at .*basics.cu"):
        basics.call("assertion", out, 4)


def test_polling_in_vain_ends(basics: SimtLibrary) -> None:
    with pytest.raises(SimtError, match="no progress"):
        basics.call("spin", torch.zeros(1, dtype=torch.int32), settings=Settings(watchdog_seconds=0.2))


# ---- launchers of the library ----


def _plan(simt: Simt, **fields: Tensor | int | None) -> Tensor:
    offsets = poisoned((4,), torch.int32)
    defaults: dict[str, Any] = {
        "expert_ids": torch.tensor([[0, 1], [1, 2], [2, 0]], dtype=torch.int32),
        "expert_offsets": offsets,
        "token_of_row": poisoned((6,), torch.int32),
        "row_of_slot": poisoned((3, 2), torch.int32),
        "num_tokens": 3,
        "capacity": -1,
        "group_size": 3,
        "num_experts": 3,
        "top_k": 2,
    }
    simt.library(KERNELS / "op.cu").run("plan", **{**defaults, **fields})
    return offsets


def test_launchers_get_their_parameters_and_a_workspace(simt: Simt) -> None:
    assert _plan(simt).tolist() == [3, 3, 2, 0]  # T, E, K, the first id
    library = simt.library(KERNELS / "op.cu")
    assert library.launches == ["plan_kernel <<<(1, 1, 1), (1, 1, 1), 0>>>"]


def test_inputs_are_not_written(simt: Simt) -> None:
    with pytest.raises(SimtError, match="write to buffer 'expert_ids', which is an input"):
        _plan(simt, capacity=1)


def test_workspaces_are_as_large_as_asked_for(simt: Simt) -> None:
    with pytest.raises(SimtError, match="of buffer 'workspace', which has 12 bytes"):
        _plan(simt, capacity=2)


def test_null_pointers_are_not_written(simt: Simt) -> None:
    with pytest.raises(SimtError, match="in no known buffer"):
        _plan(simt, token_of_row=None, capacity=3)


def test_fields_must_be_known_and_complete(simt: Simt) -> None:
    with pytest.raises(TypeError, match="no field"):
        _plan(simt, unknown=1)
    with pytest.raises(TypeError, match=r"PermuteParams.num_tokens is missing"):
        simt.library(KERNELS / "op.cu").run("permute")


def test_errors_of_launchers_are_raised(simt: Simt) -> None:
    with pytest.raises(SimtError, match="plan returned cudaError_t 801"):
        _plan(simt, capacity=4)


# ---- memory faults ----


def test_vectors_of_16_bytes_must_be_aligned_and_inside_their_buffer(basics: SimtLibrary) -> None:
    values = torch.randn(136).bfloat16()
    out = poisoned((128,), torch.bfloat16)
    basics.call("vector_copy", values[:128], out)
    assert torch.equal(out, values[:128])
    with pytest.raises(SimtError, match=r"misaligned address.*needs 16 bytes"):
        basics.call("vector_copy", values[1:], out)
    with pytest.raises(SimtError, match=r"read of 16 bytes at byte 240 of buffer 'argument 0', which has 240 bytes"):
        basics.call("vector_copy", values[:120], out)


REVERSE_FAULTS = {
    "missing __syncthreads": (1, "shared memory race"),
    "dynamic shared memory overrun": (2, "shared memory overrun"),
    "static shared memory overrun": (3, r"index 64 out of bounds of 'int \[64\]'"),
    "a lane that leaves": (5, "divergence|deadlock"),
    "barrier of the wrong size": (6, "named barrier 1 is used for .* at once"),
    "endless loop": (7, "no progress"),
    "null pointer": (8, "in no known buffer"),
    "missing __syncwarp": (9, "shared memory race"),
    "write past the output": (10, "write of 4 bytes at byte 256 of buffer 'argument 1', which has 256 bytes"),
    "overwritten before everybody has read": (11, "shared memory race"),
    "a caller outside the mask": (12, "does not name the calling lane"),
    "lanes at different instructions": (13, "divergence"),
    "far overrun": (14, "memory fault|out of bounds"),
}


def _reverse(faults: SimtLibrary, fault: int, settings: Settings) -> Tensor:
    out = poisoned((64,), torch.int32)
    faults.call("reverse_with_fault", torch.arange(64, dtype=torch.int32), out, fault, settings=settings)
    return out


@pytest.mark.parametrize("seed", range(4))
def test_the_program_without_a_fault_passes(faults: SimtLibrary, seed: int) -> None:
    assert _reverse(faults, 0, Settings(seed=seed)).tolist() == list(range(63, -1, -1))


@pytest.mark.parametrize("name", REVERSE_FAULTS)
@pytest.mark.parametrize("seed", range(3))
def test_faults_of_threads_are_found(faults: SimtLibrary, name: str, seed: int) -> None:
    fault, message = REVERSE_FAULTS[name]
    with pytest.raises(SimtError, match=message) as caught:
        _reverse(faults, fault, Settings(seed=seed, watchdog_seconds=0.2))
    assert "reverse_kernel" in str(caught.value)
    assert "faults.cu:" in str(caught.value)  # where in the source


def test_a_missing_barrier_also_shows_in_the_result(faults: SimtLibrary) -> None:
    results = [_reverse(faults, 1, Settings(seed=seed, check_races=False)) for seed in range(4)]
    assert any(result.tolist() != list(range(63, -1, -1)) for result in results)


def test_deadlock_names_who_waits_where(faults: SimtLibrary) -> None:
    with pytest.raises(SimtError, match="deadlock") as caught:
        _reverse(faults, 15, Settings())
    assert re.search(r"32 wait at bar.sync 1 for 64 threads \(the first: warp 0 .*faults.cu:\d+", str(caught.value))
    assert "32 have exited" in str(caught.value)


def test_the_next_launch_after_a_failure_is_clean(faults: SimtLibrary) -> None:
    with pytest.raises(SimtError):
        _reverse(faults, 1, Settings())
    assert _reverse(faults, 0, Settings()).tolist() == list(range(63, -1, -1))


def test_launches_beyond_the_limits_return_errors(faults: SimtLibrary) -> None:
    out = poisoned((64,), torch.int32)
    with pytest.raises(SimtError, match="cudaError_t 9"):
        faults.call("too_many_threads", out)
    with pytest.raises(SimtError, match="cudaError_t 1"):
        faults.call("too_much_shared_memory", out)


# ---- asynchronous copies ----


def _copy(faults: SimtLibrary, fault: int, settings: Settings) -> bool:
    values = torch.arange(5 * 64, dtype=torch.int32)
    out = poisoned((5, 64), torch.int32)
    faults.call("copy_with_fault", values, out, 5, fault, settings=settings)
    return torch.equal(out, values.view(5, 64).flip(1))


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("seed", range(3))
def test_cp_async_pipeline(faults: SimtLibrary, seed: int, timing: Timing) -> None:
    assert _copy(faults, 0, Settings(seed=seed, timing=timing))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (2, "shared memory race"),
        (3, "a cp.async that it never waited for"),
        (4, "is not a multiple of 16"),
        (5, "shared memory race"),
    ],
    ids=["no barrier after the wait", "never waited for", "misaligned", "refilled too early"],
)
@pytest.mark.parametrize("seed", range(3))
def test_faults_of_cp_async_are_found(faults: SimtLibrary, fault: int, message: str, seed: int) -> None:
    with pytest.raises(SimtError, match=message):
        _copy(faults, fault, Settings(seed=seed, timing="late"))


def test_cp_async_read_without_waiting_gives_stale_data(faults: SimtLibrary) -> None:
    assert not _copy(faults, 1, Settings(timing="late"))


SPANS = {0: 0, 1: 32, 2: 64, 3: 128}  # CUtensorMapSwizzle -> bytes


@pytest.mark.parametrize("swizzle", SPANS)
@pytest.mark.parametrize("corner", [(0, 0, 0), (8, 5, 1), (-8, -3, 1), (32, 20, 0), (0, 0, 2), (0, 0, -1)])
def test_tma_boxes_land_swizzled_and_zero_filled(machine: Machine, swizzle: int, corner: tuple[int, int, int]) -> None:
    depth, rows, columns = 2, 21, 40
    span = SPANS[swizzle] or 64
    box_rows, box_columns = 8, span // 2
    tensor = torch.randn(depth, rows, columns).half()
    stored = poisoned((depth, rows, columns), torch.float16)
    image = poisoned((box_rows, span // 16, 8), torch.float16)
    x, y, z = corner
    machine("copies.cu").call(
        "box", tensor, stored, image, columns, rows, depth, box_columns, box_rows, swizzle, x, y, z
    )

    box = torch.zeros(box_rows, box_columns, dtype=torch.float16)
    inside = torch.zeros(depth, rows, columns, dtype=torch.bool)
    for r in range(box_rows):
        for c in range(box_columns):
            if 0 <= z < depth and 0 <= y + r < rows and 0 <= x + c < columns:
                box[r, c] = tensor[z, y + r, x + c]
                inside[z, y + r, x + c] = True
    for r in range(box_rows):
        flip = {0: 0, 1: (r >> 2) & 1, 2: (r >> 1) & 3, 3: r & 7}[swizzle]
        for chunk in range(span // 16):
            assert torch.equal(image[r, chunk ^ flip], box[r, chunk * 8 : chunk * 8 + 8])
    assert torch.equal(stored[inside], tensor[inside])
    assert stored[~inside].isnan().all()


@pytest.mark.parametrize("timing", TIMINGS)
def test_bulk_copies(machine: Machine, timing: Timing) -> None:
    values = torch.randint(0, 255, (1024,), dtype=torch.uint8)
    out = poisoned((1024,), torch.uint8)
    machine("copies.cu").call("bulk", values, out, 0, settings=Settings(timing=timing))
    expected = values.clone()
    expected[256:512] += 1
    assert torch.equal(out, expected)


@pytest.mark.parametrize("timing", TIMINGS)
def test_bulk_copies_of_what_is_written_meanwhile(copies: SimtLibrary, timing: Timing) -> None:
    values, out = torch.zeros(1024, dtype=torch.uint8), poisoned((1024,), torch.uint8)
    with pytest.raises(SimtError, match="which a TMA or bulk copy read with no barrier in between"):
        copies.call("bulk", values, out, 1, settings=Settings(timing=timing))


@pytest.mark.parametrize(
    ("columns", "box_columns", "box_rows", "swizzle"),
    [(44, 64, 8, 3), (40, 128, 8, 3), (40, 64, 257, 3), (40, 4, 8, 0)],
    ids=["row pitch not a multiple of 16 bytes", "box wider than the swizzle", "box too tall", "box row of 8 bytes"],
)
def test_tensor_maps_that_the_driver_refuses(
    copies: SimtLibrary, columns: int, box_columns: int, box_rows: int, swizzle: int
) -> None:
    tensor = torch.zeros(1, 300, columns).half()
    image = poisoned((1 << 16,), torch.uint8)
    with pytest.raises(SimtError, match=r"cudaError_t 1$"):
        copies.call("box", tensor, tensor, image, columns, 300, 1, box_columns, box_rows, swizzle, 0, 0, 0)


# ---- tensor cores ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_mma(machine: Machine, dtype: torch.dtype, transposed: bool) -> None:
    a = torch.randint(-4, 5, (16, 16)).to(dtype)
    b = torch.randint(-4, 5, (8, 16)).to(dtype)
    out = poisoned((16, 8), torch.float32)
    machine("tensor_cores.cu").call(
        "mma", a, b.T.contiguous() if transposed else b, out, DType.of(dtype), int(transposed)
    )
    assert torch.equal(out, a.float() @ b.float().T)


def test_tf32_mma_rounds_to_ten_bits(machine: Machine) -> None:
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    a[0, 0] = 1 + 2**-11  # a tie: away from zero
    out = poisoned((16, 8), torch.float32)
    machine("tensor_cores.cu").call("tf32", a, b, out)

    def rounded(x: Tensor) -> Tensor:
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    assert rounded(a)[0, 0] == 1 + 2**-10
    torch.testing.assert_close(out, rounded(a) @ rounded(b).T, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(out, a @ b.T, rtol=1e-6, atol=1e-6)


def test_stmatrix_undoes_ldmatrix(machine: Machine) -> None:
    values = torch.randn(16, 16).half()
    out = poisoned((16, 16), torch.float16)
    machine("tensor_cores.cu").call("stmatrix", values, out)
    assert torch.equal(out, values)


# ptx::Swizzle and whether the operand is MN-major
LAYOUTS = {
    "k, 128B": (1, 0),
    "k, 64B": (2, 0),
    "k, 32B": (3, 0),
    "k, none": (0, 0),
    "mn, 128B": (1, 1),
    "mn, 64B": (2, 1),
}


@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("a_layout", LAYOUTS)
def test_wgmma_reads_operands_through_descriptors(machine: Machine, a_layout: str, b_layout: str) -> None:
    for dtype, columns in ((torch.bfloat16, 64), (torch.float16, 192)):
        a = torch.randint(-4, 5, (64, 32)).to(dtype)
        b = torch.randint(-4, 5, (columns, 32)).to(dtype)
        out = poisoned((64, columns), torch.float32)
        machine("tensor_cores.cu").call(
            "wgmma", a, b, out, DType.of(dtype), columns, *LAYOUTS[a_layout], *LAYOUTS[b_layout]
        )
        assert torch.equal(out, a.float() @ b.float().T + 1)


@pytest.mark.parametrize("columns", [8, 256])
@pytest.mark.parametrize("timing", TIMINGS)
def test_wgmma_of_other_widths(machine: Machine, columns: int, timing: Timing) -> None:
    a = torch.randint(-4, 5, (64, 32)).bfloat16()
    b = torch.randint(-4, 5, (columns, 32)).bfloat16()
    out = poisoned((64, columns), torch.float32)
    settings = Settings(timing=timing)
    machine("tensor_cores.cu").call("wgmma", a, b, out, DType.BFLOAT16, columns, 1, 0, 1, 0, settings=settings)
    assert torch.equal(out, a.float() @ b.float().T + 1)


# ---- a whole Hopper kernel ----


def _gemm_is_right(
    hopper: SimtLibrary | HardwareLibrary, fault: int, settings: Settings, shape: tuple[int, int, int] = (100, 72, 328)
) -> bool:
    rows, columns, depth = shape
    a = torch.randint(-3, 4, (rows, depth)).bfloat16()
    b = torch.randint(-3, 4, (columns, depth)).bfloat16()
    out = poisoned((rows, columns), torch.bfloat16)
    hopper.call("hopper_gemm", a, b, out, rows, columns, depth, fault, settings=settings)
    return torch.equal(out, (a.float() @ b.float().T).bfloat16())


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("seed", range(3))
def test_hopper_gemm(machine: Machine, seed: int, timing: Timing) -> None:
    settings = Settings(seed=seed, timing=timing)
    assert _gemm_is_right(machine("hopper_gemm.cu"), 0, settings)
    assert _gemm_is_right(machine("hopper_gemm.cu"), 0, settings, (1, 8, 8))


HOPPER_FAULTS = {
    "no proxy fence before wgmma": (1, "missing proxy fence: wgmma"),
    "too few expected bytes": (2, "deadlock|race"),
    "too many expected bytes": (3, "deadlock"),
    "wrong parity at full": (4, "race|more arrivals|in flight"),
    "wrong parity at empty": (5, "deadlock"),
    "stage released before the wait": (6, "race"),
    "no wgmma.fence": (7, "no wgmma.fence"),
    "accumulator touched in flight": (8, "an accumulator was written"),
    "no fence after mbarrier.init": (9, "no fence_mbarrier_init"),
    "too few arrivals counted": (10, "race|more arrivals"),
    "no barrier after mbarrier.init": (12, "no barrier after its initialisation|no mbarrier has been initialised"),
    "no proxy fence before the store": (13, "missing proxy fence: TMA store"),
    "store not awaited": (14, "bulk stores may still read"),
    "registers that nobody gave back": (15, "setmaxnreg.inc to 240: registers"),
    "one warp releases for all": (17, "race"),
    "too many arrivals": (18, "race|more arrivals"),
    "exit with copies under way": (19, "exits with a cp.async under way"),
}


@pytest.mark.parametrize("name", HOPPER_FAULTS)
@pytest.mark.parametrize("seed", range(1, 4))
def test_faults_of_hopper_kernels_are_found(hopper: SimtLibrary, name: str, seed: int) -> None:
    fault, message = HOPPER_FAULTS[name]
    with pytest.raises(SimtError, match=message):
        _gemm_is_right(hopper, fault, Settings(seed=seed, timing="random" if seed > 1 else "late"))


@pytest.mark.parametrize("fault", [11, 16], ids=["wrong swizzle", "accumulators read before the wait"])
def test_faults_that_no_rule_forbids_show_in_the_result(hopper: SimtLibrary, fault: int) -> None:
    assert not _gemm_is_right(hopper, fault, Settings())


# ---- the same source on a GPU ----


def test_every_wrapper_is_tried() -> None:
    source = (KERNELS / "every_wrapper.cu").read_text()
    for header in ("ptx.cuh", "wgmma.cuh"):
        names = re.findall(r"^MOEKERNELS_DEVICE \w+ (\w+)\(", (CUDA_SOURCES / "ptx" / header).read_text(), re.MULTILINE)
        assert len(names) >= 4
        for name in names:
            assert f"ptx::{name}" in source, name


def test_every_wrapper_compiles_for_the_cpu(simt: Simt) -> None:
    simt.library(KERNELS / "every_wrapper.cu")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_every_wrapper_assembles(tmp_path: Path, architecture: str) -> None:
    command = ["nvcc", "-std=c++20", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-cubin"]
    command += ["-Xcompiler", "-Wall,-Wextra", f"-I{CUDA_SOURCES.parent}", f"-I{REPOSITORY / 'csrc' / 'include'}"]
    command += [str(KERNELS / "every_wrapper.cu"), "-o", str(tmp_path / "out.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
