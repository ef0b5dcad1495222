"""The model classes of an architecture, found by its name in ``config.json``."""

from __future__ import annotations

import os
from typing import Any, ClassVar, NamedTuple

from moekernels.checkpoint import CheckpointError, read_json, take_hub_options
from moekernels.models.base import PreTrainedModel
from moekernels.models.configuration import PretrainedConfig, config_path
from moekernels.models.gguf import gguf_config, open_gguf
from moekernels.models.m2m_100 import M2M100Config, M2M100ForConditionalGeneration, M2M100Model
from moekernels.models.nllb_moe import NllbMoeConfig, NllbMoeForConditionalGeneration, NllbMoeModel
from moekernels.models.olmoe import OlmoeConfig, OlmoeForCausalLM, OlmoeModel
from moekernels.models.phimoe import (
    PhimoeConfig,
    PhimoeForCausalLM,
    PhimoeForSequenceClassification,
    PhimoeModel,
)
from moekernels.models.switch_transformers import (
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    SwitchTransformersModel,
)


class Architecture(NamedTuple):
    """The classes of one architecture; None where it has no such model."""

    config: type[PretrainedConfig]
    base: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel] | None = None
    seq2seq_lm: type[PreTrainedModel] | None = None
    sequence_classification: type[PreTrainedModel] | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "olmoe": Architecture(config=OlmoeConfig, base=OlmoeModel, causal_lm=OlmoeForCausalLM),
    "phimoe": Architecture(
        config=PhimoeConfig,
        base=PhimoeModel,
        causal_lm=PhimoeForCausalLM,
        sequence_classification=PhimoeForSequenceClassification,
    ),
    "m2m_100": Architecture(config=M2M100Config, base=M2M100Model, seq2seq_lm=M2M100ForConditionalGeneration),
    "nllb-moe": Architecture(config=NllbMoeConfig, base=NllbMoeModel, seq2seq_lm=NllbMoeForConditionalGeneration),
    "switch_transformers": Architecture(
        config=SwitchTransformersConfig,
        base=SwitchTransformersModel,
        seq2seq_lm=SwitchTransformersForConditionalGeneration,
    ),
}


def _architecture(model_type: Any) -> Architecture | None:
    """The architecture of that name; files also write "nllb_moe"."""
    by_spelling = {name.replace("-", "_"): found for name, found in ARCHITECTURES.items()}
    return by_spelling.get(str(model_type).replace("-", "_"))


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of the model that a configuration is of: the one it names, or else the one that generates."""
    found = ARCHITECTURES[type(config).model_type]
    classes = [made for made in found[1:] if isinstance(made, type)]
    named = {made.__name__: made for made in classes}
    chosen = next((named[name] for name in config.architectures or () if name in named), None)
    return chosen or found.causal_lm or found.seq2seq_lm or found.base


def _known() -> str:
    return ", ".join(repr(name) for name in ARCHITECTURES)


class AutoConfig:
    """Reads configurations of any known architecture."""

    @staticmethod
    def from_pretrained(directory: str | os.PathLike[str], **kwargs: Any) -> PretrainedConfig:
        """Read ``config.json``; see :meth:`PretrainedConfig.from_pretrained`.

        With `gguf_file`, the name of a file in `directory`, see :func:`moekernels.models.gguf.gguf_config`.

        Raises:
            CheckpointError: there is none, it cannot be used, or the architecture is not known.
        """
        gguf_file = kwargs.pop("gguf_file", None)
        if gguf_file is not None:
            reader = open_gguf(directory, gguf_file, take_hub_options(kwargs))
            return gguf_config(reader, ARCHITECTURES[reader.architecture].config)
        path = config_path(directory, **take_hub_options(dict(kwargs)))
        model_type = read_json(path).get("model_type")
        found = _architecture(model_type)
        if found is None:
            raise CheckpointError(
                f"{path}: unknown architecture: model_type must be one of {_known()}, got {model_type!r}"
            )
        return found.config.from_pretrained(directory, **kwargs)

    @staticmethod
    def for_model(model_type: str, **kwargs: Any) -> PretrainedConfig:
        """A configuration of the named architecture."""
        found = _architecture(model_type)
        if found is None:
            raise ValueError(f"unknown architecture: model_type must be one of {_known()}, got {model_type!r}")
        return found.config(**kwargs)


class _AutoModel:
    """Not a model itself: the class methods return one."""

    _role: ClassVar[str]

    def __init__(self) -> None:
        raise TypeError(f"use {type(self).__name__}.from_pretrained(...) or {type(self).__name__}.from_config(...)")

    @classmethod
    def _class_for(cls, config: PretrainedConfig) -> type[PreTrainedModel]:
        found = getattr(ARCHITECTURES.get(type(config).model_type), cls._role, None)
        if found is None:
            having = ", ".join(name for name, known in ARCHITECTURES.items() if getattr(known, cls._role) is not None)
            raise ValueError(f"{cls.__name__}: no such model for {type(config).__name__}; there is one for {having}")
        return found

    @classmethod
    def from_config(cls, config: PretrainedConfig, **kwargs: Any) -> Any:
        """A model with new weights; see :meth:`PreTrainedModel.from_config`."""
        return cls._class_for(config).from_config(config, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str] | None,
        *,
        config: PretrainedConfig | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint into the class for its architecture; see :meth:`PreTrainedModel.from_pretrained`."""
        if not isinstance(config, PretrainedConfig):
            source = directory if config is None else config
            if source is None:
                raise ValueError(f"{cls.__name__}.from_pretrained: without a checkpoint there must be a config")
            file = {"gguf_file": kwargs["gguf_file"]} if kwargs.get("gguf_file") and config is None else {}
            config = AutoConfig.from_pretrained(source, **file, **take_hub_options(dict(kwargs)))
        return cls._class_for(config).from_pretrained(directory, config=config, **kwargs)


class AutoModel(_AutoModel):
    """Models without a head."""

    _role = "base"


class AutoModelForCausalLM(_AutoModel):
    """Decoders with a language-modelling head."""

    _role = "causal_lm"


class AutoModelForSeq2SeqLM(_AutoModel):
    """Encoders and decoders with a language-modelling head."""

    _role = "seq2seq_lm"


class AutoModelForSequenceClassification(_AutoModel):
    """Models with a head that classifies sequences."""

    _role = "sequence_classification"
