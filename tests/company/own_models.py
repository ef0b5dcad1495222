"""Columns: the models of this package, beside the same models with experts in plain PyTorch.

Names of modules and parameters are alike, so that whatever others do to one side they can do to the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moekernels as mk
from moekernels import ops
from moekernels.nn import GroupedExperts
from moekernels.ops.linear import ACTIVATION_FUNCTIONS
from tests.company.matrix import Column


class PlainExperts(GroupedExperts):
    """Expert by expert."""

    def forward(self, hidden: Tensor, routing_weights: Tensor, plan: ops.Plan, **dropouts: float) -> Tensor:
        offsets = plan.expert_offsets.tolist()
        rows = hidden[plan.token_of_row.clamp(min=0).long()]
        outs = []
        for e in range(self.num_experts):
            up_bias = None if self.up_bias is None else self.up_bias[e]
            down_bias = None if self.down_proj_bias is None else self.down_proj_bias[e]
            inner = F.linear(rows[offsets[e] : offsets[e + 1]], self.up_weight[e], up_bias)
            activation = ACTIVATION_FUNCTIONS[self.activation]
            if self.gated:
                gate, value = inner.chunk(2, dim=-1)
                inner = activation(gate) * value
            else:
                inner = activation(inner)
            outs.append(F.linear(inner, self.down_proj[e], down_bias))
        outs.append(rows.new_zeros(1, rows.shape[1]))
        served = torch.cat(outs)
        slots = torch.where(plan.row_of_slot < 0, served.shape[0] - 1, plan.row_of_slot).long()
        return (served[slots] * routing_weights[..., None]).sum(1).to(hidden.dtype)


_DECODER: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TRANSLATION: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "init_std": 0.2,
    **dict.fromkeys(("dropout", "attention_dropout", "encoder_layerdrop", "decoder_layerdrop"), 0.0),
}
_SWITCH: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 24,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_experts": 4,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
    "router_jitter_noise": 0.0,
}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "OLMoE": lambda: mk.OlmoeForCausalLM(mk.OlmoeConfig(**_DECODER, num_experts=6, num_experts_per_tok=2)),
    "PhiMoE": lambda: mk.PhimoeForCausalLM(mk.PhimoeConfig(**_DECODER, num_local_experts=4)),
    "M2M100": lambda: mk.M2M100ForConditionalGeneration(mk.M2M100Config(**_TRANSLATION)),
    "NLLB-MoE": lambda: mk.NllbMoeForConditionalGeneration(
        mk.NllbMoeConfig(
            **_TRANSLATION, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2, moe_token_dropout=0.0
        )
    ),
    "Switch": lambda: mk.SwitchTransformersForConditionalGeneration(mk.SwitchTransformersConfig(**_SWITCH)),
}


def inputs(name: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 61, (2, 6), generator=generator)
    if name in ("OLMoE", "PhiMoE"):
        return {"input_ids": ids, "labels": ids}
    return {"input_ids": ids, "labels": torch.randint(3, 61, (2, 5), generator=generator)}


def make(name: str, *, plain: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for module in model.modules():
        if plain and type(module) is GroupedExperts:
            module.__class__ = PlainExperts
    return model


def _column(name: str) -> Column:
    tags = {"own"} if name == "M2M100" else {"own", "stacks", "block"}
    return Column(
        name,
        lambda ours: make(name, plain=not ours),
        lambda: inputs(name),
        attach=lambda model, **options: None,
        tags=frozenset(tags),
    )


COLUMNS = [_column(name) for name in MODELS]
