"""What takes the place of each MoE module of transformers whose routing or experts interface is known.

Modules of transformers 4 hold one Linear per projection and expert, and compute routing and experts in one block;
transformers 5 splits the two, and keeps the experts of most models fused. Which one is at hand is seen from the module
itself, not from a version number.

Letters: B sequences, S tokens of each, T = B * S, E experts, K choices per token, H hidden size.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekernels import ops
from moekernels.integrations.transformers.experts import ExpertWeights
from moekernels.integrations.transformers.fused import Structure, plain_stacks, run_stacks, structure_of
from moekernels.integrations.transformers.plain import say_why, why_not_plain
from moekernels.integrations.transformers.swaps import LinearExperts, Swap, num_bytes

# --- softmax and top-k: OLMoE, Mixtral, Qwen-MoE ----------------------------------------------------------------------


class SoftmaxBlock(LinearExperts):
    """transformers 4: ``forward(hidden [B, S, H]) -> (out [B, S, H], router logits [T, E])``."""

    up = ("gate_proj", "up_proj")
    down = "down_proj"
    act = "act_fn"
    # Mixtral always divides by the sum of the weights; the others do as their configuration says.
    renormalizes: ClassVar[bool | None] = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        experts = self.plain_experts()
        if experts is None:
            return self.original.forward(self, hidden_states)
        shape = hidden_states.shape
        if self.training and getattr(self, "jitter_noise", 0) > 0:
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(
                1.0 - self.jitter_noise, 1.0 + self.jitter_noise
            )
        hidden = hidden_states.reshape(-1, shape[-1])
        logits = self.gate(hidden)
        renormalize = self.norm_topk_prob if self.renormalizes is None else self.renormalizes
        weights, expert_ids = ops.route(logits, self.top_k, renormalize=renormalize)
        out = self.run(hidden, expert_ids, weights, experts) + self.shared(hidden)
        return out.reshape(shape), logits

    def shared(self, hidden: Tensor) -> Tensor | int:
        """What every token gets besides."""
        return 0


class OlmoeBlock(SoftmaxBlock):
    expert = "OlmoeMLP"
    calls_all = True


class Qwen3MoeBlock(SoftmaxBlock):
    expert = "Qwen3MoeMLP"


class MixtralBlock(SoftmaxBlock):
    expert = "MixtralBlockSparseTop2MLP"
    up = ("w1", "w3")
    down = "w2"
    renormalizes = True


class Qwen2MoeBlock(SoftmaxBlock):
    expert = "Qwen2MoeMLP"

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

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        structure = structure_of(module)
        return structure if isinstance(structure, str) else None

    @classmethod
    def hinders(cls, module: nn.Module) -> str | None:
        structure = structure_of(module)
        found = structure if isinstance(structure, str) else plain_stacks(module, structure, lasting=True)
        return found if isinstance(found, str) else None

    @classmethod
    def num_bytes(cls, module: nn.Module) -> int:
        return sum(num_bytes(p) for p in module.parameters(recurse=False))

    @classmethod
    def expert_weights(cls, module: nn.Module) -> list[tuple[nn.Module, str]]:
        structure = structure_of(module)
        if isinstance(structure, str):
            return []
        if structure.transposed:
            raise ValueError("its stacks are [E, in, out], which cannot be quantised by rows")
        return [(module, structure.up), (module, "down_proj")]

    def plain_stacks(self) -> tuple[Structure, ExpertWeights] | str:
        """What :func:`run_stacks` wants, or why the kernels cannot run."""
        structure = structure_of(self)
        if isinstance(structure, str):
            return structure
        stacks = plain_stacks(self, structure)
        return stacks if isinstance(stacks, str) else (structure, stacks)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        found = self.plain_stacks()
        if isinstance(found, str):
            say_why(self.stock, found)
            return self.original.forward(self, hidden_states, top_k_index, top_k_weights)
        structure, stacks = found
        return run_stacks(self, structure, hidden_states, top_k_index, top_k_weights, stacks)


# --- PhiMoE -----------------------------------------------------------------------------------------------------------


class PhimoeBlock(LinearExperts):
    """transformers 4: ``forward(hidden [B, S, H]) -> (out [B, S, H], router logits [T, E])``."""

    expert = "PhimoeBlockSparseTop2MLP"
    up = ("w1", "w3")
    down = "w2"
    act = "act_fn"

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        experts = self.plain_experts()
        if experts is None:
            return self.original.forward(self, hidden_states)
        shape = hidden_states.shape
        if self.training and self.input_jitter_noise > 0:
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(
                1.0 - self.input_jitter_noise, 1.0 + self.input_jitter_noise
            )
        hidden = hidden_states.reshape(-1, shape[-1])
        logits = self.gate(hidden)
        weights, expert_ids = _sparsemixer(self, logits)
        return self.run(hidden, expert_ids, weights, experts).reshape(shape), logits


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
        return ops.route(logits, 2, scoring="sparsemixer", eps=module.router_jitter_noise)
    original = sys.modules[module.stock.__module__].sparsemixer
    return original(logits, jitter_eps=module.router_jitter_noise, training=True)


# --- Switch Transformers ----------------------------------------------------------------------------------------------


def _chosen(dispatch: Tensor) -> Tensor:
    """The expert of every token, -1 for none: ``dispatch [..., E]`` of zeros and ones -> ``[...]``."""
    return torch.where(dispatch.any(-1), dispatch.argmax(-1), -1)


class _SwitchExperts(LinearExperts):
    expert = "SwitchTransformersDenseActDense"
    up = ("wi",)
    down = "wo"
    act = "act"
    dropout = "dropout"


class SwitchBlock(_SwitchExperts):
    """transformers 4: ``forward(hidden [B, S, H]) -> (out, (router logits [B, S, E], expert ids [B, S]))``."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        experts = self.plain_experts()
        if experts is None:
            return self.original.forward(self, hidden_states)
        dispatch, weights, logits = self.router(hidden_states)
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        out = self.run(hidden, _chosen(dispatch.flatten(0, 1))[:, None], weights.reshape(-1, 1), experts)
        return out.view(hidden_states.shape), (logits, torch.argmax(dispatch, dim=-1))


class SwitchExperts(_SwitchExperts):
    """transformers 5.18: ``forward(hidden [T, H], dispatch [T, 1, E], weights [T, 1]) -> [T, H]``."""

    where = ""

    @classmethod
    def experts_of(cls, module: nn.Module) -> Mapping[str, nn.Module]:
        return _numbered(module)

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
        experts = self.plain_experts()
        if experts is None:
            return self.original.forward(self, hidden_states, selected_experts, routing_weights)
        return self.run(hidden_states, _chosen(selected_experts[:, 0])[:, None], routing_weights, experts)


# --- NLLB-MoE ---------------------------------------------------------------------------------------------------------


class _NllbExperts(LinearExperts):
    expert = "NllbMoeDenseActDense"
    up = ("fc1",)
    down = "fc2"
    act = "act"
    dropout = "dropout"

    def plain_experts(self) -> ExpertWeights | None:
        if reason := why_not_plain(self.token_dropout, nn.Dropout):
            say_why(self.stock, f"token_dropout {reason}")
            return None
        return super().plain_experts()

    def run_two(self, hidden: Tensor, router_probs: Tensor, experts: ExpertWeights) -> Tensor:
        """``hidden [T, H]``, ``router_probs [T, E]``, zero but for at most two choices -> ``[T, H]``."""
        weights, expert_ids = router_probs.topk(min(2, router_probs.shape[-1]), dim=-1)
        expert_ids = expert_ids.masked_fill(weights == 0, -1)
        if not self.training:
            return self.run(hidden, expert_ids, weights * (1 - self.moe_token_dropout), experts)
        dropout = self.token_dropout
        share = dropout.p if self.moe_token_dropout > 0 and dropout.training else 0.0
        return self.run(hidden, expert_ids, weights, experts, output_dropout=share)


class NllbBlock(_NllbExperts):
    """transformers 4: ``forward(hidden [B, S, H], padding_mask) -> (out, (router probs [T, E], expert ids [T]))``."""

    calls_all = True

    def forward(
        self, hidden_states: Tensor, padding_mask: Tensor | bool | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        padding_mask = None if padding_mask is False else padding_mask  # the default in transformers
        experts = self.plain_experts()
        if experts is None:
            return self.original.forward(self, hidden_states, padding_mask)
        top_1_mask, router_probs = self.router(hidden_states, padding_mask)
        out = self.run_two(hidden_states.reshape(-1, hidden_states.shape[-1]), router_probs, experts)
        return out.view(hidden_states.shape), (router_probs, torch.argmax(top_1_mask, dim=-1))


class NllbExperts(_NllbExperts):
    """transformers 5: ``forward(hidden [T, H], top-1 mask [T, E], router probs [T, E]) -> [T, H]``."""

    where = ""

    @classmethod
    def experts_of(cls, module: nn.Module) -> Mapping[str, nn.Module]:
        return _numbered(module)

    def forward(self, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
        experts = self.plain_experts()
        if experts is None:
            return self.call_modules(hidden_states, router_probs)
        return self.run_two(hidden_states, router_probs, experts)

    def call_modules(self, hidden: Tensor, router_probs: Tensor) -> Tensor:
        """What transformers 4.56 computes, expert by expert; the original runs the experts 0 and 1 alone."""
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts_of(self).values()):
            rows = router_probs[:, number].nonzero()[:, 0]
            if len(rows) == 0:
                continue
            share = expert(hidden[rows])
            if self.moe_token_dropout > 0:
                share = self.token_dropout(share) if self.training else share * (1 - self.moe_token_dropout)
            out = out.index_add(0, rows, (share * router_probs[rows, number, None]).to(out.dtype))
        return out


def _numbered(module: nn.Module) -> Mapping[str, nn.Module]:
    """The experts of a dictionary that holds other modules, too."""
    return {name: child for name, child in module._modules.items() if child is not None and name.startswith("expert_")}


@cache
def warn_of_nllb() -> None:
    """Once per process."""
    import transformers

    warnings.warn(
        f"NLLB-MoE in transformers {transformers.__version__} runs only the experts 0 and 1, whatever the router says "
        "(right in 4.56). moekernels runs the experts that were chosen: outputs differ, and are those of the model.",
        stacklevel=4,
    )
