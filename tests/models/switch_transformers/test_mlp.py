"""The router and the sparse layer against those of transformers 4.56.2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.switch_transformers import modeling_switch_transformers as reference
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from moekernels.models import (
    SwitchTransformersConfig,
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
)
from tests.models.switch_checkpoints import HIDDEN, TINY, assert_close
from tests.tolerance import assert_accurate

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")

E, H = TINY["num_experts"], HIDDEN


def layers(**overrides: Any) -> tuple[Any, SwitchTransformersSparseMLP]:
    """The same sparse layer twice."""
    fields = {**TINY, **overrides}
    theirs = reference.SwitchTransformersSparseMLP(transformers.SwitchTransformersConfig(**fields))
    ours = SwitchTransformersSparseMLP(SwitchTransformersConfig(**fields))
    with torch.no_grad():
        theirs.router.classifier.weight.normal_()
        ours.router.load_state_dict(theirs.router.state_dict())
        for e, expert in enumerate(theirs.experts.values()):
            ours.experts.up_proj[e], ours.experts.down_proj[e] = expert.wi.weight, expert.wo.weight
    return theirs.eval(), ours.eval()


@torch.no_grad()
@pytest.mark.parametrize("capacity", [1, 3, 64])
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_router_and_layer(capacity: int, skewed: bool, bias: bool) -> None:
    theirs, ours = layers(expert_capacity=capacity, router_bias=bias)
    # Every other element of a wider tensor; rows are limited one by one.
    hidden = torch.randn(3, 11, 2 * H)[..., ::2]
    if skewed:
        hidden = hidden[:, :1].expand(-1, 11, -1)
    for mine, other in zip(ours.router(hidden), theirs.router(hidden), strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        assert_close(mine, other)
    out, logits = ours(hidden)
    expected, (expected_logits, _) = theirs(hidden)
    assert_close(out, expected)
    assert_close(logits, expected_logits)
    dropped = ours.router(hidden)[0].sum(-1) == 0
    assert (out[dropped] == 0).all()
    if skewed or capacity != 3:
        assert bool(dropped.any()) == (capacity < 64)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (4, 1)])
def test_few_tokens(shape: tuple[int, int]) -> None:
    theirs, ours = layers(expert_capacity=1)
    hidden = torch.randn(*shape, H)
    out, logits = ours(hidden)
    assert out.shape == hidden.shape and logits.shape == (*shape, E)
    dispatched, probs, _ = ours.router(hidden)
    assert dispatched.shape == (*shape, E) and probs.shape == (*shape, 1)
    if out.numel():
        # One token of a sequence always finds a place, whatever the other sequences choose.
        assert_close(out, theirs(hidden)[0])
        assert dispatched.sum() == 4


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_are_compared_in_the_dtype_of_the_tokens(dtype: torch.dtype) -> None:
    theirs, ours = layers()
    # Nearly equal logits: after rounding, probabilities tie, and the lowest index wins.
    hidden = (torch.randn(2, 40, H) * 1e-4).to(dtype)
    for mine, other in zip(ours.router(hidden), theirs.router(hidden), strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other) or mine.is_floating_point()
    assert torch.equal(ours.router(hidden)[1], theirs.router(hidden)[1])


@torch.no_grad()
def test_jitter_is_of_the_routers_input() -> None:
    theirs, ours = layers(router_jitter_noise=0.3, dropout_rate=0.0)
    hidden = torch.randn(2, 9, H).bfloat16()
    ours.train(), theirs.train()
    torch.manual_seed(7)
    expected = theirs.router(hidden)[2]
    torch.manual_seed(7)
    actual = ours.router(hidden)[2]
    assert_close(actual, expected)
    assert not torch.allclose(actual, ours.eval().router(hidden)[2], atol=1e-3)
    # In float32 too the experts get the tokens as they are.
    before = hidden.float()
    after = before.clone()
    ours.train()(after)
    assert torch.equal(before, after)


@torch.no_grad()
def test_padding_may_be_left_out() -> None:
    _, routed = layers(expert_capacity=2)
    _, ignoring = layers(expert_capacity=2, router_ignore_padding_tokens=True)
    ignoring.load_state_dict(routed.state_dict())
    hidden = torch.randn(1, 1, H).expand(2, 5, H)
    kept = torch.tensor([[False, False, True, True, True], [True, False, True, True, True]])
    assert (routed(hidden, kept)[0].abs().sum(-1) > 0).tolist() == [[True, True, False, False, False]] * 2
    served = (ignoring(hidden, kept)[0].abs().sum(-1) > 0).tolist()
    assert served == [[False, False, True, True, False], [True, False, True, False, False]]


def test_a_gate_which_transformers_cannot_build() -> None:
    fields = {**TINY, "dense_act_fn": "gated-gelu"}
    with pytest.raises(KeyError):
        reference.SwitchTransformersDenseActDense(transformers.SwitchTransformersConfig(**fields))
    ours = SwitchTransformersSparseMLP(SwitchTransformersConfig(**fields)).eval()
    t5 = transformers.T5Config(d_model=H, d_ff=TINY["d_ff"], feed_forward_proj="gated-gelu")
    experts = [T5DenseGatedActDense(t5).eval() for _ in range(E)]
    hidden = torch.randn(2, 7, H)
    with torch.no_grad():
        for e, expert in enumerate(experts):
            ours.experts.gate_up_proj[e] = torch.cat((expert.wi_0.weight, expert.wi_1.weight))
            ours.experts.down_proj[e] = expert.wo.weight
        one_hot, probs, _ = ours.router(hidden)
        expected = torch.stack([expert(hidden) for expert in experts], -1) @ one_hot.float()[..., None]
        assert_close(ours(hidden)[0], probs * expected[..., 0])


REAL: dict[str, dict[str, int]] = {
    "switch-base-8": {"num_experts": 8, "d_model": 768, "d_ff": 3072},
    "switch-base-128": {"num_experts": 128, "d_model": 768, "d_ff": 3072},
}


@torch.no_grad()
@pytest.mark.parametrize("name", REAL)
def test_layers_of_the_released_sizes(name: str) -> None:
    # Few tokens reach few of the experts; the limit of 4 drops some.
    fields = {**REAL[name], "expert_capacity": 4}
    theirs = reference.SwitchTransformersSparseMLP(transformers.SwitchTransformersConfig(**REAL["switch-base-8"]))
    ours = SwitchTransformersSparseMLP(SwitchTransformersConfig(**fields)).eval()
    theirs.router = reference.SwitchTransformersTop1Router(transformers.SwitchTransformersConfig(**fields))
    theirs.router.load_state_dict(ours.router.state_dict())
    hidden = torch.randn(2, 24, 768)
    hidden[:, ::3] = hidden[:, :1]
    for e in ours.router(hidden)[0].sum((0, 1)).nonzero()[:, 0].tolist():
        expert = reference.SwitchTransformersDenseActDense(
            transformers.SwitchTransformersConfig(**{**REAL[name], "num_experts": 1})
        )
        expert.wi.weight, expert.wo.weight = (
            torch.nn.Parameter(stack[e]) for stack in (ours.experts.up_proj, ours.experts.down_proj)
        )
        theirs.experts[f"expert_{e}"] = expert
    expected = theirs.eval()(hidden)[0]
    out = ours(hidden)[0]
    assert (out.abs().sum(-1) == 0).any()
    assert_close(out, expected)
    rounded = ours.to(torch.bfloat16)(hidden.bfloat16())[0]
    plain = theirs.to(torch.bfloat16)(hidden.bfloat16())[0]
    # In the lower precision other experts may win; those tokens are left out.
    same = (ours.router(hidden.bfloat16())[0] == ours.router(hidden)[0]).all(-1)
    assert_accurate(rounded[same], expected[same].double(), plain[same])


@torch.no_grad()
def test_dropout() -> None:
    _, sparse = layers(dropout_rate=1.0)
    assert (sparse.train()(torch.randn(1, 4, H))[0] == 0).all()


def test_other_experts_cannot_be_fused() -> None:
    with pytest.raises(ValueError, match="expert_class must be SwitchTransformersDenseActDense, got Linear"):
        SwitchTransformersSparseMLP(SwitchTransformersConfig(**TINY), torch.nn.Linear)
    assert SwitchTransformersTop1Router(SwitchTransformersConfig(**TINY)).num_experts == E
