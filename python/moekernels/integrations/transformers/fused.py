"""Experts whose weights are stacks, as transformers 5 keeps them, and the function behind its experts interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from moekernels import ops
from moekernels.integrations.transformers.experts import ExpertWeights, run_experts
from moekernels.integrations.transformers.gates import activation_of
from moekernels.integrations.transformers.plain import say_why, why_all_hooked, why_no_kernel, why_not_plain
from moekernels.ops._call import is_transformed, wants_gradient
from moekernels.ops._low_rank import LowRank, adapted_mlp

Experts = Callable[..., Tensor]
"""``(module, hidden [T, H], expert ids [T, K], weights [T, K]) -> [T, H]``."""


class Structure(NamedTuple):
    """How a module of transformers 5 is made, as the decorator of its experts interface says.

    Attributes:
        up: the name of the up-projection's stack.
        gated: whether that holds a gate.
        biased: whether both projections have biases.
        transposed: whether the stacks are ``[E, in, out]``.
        activation: the kernels' name of what lies between the projections; None: only the module itself can compute it.
        normed: whether the module norms what an expert returns.
    """

    up: str
    gated: bool
    biased: bool
    transposed: bool
    activation: str | ops.Swiglu | None
    normed: bool

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the stacks, in the order of :class:`ExpertWeights`."""
        biases = (f"{self.up}_bias", "down_proj_bias") if self.biased else ()
        return (self.up, "down_proj", *biases)

    @property
    def is_one_op(self) -> bool:
        return self.activation is not None and not self.transposed and not self.normed


def structure_of(module: Any) -> Structure | str:
    """How the module is made, or why that is not a way that we know."""
    gated = bool(getattr(module, "has_gate", True))
    structure = Structure(
        up="gate_up_proj" if gated else "up_proj",
        gated=gated,
        biased=bool(getattr(module, "has_bias", False)),
        transposed=bool(getattr(module, "is_transposed", False)),
        activation=activation_of(module),
        normed=bool(getattr(module, "has_post_expert_norm", False)),
    )
    for name in structure.tensors:
        if not hasattr(module, name):
            return f"it has no {name}"
    if structure.normed and not hasattr(module, "post_expert_norm"):
        return "it has no post_expert_norm"
    if structure.activation is None and not hasattr(module, "_apply_gate" if gated else "act_fn"):
        name = type(getattr(module, "act_fn", None)).__name__
        return f"its activation {name} is none of {', '.join(ops.ACTIVATIONS)}"
    if not getattr(module, "is_concatenated", True) and isinstance(structure.activation, str):
        return "its gate and value are interleaved, and it has no _apply_gate of its own"
    return structure


def plain_stacks(module: Any, structure: Structure, *, lasting: bool = False) -> ExpertWeights | str:
    """The stacks of a module as they are now (adapted, pruned, gathered), or why the kernels cannot run on them.

    Args:
        lasting: leave out what may be otherwise in the next call: hooks, and that weights are sharded.
    """
    if not lasting and (reason := why_all_hooked()):
        return reason
    act: Any = getattr(module, "act_fn", None)
    passed_by = structure.activation is not None and isinstance(act, nn.Module)
    if passed_by and (reason := why_not_plain(act, type(act), lasting=lasting)):
        return f"act_fn {reason}"
    names = structure.tensors
    tensors = [getattr(module, name) for name in names]
    for name, tensor in zip(names, tensors, strict=True):
        if reason := why_no_kernel(tensor, lasting=lasting):
            return f"{name} {reason}"
        if (tensor.dtype, tensor.device) != (tensors[0].dtype, tensors[0].device):
            return f"{name} differs from {names[0]} in dtype or device"
    if structure.transposed and structure.biased and tensors[0].is_cuda:
        return f"{names[0]} lies transposed, and on CUDA there is no bias beside such weights yet"
    return ExpertWeights(*tensors)


def run_stacks(
    module: Any,
    structure: Structure,
    hidden: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    experts: ExpertWeights,
    adapters: Mapping[str, LowRank] | None = None,
) -> Tensor:
    """``hidden [T, H]``, ``expert_ids [T, K]``, ``weights [T, K]`` -> ``[T, H]``.

    Args:
        adapters: what is added to the products with stacks, by their names.
    """
    if structure.is_one_op and not adapters:
        assert structure.activation is not None
        activation, gated = structure.activation, structure.gated
        return run_experts(hidden, expert_ids, weights, experts, activation=activation, gated=gated)
    plan = ops.plan(expert_ids.int(), len(experts.down))
    return run_planned(module, structure, hidden, plan, weights, experts, adapters)


def run_planned(
    module: Any,
    structure: Structure,
    hidden: Tensor,
    plan: ops.Plan,
    weights: Tensor,
    experts: ExpertWeights,
    adapters: Mapping[str, LowRank] | None = None,
) -> Tensor:
    """The same for tokens whose places are known: with adapters, or one op after the other."""
    up, down, up_bias, down_bias = experts
    assert isinstance(up, Tensor) and isinstance(down, Tensor)
    activation, gated, transposed = structure.activation, structure.gated, structure.transposed
    up_lora, down_lora = ((adapters or {}).get(name) for name in (structure.up, "down_proj"))
    frozen = not is_transformed() and not wants_gradient(*(tensor for tensor in experts if isinstance(tensor, Tensor)))
    if adapters and frozen and activation is not None and not structure.normed:
        return adapted_mlp(
            hidden.to(down.dtype), weights.float(), plan, (up, down), (up_bias, down_bias), (up_lora, down_lora),
            activation=activation, gated=gated, transposed=transposed,
        ).to(hidden.dtype)  # fmt: skip
    gemm = partial(_grouped_gemm, offsets=plan.expert_offsets, transposed=transposed)
    rows = ops.permute(hidden.to(down.dtype), plan.token_of_row, plan.row_of_slot)
    if activation is None:
        linear = gemm(rows, up, up_bias, up_lora)
        inner = module._apply_gate(linear) if gated else module.act_fn(linear)
    else:
        inner = gemm(rows, up, up_bias, up_lora, activation=activation, gated=gated)
    rows = gemm(inner.to(down.dtype), down, down_bias, down_lora)
    if structure.normed:
        rows = module.post_expert_norm(rows)
    return ops.unpermute(rows, plan.row_of_slot, weights.float()).to(hidden.dtype)


def _grouped_gemm(
    rows: Tensor,
    weight: Any,
    bias: Any,
    lora: LowRank | None,
    *,
    offsets: Tensor,
    transposed: bool,
    activation: str | ops.Swiglu = "none",
    gated: bool = False,
) -> Tensor:
    if lora is None:
        return ops.grouped_gemm(
            rows, weight, offsets, bias=bias, transposed=transposed, activation=activation, gated=gated
        )
    linear = ops.grouped_gemm(rows, weight, offsets, bias=bias, transposed=transposed)
    linear += lora.expand(lora.reduce(rows, offsets), offsets)
    return ops.activation(linear, activation, gated=gated) if str(activation) != "none" or gated else linear


def fused_experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, stock: Experts | None = None
) -> Tensor:
    """The function behind ``experts_implementation="moekernels"`` in transformers 5.

    Weights are read from the module in every call. Between the projections the kernels compute what they know; else
    the module's own gate or activation is called on all rows at once, as transformers' own implementations do. Where
    the module is made in a way that is not known, its weights are none that the kernels can run on at that moment, or
    something hooks the activation, `stock` computes the result, and a warning says why, once.

    Args:
        module: holds ``gate_up_proj`` or ``up_proj``, ``down_proj``, perhaps their biases, and ``act_fn`` or
            ``_apply_gate``.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, K]``; the number of experts marks a choice that another rank serves.
        top_k_weights: ``[T, K]``.
        stock: what computes the experts in place of the kernels; by default the loop in the module's class.

    Returns:
        ``[T, H]`` in the dtype of `hidden_states`.

    Raises:
        ValueError: neither the kernels nor `stock` nor the module itself can compute the experts.
    """
    structure = structure_of(module)
    experts = structure if isinstance(structure, str) else plain_stacks(module, structure)
    if not isinstance(structure, str) and isinstance(experts, ExpertWeights):
        return run_stacks(module, structure, hidden_states, top_k_index, top_k_weights, experts)
    stock = stock or _eager(module)
    if stock is None:
        raise ValueError(f"moekernels cannot run the experts of {type(module).__name__}: {experts}")
    say_why(type(module), str(experts))
    return stock(module, hidden_states, top_k_index, top_k_weights)


def _eager(module: Any) -> Experts | None:
    """What the decorator of the experts interface has wrapped: the loop over the experts in the module's class."""
    for cls in type(module).__mro__:
        if loop := getattr(cls.__dict__.get("forward"), "__wrapped__", None):
            return loop
    return None
