from __future__ import annotations

import pytest
import torch

from moekernels import nn, ops
from tests.processes import run_processes


def test_in_a_sparse_mlp() -> None:
    router = nn.ScoreRouter(16, 8, 2, num_groups=4, top_groups=2, scale=2.5)
    router.e_score_correction_bias.copy_(torch.rand(8))
    mlp = nn.SparseMLP(router, nn.GroupedExperts(16, 12, 8))
    hidden = torch.randn(3, 5, 16)
    out, logits = mlp(hidden)
    weights, ids = ops.route_by_score(
        hidden.view(-1, 16) @ router.weight.T, 2, selection_bias=router.e_score_correction_bias, num_groups=4,
        top_groups=2, renormalize=True, scale=2.5,
    )  # fmt: skip
    expected = mlp.experts(hidden.view(-1, 16), weights, ops.plan(ids, 8))
    torch.testing.assert_close(out.view(-1, 16), expected)
    assert logits.dtype == torch.float32 and "router.e_score_correction_bias" in mlp.state_dict()


def test_half_precision_is_routed_in_float32() -> None:
    router, hidden = nn.ScoreRouter(16, 8, 2, dtype=torch.bfloat16), torch.randn(5, 16).bfloat16()
    expected = hidden.float() @ router.weight.float().T
    assert torch.equal(router(hidden).logits, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(hidden).logits, expected)


def test_balancing_moves_every_bias_towards_the_mean() -> None:
    router = nn.ScoreRouter(16, 4, 1)
    ids = torch.tensor([[0], [0], [0], [1], [-1], [2], [2]])
    assert router.balance(ids, rate=0.25).tolist() == [3.0, 1.0, 2.0, 0.0]  # 1.5 each on average
    assert router.e_score_correction_bias.tolist() == [-0.25, 0.25, -0.25, 0.25]


def test_balancing_evens_out_the_load() -> None:
    router, hidden = nn.ScoreRouter(8, 8, 2), torch.randn(400, 8)
    torch.nn.init.normal_(router.weight, std=0.5)
    before = router.balance(router(hidden).expert_ids, rate=0.0).std()
    for _ in range(200):
        after = router.balance(router(hidden).expert_ids, rate=0.01).std()
    assert after < before / 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "tanh"}, "score must be one of softmax, sigmoid, sqrt_softplus, got 'tanh'"),
        ({"num_groups": 3}, r"num_groups must be a divisor of num_experts \(8\), got 3"),
        ({"num_groups": 8, "top_groups": 1}, r"top_groups must be between 2, for top_k experts, .*\(8\), got 1"),
    ],
)
def test_sizes_that_do_not_go_together(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"ScoreRouter: {message}"):
        nn.ScoreRouter(16, 8, 2, **options)
    with pytest.raises(ValueError, match="no selection bias"):
        nn.ScoreRouter(16, 8, 2, selection_bias=False).balance(torch.zeros(1, 2))


def balance_on(rank: int, on_mesh: bool) -> list[float]:
    """The bias after a step in which every process has chosen the expert of its number."""
    from torch.distributed import group
    from torch.distributed.device_mesh import init_device_mesh

    router = nn.ScoreRouter(16, 4, 1)
    where = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "ep")) if on_mesh else group.WORLD
    assert router.balance(torch.tensor([[rank], [0]]), 0.5, where).tolist() == [3.0, 1.0, 0.0, 0.0]
    return router.e_score_correction_bias.tolist()


@pytest.mark.parametrize("on_mesh", [False, True], ids=["group", "mesh"])
def test_processes_move_alike(on_mesh: bool) -> None:
    assert run_processes(balance_on, 2, on_mesh) == [[-0.5, 0.0, 0.5, 0.5]] * 2
