"""What all model configurations share: common fields, JSON files, dtype, rotary parameters, validation."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from moekernels._files import write_file
from moekernels.checkpoint import CheckpointError, HubOptions, read_json, replace_files, resolve, take_hub_options
from moekernels.checkpoint.hub import CONFIG_FILES
from moekernels.models.fields import Check, Field, documentation, signature

if TYPE_CHECKING:
    from typing_extensions import Unpack

CONFIG_NAME = "config.json"

_Config = TypeVar("_Config", bound="PretrainedConfig")

# Fields every configuration has, with their defaults; written to a file only where they differ.
_COMMON: dict[str, Any] = {
    "architectures": None,
    "bos_token_id": None,
    "chunk_size_feed_forward": 0,
    "decoder_start_token_id": None,
    "eos_token_id": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "pad_token_id": None,
    "problem_type": None,
    "return_dict": True,
    "sep_token_id": None,
    "tie_word_embeddings": True,
    "transformers_version": None,
    "use_cache": True,
}
# More than any model has.
_MAX_LABELS, _MAX_WEIGHTS = 2**20, 2**40
_NOT_WRITTEN = ("name_or_path", "_name_or_path", "_attn_implementation")


class PretrainedConfig:
    """A model's hyperparameters, read from and written to ``config.json``.

    A subclass lists its fields in its body (:mod:`moekernels.models.fields`). Every keyword is an attribute; keywords
    the class does not know are kept and written back. `num_labels` fills `id2label` and `label2id`. The dtype goes by
    both of its names, ``dtype`` and ``torch_dtype``, and the rotary parameters by ``rope_theta`` with ``rope_scaling``
    or by ``rope_parameters``.

    Raises:
        ValueError: a field has a value that no model could be built from; the message names it.
    """

    model_type: ClassVar[str] = ""
    #: Other names of fields: alias -> field.
    attribute_map: ClassVar[dict[str, str]] = {}
    _fields: ClassVar[dict[str, Field]] = {}
    _annotations: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = {name: value for name, value in cls.__dict__.items() if isinstance(value, Field)}
        for name in own:
            delattr(cls, name)
        # One that is listed again takes its new place.
        cls._fields = {**{name: field for name, field in cls._fields.items() if name not in own}, **own}
        cls._annotations = {**cls._annotations, **inspect.get_annotations(cls)}
        if "__init__" not in cls.__dict__:
            cls.__init__ = _constructor(cls)  # type: ignore[method-assign]
            cls.__doc__ = documentation(cls.__doc__ or "", cls._fields)

    def __init__(self, **kwargs: Any) -> None:
        dtype = kwargs.pop("dtype", None)
        torch_dtype = kwargs.pop("torch_dtype", None)
        self.dtype: torch.dtype | None = parse_dtype(dtype if dtype is not None else torch_dtype)
        self.name_or_path: str = kwargs.pop("name_or_path", kwargs.pop("_name_or_path", "")) or ""
        self._attn_implementation: str | None = kwargs.pop("attn_implementation", None)
        kwargs.pop("_attn_implementation_internal", None)
        kwargs.pop("model_type", None)
        self._set_labels(kwargs)
        for name, default in _COMMON.items():
            if name not in self.__dict__:
                setattr(self, name, kwargs.pop(name, default))
        # The dictionary comes before what may be an entry of it.
        for name, value in sorted(kwargs.items(), key=lambda item: item[0] != "rope_parameters"):
            if name.startswith("__") or callable(getattr(type(self), name, None)):
                raise ValueError(f"{type(self).__name__}: {name!r} cannot be a field, it is a method")
            setattr(self, name, value)
        self.validate()

    def _complete(self, others: dict[str, Any]) -> None:
        """Sets fields that follow from others, before the keywords `others`, which are no fields, are set."""

    def validate(self) -> None:
        """Raise ValueError for a value that no model could be built from."""
        for name, field in type(self)._fields.items():
            self._check(name, *field.checks)

    # Names a field also goes by.

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(type(self).attribute_map.get(name, name), value)

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that are not set.
        field = type(self).attribute_map.get(name)
        if field is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self, field)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, value: torch.dtype | str | None) -> None:
        self.dtype = parse_dtype(value)

    @property
    def use_return_dict(self) -> bool:
        return self.return_dict

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_LABELS:
            raise ValueError(f"{type(self).__name__}: num_labels must be a number up to {_MAX_LABELS}, got {value!r}")
        self.id2label = {index: f"LABEL_{index}" for index in range(value)}
        self.label2id = {label: index for index, label in self.id2label.items()}

    def _set_labels(self, kwargs: dict[str, Any]) -> None:
        id2label = kwargs.pop("id2label", None)
        label2id = kwargs.pop("label2id", None)
        num_labels = kwargs.pop("num_labels", None)
        if id2label is None:
            self.num_labels = 2 if num_labels is None else num_labels
        else:
            # JSON has no integer keys.
            self.id2label = {int(index): label for index, label in id2label.items()}
            if num_labels is not None and num_labels != len(self.id2label):
                self.num_labels = num_labels
        self.label2id = {label: index for index, label in self.id2label.items()} if label2id is None else label2id

    # Reading and writing.

    @classmethod
    def from_dict(cls: type[_Config], values: dict[str, Any], **kwargs: Any) -> _Config:
        """A configuration with the given fields; keywords take precedence."""
        return cls(**{**values, **kwargs})

    @classmethod
    def from_pretrained(cls: type[_Config], directory: str | os.PathLike[str], **kwargs: Any) -> _Config:
        """Read ``config.json`` from a checkpoint directory, a JSON file, or the Hugging Face Hub.

        Args:
            directory: the checkpoint, or its name on the Hub.
            **kwargs: fields, which take precedence over the file; and those of :func:`moekernels.checkpoint.resolve`.

        Raises:
            CheckpointError: there is no such file, it is not a JSON object, it describes another architecture, or it
                holds an unusable value.
        """
        path = config_path(directory, **take_hub_options(kwargs))
        kwargs.pop("trust_remote_code", None)  # nothing of a checkpoint is executed
        values = read_json(path)
        found = str(values.get("model_type", cls.model_type))
        if cls.model_type and found.replace("_", "-") != cls.model_type.replace("_", "-"):
            raise CheckpointError(f"{path}: model_type must be {cls.model_type!r} for {cls.__name__}, got {found!r}")
        try:
            return cls.from_dict(values, **{"name_or_path": os.fspath(directory), **kwargs})
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    @classmethod
    def from_json_file(cls: type[_Config], json_file: str | os.PathLike[str]) -> _Config:
        """The configuration in a JSON file. Raises as :meth:`from_pretrained` does."""
        return cls.from_pretrained(json_file)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``config.json`` into `directory`, which is created if need be."""
        with replace_files(directory) as stage:
            self.to_json_file(stage / CONFIG_NAME)

    def to_json_file(self, json_file: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write :meth:`to_json_string` to a file."""
        write_file(json_file, self.to_json_string(use_diff))

    def update(self, fields: dict[str, Any]) -> None:
        """Set several fields.

        Raises:
            ValueError: a value is none the field can have; nothing is changed then.
        """
        changed = copy.deepcopy(self)
        for name, value in fields.items():
            setattr(changed, name, value)
        changed.validate()
        self.__dict__.update(changed.__dict__)

    def get_text_config(self, decoder: bool = False) -> PretrainedConfig:
        """The configuration of the language model, which is all there is."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON knows, as a deep copy."""
        values = {name: value for name, value in copy.deepcopy(self.__dict__).items() if name not in _NOT_WRITTEN}
        # The spelling that every version of transformers reads.
        dtype = values.pop("dtype")
        values["torch_dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
        values["model_type"] = type(self).model_type
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """:meth:`to_dict` without the common fields that have their default."""
        values = self.to_dict()
        for name, default in {**_COMMON, "torch_dtype": None}.items():
            # A class may have its own default.
            if values[name] == default and name not in type(self)._fields:
                del values[name]
        if self.id2label == {0: "LABEL_0", 1: "LABEL_1"}:
            del values["id2label"], values["label2id"]
        return values

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of ``config.json``."""
        values = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PretrainedConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    # Rotary parameters.

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """`rope_theta` and `rope_scaling` in one dictionary, as transformers 5 has them."""
        scaling = dict(self.rope_scaling or {"rope_type": "default"})
        return {**scaling, "rope_theta": self.rope_theta}

    @rope_parameters.setter
    def rope_parameters(self, parameters: dict[str, Any] | None) -> None:
        if parameters is None:
            return
        scaling = dict(parameters)
        self.rope_theta = scaling.pop("rope_theta", self.__dict__.get("rope_theta", 10000.0))
        self.rope_scaling = None if scaling in ({}, {"rope_type": "default"}) else scaling

    # Checks for subclasses.

    def _check(self, name: str, *checks: Check) -> None:
        value = getattr(self, name)
        for check in checks:
            expected = check(value, self)
            if expected is not None:
                raise ValueError(f"{type(self).__name__}: {name} must be {expected}, got {value!r}")

    def _check_weights(self, *names: str) -> None:
        """The sizes of one tensor; checked one by one before."""
        sizes = {name: getattr(self, name) for name in names}
        if math.prod(sizes.values()) > _MAX_WEIGHTS:
            listed = " * ".join(f"{name} ({size})" for name, size in sizes.items())
            raise ValueError(f"{type(self).__name__}: {listed} must be at most {_MAX_WEIGHTS}, the weights of a tensor")


def _constructor(cls: type[PretrainedConfig]) -> Callable[..., None]:
    """The ``__init__`` that takes the fields of a class."""
    fields, expected = cls._fields, signature(cls._fields, cls._annotations)

    def __init__(self: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        given = expected.bind(self, *args, **kwargs)
        given.apply_defaults()
        others = given.arguments["kwargs"]
        for name in fields:
            setattr(self, name, given.arguments[name])
        for name, field in fields.items():
            if field.like is not None and getattr(self, name) is None:
                setattr(self, name, getattr(self, field.like))
        self._complete(others)
        PretrainedConfig.__init__(self, **others)

    __init__.__signature__ = expected  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    return __init__


def config_path(directory: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> Path:
    """The ``config.json`` of a checkpoint, fetched if need be; a path to a JSON file stands for itself.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    path = resolve(directory, CONFIG_FILES, **hub)
    return path if path.is_file() else path / CONFIG_NAME


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch dtype from itself or its name ("bfloat16", "torch.bfloat16"); "auto" and None give None.

    Raises:
        ValueError: it names no floating-point dtype.
    """
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f'dtype must be "auto", a floating-point torch dtype or the name of one, got {dtype!r}')
    return found
