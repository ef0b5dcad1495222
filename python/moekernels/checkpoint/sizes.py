"""The sizes a configuration gives beside those its checkpoint has, before anything is built from either."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from moekernels.checkpoint.errors import CheckpointError
from moekernels.checkpoint.keymap import KeyMap
from moekernels.checkpoint.reader import Reader


class Size(NamedTuple):
    """Where a checkpoint shows what a field of the configuration must be.

    Attributes:
        field: of the configuration.
        parameter: regular expression of canonical parameter names.
        axis: of those parameters; None counts the different numbers that the expression's group matches.
    """

    field: str
    parameter: str
    axis: int | None = None


def _decoder(num_experts: str) -> tuple[Size, ...]:
    experts = r"layers\.\d+\.\w+\.experts\.down_proj"
    return (
        Size("num_hidden_layers", r"layers\.(\d+)\..*"),
        Size("vocab_size", r"embed_tokens\.weight", 0),
        Size("hidden_size", r"embed_tokens\.weight", 1),
        Size(num_experts, experts, 0),
        Size("intermediate_size", experts, 2),
    )


def _translation() -> tuple[Size, ...]:
    embedding = r"(?:shared|encoder\.embed_tokens|decoder\.embed_tokens)\.weight"
    return (
        Size("encoder_layers", r"encoder\.layers\.(\d+)\..*"),
        Size("decoder_layers", r"decoder\.layers\.(\d+)\..*"),
        Size("vocab_size", embedding, 0),
        Size("d_model", embedding, 1),
        *(
            Size(f"{stack}_ffn_dim", rf"{stack}\.layers\.\d+\.(?:ffn\.)?(?:fc2\.weight|experts\.down_proj)", -1)
            for stack in ("encoder", "decoder")
        ),
    )


SIZES: dict[str, tuple[Size, ...]] = {
    "olmoe": _decoder("num_experts"),
    "phimoe": _decoder("num_local_experts"),
    "m2m_100": _translation(),
    "nllb-moe": (*_translation(), Size("num_experts", r".*\.ffn\.experts\.down_proj", 0)),
    "switch_transformers": (
        Size("num_layers", r"encoder\.block\.(\d+)\..*"),
        Size("num_decoder_layers", r"decoder\.block\.(\d+)\..*"),
        Size("vocab_size", r"shared\.weight", 0),
        Size("d_model", r"shared\.weight", 1),
        Size("d_ff", r".*\.mlp\.(?:wo\.weight|experts\.down_proj)", -1),
        Size("num_heads", r".*\.relative_attention_bias\.weight", 1),
        Size("num_experts", r".*\.mlp\.experts\.down_proj", 0),
    ),
}


def check_sizes(config: Any, reader: Reader, key_map: KeyMap, ignore_mismatched: bool = False) -> None:
    """Compare the fields of a configuration that say how large a model is with the shapes in its checkpoint.

    What the checkpoint does not show is left to the loader, which knows every tensor.

    Args:
        config: the configuration.
        reader: the checkpoint, of which only names and shapes are looked at.
        key_map: the names of the architecture.
        ignore_mismatched: look at the number of layers only, as tensors of other shapes are wanted.

    Raises:
        CheckpointError: a field is not what the checkpoint has; the message names both.
    """
    shapes = _parameter_shapes(reader, key_map)
    for size in SIZES.get(type(config).model_type, ()):
        if ignore_mismatched and size.axis is not None:
            continue
        found = _found(size, shapes)
        value = getattr(config, size.field)
        if found is not None and value != found:
            hint = "" if size.axis is None else " (ignore_mismatched_sizes=True initialises such weights anew)"
            raise CheckpointError(
                f"{reader.directory}: {size.field} in the configuration must be {found}, as the weights have it, "
                f"got {value}{hint}"
            )


def _found(size: Size, shapes: dict[str, tuple[int, ...]]) -> int | None:
    matches = [match for match in map(re.compile(size.parameter).fullmatch, shapes) if match is not None]
    if not matches:
        return None
    if size.axis is None:
        return len({match[1] for match in matches})
    shape = shapes[matches[0][0]]
    return shape[size.axis] if -len(shape) <= size.axis < len(shape) else None


def _parameter_shapes(reader: Reader, key_map: KeyMap) -> dict[str, tuple[int, ...]]:
    """Our parameters of which the checkpoint has something, and the shapes that it gives them."""
    shapes: dict[str, tuple[int, ...]] = {}
    experts: dict[str, int] = {}
    for name, info in reader.tensors.items():
        place = key_map.place(name)
        if place.expert is None or not info.shape:
            shapes[place.parameter] = (
                (*info.shape[:-2], place.parts * info.shape[-2], info.shape[-1]) if place.parts > 1 else info.shape
            )
            continue
        experts[place.parameter] = max(experts.get(place.parameter, 0), place.expert + 1)
        shapes[place.parameter] = (
            experts[place.parameter],
            place.parts * info.shape[0],
            *info.shape[1:],
        )
    return shapes
