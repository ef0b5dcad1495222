"""The quantised weights of a model: which parameters they are, and what ``config.json`` says of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moekernels.checkpoint import KeyMap, Packing
from moekernels.models.quantization import BitsAndBytesConfig, Quantization, QuantizationConfig
from moekernels.nn import GroupedExperts
from moekernels.quantization import Format, QuantizedWeight

_ROUTER = "router"
_BITSANDBYTES = ("nf4", "fp4", "int8")


def packable_weights(model: nn.Module) -> dict[str, list[str]]:
    """The parameters that can be quantised, and the modules that have them: Linears, stacks of experts, and embeddings
    that a head is tied to.

    Not the routers', whose rounding would send tokens to other experts, nor other embeddings.
    """
    found: dict[int, list[str]] = {}
    heads = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    for path, module in model.named_modules():
        if _ROUTER in path.split("."):
            continue
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Embedding) and id(module.weight) in heads):
            found.setdefault(id(module.weight), []).append(path)
        elif isinstance(module, GroupedExperts):
            for name in (module._up_name, "down_proj"):
                found[id(module.get_parameter(name))] = [f"{path}.{name}"]
    return {name: found[id(weight)] for name, weight in model.named_parameters() if id(weight) in found}


def packing_of(
    model: nn.Module, key_map: KeyMap, quantization: Quantization | None, compute_dtype: torch.dtype | None = None
) -> Packing:
    """Which parameters of a model get which format while they are loaded.

    Args:
        model: on the meta device.
        key_map: the names of the architecture.
        quantization: what to do with weights that the checkpoint has whole; None is nothing.
        compute_dtype: what products with those that it has quantised are computed in; None is the model's dtype.
    """
    packable = packable_weights(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name in packable}
    embeddings = {name for name in packable if _is_embedding(model, name)}
    if quantization is not None:
        compute_dtype = quantization.compute_dtype

    def is_packable(name: str, format: Format) -> bool:
        if name in embeddings:  # whose rows are looked up one by one, and give the model's dtype
            return compute_dtype is None and format.rows_are_apart(shapes[name][-1])
        return name in packable

    def format_of(name: str) -> Format | None:
        if quantization is None or not is_packable(name, quantization.format):
            return None
        if name in embeddings and not quantization.tied:
            return None
        if quantization.skip is None:
            is_skipped = name in embeddings or key_map.canonical(name) in key_map.heads
        else:
            is_skipped = any(map(quantization.skips, (*packable[name], *_modules(name, shapes[name], key_map))))
        return None if is_skipped else quantization.format

    return Packing(format_of, is_packable, compute_dtype)


def _is_embedding(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)


def _modules(name: str, shape: tuple[int, ...], key_map: KeyMap) -> Iterator[str]:
    """The modules of transformers that hold a parameter of ours as their weight; biases of experts are none."""
    canonical = key_map.canonical(name)
    prefix = name.removesuffix(canonical)
    for key, _ in key_map.checkpoint_names(canonical, shape):
        if key.endswith(".weight"):
            yield prefix + key.removesuffix(".weight")


def quantize_model(model: Any, quantization: Quantization) -> None:
    """Quantise a model in memory, one parameter after the other, as `from_pretrained` does while loading.

    Args:
        model: whose weights are whole; those that are quantised stay as they are.
        quantization: what to do with them.

    Raises:
        ValueError: the shape of a parameter is none that the format can have; nothing is changed.
    """
    packing = packing_of(model, model.key_map, quantization)
    chosen = {name: found for name, _ in model.named_parameters() if (found := packing.format(name)) is not None}
    for name, format in chosen.items():
        format.check_shape(model.get_parameter(name).shape, f"quantize_model: {name}")
    for name, format in chosen.items():
        weight = model.get_parameter(name)
        if isinstance(weight, QuantizedWeight):
            continue
        packed = QuantizedWeight.quantize(weight.detach(), format, dtype=quantization.compute_dtype)
        parameter = nn.Parameter(packed, requires_grad=False)
        for module in model.modules():  # a tied one has several
            for last in [last for last, other in module._parameters.items() if other is weight]:
                module._parameters[last] = parameter


def quantized_formats(weights: Mapping[str, Tensor]) -> dict[str, Format]:
    """The formats of those of the weights that are quantised."""
    return {name: weight.format for name, weight in weights.items() if isinstance(weight, QuantizedWeight)}


def describe_quantization(model: Any, formats: Mapping[str, Format]) -> torch.dtype | None:
    """Set what ``config.json`` says of a model's weights to what they are.

    Args:
        model: whose `config` gets the entry `quantization_config`, or loses it.
        formats: of the parameters that are written quantised.

    Returns:
        The dtype of 4-bit codes in files, if bitsandbytes' layout can hold the weights.
    """
    before = model.config.__dict__.pop("quantization_config", None) or {}
    if not formats:
        return None
    whole = _whole_modules(model, set(formats), model.key_map)
    names = {format.name for format in formats.values()}
    has_embedding = any(_is_embedding(model, name) for name in formats)  # which bitsandbytes' layout cannot hold
    if len(names) == 1 and names <= set(_BITSANDBYTES) and not has_embedding:
        kept = BitsAndBytesConfig.from_dict({name: before[name] for name in before if name != "activations"})
        config = _bitsandbytes_config(kept, next(iter(formats.values())), whole)
        model.config.quantization_config = config.to_dict()
        assert isinstance(config.bnb_4bit_quant_storage, torch.dtype)
        return config.bnb_4bit_quant_storage
    # The format of most weights, and those of others by name.
    (most, _), *_ = Counter(formats.values()).most_common()
    entries = {format: {"format": format.name, **format.options} for format in set(formats.values())}
    model.config.quantization_config = {
        "quant_method": QuantizationConfig.quant_method,
        **entries[most],
        "skip_modules": whole,
        "modules": {name: entries[format] for name, format in formats.items() if format != most},
    }
    return None


def _bitsandbytes_config(kept: BitsAndBytesConfig, format: Format, whole: list[str]) -> BitsAndBytesConfig:
    """What transformers needs to know to read weights in a format; other fields stay."""
    fields: dict[str, Any] = {"load_in_8bit": format.name == "int8", "load_in_4bit": format.name != "int8"}
    if format.name != "int8":
        fields["bnb_4bit_quant_type"] = format.name
        fields["bnb_4bit_use_double_quant"] = format.options["double_quant"]
    elif "activations" in format.options:
        fields["activations"] = format.options["activations"]
        fields["llm_int8_threshold"] = format.options["threshold"]
    return dataclasses.replace(kept, **fields, llm_int8_skip_modules=whole)


def _whole_modules(model: nn.Module, quantized: set[str], key_map: KeyMap) -> list[str]:
    """Modules of transformers that it would quantise too, if they were not named; routers by their last name."""
    found: dict[str, None] = {}
    for name, parameter in model.named_parameters():
        if name in quantized or parameter.ndim < 2:
            continue
        modules = list(_modules(name, tuple(parameter.shape), key_map))
        if _ROUTER in name.split("."):
            modules = [module.rpartition(".")[2] for module in modules]
        elif _is_embedding(model, name):
            # A head that is tied has the embedding's name.
            modules = [path for path, module in model.named_modules() if _is_tied_head(module, parameter)]
        found.update(dict.fromkeys(modules))
    return list(found)


def _is_tied_head(module: nn.Module, embedding: Tensor) -> bool:
    return isinstance(module, nn.Linear) and module.weight is embedding


def stored_size(parameter: Tensor, format: Format | None, dtype: torch.dtype) -> int:
    """The bytes that a parameter takes in a dtype, or in a format."""
    if format is None:
        return parameter.numel() * dtype.itemsize
    weights = parameter.shape[-2] * parameter.shape[-1]
    matrices = parameter.numel() // weights
    parts = format.parts(parameter.shape[-1]).values()
    return matrices * sum(part.size(weights) * part.dtype.itemsize for part in parts)
