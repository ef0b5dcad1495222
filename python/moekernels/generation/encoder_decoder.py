"""The prompt of an encoder-decoder model: a source, which the encoder reads once, and the decoder's first tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from moekernels.generation.config import GenerationConfig
from moekernels.generation.prompt import Prompt, is_index_matrix, on_model_device, visible_or_none

# Keywords that are not the encoder's, by how they begin.
_OF_THE_DECODER = ("decoder_", "cross_attn", "use_cache")


def encode_prompt(model: Any, inputs: Tensor | None, config: GenerationConfig, model_kwargs: dict[str, Any]) -> Prompt:
    """Runs the encoder, unless its outputs were given, and returns what the decoder starts from.

    The prompt's keywords have one row per source, whatever the number of sequences to generate from it: rows of the
    decoder that belong to one source follow one another, and the model lets them share it.

    Args:
        model: has `get_encoder()`, `config` and `device`.
        inputs: int64 `[B, S]`, the sources; also accepted as `input_ids` or, as embeddings, `inputs_embeds`.
        model_kwargs: the caller's keywords; those of the prompt are taken out.

    Raises:
        ValueError: there is no source or no start token, one was given twice, or their batches differ.
    """
    source = _take_source(inputs, model_kwargs)
    mask = model_kwargs.pop("attention_mask", None)
    encoder_outputs = model_kwargs.pop("encoder_outputs", None)
    shape = _source_shape(source, encoder_outputs)
    if source is not None:
        on_model_device("the source", source, model.device)
    if mask is not None and mask.shape != shape:
        raise ValueError(f"generate: attention_mask must be {list(shape)} like the source, got {list(mask.shape)}")
    ids = source if source is not None and source.dim() == 2 else None
    mask = visible_or_none(ids, mask, config)
    if encoder_outputs is None:
        encoder_outputs = _encode(model, source, mask, config, model_kwargs)

    decoder_ids, decoder_mask = _decoder_prompt(shape[0], config, model_kwargs, model.device)
    return Prompt(
        decoder_ids,
        attention_mask=decoder_mask,
        encoder_input_ids=ids,
        shared_kwargs={"encoder_outputs": encoder_outputs, "attention_mask": mask, **model_kwargs},
    )


def _take_source(inputs: Tensor | None, model_kwargs: dict[str, Any]) -> Tensor | None:
    """The source's ids `[B, S]` or embeddings `[B, S, H]`, taken out of the keywords; None if there are none."""
    given = {"inputs": inputs, "input_ids": model_kwargs.pop("input_ids", None)}
    given["inputs_embeds"] = model_kwargs.pop("inputs_embeds", None)
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"generate: the source was given twice, as {' and as '.join(given)}")
    for name, value in given.items():
        embeds = isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()
        if not (embeds if name == "inputs_embeds" else is_index_matrix(value)):
            expected = "[batch, length, hidden]" if name == "inputs_embeds" else "an integer tensor [batch, length]"
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"generate: {name} must be {expected}, got {got}")
        if 0 in value.shape[:2]:
            raise ValueError(f"generate: {name} must hold at least one token per source, got {list(value.shape)}")
        return value
    return None


def _source_shape(source: Tensor | None, encoder_outputs: Any) -> torch.Size:
    """`[B, S]`, on which the source and its encoding must agree."""
    if encoder_outputs is None:
        if source is None:
            raise ValueError("generate: there is no source: pass input_ids, inputs_embeds or encoder_outputs")
        return source.shape[:2]
    hidden = None if isinstance(encoder_outputs, Tensor) else encoder_outputs[0]
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        got = f" of {list(hidden.shape)}" if isinstance(hidden, Tensor) else ""
        raise ValueError(
            "generate: encoder_outputs must be what the encoder returns, or a tuple that begins with its last hidden "
            f"state [batch, length, hidden], got {type(encoder_outputs).__name__}{got}"
        )
    if not hidden.shape[0] * hidden.shape[1]:
        raise ValueError(f"generate: encoder_outputs must hold at least one token per source, got {list(hidden.shape)}")
    if source is not None and source.shape[:2] != hidden.shape[:2]:
        raise ValueError(
            f"generate: encoder_outputs {list(hidden.shape)} and the source {list(source.shape)} differ in batch or "
            "length"
        )
    return hidden.shape[:2]


def _encode(
    model: Any, source: Tensor | None, mask: Tensor | None, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> Any:
    assert source is not None
    encoder = model.get_encoder()
    names = inspect.signature(encoder.forward).parameters
    # What is the encoder's alone must not reach the decoder as well, but a model may take a keyword for both.
    kwargs = {
        name: value
        for name, value in model_kwargs.items()
        if name in names and not name.startswith(_OF_THE_DECODER) and value is not None
    }
    kwargs["input_ids" if source.dim() == 2 else "inputs_embeds"] = source.long() if source.dim() == 2 else source
    for option in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, option):
            kwargs[option] = True
    return encoder(**kwargs, attention_mask=mask, return_dict=True)


def _decoder_prompt(
    batch_size: int, config: GenerationConfig, model_kwargs: dict[str, Any], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The tokens int64 `[B, n]` that the decoder begins with, and their mask if one was given.

    Tokens that the caller gives get the start token in front, unless a row begins with it already.
    """
    ids = model_kwargs.pop("decoder_input_ids", None)
    mask = model_kwargs.pop("decoder_attention_mask", None)
    start = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
    if start is None:
        raise ValueError("generate: an encoder-decoder model needs decoder_start_token_id or bos_token_id")
    try:
        starts = torch.as_tensor(start, dtype=torch.int64, device=device).expand(batch_size).reshape(batch_size, 1)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"generate: decoder_start_token_id must be a token id, or one for each of {batch_size} rows, got {start!r}"
        ) from error
    if ids is None:
        ids = starts
    elif not is_index_matrix(ids) or ids.shape[0] != batch_size or ids.shape[1] == 0:
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"generate: decoder_input_ids must be an integer tensor [{batch_size}, length], got {got}")
    elif mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"generate: decoder_attention_mask must be {list(ids.shape)} like decoder_input_ids, got {list(mask.shape)}"
        )
    elif bool((ids[:, :1] != starts).all()):
        ids = torch.cat([starts, ids], dim=1)
        mask = None if mask is None else torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
    if mask is not None and mask.shape != ids.shape:
        raise ValueError("generate: decoder_attention_mask goes with decoder_input_ids, which are missing")
    on_model_device("decoder_input_ids", ids, device)
    return ids.long(), None if mask is None or bool((mask != 0).all()) else (mask != 0).long()
