"""``csrc/cuda/routing/router_stats.cu`` on the CPU, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekernels.ops import reference
from tests.simt.device import Settings, Simt, SimtError, SimtLibrary, poisoned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Both sides of every size that changes the kernel.
EXPERTS = (1, 2, 16, 17, 37, 64, 65, 128, 131, 256, 300, 521, 1024, 1030)
NAN = float("nan")

Stats = tuple[Tensor, Tensor, Tensor]  # counts [G, E], prob_sums [G, E], z_sums [G]


@pytest.fixture(scope="module")
def library(simt: Simt) -> SimtLibrary:
    return simt.library("routing/router_stats.cu")


def run(
    library: SimtLibrary, logits: Tensor, num_groups: int, top_k: int, mask: Tensor | None = None, seed: int = 1
) -> Stats:
    num_experts = logits.shape[1]
    counts, prob_sums = (poisoned((num_groups, num_experts), torch.float32) for _ in range(2))
    z_sums = poisoned((num_groups,), torch.float32)
    library.run(
        "router_stats",
        settings=Settings(seed=seed),
        logits=logits,
        mask=mask,
        counts=counts,
        prob_sums=prob_sums,
        z_sums=z_sums,
        num_groups=num_groups,
        group_size=logits.shape[0] // num_groups if num_groups else 0,
        logits_stride=logits.stride(0),
        num_experts=num_experts,
        top_k=top_k,
        logits_dtype=logits.dtype,
    )
    return counts, prob_sums, z_sums


def run_grad(
    library: SimtLibrary, grads: tuple[Tensor, Tensor], logits: Tensor, mask: Tensor | None = None, seed: int = 1
) -> Tensor:
    grad_logits = poisoned(tuple(logits.shape), logits.dtype)
    library.run(
        "router_stats_grad",
        settings=Settings(seed=seed),
        logits=logits,
        mask=mask,
        grad_prob_sums=grads[0],
        grad_z_sums=grads[1],
        grad_logits=grad_logits,
        num_groups=grads[1].shape[0],
        group_size=logits.shape[0] // grads[1].shape[0],
        logits_stride=logits.stride(0),
        num_experts=logits.shape[1],
        logits_dtype=logits.dtype,
    )
    return grad_logits


def definition(logits: Tensor, num_groups: int, top_k: int, mask: Tensor | None) -> Stats:
    """In the dtype of the logits."""
    _, expert_ids = reference.route(logits, top_k)
    chosen = torch.zeros_like(logits).scatter(-1, expert_ids.long(), 1.0)
    weight = torch.ones_like(logits[:, 0]) if mask is None else mask.to(logits.dtype)
    grouped = (num_groups, -1, logits.shape[1])
    counts = (weight[:, None] * chosen).view(grouped).sum(1)
    prob_sums = (weight[:, None] * torch.softmax(logits, -1)).view(grouped).sum(1)
    z_sums = (weight * torch.logsumexp(logits, -1) ** 2).view(num_groups, -1).sum(1)
    return counts, prob_sums, z_sums


def assert_stats(actual: Stats, logits: Tensor, top_k: int, mask: Tensor | None = None) -> None:
    expected = definition(logits.double(), actual[2].shape[0], top_k, mask)
    for name, ours, truth in zip(("counts", "prob_sums", "z_sums"), actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=3e-6, atol=3e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("num_experts", EXPERTS)
def test_equals_definition(library: SimtLibrary, num_experts: int, masked: bool) -> None:
    for seed, dtype in enumerate(DTYPES):
        torch.manual_seed(10 * seed + num_experts)
        num_groups, group_size = ((1, 45), (3, 7), (2, 33))[seed]
        top_k = min((1, 8, 2)[seed], num_experts)
        logits = (torch.randn(num_groups * group_size, num_experts) * 2).to(dtype)
        mask = (torch.rand(logits.shape[0]) - 0.3).clamp(min=0) if masked else None
        assert_stats(run(library, logits, num_groups, top_k, mask, seed=seed), logits, top_k, mask)
        assert len(library.launches) == 2

        grads = torch.randn(num_groups, num_experts), torch.randn(num_groups)
        leaf = logits.double().requires_grad_()
        _, prob_sums, z_sums = definition(leaf, num_groups, top_k, mask)
        (expected,) = torch.autograd.grad((prob_sums, z_sums), leaf, tuple(g.double() for g in grads))
        actual = run_grad(library, grads, logits, mask, seed=seed)
        eps = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
        torch.testing.assert_close(actual.double(), expected, rtol=eps, atol=1e-5)


@pytest.mark.parametrize(("num_groups", "group_size"), [(1, 33000), (700, 3), (3, 12000)])
def test_many_tokens(library: SimtLibrary, num_groups: int, group_size: int) -> None:
    """Pieces of more than the smallest size, the last of them short."""
    logits = torch.randn(num_groups * group_size, 3)
    assert_stats(run(library, logits, num_groups, 2), logits, 2)


@pytest.mark.parametrize("num_experts", [16, 48, 1100])
def test_masked_tokens_have_no_influence(library: SimtLibrary, num_experts: int) -> None:
    logits, mask = torch.randn(20, num_experts), torch.ones(20)
    mask[::3] = 0.0
    logits[::3] = NAN
    clean = logits.nan_to_num()
    assert_stats(run(library, logits, 2, 2, mask), clean, 2, mask)
    grads = torch.randn(2, num_experts), torch.randn(2)
    actual = run_grad(library, grads, logits, mask)
    assert torch.equal(actual, run_grad(library, grads, clean, mask)) and not actual[::3].any()
    assert actual[1::3].any()


def test_ties_go_to_the_lowest_index(library: SimtLibrary) -> None:
    for num_experts in (8, 40, 1100):
        logits = torch.zeros(5, num_experts)
        logits[:, 5] = 1.0
        counts = run(library, logits, 1, 3)[0]
        assert torch.nonzero(counts[0]).flatten().tolist() == [0, 1, 5]
        assert (counts[0, [0, 1, 5]] == 5).all()


@pytest.mark.parametrize("num_experts", [8, 64, 1030])
def test_groups_do_not_mix_and_orders_do_not_matter(library: SimtLibrary, num_experts: int) -> None:
    logits = torch.randn(3 * 70, num_experts)
    expected = run(library, logits, 3, 4)
    for seed in range(3):
        again = run(library, logits, 3, 4, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    alone = run(library, logits[70:140], 1, 4)
    assert all(torch.equal(a[0], b[1]) for a, b in zip(alone, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_experts", [7, 8, 66, 1026])
def test_rows_at_any_stride_and_alignment(library: SimtLibrary, num_experts: int, dtype: torch.dtype) -> None:
    for stride in (num_experts + 5, (num_experts + 11) // 8 * 8):
        base = torch.randn(18, stride).to(dtype)
        for logits in (base[:9, :num_experts], base[:9, 1 : num_experts + 1], base[::2, 4 : num_experts + 4]):
            assert_stats(run(library, logits, 1, 4), logits, 4)
            grads = torch.randn(1, num_experts), torch.randn(1)
            assert torch.equal(run_grad(library, grads, logits), run_grad(library, grads, logits.clone()))


def test_large_logits(library: SimtLibrary) -> None:
    logits = torch.tensor([[1000.0, -1000.0, 999.0, float("-inf")], [-3e4, -3e4, -3e4, -3e4]])
    assert_stats(run(library, logits, 2, 1), logits, 1)


@pytest.mark.parametrize("num_experts", [4, 64, 1030])
def test_the_sum_over_an_infinite_row_is_infinite(library: SimtLibrary, num_experts: int) -> None:
    """Though no expert of such a row has a probability."""
    logits = torch.randn(3, num_experts)
    logits[0, 2], logits[1] = float("inf"), float("-inf")
    _, prob_sums, z_sums = run(library, logits, 3, 1)
    torch.testing.assert_close(z_sums.double(), torch.logsumexp(logits.double(), -1) ** 2, rtol=3e-6, atol=3e-6)
    assert z_sums.isinf().tolist() == [True, True, False]
    assert prob_sums.isnan().all(-1).tolist() == [True, True, False]


def test_nothing_to_do(library: SimtLibrary) -> None:
    run(library, torch.zeros(0, 8), 0, 2)
    assert library.launches == []
    stats = run(library, torch.zeros(0, 8), 3, 2)
    assert not any(x.any() for x in stats), "empty sums are zero"
    run_grad(library, (torch.zeros(3, 8), torch.zeros(3)), torch.zeros(0, 8))
    assert library.launches == []


def test_more_choices_than_experts(library: SimtLibrary) -> None:
    with pytest.raises(SimtError, match="cudaError_t 1"):
        run(library, torch.zeros(2, 8), 1, 9)
