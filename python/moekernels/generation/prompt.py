"""From what a caller passes to `generate` to checked tensors and final lengths."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moekernels.generation.config import GenerationConfig
from moekernels.generation.processors import token_list


@dataclass
class Prompt:
    """What generation starts from. B prompts.

    Attributes:
        input_ids: int64 `[B, n]`, the tokens that the decoder begins with.
        inputs_embeds: `[B, m, H]`, given instead of ids or besides them.
        attention_mask: int64 `[B, n or m]`; None if nothing is masked.
        position_ids: int64 `[B, n or m]`, where the caller says them.
        encoder_input_ids: int64 `[B, S]`, what the encoder penalties apply to; None where there are no ids.
        row_kwargs: keywords for the model in every step, whose tensors have a row per sequence.
        shared_kwargs: keywords for the model in every step, whose tensors stay as they are.
    """

    input_ids: Tensor
    inputs_embeds: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    encoder_input_ids: Tensor | None = None
    row_kwargs: dict[str, Any] = field(default_factory=dict)
    shared_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def num_embeds(self) -> int:
        """Positions that were given as embeddings, without ids."""
        return 0 if self.inputs_embeds is None else self.inputs_embeds.shape[1] - self.input_ids.shape[1]


def decoder_prompt(
    inputs: Tensor | None, config: GenerationConfig, model_kwargs: dict[str, Any], device: torch.device
) -> Prompt:
    """The prompt of a decoder-only model; other keywords of the caller's stay with it.

    Raises:
        ValueError: as the two functions below do.
    """
    ids, embeds = take_prompt(inputs, config, model_kwargs, device)
    prompt = ids if embeds is None else embeds
    mask = attention_mask_for(prompt, model_kwargs.pop("attention_mask", None), config)
    positions = model_kwargs.pop("position_ids", None)
    if positions is not None:
        positions = _checked_positions(positions, prompt.shape[0], prompt.shape[1])
    return Prompt(ids, embeds, mask, positions, ids if embeds is None else None, row_kwargs=model_kwargs)


def _checked_positions(positions: Any, batch_size: int, length: int) -> Tensor:
    """The given positions int64 `[B, m]`, which may have one row for all."""
    if not is_index_matrix(positions) or positions.shape[0] not in (1, batch_size) or positions.shape[1] != length:
        got = (
            f"{positions.dtype} {list(positions.shape)}" if isinstance(positions, Tensor) else type(positions).__name__
        )
        raise ValueError(
            f"generate: position_ids must be an integer tensor [{batch_size}, {length}], one for every position of the "
            f"prompt, got {got}"
        )
    return positions.long().expand(batch_size, -1)


def take_prompt(
    inputs: Tensor | None, config: GenerationConfig, model_kwargs: dict[str, Any], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The prompts' ids int64 `[B, n]` (n may be 0 beside embeddings) and embeddings, taken out of the keywords.

    Raises:
        ValueError: there is no prompt, it was given twice, or it is no batch of token ids on the model's device.
    """
    ids = model_kwargs.pop("input_ids", None)
    embeds = model_kwargs.pop("inputs_embeds", None)
    if inputs is not None and ids is not None:
        raise ValueError("generate: the prompt was given twice, as inputs and as input_ids")
    ids = inputs if ids is None else ids
    if ids is not None and not is_index_matrix(ids):
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"generate: input_ids must be an integer tensor [batch, length], got {got}")
    if embeds is not None:
        if embeds.dim() != 3 or embeds.shape[1] == 0:
            raise ValueError(f"generate: inputs_embeds must be [batch, length, hidden], got {list(embeds.shape)}")
        if not config.use_cache:
            raise ValueError("generate: a prompt given as inputs_embeds needs use_cache=True")
        ids = torch.zeros(embeds.shape[0], 0, dtype=torch.long, device=embeds.device) if ids is None else ids
    elif ids is None:
        if config.bos_token_id is None:
            raise ValueError("generate: there is no prompt, and no bos_token_id to start from")
        ids = torch.full((1, 1), config.bos_token_id, device=device)
    if ids.shape[0] == 0 or (ids.shape[1] == 0 and embeds is None):
        raise ValueError(f"generate: input_ids must hold at least one token per prompt, got {list(ids.shape)}")
    on_model_device("input_ids", ids, device)
    return ids.long(), embeds


def on_model_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError if `tensor` is on another kind of device than the model."""
    if tensor.device.type != torch.device(device).type:
        raise ValueError(f"generate: {name} is on {tensor.device}, but the model on {device}")


def is_index_matrix(ids: Any) -> bool:
    return isinstance(ids, Tensor) and ids.dim() == 2 and ids.dtype in (torch.int32, torch.int64)


def attention_mask_for(prompt: Tensor, given: Tensor | None, config: GenerationConfig) -> Tensor | None:
    """The mask int64 `[B, m]` of a prompt (ids or embeddings), given or inferred; None where it would hide nothing.

    A mask is inferred from ids in which the pad token occurs, unless that is an end token too. Warns where the last
    position is hidden, because a decoder would then go on from padding.

    Raises:
        ValueError: the given mask does not have the prompt's shape.
    """
    if given is not None and given.shape != prompt.shape[:2]:
        raise ValueError(
            f"generate: attention_mask must be {list(prompt.shape[:2])} like the prompt, got {list(given.shape)}"
        )
    mask = visible_or_none(prompt if prompt.dim() == 2 else None, given, config)
    if mask is not None and not bool(mask[:, -1].all()):
        warnings.warn(
            "generate: a prompt is padded on the right, and a decoder goes on from the padding; "
            "tokenize with padding_side='left'",
            stacklevel=5,
        )
    return mask


def visible_or_none(ids: Tensor | None, given: Tensor | None, config: GenerationConfig) -> Tensor | None:
    """The given mask, or else one inferred from the pad tokens in `ids`, int64; None where it would hide nothing."""
    if given is not None:
        visible = given != 0
    else:
        pad = config.pad_token_id
        ends = [] if config.eos_token_id is None else token_list("eos_token_id", config.eos_token_id)
        if ids is None or pad is None or pad in ends:
            return None
        visible = ids != pad
    return None if bool(visible.all()) else visible.long()


def warn_of_unread_prompt(config: GenerationConfig, prompt: Prompt, is_encoder_decoder: bool) -> None:
    """Warns of rules that look at the prompt's tokens, where it was given as embeddings and has none."""
    neutral = {"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}
    if not is_encoder_decoder:
        neutral |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    if prompt.encoder_input_ids is not None and not prompt.num_embeds:
        return
    blind = {name: value for name in neutral if (value := getattr(config, name)) not in (None, neutral[name])}
    if blind:
        listed = ", ".join(f"{name}={value!r}" for name, value in blind.items())
        warnings.warn(
            f"generate: {listed}: what was given as embeddings has no token ids, and does not count", stacklevel=4
        )


def set_lengths(
    config: GenerationConfig,
    prompt_length: int,
    num_embeds: int,
    *,
    max_length_given: bool,
    max_position_embeddings: int | None,
) -> None:
    """Makes `config.max_length` and `min_length` count the tokens of the result, whichever way they were given.

    Args:
        config: changed in place.
        prompt_length: token ids in a prompt.
        num_embeds: positions that were given as embeddings, without ids.
        max_length_given: the caller passed `max_length` itself.
        max_position_embeddings: what the default length stays within.

    Raises:
        ValueError: the prompt leaves no room.
    """
    if config.max_new_tokens is not None:
        if max_length_given:
            warnings.warn(
                f"generate: max_new_tokens={config.max_new_tokens} overrides max_length={config.max_length}",
                stacklevel=4,
            )
        config.max_length = prompt_length + config.max_new_tokens
    elif num_embeds:
        config.max_length -= num_embeds
    elif not max_length_given and config.max_length == GenerationConfig.max_length:
        longest = max_position_embeddings or config.max_length + prompt_length
        config.max_length = min(config.max_length + prompt_length, longest)
    if prompt_length >= config.max_length:
        raise ValueError(
            f"generate: the prompt has {prompt_length} tokens, but max_length, which counts them, is "
            f"{config.max_length}; set max_new_tokens"
        )
    if config.min_new_tokens is not None:
        config.min_length = prompt_length + config.min_new_tokens
    elif num_embeds:
        config.min_length = max(config.min_length - num_embeds, 0)
    if config.min_length > config.max_length:
        warnings.warn(
            f"generate: the minimum length {config.min_length} lies beyond the maximum {config.max_length}, "
            "where generation ends",
            stacklevel=4,
        )
