"""Classifier-free guidance: away from what the model would say without the prompt (arXiv 2306.17806)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moekernels.generation.encoder_decoder import encode_prompt
from moekernels.generation.processors import LogitsProcessor
from moekernels.generation.prompt import Prompt, is_index_matrix, on_model_device

if TYPE_CHECKING:
    from moekernels.generation.config import GenerationConfig
    from moekernels.generation.loop import Step
    from moekernels.generation.state import DecodeState


class UnbatchedClassifierFreeGuidanceLogitsProcessor(LogitsProcessor):
    """Turns scores into `u + guidance_scale * (c - u)`, c and u the log-probabilities with and without the prompt.

    Those without come from a second run of the model per step, on the negative prompt and the tokens generated so far.
    It keeps up with whatever becomes of those, beams and rejected candidates included. Letters: B prompts, R rows of
    scores, which may be several for each prompt.

    Args:
        guidance_scale: 1 changes nothing, more strengthens the prompt.
        model: has `generate`.
        unconditional_ids: int64 `[B, m]`, the negative prompt: of a decoder, what stands in the place of the prompt,
            by default its last token; with an encoder, what stands in the place of the source, which has no default.
        unconditional_attention_mask: `[B, m]`; hides nothing by default, with an encoder the padding.
        use_cache: whether the second run keeps keys and values.
        decoder_attention_mask: `[R, n]`, of the tokens that the decoder of an encoder-decoder model begins with.
        config: the parameters of the call; by default the model's.
        step: runs the model; by default as `model` says.

    Raises:
        ValueError: the negative prompt is missing where it has no default, or has not the shape it must have.
    """

    def __init__(
        self,
        guidance_scale: float,
        model: Any,
        unconditional_ids: Tensor | None = None,
        unconditional_attention_mask: Tensor | None = None,
        use_cache: bool = True,
        *,
        decoder_attention_mask: Tensor | None = None,
        config: GenerationConfig | None = None,
        step: Step | None = None,
    ) -> None:
        if not isinstance(guidance_scale, (int, float)):
            raise ValueError(f"guidance_scale must be a number, got {guidance_scale!r}")
        ids, mask = unconditional_ids, unconditional_attention_mask
        if ids is not None:
            if not is_index_matrix(ids) or 0 in ids.shape:
                got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
                raise ValueError(f"negative_prompt_ids must be an integer tensor [batch, length], got {got}")
            on_model_device("negative_prompt_ids", ids, model.device)
        if mask is not None and (ids is None or mask.shape != ids.shape):
            expected = "needs negative_prompt_ids" if ids is None else f"must be {list(ids.shape)} like its prompt"
            raise ValueError(f"negative_prompt_attention_mask {expected}, got {list(mask.shape)}")
        self.guidance_scale = guidance_scale
        self._model = model
        self._ids = ids
        self._mask = mask
        self._use_cache = use_cache
        self._decoder_mask = decoder_attention_mask
        self._config = model.generation_config if config is None else config
        self._step = model._step if step is None else step
        self._state: DecodeState | None = None
        self._prompt_length = 0
        self._in_place_of_prompt: Tensor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.log_softmax(dim=-1)
        if self.guidance_scale == 1:
            return scores
        state = self.start(input_ids) if self._state is None else self._state
        state.follow(torch.cat([self._in_place_of_prompt, input_ids[:, self._prompt_length :]], dim=1))
        outputs = self._step(state, {})
        state.seen(outputs.past_key_values if state.use_cache else None)
        without = outputs.logits[:, -1].to(torch.float32).log_softmax(dim=-1)
        return self.guidance_scale * (scores - without) + without

    def start(self, input_ids: Tensor) -> DecodeState:
        """Makes the state of the second run from the prompts `input_ids` `[R, n]`, at the latest at the first step."""
        num_rows, self._prompt_length = input_ids.shape
        ids, mask = self._ids, self._mask
        times = 1 if ids is None else num_rows // len(ids)
        if ids is not None and times * len(ids) != num_rows:
            raise ValueError(f"negative_prompt_ids must have one row per prompt, got {len(ids)} for {num_rows} rows")
        if getattr(self._model.config, "is_encoder_decoder", False):
            if ids is None:
                raise ValueError("guidance_scale needs negative_prompt_ids: a source, to be encoded beside the other")
            prompt = encode_prompt(self._model, ids, self._config, {"attention_mask": mask})
            prompt.input_ids, prompt.attention_mask = input_ids, self._decoder_mask
        else:
            if ids is None and not input_ids.shape[1]:
                raise ValueError("guidance_scale needs negative_prompt_ids beside a prompt given as inputs_embeds")
            ids = input_ids[:, -1:] if ids is None else ids.repeat_interleave(times, dim=0)
            mask = mask if mask is None or bool((mask != 0).all()) else (mask != 0).long()
            prompt = Prompt(ids.long(), attention_mask=None if mask is None else mask.repeat_interleave(times, dim=0))
        self._in_place_of_prompt = prompt.input_ids
        self._state = self._model._side_state(prompt, self._use_cache)
        return self._state
