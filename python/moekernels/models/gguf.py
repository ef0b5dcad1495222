"""The configuration of a model from the metadata of a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from moekernels.checkpoint import CheckpointError, CheckpointNotFoundError, HubOptions, resolve
from moekernels.checkpoint.gguf import GgufReader
from moekernels.checkpoint.hub import CONFIG_FILES, GENERATION_CONFIG_FILES
from moekernels.models.configuration import CONFIG_NAME, PretrainedConfig

_Config = TypeVar("_Config", bound=PretrainedConfig)

#: Fields of a configuration -> keys of the metadata, after the name of the architecture.
_FIELDS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "num_experts_per_tok": "expert_used_count",
    "num_experts": "expert_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
_OPTIONAL = {
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "clip_qkv": "attention.clamp_kqv",
}
_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


def open_gguf(directory: str | os.PathLike[str] | None, gguf_file: str, hub: HubOptions) -> GgufReader:
    """A GGUF file in a directory, or in a repository of the Hugging Face Hub.

    Raises:
        CheckpointError: there is no such file, or it cannot be read.
        ImportError: the gguf package is not installed.
    """
    if directory is None:
        raise ValueError("from_pretrained: gguf_file needs a directory")
    path = resolve(directory, (gguf_file, *CONFIG_FILES, *GENERATION_CONFIG_FILES), **hub) / gguf_file
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path}: no such GGUF file")
    return GgufReader(path)


def gguf_config(reader: GgufReader, config_class: type[_Config]) -> _Config:
    """The configuration of a GGUF file: the ``config.json`` beside it, or what its metadata say.

    Raises:
        CheckpointError: it is that of another architecture, or is not usable.
    """
    beside = reader.directory.parent / CONFIG_NAME
    if beside.is_file():
        return config_class.from_pretrained(beside.parent)
    values = config_values(reader)
    if values["model_type"] != config_class.model_type:
        raise CheckpointError(
            f"{reader.directory}: general.architecture must be {config_class.model_type!r} for "
            f"{config_class.__name__}, got {values['model_type']!r}"
        )
    try:
        return config_class.from_dict(values, name_or_path=str(reader.directory))
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"{reader.directory}: {error}") from error


def config_values(reader: GgufReader) -> dict[str, Any]:
    """The fields of ``config.json``, as far as metadata and tensors say them.

    Raises:
        CheckpointError: a key or a tensor that is needed is missing.
    """
    model_type = reader.architecture
    metadata = reader.metadata

    def need(key: str) -> Any:
        if f"{model_type}.{key}" not in metadata:
            raise CheckpointError(f"{reader.directory}: the metadata lacks {model_type}.{key}")
        return metadata[f"{model_type}.{key}"]

    for name in ("token_embd.weight", "blk.0.ffn_down_exps.weight"):
        if name not in reader.tensors:
            raise CheckpointError(f"{reader.directory}: missing tensor {name!r}")
    values = {field: need(key) for field, key in _FIELDS.items()}
    for field, key in _OPTIONAL.items():
        if metadata.get(f"{model_type}.{key}"):
            values[field] = metadata[f"{model_type}.{key}"]
    values |= {field: metadata.get(key) for field, key in _TOKENS.items()}
    values |= {
        "model_type": model_type,
        "vocab_size": reader.tensors["token_embd.weight"].shape[0],
        # The width of one expert; the metadata has it under one key or another.
        "intermediate_size": reader.tensors["blk.0.ffn_down_exps.weight"].shape[-1],
        "attention_bias": "blk.0.attn_q.bias" in reader.tensors,
        "tie_word_embeddings": "output.weight" not in reader.tensors,
    }
    if model_type == "phimoe":
        values["lm_head_bias"] = "output.bias" in reader.tensors
        values |= _long_rope(reader, metadata)
    return values


def _long_rope(reader: GgufReader, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary factors of PhiMoE, which are tensors; none where the model has one set of frequencies."""
    names = ("rope_factors_short.weight", "rope_factors_long.weight")
    if not all(name in reader.tensors for name in names):
        return {"rope_scaling": None}
    tensors = reader.read(names)
    short, long = (tensors[name].tolist() for name in names)
    # llama.cpp writes and uses one magnitude for both; it is that of a formula, whatever the checkpoint's were.
    magnitude = metadata.get("phimoe.rope.scaling.attn_factor", 1.0)
    length = metadata.get("phimoe.rope.scaling.original_context_length")
    if length is None:
        raise CheckpointError(f"{reader.directory}: the metadata lacks phimoe.rope.scaling.original_context_length")
    scaling = {"short_factor": short, "long_factor": long, "short_mscale": magnitude, "long_mscale": magnitude}
    return {"rope_scaling": {"type": "longrope", **scaling, "original_max_position_embeddings": length}}
