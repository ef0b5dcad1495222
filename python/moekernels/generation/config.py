"""What `generate` is told: the documented generation parameters, with the defaults transformers 4.56.2 gives them."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, Literal

from moekernels.checkpoint import CheckpointError, read_json, replace_files, resolve, take_hub_options

CONFIG_NAME = "generation_config.json"

_CACHE_IMPLEMENTATIONS = ("dynamic", "dynamic_full", "static")
_EXTRA_OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
_POSITIVE = (
    "max_new_tokens",
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
)
# Arguments of `generate` itself; found in a config they are a mistake.
_GENERATE_ARGUMENTS = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "use_model_defaults",
    "custom_generate",
)


@dataclass
class GenerationParameters:
    """The known parameters. One that is at its default is not written to disk."""

    # Length.
    max_length: int = 20
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    early_stopping: bool | Literal["never"] = False
    max_time: float | None = None
    stop_strings: str | list[str] | None = None

    # Strategy.
    do_sample: bool = False
    num_beams: int = 1
    num_beam_groups: int = 1

    # Cache.
    use_cache: bool = True
    cache_implementation: str | None = None
    cache_config: dict[str, Any] | None = None
    return_legacy_cache: bool | None = None
    prefill_chunk_size: int | None = None

    # Scores.
    temperature: float | None = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    typical_p: float | None = 1.0
    epsilon_cutoff: float | None = 0.0
    eta_cutoff: float | None = 0.0
    diversity_penalty: float = 0.0
    repetition_penalty: float | None = 1.0
    encoder_repetition_penalty: float | None = 1.0
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: list[list[int]] | None = None
    force_words_ids: list[list[int]] | None = None
    renormalize_logits: bool = False
    constraints: list[Any] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    sequence_bias: Any = None
    token_healing: bool = False
    guidance_scale: float | None = None
    watermarking_config: dict[str, Any] | None = None

    # Outputs.
    num_return_sequences: int = 1
    output_attentions: bool = False
    output_hidden_states: bool = False
    output_scores: bool = False
    output_logits: bool | None = None
    return_dict_in_generate: bool = False

    # Special tokens.
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    # Encoder-decoder models.
    encoder_no_repeat_ngram_size: int = 0
    decoder_start_token_id: int | None = None

    # Assisted generation.
    is_assistant: bool = False
    num_assistant_tokens: int = 20
    num_assistant_tokens_schedule: str = "constant"
    assistant_confidence_threshold: float = 0.4
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    assistant_early_exit: int | None = None
    assistant_lookbehind: int = 10
    target_lookbehind: int = 10

    # Compilation, and search methods that transformers has moved out.
    compile_config: Any = None
    disable_compile: bool = False
    low_memory: bool | None = None
    penalty_alpha: float | None = None
    dola_layers: str | list[int] | None = None

    transformers_version: str | None = None


_KNOWN = {field.name: field.default for field in fields(GenerationParameters)}


class GenerationConfig(GenerationParameters):
    """The parameters of one call of `generate`, or a model's defaults for all of them.

    Every keyword is an attribute. Keywords that are not generation parameters are kept as attributes and written back.

    Raises:
        ValueError: a parameter has a value that no generation could use; the message names it.
    """

    def __init__(self, **kwargs: Any) -> None:
        # Older files say how they came about; that does not survive a copy.
        from_model_config = kwargs.pop("_from_model_config", False)
        kwargs.pop("_commit_hash", None)
        super().__init__(**{name: value for name, value in kwargs.items() if name in _KNOWN})
        self._from_model_config = from_model_config
        if not from_model_config:
            for name, value in kwargs.items():
                if name not in _KNOWN:
                    setattr(self, name, value)
        self.validate()

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GenerationConfig):
            return NotImplemented
        mine, theirs = self.to_dict(), other.to_dict()
        for metadata in ("transformers_version", "_from_model_config"):
            mine.pop(metadata, None)
            theirs.pop(metadata, None)
        return mine == theirs

    __hash__ = None  # type: ignore[assignment]

    # Reading and writing.

    @classmethod
    def from_dict(cls, config: dict[str, Any], **kwargs: Any) -> GenerationConfig:
        """A config with the given parameters; keywords take precedence."""
        return cls(**{**config, **kwargs})

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], config_file_name: str = CONFIG_NAME, **kwargs: Any
    ) -> GenerationConfig:
        """Reads `generation_config.json` from a checkpoint directory or the Hugging Face Hub.

        Args:
            directory: the checkpoint, or its name on the Hub.
            config_file_name: another name of the file.
            **kwargs: parameters, which take precedence; and those of :func:`moekernels.checkpoint.resolve`.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: it is not a JSON object, or holds an unusable value.
        """
        path = resolve(directory, (config_file_name,), **take_hub_options(kwargs)) / config_file_name
        if not path.is_file():
            raise FileNotFoundError(f"no {config_file_name} in {os.fspath(directory)!r}")
        config = read_json(path)
        try:
            return cls.from_dict(config, **kwargs)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    @classmethod
    def from_model_config(cls, model_config: Any) -> GenerationConfig:
        """The generation parameters among those of a model's config, for checkpoints without a file of their own."""
        config = {name: value for name, value in model_config.to_dict().items() if value is not None}
        config.pop("_from_model_config", None)
        generation_config = cls(**config, _from_model_config=True)
        if any(getattr(generation_config, name) for name in _EXTRA_OUTPUTS):
            generation_config.return_dict_in_generate = True
        return generation_config

    def save_pretrained(self, directory: str | os.PathLike[str], config_file_name: str = CONFIG_NAME) -> None:
        """Writes the parameters that differ from their defaults to `generation_config.json`.

        An older file stays whole until the new one takes its place.
        """
        with replace_files(directory) as stage:
            (stage / config_file_name).write_text(self.to_json_string(), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """All parameters and other attributes, as a deep copy."""
        return copy.deepcopy(self.__dict__)

    def to_diff_dict(self) -> dict[str, Any]:
        """The parameters that differ from their defaults, and everything that has none."""
        return {name: value for name, value in self.to_dict().items() if name not in _KNOWN or value != _KNOWN[name]}

    def to_json_string(self, use_diff: bool = True) -> str:
        config = self.to_diff_dict() if use_diff else self.to_dict()
        if not config.get("_from_model_config"):
            config.pop("_from_model_config", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    # Changing.

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Sets the attributes that exist and returns the keywords that name none.

        Raises:
            ValueError: as the constructor does; the config is then unchanged.
        """
        unused = {name: value for name, value in kwargs.items() if not hasattr(self, name)}
        changed = copy.copy(self)
        changed.__dict__.update({name: value for name, value in kwargs.items() if name not in unused})
        changed.validate()
        self.__dict__.update(changed.__dict__)
        return unused

    def with_defaults_from(self, other: GenerationConfig) -> GenerationConfig:
        """A copy in which every parameter that is at its default takes the value `other` has."""
        merged = copy.deepcopy(self)
        for name, value in other.__dict__.items():
            if name.startswith("_") or name == "transformers_version":
                continue
            default = _KNOWN.get(name)
            if getattr(merged, name, None) == default and value != default:
                setattr(merged, name, copy.deepcopy(value))
        if merged.temperature == 0.0:
            merged.do_sample = False
        return merged

    # Checking.

    def validate(self) -> None:
        """Raises ValueError for a value that no generation could use."""

        def require(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"generation config: {name} must be {expected}, got {getattr(self, name)!r}")

        def at_least(smallest: int, name: str) -> bool:
            value = getattr(self, name)
            return value is None or (isinstance(value, Integral) and int(value) >= smallest)

        for name in _POSITIVE:
            require(at_least(1, name), name, "a positive integer")
        for name in ("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size"):
            require(at_least(0, name), name, "a non-negative integer")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, name, "between 0 and 1")
        require(self.early_stopping in (True, False, "never"), "early_stopping", "a boolean or 'never'")
        require(
            self.cache_implementation is None or self.cache_implementation in _CACHE_IMPLEMENTATIONS,
            "cache_implementation",
            f"one of {', '.join(_CACHE_IMPLEMENTATIONS)}",
        )
        if self.do_sample:
            require(
                self.temperature is None or self.temperature > 0,
                "temperature",
                "greater than 0 when do_sample is set (greedy search is do_sample=False)",
            )
        if self.num_return_sequences > self.num_beams and not (self.do_sample and self.num_beams == 1):
            raise ValueError(
                f"generation config: there are num_beams={self.num_beams} sequences to return, got "
                f"num_return_sequences={self.num_return_sequences}; set num_beams as high, or sample without beams "
                "(do_sample=True, num_beams=1)"
            )
        for name in _GENERATE_ARGUMENTS:
            if hasattr(self, name):
                raise ValueError(f"generation config: {name} is an argument of generate(), not a generation parameter")

    def ignored_parameters(self) -> dict[str, Any]:
        """The parameters that are set but have no effect in the chosen strategy, with their values."""
        unused: list[str] = []
        if not self.do_sample:
            unused += ["temperature", "top_p", "min_p", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff"]
        if self.num_beams == 1:
            unused += ["early_stopping", "num_beam_groups", "diversity_penalty", "length_penalty"]
        if not self.use_cache:
            unused += ["cache_implementation", "cache_config", "return_legacy_cache"]
        if not self.return_dict_in_generate:
            unused += _EXTRA_OUTPUTS
        values = {name: getattr(self, name) for name in unused}
        # Not `value in (None, False)`, which 0.0 is.
        return {
            name: value
            for name, value in values.items()
            if value is not None and value is not False and value != _KNOWN[name]
        }
