"""From the keywords of a call of `generate` to one config, and the keywords that are the model's."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from moekernels.generation.config import GenerationConfig

# Keywords of `generate` that describe the prompt.
_PROMPT = frozenset(("input_ids", "inputs_embeds", "attention_mask", "past_key_values"))
_DECODER_PROMPT = frozenset(("encoder_outputs", "decoder_input_ids", "decoder_attention_mask"))
# Keywords of a model that change with every step, and are not the caller's to set.
_OF_THE_LOOP = frozenset(("cache_position", "decoder_position_ids", "decoder_inputs_embeds", "return_dict", "self"))
# What a batch for training may hold beside the prompt, and what some tokenizers return: of no use here.
_WITHOUT_USE = ("labels", "num_items_in_batch", "shift_labels", "token_type_ids")
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def resolve_generation_config(
    model: Any, given: GenerationConfig | None, use_model_defaults: bool | None, kwargs: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Merges keywords over the given config over the model's. Returns it with the keywords meant for the model.

    Raises:
        ValueError: a keyword is neither's, or a parameter is unusable.
    """
    own = _ours(getattr(model, "generation_config", None)) or GenerationConfig.from_model_config(model.config)
    given = _ours(given)
    if given is None:
        config = copy.deepcopy(own)
    elif use_model_defaults or (use_model_defaults is None and _since_4_50(own.transformers_version)):
        config = given.with_defaults_from(own)
    else:
        config = copy.deepcopy(given)
        for name in _SPECIAL_TOKENS:
            if getattr(config, name) is None:
                setattr(config, name, getattr(own, name))
    model_kwargs = config.update(**kwargs)
    if isinstance(config.eos_token_id, int) and config.eos_token_id < 0:
        config.eos_token_id = None  # the usual way to say that nothing ends a sequence
    for name in _WITHOUT_USE:
        model_kwargs.pop(name, None)
    names, _ = keywords(type(model).forward)
    prompt = _PROMPT | _DECODER_PROMPT if getattr(model.config, "is_encoder_decoder", False) else _PROMPT
    if unknown := sorted(set(model_kwargs) - prompt - (names - _OF_THE_LOOP)):
        raise ValueError(f"generate: neither generation parameters nor keywords of the model: {', '.join(unknown)}")
    return config, {name: value for name, value in model_kwargs.items() if value is not None}


def _ours(config: Any) -> GenerationConfig | None:
    """A config of transformers as one of ours, which has the same names; others as they are."""
    if config is None or isinstance(config, GenerationConfig):
        return config
    if not hasattr(config, "to_dict"):
        raise TypeError(f"generate: generation_config must be a GenerationConfig, got {type(config).__name__}")
    return GenerationConfig.from_dict(config.to_dict())


@cache
def keywords(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """The keywords a function names, and whether it takes any others."""
    parameters = inspect.signature(forward).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return frozenset(parameter.name for parameter in parameters), takes_any


def _since_4_50(version: str | None) -> bool:
    """Whether a config was written by transformers 4.50 or later, or by us."""
    if version is None:
        return True
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    return not (major.isdigit() and minor.isdigit()) or (int(major), int(minor)) >= (4, 50)


def refuse_unsupported(config: GenerationConfig) -> None:
    """Raises NotImplementedError for what this version cannot do, rather than doing something else."""
    wanted = {
        "diverse beam search (num_beam_groups)": config.num_beam_groups > 1 or config.diversity_penalty > 0,
        "constrained beam search": config.constraints is not None or config.force_words_ids is not None,
        "early-exit assistance": config.assistant_early_exit is not None,
        "contrastive search (penalty_alpha)": bool(config.penalty_alpha) and not config.do_sample,
        "DoLa decoding (dola_layers)": config.dola_layers is not None,
        "watermarking": config.watermarking_config is not None,
        "token healing": config.token_healing,
    }
    for feature, asked in wanted.items():
        if asked:
            raise NotImplementedError(f"generate: {feature} is not supported yet")
