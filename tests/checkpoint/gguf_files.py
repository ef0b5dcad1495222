"""GGUF files of tiny models, as llama.cpp's converter names and shapes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

import moekernels as mk

TYPES = gguf.GGMLQuantizationType


def model(kind: str) -> Any:
    """With random weights, wide enough for blocks of 256."""
    sizes = {"vocab_size": 61, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(1)
    if kind == "olmoe":
        config: Any = mk.OlmoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, eos_token_id=2)
        made: Any = mk.OlmoeForCausalLM(config)
    else:
        factors = {"short_factor": [1.0 + 0.1 * i for i in range(32)], "long_factor": [2.0] * 32}
        scaling = {"type": "longrope", **factors, "short_mscale": 1.25, "long_mscale": 1.25}
        scaling["original_max_position_embeddings"] = 16
        config = mk.PhimoeConfig(
            **sizes, num_local_experts=3, rope_scaling=scaling, attention_bias=True, lm_head_bias=True, rope_theta=1e4
        )
        made = mk.PhimoeForCausalLM(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


def blocks(shape: tuple[int, ...], kind: Any, generator: np.random.Generator) -> np.ndarray:
    """Blocks with random codes, and scales of a size that weights have: gguf-py cannot write all that it reads."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = generator.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    scale = np.asarray([0.004], dtype=np.float16).view(np.uint8)
    at = {"Q4_0": 0, "Q8_0": 0, "Q4_K": 0, "Q6_K": 208}[kind.name]
    data[..., at : at + 2] = scale
    if kind.name == "Q4_K":
        data[..., 2:4] = scale
    if kind.name == "Q6_K":
        data[..., 192:208] = generator.integers(0, 16, (*shape[:-1], shape[-1] // block, 16), dtype=np.uint8)
    return data.reshape(*shape[:-1], -1)


def tensors(made: Any, kind: str) -> dict[str, Tensor]:
    """By the names of GGUF."""
    found = {"token_embd.weight": made.model.embed_tokens.weight, "output.weight": made.lm_head.weight}
    norms = {"output_norm": made.model.norm}
    modules: dict[str, Any] = {}
    for i, layer in enumerate(made.model.layers):
        mlp = layer.mlp if kind == "olmoe" else layer.block_sparse_moe
        norms |= {f"blk.{i}.attn_norm": layer.input_layernorm, f"blk.{i}.ffn_norm": layer.post_attention_layernorm}
        attention = layer.self_attn
        modules |= {f"blk.{i}.attn_{x}": getattr(attention, f"{x}_proj") for x in "qkv"}
        modules[f"blk.{i}.attn_output"] = attention.o_proj
        if kind == "olmoe":
            norms |= {f"blk.{i}.attn_q_norm": attention.q_norm, f"blk.{i}.attn_k_norm": attention.k_norm}
        found[f"blk.{i}.ffn_gate_inp.weight"] = mlp.router.weight
        gate, up = mlp.experts.gate_up_proj.chunk(2, dim=1)
        found |= {f"blk.{i}.ffn_gate_exps.weight": gate, f"blk.{i}.ffn_up_exps.weight": up}
        found[f"blk.{i}.ffn_down_exps.weight"] = mlp.experts.down_proj
    if kind == "phimoe":
        found["output.bias"] = made.lm_head.bias
    for name, module in {**norms, **modules}.items():
        found |= {f"{name}.{part}": value for part, value in module.named_parameters()}
    return {name: value.detach() for name, value in found.items()}


def write(path: Path, made: Any, kind: str, types: dict[str, str], **metadata: Any) -> dict[str, Tensor]:
    """Write a model, and return the values that the file has, by the names of GGUF.

    Args:
        path: of the file.
        made: the model.
        kind: "olmoe" or "phimoe".
        types: the type of tensors whose name contains a key; others are F32.
        **metadata: instead of what there would be; None leaves it out.
    """
    config = made.config
    writer = gguf.GGUFWriter(os.fspath(path), kind)
    keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    if kind == "phimoe":
        keys |= {"rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": 1.25}
    for key, value in {**keys, **metadata}.items():
        if value is not None:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{kind}.{key}", value)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    generator = np.random.default_rng(0)
    values = {}
    for name, tensor in tensors(made, kind).items():
        type_name = next((found for part, found in types.items() if part in name), "F32") if tensor.ndim > 1 else "F32"
        found = TYPES[type_name]
        if type_name in ("F32", "F16", "BF16"):
            data = gguf.quantize(tensor.float().numpy(), found)
        else:
            data = blocks(tuple(tensor.shape), found, generator)
        writer.add_tensor(name, data, raw_dtype=found)
        values[name] = torch.from_numpy(gguf.dequantize(data, found).astype(np.float32)).reshape(tensor.shape)
    if kind == "phimoe":
        for length in ("short", "long"):
            factors = np.asarray(config.rope_scaling[f"{length}_factor"], dtype=np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
