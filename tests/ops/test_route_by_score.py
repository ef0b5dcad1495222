"""Routing by scores, against the code of the models that do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moekernels import cpu_isa, ops
from moekernels.ops.route_by_score import SCORES
from tests.isa import isas
from tests.tolerance import assert_accurate

transformers = pytest.importorskip("transformers")

NUM_TOKENS = 2000  # 100,000 and more by hand
E, K, H = 64, 6, 32


def of_model(name: str, config: Any, router: str, bias: Tensor | None) -> tuple[Any, Tensor]:
    """A router of transformers with random weights, and its weight."""
    module = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=[router])
    made = getattr(module, router)(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if bias is not None:
        made.e_score_correction_bias.copy_(bias)
    return made, made.weight.detach()


def choices(outputs: tuple[Tensor, ...]) -> Tensor:
    """``[T, E]`` of weights, whichever way a version of transformers orders what its routers return."""
    ids = next(x for x in outputs if not x.is_floating_point())
    weights = next(x for x in outputs if x.is_floating_point() and x.shape[-1] in (ids.shape[-1], E) and x is not ids)
    others = [x for x in outputs if x.is_floating_point()]
    weights = next((x for x in others if x.shape == ids.shape), weights)
    if weights.shape == ids.shape:
        return torch.zeros(len(ids), E).scatter(1, ids, weights.detach())
    return weights.detach()


def assert_same_choices(actual: Tensor, expected: Tensor, rtol: float) -> None:
    """Both ``[T, E]``. Scores differ from torch's in their last bit, so two that are so close may change places: 6 of
    3,000,000 tokens do."""
    same = ((actual > 0) == (expected > 0)).all(dim=1)
    assert (~same).sum() <= 1 + NUM_TOKENS // 100_000
    torch.testing.assert_close(actual[same], expected[same], rtol=rtol, atol=1e-7)


@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (8, 3), (4, 4)])
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_grouped_sigmoid(name: str, num_groups: int, top_groups: int) -> None:
    prefix = {"deepseek_v3": "DeepseekV3", "glm4_moe": "Glm4Moe"}[name]
    for renormalize in (False, True):
        config = getattr(transformers, f"{prefix}Config")(
            hidden_size=H, n_routed_experts=E, num_experts_per_tok=K, n_group=num_groups, topk_group=top_groups,
            norm_topk_prob=renormalize, routed_scaling_factor=2.5,
        )  # fmt: skip
        bias = torch.rand(E) * 0.3
        router, weight = of_model(name, config, f"{prefix}TopkRouter", bias)
        hidden = torch.randn(NUM_TOKENS, H)
        expected = choices(router(hidden))
        weights, ids = ops.route_by_score(
            torch.nn.functional.linear(hidden, weight), K, selection_bias=bias, num_groups=num_groups,
            top_groups=top_groups, renormalize=renormalize, scale=2.5,
        )  # fmt: skip
        actual = torch.zeros(NUM_TOKENS, E).scatter(1, ids.long(), weights)
        assert_same_choices(actual, expected, rtol=1e-6)


def test_gpt_oss_is_softmax_over_the_chosen() -> None:
    config = transformers.GptOssConfig(hidden_size=H, num_local_experts=E, num_experts_per_tok=K)
    router, weight = of_model("gpt_oss", config, "GptOssTopKRouter", None)
    hidden = torch.randn(NUM_TOKENS, H)
    expected = choices(router(hidden))
    logits = torch.nn.functional.linear(hidden, weight, router.bias)
    for route in (lambda: ops.route(logits, K, renormalize=True), lambda: ops.route_by_score(
        logits, K, score="softmax", renormalize=True
    )):  # fmt: skip
        weights, ids = route()
        actual = torch.zeros(NUM_TOKENS, E).scatter(1, ids.long(), weights.detach())
        assert_same_choices(actual, expected, rtol=2e-6)


@pytest.mark.parametrize("renormalize", [False, True])
def test_qwen3_moe(renormalize: bool) -> None:
    modeling = __import__("transformers.models.qwen3_moe.modeling_qwen3_moe", fromlist=["Qwen3MoeTopKRouter"])
    if not hasattr(modeling, "Qwen3MoeTopKRouter"):
        pytest.skip("transformers 4 has no module for this router")
    config = transformers.Qwen3MoeConfig(
        hidden_size=H, num_experts=E, num_experts_per_tok=K, norm_topk_prob=renormalize
    )
    router, weight = of_model("qwen3_moe", config, "Qwen3MoeTopKRouter", None)
    hidden = torch.randn(NUM_TOKENS, H)
    expected = choices(router(hidden))
    weights, ids = ops.route_by_score(
        torch.nn.functional.linear(hidden, weight), K, score="softmax", renormalize=renormalize
    )
    actual = torch.zeros(NUM_TOKENS, E).scatter(1, ids.long(), weights)
    assert_same_choices(actual, expected, rtol=2e-6)


def test_softmax_is_that_of_route() -> None:
    logits = torch.randn(NUM_TOKENS, E)
    for renormalize in (False, True):  # Qwen3-MoE
        expected = ops.route(logits, K, renormalize=renormalize)
        actual = ops.route_by_score(logits, K, score="softmax", renormalize=renormalize)
        assert torch.equal(actual.expert_ids, expected.expert_ids)
        torch.testing.assert_close(actual.weights, expected.weights, rtol=2e-6, atol=1e-7)


def test_sqrt_softplus_by_hand() -> None:
    logits, bias = torch.randn(50, 8), torch.randn(8)
    weights, ids = ops.route_by_score(
        logits, 3, score="sqrt_softplus", selection_bias=bias, renormalize=True, scale=1.5
    )
    for t in range(50):
        scores = [float((1 + x.double().exp()).log().sqrt()) for x in logits[t]]
        order = sorted(range(8), key=lambda e: -(scores[e] + float(bias[e])))[:3]
        assert ids[t].tolist() == order
        total = sum(scores[e] for e in order)
        expected = torch.tensor([1.5 * scores[e] / total for e in order])
        torch.testing.assert_close(weights[t], expected, rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_lowest_index_of_experts_and_of_groups() -> None:
    assert ops.route_by_score(torch.zeros(1, 8), 3).expert_ids.tolist() == [[0, 1, 2]]
    tied = ops.route_by_score(torch.zeros(1, 8), 2, num_groups=4, top_groups=1)
    assert tied.expert_ids.tolist() == [[0, 1]]
    bias = torch.tensor([0.0, 0, 0, 0, 1, 0, 0, 0])
    assert ops.route_by_score(torch.zeros(1, 8), 2, selection_bias=bias).expert_ids.tolist() == [[4, 0]]


def test_gradients_do_not_know_the_bias() -> None:
    logits = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.rand(8, dtype=torch.float64, requires_grad=True)

    def weights(logits: Tensor) -> Tensor:
        return ops.route_by_score(logits, 3, selection_bias=bias, num_groups=2, renormalize=True, scale=2.0).weights

    torch.autograd.gradcheck(weights, logits)
    weights(logits).sum().backward()
    assert bias.grad is None


@pytest.mark.parametrize(("experts", "groups", "kept"), [(8, 1, 1), (60, 4, 2), (256, 8, 4), (6, 6, 3), (9, 3, 3)])
def test_the_kernel_is_the_definition(experts: int, groups: int, kept: int) -> None:
    logits = (torch.randn(300, experts) * 2).round() / 2  # with ties
    logits[5, 3] = float("nan")
    bias, mask = (torch.randn(experts) * 2).round() / 4, torch.rand(300) > 0.1
    for options in ({}, {"selection_bias": bias, "mask": mask, "renormalize": True, "scale": 2.5}):
        options |= {"score": "sigmoid", "num_groups": groups, "top_groups": kept}
        wanted = ops.route_by_score(logits.double(), 3, **options)  # by torch's functions
        got = ops.route_by_score(logits, 3, **options)
        trained = ops.route_by_score(logits.clone().requires_grad_(), 3, **options)
        tied = torch.isclose(wanted.weights.float(), got.weights, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert tied.all() and torch.equal(got.expert_ids, trained.expert_ids)
        torch.testing.assert_close(trained.weights, got.weights, rtol=1e-6, atol=1e-7, equal_nan=True)
        assert torch.equal(wanted.expert_ids, got.expert_ids)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("experts", [1, 5, 16, 31, 64, 70, 256, 333])
def test_ties_and_infinities_on_every_machine(experts: int, isa: str) -> None:
    """Ids are those of a stable sort, whichever way the kernel takes: few or many columns, or one after another."""
    kinds = [torch.randn(20, experts), (torch.randn(20, experts) * 2).round() / 2, torch.zeros(1, experts)]
    kinds.append(torch.linspace(-3, 3, experts).expand(1, -1))  # each larger than all before
    kinds.append(torch.where(torch.rand(20, experts) < 0.7, float("-inf"), torch.randn(20, experts)))
    logits = torch.cat(kinds)
    logits[3, experts // 2] = float("nan")
    for top_k in sorted({1, min(experts, 2), min(experts, 8), min(experts, 11), min(experts, 30), experts}):
        expected = torch.sort(logits + 0.0, dim=-1, descending=True, stable=True).indices[:, :top_k]
        with cpu_isa(isa):
            assert torch.equal(ops.route(logits, top_k).expert_ids.long(), expected)


@pytest.mark.parametrize("isa", isas())
def test_groups_on_every_machine(isa: str) -> None:
    for experts, num_groups, top_groups, top_k in ((64, 8, 4, 8), (40, 8, 3, 6), (256, 8, 4, 8), (12, 12, 5, 4)):
        logits = (torch.randn(200, experts) * 4).round() / 4
        logits[7, 3] = float("nan")
        bias = torch.randn(experts).round() / 8
        bias[torch.rand(experts) < 0.3] = float("-inf")  # never chosen, but where a group has nothing else
        options = {"selection_bias": bias, "num_groups": num_groups, "top_groups": top_groups}
        expected = ops.route_by_score(logits.double(), top_k, **options)  # by torch's functions
        with cpu_isa(isa):
            actual = ops.route_by_score(logits, top_k, **options)
        assert torch.equal(actual.expert_ids, expected.expert_ids)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_of_every_machine(dtype: torch.dtype, score: str, isa: str) -> None:
    """Also where exponentials leave float32, and to the same bits for a token whoever else there is."""
    logits = torch.cat([torch.randn(50, 40), torch.linspace(-120, 120, 400).view(10, 40)]).to(dtype)
    with cpu_isa(isa):
        weights, ids = ops.route_by_score(logits, 40, score=score)
        some = ops.route_by_score(logits[3:5], 40, score=score)
    actual = torch.zeros(60, 40).scatter(1, ids.long(), weights)
    assert_accurate(actual, SCORES[score](logits.double()), SCORES[score](logits.float()))
    assert torch.equal(some.weights, weights[3:5])
    small = SCORES[score](logits.double())
    big_enough = small > 1e-17  # of which even the square is a normal number
    assert ((actual - small).abs() / small)[big_enough].max() < 4e-7 * (20 if score == "softmax" else 1)


def test_registration() -> None:
    logits, bias, mask = torch.randn(5, 8), torch.rand(8), torch.rand(5) > 0.5
    op = torch.ops.moekernels.route_by_score.default
    torch.library.opcheck(op, (logits, 2, "sigmoid", bias, 4, 2, True, 1.5, mask))


def test_mask() -> None:
    logits, mask = torch.randn(4, 8), torch.tensor([True, False, True, False])
    weights, ids = ops.route_by_score(logits, 2, mask=mask)
    plain = ops.route_by_score(logits, 2)
    assert torch.equal(ids[mask], plain.expert_ids[mask]) and torch.equal(weights[mask], plain.weights[mask])
    assert (ids[~mask] == -1).all() and (weights[~mask] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits": torch.zeros(8)}, r"logits must have 2 dimensions \[num_tokens, num_experts\], got 1"),
        ({"logits": torch.zeros(3, 8).int()}, "logits must be of a floating-point dtype, got torch.int32"),
        ({"score": "tanh"}, "score must be one of softmax, sigmoid, sqrt_softplus; got 'tanh'"),
        ({"top_k": 9}, "top_k must be between 1 and num_experts, 8, got 9"),
        ({"selection_bias": torch.zeros(7)}, r"selection_bias must have shape \[num_experts\] = \[8\], got \[7\]"),
        ({"num_groups": 3}, "num_groups must divide num_experts, 8, got 3"),
        ({"num_groups": 4, "top_groups": 5}, "top_groups must be between 1 and num_groups, 4, got 5"),
        ({"num_groups": 8, "top_groups": 1}, "top_k must be at most the 1 experts of 1 groups, got 2"),
        ({"mask": torch.ones(3)}, "mask must be bool, got torch.float32"),
        ({"selection_bias": torch.zeros(8, device="meta")}, "selection_bias must be on cpu like logits, got meta"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    arguments = {"logits": torch.zeros(3, 8), "top_k": 2, **options}
    with pytest.raises(ValueError, match=f"route_by_score: {message}"):
        ops.route_by_score(**arguments)
