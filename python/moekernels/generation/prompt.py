"""From what a caller passes to `generate` to checked tensors and final lengths."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from moekernels.generation.config import GenerationConfig
from moekernels.generation.processors import token_list


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
    if ids is not None and not _is_index_matrix(ids):
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
    if ids.device.type != torch.device(device).type:
        raise ValueError(f"generate: input_ids is on {ids.device}, but the model on {device}")
    return ids.long(), embeds


def _is_index_matrix(ids: Any) -> bool:
    return isinstance(ids, Tensor) and ids.dim() == 2 and ids.dtype in (torch.int32, torch.int64)


def attention_mask_for(prompt: Tensor, given: Tensor | None, config: GenerationConfig) -> Tensor | None:
    """The mask int64 `[B, m]` of a prompt (ids or embeddings), given or inferred; None where it would hide nothing.

    A mask is inferred from ids in which the pad token occurs, unless that is an end token too. Warns where the last
    position is hidden, because a decoder would then go on from padding.

    Raises:
        ValueError: the given mask does not have the prompt's shape.
    """
    if given is not None:
        if given.shape != prompt.shape[:2]:
            raise ValueError(
                f"generate: attention_mask must be {list(prompt.shape[:2])} like the prompt, got {list(given.shape)}"
            )
        visible = given != 0
    else:
        pad = config.pad_token_id
        ends = [] if config.eos_token_id is None else token_list("eos_token_id", config.eos_token_id)
        if pad is None or pad in ends or prompt.dim() != 2:
            return None
        visible = prompt != pad
    if bool(visible.all()):
        return None
    if not bool(visible[:, -1].all()):
        warnings.warn(
            "generate: a prompt is padded on the right, and a decoder goes on from the padding; "
            "tokenize with padding_side='left'",
            stacklevel=4,
        )
    return visible.long()


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
