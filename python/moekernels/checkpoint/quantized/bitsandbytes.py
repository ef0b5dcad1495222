"""The layout of bitsandbytes 0.50, as transformers 4.56 writes and reads it.

In 4 bits a weight W is the codes ``W`` ``[n / 2, 1]``, uint8 or of the dtype that `bnb_4bit_quant_storage` names,
``W.absmax``, ``W.quant_map`` and the JSON text ``W.quant_state.bitsandbytes__nf4``; with double quantisation also
``W.nested_absmax`` and ``W.nested_quant_map``. In 8 bits it is int8 ``X.weight``, ``X.SCB`` and ``X.weight_format``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moekernels.checkpoint.errors import CheckpointError
from moekernels.checkpoint.quantized.stored import StoredWeight, need
from moekernels.checkpoint.reader import Reader, TensorInfo
from moekernels.quantization import Format, parse_format
from moekernels.quantization.bitsandbytes import FP4_CODES, NF4_CODES, dynamic_map

METHOD = "bitsandbytes"
FORMAT_NAMES = ("nf4", "fp4", "int8")

_STATE = ".quant_state.bitsandbytes__"
_CODES = {"nf4": NF4_CODES, "fp4": FP4_CODES}
_NESTED_BLOCK = 256
_ROW_MAJOR = 0  # the only order of int8 weights that is still written


def find(reader: Reader, config: Mapping[str, Any]) -> dict[str, StoredWeight]:
    """The quantised weights of a checkpoint, by name.

    Args:
        reader: the checkpoint.
        config: the entry `quantization_config` of its ``config.json``.

    Raises:
        CheckpointError: a weight lacks one of its tensors, or is not stored as the configuration says.
    """
    eight, four = bool(config.get("load_in_8bit")), bool(config.get("load_in_4bit"))
    if eight == four:
        raise CheckpointError(
            f"{reader.directory}: quantization_config of bitsandbytes must have one of load_in_4bit and load_in_8bit"
        )
    found = _in_8_bits(reader, config) if eight else _in_4_bits(reader, str(config.get("bnb_4bit_quant_type", "fp4")))
    other = "4" if eight else "8"
    marks = [name for name in reader.tensors if (_STATE in name if eight else name.endswith(".SCB"))]
    if marks:
        raise CheckpointError(
            f"{reader.tensors[marks[0]].file}: {marks[0]!r} is of a weight in {other} bits, but quantization_config "
            f"says {'load_in_8bit' if eight else 'load_in_4bit'}"
        )
    if not found:
        raise CheckpointError(
            f"{reader.directory}: quantization_config says {'load_in_8bit' if eight else 'load_in_4bit'}, but no "
            "weight is quantised"
        )
    return found


def _in_8_bits(reader: Reader, config: Mapping[str, Any]) -> dict[str, StoredWeight]:
    found = {}
    # What this library adds: how rows are multiplied, which files otherwise do not say.
    options: dict[str, Any] = {}
    if (activations := config.get("activations")) is not None:
        options = {"activations": activations, "threshold": config.get("llm_int8_threshold")}
    try:
        format = parse_format("int8", str(reader.directory), **options)
    except ValueError as error:
        raise CheckpointError(f"{reader.directory}: quantization_config: {error}") from error
    orders = reader.read([name for name in reader.tensors if name.endswith(".weight_format")])
    for name, order in orders.items():
        if order.numel() != 1 or int(order) != _ROW_MAJOR:
            raise CheckpointError(
                f"{reader.tensors[name].file}: {name!r} must be {_ROW_MAJOR} (rows one after the other), got "
                f"{order.flatten().tolist()}"
            )
    for name, info in reader.tensors.items():
        if info.dtype == torch.int8 and name.endswith(".weight"):
            scales = need(reader, name.removesuffix("weight") + "SCB", name)
            names = {"codes": name, "SCB": scales}
            if (order_name := name + "_format") in orders:
                names["order"] = order_name
            found[name] = StoredWeight(format, info.shape, names, _int8_parts, {"codes": name, "SCB": scales})
    return found


def _int8_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"codes": tensors["codes"].flatten(), "SCB": tensors["SCB"].flatten()}


def _in_4_bits(reader: Reader, kind: str) -> dict[str, StoredWeight]:
    states = reader.read([name for name in reader.tensors if _STATE in name])
    maps = reader.read([name for name in reader.tensors if name.endswith("quant_map")])
    found = {}
    for name, text in states.items():
        weight, _, stored = name.partition(_STATE)
        file = reader.tensors[name].file
        where = f"{file}: {weight!r}"
        need(reader, weight, weight)
        if stored != kind:
            raise CheckpointError(
                f"{where} is stored as {stored}, but quantization_config has bnb_4bit_quant_type={kind!r}"
            )
        state = _state(text, f"{file}: {name!r}")
        names = {"codes": weight, "absmax": need(reader, f"{weight}.absmax", weight)}
        names["quant_map"] = need(reader, f"{weight}.quant_map", weight)
        names["state"] = name
        is_nested = "nested_offset" in state
        if is_nested:
            names |= {part: need(reader, f"{weight}.{part}", weight) for part in ("nested_absmax", "nested_quant_map")}
        try:
            format = parse_format(stored, where, blocksize=state["blocksize"], double_quant=is_nested)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        if not torch.equal(maps[names["quant_map"]].float(), torch.tensor(_CODES[stored])):
            raise CheckpointError(f"{where}: its quant_map is not that of {stored}")
        if is_nested and not torch.equal(maps[names["nested_quant_map"]].float(), dynamic_map(torch.device("cpu"))):
            raise CheckpointError(f"{where}: its nested_quant_map is not that of 8-bit dynamic quantisation")
        shape = tuple(state["shape"])
        parts_of = partial(_four_bit_parts, shape=shape, state=state, where=where)
        in_files: dict[str, str | float] = {part: names[part] for part in ("codes", "absmax")}
        if is_nested:
            in_files |= {"nested_absmax": names["nested_absmax"], "offset": float(state["nested_offset"])}
        is_transposed = not is_nested and _is_transposed(reader.tensors[names["absmax"]], shape, state["blocksize"])
        found[weight] = StoredWeight(format, shape, names, parts_of, None if is_transposed else in_files)
    return found


def _state(text: Tensor, where: str) -> dict[str, Any]:
    """The JSON object in a tensor of bytes, with what is needed of it."""
    try:
        state = json.loads(bytes(text.flatten().tolist()))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: must be bytes of a JSON object: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{where}: must hold a JSON object, got {type(state).__name__}")
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise CheckpointError(f"{where}: shape must be two positive numbers, got {shape!r}")
    offset = state.get("nested_offset", 0.0)
    if not isinstance(offset, int | float):
        raise CheckpointError(f"{where}: nested_offset must be a number, got {offset!r}")
    if "nested_offset" in state and state.get("nested_blocksize", _NESTED_BLOCK) != _NESTED_BLOCK:
        raise CheckpointError(f"{where}: nested_blocksize must be {_NESTED_BLOCK}, got {state['nested_blocksize']!r}")
    return {"blocksize": state.get("blocksize"), **state}


def _is_transposed(absmax: Tensor | TensorInfo, shape: tuple[int, ...], blocksize: int) -> bool:
    """Whether scales are what bitsandbytes 0.50 makes of them for its own product on some CPUs, and then saves."""
    rows, columns = shape
    return absmax.dtype == torch.bfloat16 and tuple(absmax.shape) == (columns // blocksize, rows)


def _four_bit_parts(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], state: Mapping[str, Any], where: str
) -> dict[str, Tensor]:
    codes, absmax = tensors["codes"].contiguous().view(torch.uint8).flatten(), tensors["absmax"]
    if "nested_absmax" in tensors:
        nested = tensors["nested_absmax"].flatten()
        offset = torch.full_like(nested, state["nested_offset"])
        return {"codes": codes, "absmax": absmax.flatten(), "nested_absmax": nested, "offset": offset}
    if _is_transposed(absmax, shape, state["blocksize"]):
        warnings.warn(
            f"{where}: its scales were saved after an evaluation pass of bitsandbytes on a CPU, transposed and rounded "
            "to bfloat16; they are put in order, but stay rounded",
            stacklevel=2,
        )
        absmax = absmax.t()
    return {"codes": codes, "absmax": absmax.float().flatten()}


def tensors_of(
    name: str,
    format: Format,
    parts: Mapping[str, Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    storage: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a file holds of one matrix.

    Args:
        name: of the weight.
        format: nf4, fp4 or int8.
        parts: of the matrix.
        shape: ``[N, K]``.
        dtype: of the weight when it is dequantised.
        storage: the dtype in which 4-bit codes are stored.
    """
    if format.name == "int8":
        yield name, parts["codes"].view(shape)
        yield name.removesuffix("weight") + "SCB", parts["SCB"]
        yield name + "_format", torch.tensor(_ROW_MAJOR, dtype=torch.uint8)
        return
    options = format.options
    state: dict[str, Any] = {
        "quant_type": format.name,
        "blocksize": options["blocksize"],
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    codes = parts["codes"]
    yield name, (codes if storage == torch.uint8 else codes.contiguous().view(storage)).view(-1, 1)
    yield f"{name}.absmax", parts["absmax"]
    yield f"{name}.quant_map", torch.tensor(_CODES[format.name])
    if options["double_quant"]:
        yield f"{name}.nested_absmax", parts["nested_absmax"]
        yield f"{name}.nested_quant_map", dynamic_map(torch.device("cpu")).clone()
        state |= {
            "nested_blocksize": _NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": parts["offset"].flatten()[0].item(),
        }
    yield f"{name}{_STATE}{format.name}", torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
