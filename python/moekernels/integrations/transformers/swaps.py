"""What takes the place of each MoE module of transformers.

A module is not rebuilt: it changes its class to a subclass of its own with another `forward`, so that parameters,
names, hooks and everything that asks for its type stay. Modules of transformers 4 hold one Linear per projection and
expert, and compute routing and experts in one block; transformers 5 splits the two, and keeps the experts of most
models fused. Which one is at hand is seen from the module itself, not from a version number.

Letters: B sequences, S tokens of each, T = B * S, E experts, K choices per token, H hidden size.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekernels import ops
from moekernels.integrations.transformers.experts import activation_name, fused_experts, run_experts, why_not_fused
from moekernels.integrations.transformers.packing import PackedExperts, why_not_packed

_PACK = "_moekernels_experts"


class Swap(nn.Module):
    """The base of all replacements; never constructed, only mixed into a module's own class."""

    original: ClassVar[type[nn.Module]]
    swap: ClassVar[type[Swap]]

    if TYPE_CHECKING:  # the attributes of the original

        def __getattr__(self, name: str) -> Any: ...

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        """Why this module cannot be replaced; None if it can. Changes nothing."""
        return None

    def install(self) -> int:
        """Prepare a module that just became one of this class. Returns the bytes of weights that were packed."""
        return 0

    def uninstall(self) -> None:
        """Undo :meth:`install`."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class was made at run time, so that pickle cannot find it by name.
        return _rebuild, (self.original, self.swap), self.__getstate__()


_CLASSES: dict[tuple[type[nn.Module], type[Swap]], type[nn.Module]] = {}


def swapped_class(original: type[nn.Module], swap: type[Swap]) -> type[nn.Module]:
    """The subclass of `original` that runs `swap`; looks like `original` to whoever asks for names."""
    if (original, swap) not in _CLASSES:
        names = {
            "original": original,
            "swap": swap,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
        }
        _CLASSES[original, swap] = type(original.__name__, (swap, original), names)
    return _CLASSES[original, swap]


def _rebuild(original: type[nn.Module], swap: type[Swap]) -> nn.Module:
    made = swapped_class(original, swap)
    return made.__new__(made)


class PackedSwap(Swap):
    """Experts with a Linear per projection."""

    up: ClassVar[tuple[str, ...]]
    down: ClassVar[str]
    activation_of: ClassVar[str]  # the attribute of an expert that holds its activation

    @classmethod
    def experts_of(cls, module: nn.Module) -> Sequence[nn.Module]:
        """The expert modules in the order of their numbers."""
        experts: Any = module.experts
        return list(experts.values() if isinstance(experts, nn.ModuleDict) else experts)

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        experts = cls.experts_of(module)
        if reason := why_not_packed(experts, cls.up, cls.down):
            return reason
        act = getattr(experts[0], cls.activation_of)
        if activation_name(act) is None:
            return f"its activation {type(act).__name__} is none of {', '.join(ops.ACTIVATIONS)}"
        return None

    def install(self) -> int:
        pack = PackedExperts(self.experts_of(self), self.up, self.down)
        # Past nn.Module.__setattr__ and out of the state dict: the weights belong to the experts.
        object.__setattr__(self, _PACK, pack)
        return pack.num_bytes

    def uninstall(self) -> None:
        getattr(self, _PACK).scatter()
        object.__delattr__(self, _PACK)

    def run(self, hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor, **dropouts: float) -> Tensor:
        """``hidden [T, H]``, ``expert_ids [T, K]``, ``expert_weights [T, K]`` -> ``[T, H]``."""
        activation = activation_name(getattr(self.experts_of(self)[0], self.activation_of))
        assert activation is not None
        weights = getattr(self, _PACK).weights()
        return run_experts(
            hidden,
            expert_ids,
            expert_weights,
            weights,
            activation=activation,
            gated=len(self.up) == 2,
            **dropouts,
        )


# --- softmax and top-k: OLMoE, Mixtral, Qwen-MoE ----------------------------------------------------------------------


class SoftmaxBlock(PackedSwap):
    """transformers 4: ``forward(hidden [B, S, H]) -> (out [B, S, H], router logits [T, E])``."""

    up = ("gate_proj", "up_proj")
    down = "down_proj"
    activation_of = "act_fn"
    # Mixtral always divides by the sum of the weights; the others do as their configuration says.
    renormalizes: ClassVar[bool | None] = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        shape = hidden_states.shape
        if self.training and getattr(self, "jitter_noise", 0) > 0:
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(
                1.0 - self.jitter_noise, 1.0 + self.jitter_noise
            )
        hidden = hidden_states.reshape(-1, shape[-1])
        logits = self.gate(hidden)
        renormalize = self.norm_topk_prob if self.renormalizes is None else self.renormalizes
        weights, expert_ids = ops.route(logits, self.top_k, renormalize=renormalize)
        out = self.run(hidden, expert_ids, weights) + self.shared(hidden)
        return out.reshape(shape), logits

    def shared(self, hidden: Tensor) -> Tensor | int:
        """What every token gets besides."""
        return 0


class MixtralBlock(SoftmaxBlock):
    up = ("w1", "w3")
    down = "w2"
    renormalizes = True


class Qwen2MoeBlock(SoftmaxBlock):
    def shared(self, hidden: Tensor) -> Tensor:
        return F.sigmoid(self.shared_expert_gate(hidden)) * self.shared_expert(hidden)


class SoftmaxRouter(Swap):
    """transformers 5: ``forward(hidden) -> (logits [T, E], weights [T, K], expert ids [T, K])``."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden_states.reshape(-1, hidden_states.shape[-1]), self.weight)
        weights, expert_ids = ops.route(logits, self.top_k, renormalize=getattr(self, "norm_topk_prob", True))
        return logits, weights, expert_ids.long()


class FusedExperts(Swap):
    """transformers 5: ``forward(hidden [T, H], expert ids [T, K], weights [T, K]) -> [T, H]``."""

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        for name, parameter in module.named_parameters(recurse=False):
            if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
                return f"{name} is sharded or quantised ({type(parameter.data).__name__})"
            if parameter.is_meta:
                return f"{name} has no data yet (meta device): it is offloaded, or not loaded"
            if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                return f"{name} is {parameter.dtype}; the kernels take float32, bfloat16 and float16"
        return why_not_fused(module)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return fused_experts(self, hidden_states, top_k_index, top_k_weights)


# --- PhiMoE -----------------------------------------------------------------------------------------------------------


class PhimoeBlock(PackedSwap):
    """transformers 4: ``forward(hidden [B, S, H]) -> (out [B, S, H], router logits [T, E])``."""

    up = ("w1", "w3")
    down = "w2"
    activation_of = "act_fn"

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        shape = hidden_states.shape
        if self.training and self.input_jitter_noise > 0:
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(
                1.0 - self.input_jitter_noise, 1.0 + self.input_jitter_noise
            )
        hidden = hidden_states.reshape(-1, shape[-1])
        logits = self.gate(hidden)
        weights, expert_ids = _sparsemixer(self, logits)
        return self.run(hidden, expert_ids, weights).reshape(shape), logits


class PhimoeRouter(Swap):
    """transformers 5: ``forward(hidden [T, H]) -> (logits [T, E], weights [T, 2], expert ids [T, 2])``."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.training:
            return self.original.forward(self, hidden_states)
        logits = F.linear(hidden_states, self.weight)
        weights, expert_ids = _sparsemixer(self, logits)
        return logits, weights, expert_ids.long()


def _sparsemixer(module: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and expert ids ``[T, 2]``; in training by the original's own function, noise and gradient included."""
    if not module.training:
        return ops.route(logits, 2, scoring="sparsemixer", epsilon=module.router_jitter_noise)
    original = sys.modules[module.original.__module__].sparsemixer
    return original(logits, jitter_eps=module.router_jitter_noise, training=True)


# --- Switch Transformers ----------------------------------------------------------------------------------------------


def _chosen(dispatch: Tensor) -> Tensor:
    """The expert of every token, -1 for none: ``dispatch [..., E]`` of zeros and ones -> ``[...]``."""
    return torch.where(dispatch.any(-1), dispatch.argmax(-1), -1)


class _SwitchExperts(PackedSwap):
    up = ("wi",)
    down = "wo"
    activation_of = "act"

    def run_one(self, hidden: Tensor, dispatch: Tensor, weights: Tensor) -> Tensor:
        """``hidden [T, H]``, ``dispatch [T, E]``, ``weights [T, 1]`` -> ``[T, H]``; zero for tokens without a place."""
        dropout: Any = self.experts_of(self)[0].dropout
        return self.run(hidden, _chosen(dispatch)[:, None], weights, inner_dropout=dropout.p if self.training else 0.0)


class SwitchBlock(_SwitchExperts):
    """transformers 4: ``forward(hidden [B, S, H]) -> (out, (router logits [B, S, E], expert ids [B, S]))``."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        dispatch, weights, logits = self.router(hidden_states)
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        out = self.run_one(hidden, dispatch.flatten(0, 1), weights.reshape(-1, 1))
        return out.view(hidden_states.shape), (logits, torch.argmax(dispatch, dim=-1))


class SwitchExperts(_SwitchExperts):
    """transformers 5.18: ``forward(hidden [T, H], dispatch [T, 1, E], weights [T, 1]) -> [T, H]``."""

    @classmethod
    def experts_of(cls, module: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(module, nn.ModuleDict)
        return list(module.values())

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        import transformers

        version = tuple(int(number) for number in transformers.__version__.split(".")[:2])
        if (5, 0) <= version < (5, 18):
            return (
                f"transformers {transformers.__version__} does not limit the capacity of Switch's experts, and what it "
                "calls router logits are probabilities; 4.56, 4.57, and 5.18 or newer are right"
            )
        return super().refuses(module)

    def forward(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        return self.run_one(hidden_states, selected_experts[:, 0], routing_weights)


# --- NLLB-MoE ---------------------------------------------------------------------------------------------------------


class _NllbExperts(PackedSwap):
    up = ("fc1",)
    down = "fc2"
    activation_of = "act"

    def run_two(self, hidden: Tensor, router_probs: Tensor) -> Tensor:
        """``hidden [T, H]``, ``router_probs [T, E]``, zero but for at most two choices -> ``[T, H]``."""
        weights, expert_ids = router_probs.topk(min(2, router_probs.shape[-1]), dim=-1)
        expert_ids = expert_ids.masked_fill(weights == 0, -1)
        inner: Any = self.experts_of(self)[0].dropout
        if self.training:
            return self.run(hidden, expert_ids, weights, inner_dropout=inner.p, output_dropout=self.moe_token_dropout)
        return self.run(hidden, expert_ids, weights * (1 - self.moe_token_dropout))


class NllbBlock(_NllbExperts):
    """transformers 4: ``forward(hidden [B, S, H], padding_mask) -> (out, (router probs [T, E], expert ids [T]))``."""

    def forward(
        self, hidden_states: Tensor, padding_mask: Tensor | bool | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        top_1_mask, router_probs = self.router(hidden_states, None if padding_mask is False else padding_mask)
        out = self.run_two(hidden_states.reshape(-1, hidden_states.shape[-1]), router_probs)
        return out.view(hidden_states.shape), (router_probs, torch.argmax(top_1_mask, dim=-1))


class NllbExperts(_NllbExperts):
    """transformers 5: ``forward(hidden [T, H], top-1 mask [T, E], router probs [T, E]) -> [T, H]``."""

    @classmethod
    def experts_of(cls, module: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(module, nn.ModuleDict)
        return [expert for name, expert in module.items() if name.startswith("expert_")]

    def install(self) -> int:
        _warn_of_nllb()
        return super().install()

    def forward(self, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
        return self.run_two(hidden_states, router_probs)


@cache
def _warn_of_nllb() -> None:
    """Once per process."""
    import transformers

    warnings.warn(
        f"NLLB-MoE in transformers {transformers.__version__} runs only the experts 0 and 1, whatever the router says "
        "(right in 4.56). moekernels runs the experts that were chosen: outputs differ, and are those of the model.",
        stacklevel=4,
    )


# --- the table --------------------------------------------------------------------------------------------------------

# By the name of the class: blocks of transformers 4, and parts of blocks of transformers 5.
_BLOCKS: dict[str, type[Swap]] = {
    "OlmoeSparseMoeBlock": SoftmaxBlock,
    "Qwen3MoeSparseMoeBlock": SoftmaxBlock,
    "Qwen2MoeSparseMoeBlock": Qwen2MoeBlock,
    "MixtralSparseMoeBlock": MixtralBlock,
    "PhimoeSparseMoeBlock": PhimoeBlock,
    "SwitchTransformersSparseMLP": SwitchBlock,
    "NllbMoeSparseMLP": NllbBlock,
}
_PARTS: dict[str, type[Swap]] = {
    "OlmoeTopKRouter": SoftmaxRouter,
    "Qwen2MoeTopKRouter": SoftmaxRouter,
    "Qwen3MoeTopKRouter": SoftmaxRouter,
    "MixtralTopKRouter": SoftmaxRouter,
    "PhimoeTopKRouter": PhimoeRouter,
    "SwitchTransformersExperts": SwitchExperts,
    "NllbMoeExperts": NllbExperts,
}


def swap_for(module: nn.Module) -> type[Swap] | None:
    """What replaces this module; None if it is none that we know."""
    name = type(module).__name__
    if name in _BLOCKS:
        # In transformers 5 the experts are a module with a `forward`, and replaced by themselves.
        return _BLOCKS[name] if type(module.experts) in (nn.ModuleList, nn.ModuleDict) else None
    if name in _PARTS:
        return _PARTS[name]
    # Every other model of transformers 5 whose experts follow its experts interface.
    if hasattr(module, "is_concatenated") and hasattr(module, "down_proj"):
        return FusedExperts
    return None
