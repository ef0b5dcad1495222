"""Quantised weights: how they are asked for."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from moekernels.models.configuration import PretrainedConfig, parse_dtype
from moekernels.quantization import Format, parse_format

_4BIT_TYPES = ("fp4", "nf4")
_STORAGE = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")


@dataclass
class BitsAndBytesConfig:
    """Weights in the formats of bitsandbytes: 8-bit rows, or NF4 or FP4 in blocks of 64.

    The fields are those of transformers, and `activations`.

    Args:
        load_in_8bit, load_in_4bit: to how many bits; neither leaves the weights whole.
        llm_int8_threshold: beside `activations`, elements of this magnitude and more are not rounded; 0 rounds all.
            Without `activations` none are, whatever it says; it is kept and saved for others.
        llm_int8_skip_modules: names of modules whose weights stay whole: the whole path, one that contains the module,
            or the last name of it. None is the head; routers, embeddings and norms stay whole whatever it says.
        llm_int8_enable_fp32_cpu_offload: kept and saved; weights are quantised on every device.
        llm_int8_has_fp16_weight: must be False: weights are quantised once.
        bnb_4bit_compute_dtype: the dtype in which a layer multiplies in 4 bits; float32 by default.
        bnb_4bit_quant_type: "nf4" or "fp4".
        bnb_4bit_use_double_quant: quantise the scales too.
        bnb_4bit_quant_storage: the dtype in which files hold the codes; uint8 by default.
        activations: beside `load_in_8bit`, "int8" rounds what is multiplied to 8 bits, row by row, as bitsandbytes
            does; None leaves it in the model's dtype, which is more accurate. Other libraries pass over this field.

    Raises:
        ValueError: the fields contradict each other, or one has a value that bitsandbytes does not know.
    """

    quant_method: ClassVar[str] = "bitsandbytes"

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: torch.dtype | str | None = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: torch.dtype | str | None = None
    activations: str | None = None

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("BitsAndBytesConfig: set load_in_4bit or load_in_8bit, not both")
        if self.activations is not None and not self.load_in_8bit:
            raise ValueError(f"BitsAndBytesConfig: activations goes with load_in_8bit, got {self.activations!r}")
        parse_format("int8", "BitsAndBytesConfig", **self.int8_options())
        if self.bnb_4bit_quant_type not in _4BIT_TYPES:
            raise ValueError(
                f"BitsAndBytesConfig: bnb_4bit_quant_type must be one of {', '.join(_4BIT_TYPES)}, "
                f"got {self.bnb_4bit_quant_type!r}"
            )
        if self.llm_int8_has_fp16_weight:
            raise ValueError(
                "BitsAndBytesConfig: llm_int8_has_fp16_weight must be False, as weights are held in 8 bits alone; to "
                "train them, load them whole"
            )
        _check_names("BitsAndBytesConfig: llm_int8_skip_modules", self.llm_int8_skip_modules)
        self.bnb_4bit_compute_dtype = parse_dtype(self.bnb_4bit_compute_dtype) or torch.float32
        storage = str(self.bnb_4bit_quant_storage or "uint8").removeprefix("torch.")
        if storage not in _STORAGE:
            raise ValueError(
                f"BitsAndBytesConfig: bnb_4bit_quant_storage must be one of {', '.join(_STORAGE)}, got {storage!r}"
            )
        self.bnb_4bit_quant_storage = getattr(torch, storage)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BitsAndBytesConfig:
        """The fields in a dictionary, such as that in ``config.json``; what is none of them is left out."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON knows, as transformers writes them to ``config.json``."""
        values = dataclasses.asdict(self)
        for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
            values[name] = str(values[name]).removeprefix("torch.")
        if self.activations is None:  # which only this library knows
            del values["activations"]
        return {**values, "quant_method": self.quant_method}

    def to_diff_dict(self) -> dict[str, Any]:
        """:meth:`to_dict` without what has its default."""
        default = type(self)().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != default.get(name)}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of :meth:`to_diff_dict`, or of :meth:`to_dict`."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def is_quantizable(self) -> bool:
        """Whether weights are to be quantised."""
        return self.load_in_8bit or self.load_in_4bit

    def quantization_method(self) -> str | None:
        """What transformers calls the format: "llm_int8", "fp4" or "nf4"; None if the weights stay whole."""
        return "llm_int8" if self.load_in_8bit else self.bnb_4bit_quant_type if self.load_in_4bit else None

    def int8_options(self) -> dict[str, Any]:
        """Those of the format ``int8``."""
        if self.activations is None:
            return {}
        return {"activations": self.activations, "threshold": self.llm_int8_threshold}

    def quantization(self) -> Quantization | None:
        """What to do with the weights; None is nothing."""
        skip = None if self.llm_int8_skip_modules is None else tuple(self.llm_int8_skip_modules)
        if self.load_in_8bit:
            return Quantization(parse_format("int8", **self.int8_options()), skip)
        if not self.load_in_4bit:
            return None
        format = parse_format(self.bnb_4bit_quant_type, double_quant=self.bnb_4bit_use_double_quant)
        assert isinstance(self.bnb_4bit_compute_dtype, torch.dtype)
        return Quantization(format, skip, self.bnb_4bit_compute_dtype)


@dataclass
class QuantizationConfig:
    """Weights in a format of :mod:`moekernels.quantization`.

    Args:
        format: "int4", which is the fast one, "int8", "nf4", "fp4" or "q8_0", "q4_0".
        options: of the format, such as `group_size` of "int4", `blocksize` of "nf4", `activations` of "int4" and
            "int8", which may be "int8", and beside it `threshold` of "int8". As keywords of :meth:`from_dict` they
            stand beside the others.
        skip_modules: as `llm_int8_skip_modules` of :class:`BitsAndBytesConfig`; an empty list quantises the head too. A
            head that is tied takes the embedding with it, of which rows are then dequantised as they are looked up
            (unless rows share scales, or there is a `compute_dtype`: then both stay whole).
        compute_dtype: the dtype in which a layer multiplies; None is that of its input.

    Raises:
        ValueError: there is no such format, or it has no such option.
    """

    quant_method: ClassVar[str] = "moekernels"

    format: str = "int4"
    options: dict[str, Any] = field(default_factory=dict)
    skip_modules: list[str] | None = None
    compute_dtype: torch.dtype | str | None = None

    def __post_init__(self) -> None:
        parse_format(self.format, "QuantizationConfig", **self.options)
        _check_names("QuantizationConfig: skip_modules", self.skip_modules)
        self.compute_dtype = parse_dtype(self.compute_dtype)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantizationConfig:
        """From a dictionary in which the options of the format stand beside the fields."""
        own = {"format", "skip_modules", "compute_dtype"}
        options = {name: value for name, value in values.items() if name not in {*own, "quant_method", "modules"}}
        return cls(options=options, **{name: value for name, value in values.items() if name in own})

    def to_dict(self) -> dict[str, Any]:
        """The inverse of :meth:`from_dict`."""
        values: dict[str, Any] = {"quant_method": self.quant_method, "format": self.format, **self.options}
        values["skip_modules"] = self.skip_modules
        if self.compute_dtype is not None:
            values["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        return values

    def quantization(self) -> Quantization:
        """What to do with the weights."""
        skip = None if self.skip_modules is None else tuple(self.skip_modules)
        assert self.compute_dtype is None or isinstance(self.compute_dtype, torch.dtype)
        return Quantization(parse_format(self.format, **self.options), skip, self.compute_dtype, tied=True)


class Quantization(NamedTuple):
    """What to do with a model's weights.

    Attributes:
        format: that they get.
        skip: names of modules that stay whole; None is the heads.
        compute_dtype: the dtype in which layers multiply; None is that of their input.
        tied: whether a head that is tied to the embedding counts as a module that can be quantised; both are then.
    """

    format: Format
    skip: tuple[str, ...] | None = None
    compute_dtype: torch.dtype | None = None
    tied: bool = False

    def skips(self, module: str) -> bool:
        """Whether `skip` names a module: by its path, a part of the path that ends before it, or its last name."""
        path = f"{module}."
        return any(
            module.rpartition(".")[2] == name or module == name or f"{name}." in path for name in self.skip or ()
        )


AnyConfig = BitsAndBytesConfig | QuantizationConfig


def requested(
    config: PretrainedConfig, asked: AnyConfig | Mapping[str, Any] | None, load_in_8bit: bool, load_in_4bit: bool
) -> AnyConfig | None:
    """How the weights are to be quantised while loading, if at all.

    Args:
        config: the checkpoint's configuration.
        asked: the argument `quantization_config`: None, a configuration, or its fields.
        load_in_8bit, load_in_4bit: the arguments, which count where there is no `quantization_config`.

    Raises:
        ValueError: `asked` is something else, or not usable.
    """
    if asked is None:
        asked = BitsAndBytesConfig(load_in_8bit, load_in_4bit)
    if isinstance(asked, Mapping):
        asked = parse_config(asked)
    if not isinstance(asked, AnyConfig):
        raise ValueError(
            "quantization_config must be a BitsAndBytesConfig, a QuantizationConfig or a dictionary, got "
            f"{type(asked).__name__}"
        )
    if asked.quantization() is None:
        return None
    if getattr(config, "quantization_config", None):
        warnings.warn(
            f"{config.name_or_path or 'the checkpoint'}: its weights are quantised already; they stay as they are, "
            "whatever else is asked for",
            stacklevel=3,
        )
        return None
    return asked


def stored_compute_dtype(stored: Mapping[str, Any] | None) -> torch.dtype | None:
    """What products are computed in with weights that a checkpoint has quantised, as its ``config.json`` says.

    Raises:
        ValueError: it says something that is no dtype.
    """
    if not stored:
        return None
    if "format" not in stored and stored.get("load_in_4bit"):
        return parse_dtype(stored.get("bnb_4bit_compute_dtype")) or torch.float32
    return parse_dtype(stored.get("compute_dtype"))


def parse_config(values: Mapping[str, Any]) -> AnyConfig:
    """The configuration in a dictionary: ours if it has a `format`.

    Raises:
        ValueError: the dictionary has fields that are none.
    """
    method = values.get("quant_method")
    if "format" in values:
        return QuantizationConfig.from_dict(values)
    if method not in (None, BitsAndBytesConfig.quant_method):
        raise ValueError(f"quantization_config: quant_method must be bitsandbytes or moekernels, got {method!r}")
    unknown = sorted(
        {*values}
        - {f.name for f in dataclasses.fields(BitsAndBytesConfig)}
        - {"quant_method", "_load_in_8bit", "_load_in_4bit"}
    )
    if unknown:
        raise ValueError(f"quantization_config: no field of BitsAndBytesConfig: {', '.join(unknown)}")
    return BitsAndBytesConfig.from_dict(values)


def _check_names(where: str, names: Any) -> None:
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{where} must be a list of names or None, got {names!r}")
