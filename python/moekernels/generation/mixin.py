"""`generate`, for every model that has a language-modelling head."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moekernels.generation.beam_search import BeamResult, beam_search
from moekernels.generation.config import GenerationConfig
from moekernels.generation.encoder_decoder import encode_prompt
from moekernels.generation.loop import Record, Sampler, choose_greedily, decode
from moekernels.generation.outputs import (
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
)
from moekernels.generation.pipeline import build_logits_processors
from moekernels.generation.processors import token_list
from moekernels.generation.prompt import Prompt, decoder_prompt, set_lengths
from moekernels.generation.state import DecodeState
from moekernels.generation.stopping import Criterion, build_stopping_criteria
from moekernels.generation.streamers import BaseStreamer
from moekernels.nn.cache import Cache, DynamicCache, EncoderDecoderCache, StaticCache

GenerateOutput: TypeAlias = (
    GenerateDecoderOnlyOutput
    | GenerateEncoderDecoderOutput
    | GenerateBeamDecoderOnlyOutput
    | GenerateBeamEncoderDecoderOutput
)

_STATIC_CACHE = "static"
# Keywords of `generate` that describe the prompt.
_PROMPT = frozenset(("input_ids", "inputs_embeds", "attention_mask", "past_key_values"))
_DECODER_PROMPT = frozenset(("encoder_outputs", "decoder_input_ids", "decoder_attention_mask"))
# Keywords of a model that change with every step, and are not the caller's to set.
_OF_THE_LOOP = frozenset(
    ("cache_position", "position_ids", "decoder_position_ids", "decoder_inputs_embeds", "labels", "return_dict", "self")
)


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
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Tensor | GenerateOutput:
        """Continues every prompt of a batch, or, with an encoder-decoder model, generates from every source.

        Prompts of different lengths are padded on the left; sources on either side.

        Args:
            inputs: int64 `[B, n]`, the prompts or sources; also accepted as `input_ids=`.
            generation_config: the parameters; those at their defaults are taken from the model's own.
            logits_processor: callables `(input_ids, scores) -> scores`, applied after the config's rules and before its
                sampling filters.
            stopping_criteria: callables `(input_ids, scores) -> bool [B]`, besides those of the config.
            prefix_allowed_tokens_fn: `(prompt index, ids) -> allowed ids`.
            streamer: receives the tokens as they are chosen.
            use_model_defaults: whether a given `generation_config` falls back to the model's; None means yes, except
                where a transformers before 4.50 wrote the model's, which then lends only its special tokens.
            seed: makes sampling repeatable without touching PyTorch's global generator.
            generator: what to draw from, on the model's device, instead.
            tokenizer: needed for `stop_strings`.
            **kwargs: generation parameters, which take precedence over both configs, and keywords for the model, such
                as `attention_mask` int `[B, n]` (else inferred from the pad token), `past_key_values`, `inputs_embeds`;
                with an encoder also `encoder_outputs`, `decoder_input_ids` and `decoder_attention_mask`.
            synced_gpus, assistant_model, negative_prompt_ids, negative_prompt_attention_mask: not supported yet.

        Returns:
            int64 `[B * num_return_sequences, length]`: prompts or the decoder's first tokens included, padded with the
            pad token (or the first end token) after the end, the best first where there are beams. Or, with
            `return_dict_in_generate`, a `Generate[Beam]{DecoderOnly,EncoderDecoder}Output`.

        Raises:
            ValueError: an argument is wrong or unknown, or the prompt leaves no room below `max_length`.
            NotImplementedError: a search method is asked for that is not there yet.
        """
        config, model_kwargs = self._resolve_generation_config(generation_config, use_model_defaults, kwargs)
        _refuse_unsupported(
            config,
            synced_gpus=synced_gpus,
            assistant_model=assistant_model,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
        )
        if ignored := config.ignored_parameters():
            listed = ", ".join(f"{name}={value!r}" for name, value in ignored.items())
            warnings.warn(f"generate: these parameters have no effect with the others given: {listed}", stacklevel=3)

        if streamer is not None and config.num_beams > 1:
            raise ValueError("generate: beam search has no tokens to stream before its end; set num_beams=1")

        past = model_kwargs.pop("past_key_values", None)
        is_encoder_decoder = self._is_encoder_decoder
        if is_encoder_decoder:
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
        state = self._first_state(config, prompt, past)
        record = Record.of(config, is_encoder_decoder)
        processors = build_logits_processors(
            config,
            prompt.input_ids.shape[1],
            custom=logits_processor or (),
            encoder_input_ids=prompt.encoder_input_ids,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        )
        criteria = build_stopping_criteria(
            config,
            custom=stopping_criteria or (),
            tokenizer=tokenizer,
            max_position_embeddings=longest,
        )
        generator = self._generator(seed, generator)
        beams: BeamResult | None = None
        if config.num_beams > 1:
            beams = beam_search(
                self._step,
                state,
                config,
                processors=processors,
                criteria=criteria,
                record=record,
                generator=generator,
            )
        else:
            if streamer is not None:
                streamer.put(state.input_ids.cpu())
            decode(
                self._step,
                state,
                Sampler(generator) if config.do_sample else choose_greedily,
                processors=processors,
                criteria=criteria,
                record=record,
                pad_token_id=_pad_token(config),
                prefill_chunk_size=config.prefill_chunk_size,
                streamer=streamer,
            )
        if not config.return_dict_in_generate:
            return state.input_ids.clone(memory_format=torch.contiguous_format) if beams is None else beams.sequences
        return _output(config, state, record, beams, prompt.shared_kwargs.get("encoder_outputs"))

    @property
    def _is_encoder_decoder(self) -> bool:
        return bool(getattr(self.config, "is_encoder_decoder", False))

    def prepare_inputs_for_generation(self, state: DecodeState) -> dict[str, Any]:
        """The model's keywords for the next step; a model overrides it to change what it is given, or the state.

        Only `logits_to_keep=1` row of logits is asked for: nobody reads those of the prompt.
        """
        if self._is_encoder_decoder:
            return {
                "decoder_input_ids": state.next_input_ids,
                "decoder_attention_mask": state.attention_mask,
                "cache_position": state.cache_position,
                "past_key_values": state.cache,
                "use_cache": state.use_cache,
                "logits_to_keep": 1,
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
            "logits_to_keep": 1,
            **state.model_kwargs,
        }

    def _step(self, state: DecodeState, extra: dict[str, bool]) -> Any:
        inputs = {**self.prepare_inputs_for_generation(state), **extra}
        names, takes_any = _keywords(type(self).forward)  # type: ignore[attr-defined]
        if not takes_any:
            inputs = {name: value for name, value in inputs.items() if name in names}
        return self(**inputs)  # type: ignore[operator]

    def _resolve_generation_config(
        self, given: GenerationConfig | None, use_model_defaults: bool | None, kwargs: dict[str, Any]
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Merges keywords over the given config over the model's. Returns it with the keywords meant for the model."""
        own = getattr(self, "generation_config", None) or GenerationConfig.from_model_config(self.config)
        if given is None:
            config = copy.deepcopy(own)
        elif use_model_defaults or (use_model_defaults is None and _since_4_50(own.transformers_version)):
            config = given.with_defaults_from(own)
        else:
            config = copy.deepcopy(given)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
                if getattr(config, name) is None:
                    setattr(config, name, getattr(own, name))
        model_kwargs = config.update(**kwargs)
        # Some tokenizers return it, but a decoder has no use for it.
        model_kwargs.pop("token_type_ids", None)
        names, _ = _keywords(type(self).forward)  # type: ignore[attr-defined]
        prompt = _PROMPT | _DECODER_PROMPT if self._is_encoder_decoder else _PROMPT
        if unknown := sorted(set(model_kwargs) - prompt - (names - _OF_THE_LOOP)):
            raise ValueError(f"generate: neither generation parameters nor keywords of the model: {', '.join(unknown)}")
        return config, {name: value for name, value in model_kwargs.items() if value is not None}

    def _first_state(self, config: GenerationConfig, prompt: Prompt, past: Any) -> DecodeState:
        """The state before the first step, with as many rows for every prompt as there are beams or samples.

        `past` is the cache that the caller gave, or None.
        """
        times = max(config.num_beams, config.num_return_sequences)
        if past is not None and config.cache_implementation is not None:
            raise ValueError("generate: pass past_key_values or cache_implementation, not both")
        make_cache = None
        if config.use_cache and past is None:
            num_rows = prompt.input_ids.shape[0] * times
            make_cache = self._cache_maker(config, num_rows, prompt.num_embeds + config.max_length - 1)
        state = DecodeState(
            _expanded(prompt.input_ids, times),
            _expanded(prompt.attention_mask, times),
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


def _pad_token(config: GenerationConfig) -> int | None:
    """What fills a row after its end: the pad token, or else the first end token."""
    if config.pad_token_id is not None or config.eos_token_id is None:
        return config.pad_token_id
    return token_list("eos_token_id", config.eos_token_id)[0]


@cache
def _keywords(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
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


def _refuse_unsupported(config: GenerationConfig, **arguments: Any) -> None:
    """Raises NotImplementedError for what this version cannot do, rather than doing something else."""
    wanted = {
        "diverse beam search (num_beam_groups)": config.num_beam_groups > 1 or config.diversity_penalty > 0,
        "constrained beam search": config.constraints is not None or config.force_words_ids is not None,
        "prompt lookup": config.prompt_lookup_num_tokens is not None,
        "early-exit assistance": config.assistant_early_exit is not None,
        "classifier-free guidance (guidance_scale)": config.guidance_scale not in (None, 1, 1.0),
        "contrastive search (penalty_alpha)": bool(config.penalty_alpha) and not config.do_sample,
        "DoLa decoding (dola_layers)": config.dola_layers is not None,
        "watermarking": config.watermarking_config is not None,
        "token healing": config.token_healing,
        **{name: bool(value) if not isinstance(value, Tensor) else True for name, value in arguments.items()},
    }
    for feature, asked in wanted.items():
        if asked:
            raise NotImplementedError(f"generate: {feature} is not supported yet")
