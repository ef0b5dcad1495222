"""`generate`, for every model that has a language-modelling head."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moekernels.generation.assisted import assisted_decode
from moekernels.generation.beam_search import BeamResult, beam_search
from moekernels.generation.candidates import candidate_source, check_assistance
from moekernels.generation.config import GenerationConfig
from moekernels.generation.custom import call_custom_generate, load_custom_generate
from moekernels.generation.encoder_decoder import encode_prompt
from moekernels.generation.guidance import UnbatchedClassifierFreeGuidanceLogitsProcessor
from moekernels.generation.loop import Record, Search, Step, decode
from moekernels.generation.outputs import (
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
)
from moekernels.generation.pipeline import build_logits_processors
from moekernels.generation.processors import LogitsProcessor
from moekernels.generation.prompt import Prompt, decoder_prompt, set_lengths, warn_of_unread_prompt
from moekernels.generation.resolve import keywords, refuse_unsupported, resolve_generation_config
from moekernels.generation.state import DecodeState
from moekernels.generation.stopping import Criterion, build_stopping_criteria
from moekernels.generation.streamers import BaseStreamer
from moekernels.generation.synced import SyncedStep, is_synced
from moekernels.generation.transition_scores import transition_scores
from moekernels.nn.cache import Cache, DynamicCache, EncoderDecoderCache, StaticCache

GenerateOutput: TypeAlias = (
    GenerateDecoderOnlyOutput
    | GenerateEncoderDecoderOutput
    | GenerateBeamDecoderOnlyOutput
    | GenerateBeamEncoderDecoderOutput
)

_STATIC_CACHE = "static"


class GenerationMixin:
    """Adds `generate` to a model.

    The model has `config`, `device` and `dtype`, optionally `generation_config`, and is called with those of these
    keywords that its `forward` takes: `input_ids` or `inputs_embeds`, `attention_mask` (None if nothing is masked),
    `position_ids`, `past_key_values`, `use_cache`, `cache_position`, `logits_to_keep`. It returns `.logits` and
    `.past_key_values`.

    A model whose `config.is_encoder_decoder` is set has `get_encoder()`, and is called with `encoder_outputs` and their
    `attention_mask`, `decoder_input_ids`, `decoder_attention_mask` and the last five of those keywords. The rows of
    `decoder_input_ids` may be a multiple of those of `encoder_outputs`: rows that follow one another share one.
    """

    config: Any
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Iterable[Callable[[Tensor, Tensor], Tensor]] | None = None,
        stopping_criteria: Iterable[Criterion] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: BaseStreamer | None = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        use_model_defaults: bool | None = None,
        custom_generate: str | os.PathLike[str] | Callable[..., Any] | None = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        tokenizer: Any = None,
        assistant_tokenizer: Any = None,
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continues every prompt of a batch, or, with an encoder-decoder model, generates from every source.

        Prompts of different lengths are padded on the left; sources on either side.

        Args:
            inputs: int64 `[B, n]`, the prompts or sources; also accepted as `input_ids=`.
            generation_config: the parameters; those at their defaults are taken from the model's own.
            logits_processor: callables `(input_ids, scores) -> scores`, applied after the config's rules and before its
                sampling filters.
            stopping_criteria: callables `(input_ids, scores) -> bool [B]`, besides those of the config.
            prefix_allowed_tokens_fn: `(prompt index, ids) -> allowed ids`.
            synced_gpus: whether a process that has finished goes on running the model until all others have. None means
                yes where FSDP spreads the model over several processes.
            assistant_model: a smaller model with the same vocabulary that goes ahead, so that this one can check
                several tokens at once; for one prompt. `prompt_lookup_num_tokens=n` looks in the text so far instead.
            streamer: receives the tokens as they are chosen.
            negative_prompt_ids: int64 `[B, m]`, what `guidance_scale` leads away from (with an encoder, in place of the
                source); by default the last token of the prompt.
            negative_prompt_attention_mask: `[B, m]`.
            use_model_defaults: whether a given `generation_config` falls back to the model's; None means yes, except
                where a transformers before 4.50 wrote the model's, which then lends only its special tokens.
            custom_generate: what decodes instead, called as `f(model, input_ids, logits_processor=, stopping_criteria=,
                generation_config=, synced_gpus=, streamer=, **model_kwargs)` once all of those are prepared; or a local
                directory whose `custom_generate/generate.py` defines `generate(model, ...)`, which gets the arguments
                of this call. Its result is returned as it is.
            seed: makes sampling repeatable without touching PyTorch's global generator.
            generator: what to draw from, on the model's device, instead.
            tokenizer: needed for `stop_strings`.
            assistant_tokenizer: not supported.
            trust_remote_code: True allows the code in the directory `custom_generate` to be executed.
            **kwargs: generation parameters, which take precedence over both configs, and keywords for the model, such
                as `attention_mask` int `[B, n]` (else inferred from the pad token), `position_ids` `[B, n]` (new tokens
                count on from the last), `past_key_values`, `inputs_embeds`; with an encoder also `encoder_outputs`,
                `decoder_input_ids` and `decoder_attention_mask`. What a batch holds for training, such as `labels`, has
                no effect.

        Returns:
            int64 `[B * num_return_sequences, length]`: prompts or the decoder's first tokens included, padded with the
            pad token (or the first end token) after the end, the best first where there are beams. Or, with
            `return_dict_in_generate`, a `Generate[Beam]{DecoderOnly,EncoderDecoder}Output`.

        Raises:
            ValueError: an argument is wrong or unknown, or the prompt leaves no room below `max_length`.
            NotImplementedError: a search method is asked for that is not there yet.
        """
        if isinstance(custom_generate, (str, os.PathLike)):
            given = {"seed": seed, "generator": generator, "tokenizer": tokenizer}
            return load_custom_generate(custom_generate, trust_remote_code)(
                model=self,
                inputs=inputs,
                generation_config=generation_config,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                synced_gpus=synced_gpus,
                assistant_model=assistant_model,
                streamer=streamer,
                negative_prompt_ids=negative_prompt_ids,
                negative_prompt_attention_mask=negative_prompt_attention_mask,
                use_model_defaults=use_model_defaults,
                **{name: value for name, value in given.items() if value is not None},
                **kwargs,
            )
        if custom_generate is not None and not callable(custom_generate):
            got = type(custom_generate).__name__
            raise ValueError(f"generate: custom_generate must be a callable or a local directory, got {got}")
        config, model_kwargs = resolve_generation_config(self, generation_config, use_model_defaults, kwargs)
        if custom_generate is None:
            refuse_unsupported(config)
            check_assistance(self, config, assistant_model, assistant_tokenizer)
        if ignored := config.ignored_parameters():
            listed = ", ".join(f"{name}={value!r}" for name, value in ignored.items())
            warnings.warn(f"generate: these parameters have no effect with the others given: {listed}", stacklevel=3)
        if streamer is not None and config.num_beams > 1:
            raise ValueError("generate: beam search has no tokens to stream before its end; set num_beams=1")

        past = model_kwargs.pop("past_key_values", None)
        if self._is_encoder_decoder:
            prompt = encode_prompt(self, inputs, config, model_kwargs)
        else:
            prompt = decoder_prompt(inputs, config, model_kwargs, self.device)
        longest = getattr(self.config, "max_position_embeddings", None)
        set_lengths(
            config,
            prompt.input_ids.shape[1],
            prompt.num_embeds,
            max_length_given=kwargs.get("max_length") is not None,
            max_position_embeddings=longest,
        )
        synced_step = SyncedStep(self._step, self.device) if is_synced(synced_gpus, self) else None
        step = self._step if synced_step is None else synced_step
        warn_of_unread_prompt(config, prompt, self._is_encoder_decoder)
        state = self._first_state(config, prompt, past)
        search = Search(
            step,
            state,
            config,
            build_logits_processors(
                config,
                prompt.input_ids.shape[1],
                custom=logits_processor or (),
                encoder_input_ids=prompt.encoder_input_ids,
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                guidance=self._guidance(config, state, step, negative_prompt_ids, negative_prompt_attention_mask),
            ),
            build_stopping_criteria(
                config, custom=stopping_criteria or (), tokenizer=tokenizer, max_position_embeddings=longest
            ),
            Record.of(config, self._is_encoder_decoder),
            self._generator(seed, generator),
            streamer,
        )
        candidates = None if custom_generate is not None else candidate_source(assistant_model, prompt, search)
        if streamer is not None:
            streamer.put(state.input_ids.cpu())

        beams: BeamResult | None = None
        if custom_generate is not None:
            return call_custom_generate(custom_generate, self, search, synced=synced_step is not None)
        if candidates is not None:
            assisted_decode(search, candidates, self.config)
        elif config.num_beams > 1:
            beams = beam_search(search)
        else:
            decode(search)
        if streamer is not None:
            streamer.end()
        if synced_step is not None:
            synced_step.wait(state)
        if not config.return_dict_in_generate:
            return state.input_ids.clone(memory_format=torch.contiguous_format) if beams is None else beams.sequences
        return _output(config, state, search.record, beams, prompt.shared_kwargs.get("encoder_outputs"))

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: Sequence[Tensor],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """The scores of the tokens that were generated. R sequences, n steps.

        Args:
            sequences, scores, beam_indices: fields of the result of `generate(return_dict_in_generate=True,
                output_scores=True)`; `beam_indices` where there were beams.
            normalize_logits: turn the scores of every step into log-probabilities first.

        Returns:
            float32 `[R, n]`; 0 after the end of a sequence that was searched with beams.
        """
        return transition_scores(sequences, scores, beam_indices, normalize_logits)

    @property
    def _is_encoder_decoder(self) -> bool:
        return bool(getattr(self.config, "is_encoder_decoder", False))

    def prepare_inputs_for_generation(self, state: DecodeState) -> dict[str, Any]:
        """The model's keywords for the next step; a model overrides it to change what it is given, or the state."""
        if self._is_encoder_decoder:
            return {
                "decoder_input_ids": state.next_input_ids,
                "decoder_attention_mask": state.attention_mask,
                "cache_position": state.cache_position,
                "past_key_values": state.cache,
                "use_cache": state.use_cache,
                "logits_to_keep": state.logits_to_keep,
                **state.model_kwargs,
            }
        embeds = state.next_inputs_embeds
        tokens = {"input_ids": state.next_input_ids} if embeds is None else {"inputs_embeds": embeds}
        return {
            **tokens,
            "attention_mask": state.attention_mask,
            "position_ids": state.position_ids,
            "cache_position": state.cache_position,
            "past_key_values": state.cache,
            "use_cache": state.use_cache,
            "logits_to_keep": state.logits_to_keep,
            **state.model_kwargs,
        }

    def _step(self, state: DecodeState, extra: dict[str, bool]) -> Any:
        inputs = {**self.prepare_inputs_for_generation(state), **extra}
        names, takes_any = keywords(type(self).forward)  # type: ignore[attr-defined]
        if not takes_any:
            inputs = {name: value for name, value in inputs.items() if name in names}
        return self(**inputs)  # type: ignore[operator]

    def _first_state(self, config: GenerationConfig, prompt: Prompt, past: Any) -> DecodeState:
        """The state before the first step, with as many rows for every prompt as there are beams or samples.

        `past` is the cache that the caller gave, or None.
        """
        times = max(config.num_beams, config.num_return_sequences)
        if past is not None and config.cache_implementation is not None:
            raise ValueError("generate: pass past_key_values or cache_implementation, not both")
        # The last token is not seen by the model.
        longest = prompt.num_embeds + config.max_length - 1
        if isinstance(past, Cache) and config.use_cache and past.fixed_size and past.key_length(1) < longest:
            raise ValueError(
                f"generate: past_key_values has room for {past.key_length(1)} positions, but the prompt and what may "
                f"follow it take {longest}; make it longer, or set max_new_tokens"
            )
        make_cache = None
        if config.use_cache and past is None:
            num_rows = prompt.input_ids.shape[0] * times
            make_cache = self._cache_maker(config, num_rows, longest)
        state = DecodeState(
            _expanded(prompt.input_ids, times),
            _expanded(prompt.attention_mask, times),
            position_ids=_expanded(prompt.position_ids, times),
            inputs_embeds=_expanded(prompt.inputs_embeds, times),
            make_cache=make_cache,
            cache=past if config.use_cache else None,
            max_length=config.max_length,
            model_kwargs={name: _expanded(value, times) for name, value in prompt.row_kwargs.items()}
            | prompt.shared_kwargs,
        )
        if state.cached >= state.target:
            raise ValueError(
                f"generate: past_key_values holds {state.cached} positions, and the prompt {state.target}: input_ids "
                "must be the whole prompt, with at least one token that is not cached"
            )
        return state

    def _guidance(
        self, config: GenerationConfig, state: DecodeState, step: Step, ids: Tensor | None, mask: Tensor | None
    ) -> LogitsProcessor | None:
        """What leads away from the negative prompt `ids`, if `guidance_scale` asks for it."""
        if config.guidance_scale is None or config.guidance_scale == 1:
            if ids is not None:
                warnings.warn("generate: negative_prompt_ids has no effect without guidance_scale", stacklevel=4)
            return None
        guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(
            config.guidance_scale,
            self,
            ids,
            mask,
            config.use_cache,
            decoder_attention_mask=state.attention_mask,
            config=config,
            step=step,
        )
        guidance.start(state.input_ids)
        return guidance

    def _side_state(self, prompt: Prompt, use_cache: bool) -> DecodeState:
        """A state beside that of the search, with a row for every row of the prompt."""
        num_rows = len(prompt.input_ids)
        return DecodeState(
            prompt.input_ids,
            prompt.attention_mask,
            position_ids=prompt.position_ids,
            make_cache=self._cache_maker(GenerationConfig(), num_rows, 0) if use_cache else None,
            model_kwargs=prompt.row_kwargs | prompt.shared_kwargs,
        )

    def _cache_maker(self, config: GenerationConfig, num_rows: int, max_cache_len: int) -> Callable[[], Any]:
        """Makes the cache that `cache_implementation` names."""
        wrapped: Callable[[Cache], Cache] = EncoderDecoderCache if self._is_encoder_decoder else lambda cache: cache
        if config.cache_implementation != _STATIC_CACHE:
            return lambda: wrapped(DynamicCache())
        return lambda: wrapped(
            StaticCache(
                self.config, max_batch_size=num_rows, max_cache_len=max_cache_len, device=self.device, dtype=self.dtype
            )
        )

    def _generator(self, seed: int | None, generator: torch.Generator | None) -> torch.Generator | None:
        """What to draw from: the given generator, one of its own for a seed, or None for the global one."""
        if seed is not None and generator is not None:
            raise ValueError("generate: pass seed or generator, not both")
        return generator if seed is None else torch.Generator(self.device).manual_seed(seed)


def _output(
    config: GenerationConfig, state: DecodeState, record: Record, beams: BeamResult | None, encoder_outputs: Any
) -> GenerateOutput:
    """The result as one of the four classes: with beams or without, with an encoder or without."""
    fields: dict[str, Any] = {**record.fields(), "past_key_values": state.cache}
    if encoder_outputs is not None:
        for option, name in (("output_attentions", "attentions"), ("output_hidden_states", "hidden_states")):
            if getattr(config, option):
                fields[f"encoder_{name}"] = getattr(encoder_outputs, name, None)
    if beams is None:
        kind = GenerateDecoderOnlyOutput if encoder_outputs is None else GenerateEncoderDecoderOutput
        return kind(sequences=state.input_ids.clone(memory_format=torch.contiguous_format), **fields)
    beam_kind = GenerateBeamDecoderOnlyOutput if encoder_outputs is None else GenerateBeamEncoderDecoderOutput
    return beam_kind(
        sequences=beams.sequences,
        sequences_scores=beams.scores if config.output_scores else None,
        beam_indices=beams.beam_indices,
        **fields,
    )


def _expanded(value: Any, times: int) -> Any:
    """A tensor with every row `times` times in a row; anything else as it is."""
    return value.repeat_interleave(times, dim=0) if times > 1 and isinstance(value, Tensor) else value
