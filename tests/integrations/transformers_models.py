"""Small random models of whatever transformers is installed, one per architecture that the drop-in knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

MAJOR = int(transformers.__version__.split(".")[0])
VOCABULARY = 96
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN = {**_DECODER, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def _switch(**fields: Any) -> Any:
    return transformers.SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=4,
        num_sparse_encoder_layers=2,
        num_decoder_layers=4,
        num_sparse_decoder_layers=2,
        num_heads=4,
        num_experts=4,
        **{"expert_capacity": 3, "decoder_start_token_id": 0, **fields},
    )


def _nllb(**fields: Any) -> Any:
    return transformers.NllbMoeConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        num_experts=4,
        max_position_embeddings=64,
        **{"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, **fields},
    )


class Architecture(NamedTuple):
    model: str
    config: Callable[..., Any]
    is_encoder_decoder: bool = False


ARCHITECTURES = {
    "olmoe": Architecture(
        "OlmoeForCausalLM",
        lambda **f: transformers.OlmoeConfig(**{**_DECODER, "num_experts": 8, "num_experts_per_tok": 3, **f}),
    ),
    "phimoe": Architecture(
        "PhimoeForCausalLM", lambda **f: transformers.PhimoeConfig(**{**_DECODER, "num_local_experts": 4, **f})
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM", lambda **f: transformers.MixtralConfig(**{**_DECODER, "num_local_experts": 4, **f})
    ),
    "qwen2_moe": Architecture(
        "Qwen2MoeForCausalLM",
        lambda **f: transformers.Qwen2MoeConfig(**{**_QWEN, "shared_expert_intermediate_size": 40, **f}),
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM", lambda **f: transformers.Qwen3MoeConfig(**{**_QWEN, "head_dim": 8, **f})
    ),
    "switch": Architecture("SwitchTransformersForConditionalGeneration", _switch, True),
    "nllb": Architecture("NllbMoeForConditionalGeneration", _nllb, True),
}


def make_model(name: str, **fields: Any) -> nn.Module:
    """A model with weights large enough that its routing is not flat, in evaluation mode."""
    torch.manual_seed(1)
    architecture = ARCHITECTURES[name]
    model = getattr(transformers, architecture.model)(architecture.config(**fields))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter.data, std=0.3)
    return model.eval()


def make_inputs(name: str, batch: int = 2, length: int = 9) -> dict[str, Any]:
    """Ids, labels and the request for router logits."""
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))
    inputs: dict[str, Any] = {"input_ids": ids, "labels": ids, "output_router_logits": True}
    if ARCHITECTURES[name].is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids[:, :5].contiguous(), "labels": ids[:, 1:6].contiguous()}
    return inputs


def router_logits(output: Any) -> list[Tensor]:
    """All router logits of an output, flat, whichever way this version nests them."""

    def tensors(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        return [] if value is None else [tensor for item in value for tensor in tensors(item)]

    names = ("router_logits", "encoder_router_logits", "decoder_router_logits")
    return tensors([getattr(output, name, None) for name in names])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
