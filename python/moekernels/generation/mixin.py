"""`generate`, for every model that has a language-modelling head."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moekernels.generation.config import GenerationConfig
from moekernels.generation.loop import Chooser, Record, Sampler, choose_greedily, decode
from moekernels.generation.outputs import GenerateDecoderOnlyOutput
from moekernels.generation.pipeline import build_logits_processors
from moekernels.generation.processors import token_list
from moekernels.generation.prompt import attention_mask_for, set_lengths, take_prompt
from moekernels.generation.state import DecodeState
from moekernels.generation.stopping import Criterion, build_stopping_criteria
from moekernels.generation.streamers import BaseStreamer
from moekernels.nn.cache import DynamicCache, StaticCache

_STATIC_CACHE = "static"
# Keywords of `generate` that describe the prompt.
_PROMPT = frozenset(("input_ids", "inputs_embeds", "attention_mask", "past_key_values"))
# Keywords of a model that change with every step, and are not the caller's to set.
_OF_THE_LOOP = frozenset(("cache_position", "position_ids", "labels", "return_dict", "self"))


class GenerationMixin:
    """Adds `generate` to a model.

    The model has `config`, `device` and `dtype`, optionally `generation_config`, and is called with those of these
    keywords that its `forward` takes: `input_ids` or `inputs_embeds`, `attention_mask` (None if nothing is masked),
    `position_ids`, `past_key_values`, `use_cache`, `cache_position`, `logits_to_keep`. It returns `.logits` and
    `.past_key_values`.
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
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Continues every prompt of a batch. Prompts of different lengths are padded on the left.

        Args:
            inputs: int64 `[B, n]`, the prompts; also accepted as `input_ids=`.
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
                as `attention_mask` int `[B, n]` (else inferred from the pad token), `past_key_values`, `inputs_embeds`.
            synced_gpus, assistant_model, negative_prompt_ids, negative_prompt_attention_mask: not supported yet.

        Returns:
            int64 `[B * num_return_sequences, length]`, prompts included, padded with the pad token (or the first end
            token) after the end; or, with `return_dict_in_generate`, a `GenerateDecoderOnlyOutput`.

        Raises:
            ValueError: an argument is wrong or unknown, or the prompt leaves no room below `max_length`.
            NotImplementedError: a search method is asked for that is not there yet.
        """
        config, model_kwargs = self._resolve_generation_config(generation_config, use_model_defaults, kwargs)
        _refuse_unsupported(
            config,
            is_encoder_decoder=getattr(self.config, "is_encoder_decoder", False),
            synced_gpus=synced_gpus,
            assistant_model=assistant_model,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
        )
        if ignored := config.ignored_parameters():
            listed = ", ".join(f"{name}={value!r}" for name, value in ignored.items())
            warnings.warn(f"generate: these parameters have no effect with the others given: {listed}", stacklevel=3)

        input_ids, inputs_embeds = take_prompt(inputs, config, model_kwargs, self.device)
        prompt = input_ids if inputs_embeds is None else inputs_embeds
        mask = attention_mask_for(prompt, model_kwargs.pop("attention_mask", None), config)
        longest = getattr(self.config, "max_position_embeddings", None)
        set_lengths(
            config,
            input_ids.shape[1],
            prompt.shape[1] - input_ids.shape[1],
            max_length_given=kwargs.get("max_length") is not None,
            max_position_embeddings=longest,
        )
        state = self._first_state(config, input_ids, inputs_embeds, mask, model_kwargs)

        record = Record()
        if config.return_dict_in_generate:
            record = Record.of(
                scores=config.output_scores,
                logits=bool(config.output_logits),
                attentions=config.output_attentions,
                hidden_states=config.output_hidden_states,
            )
        processors = build_logits_processors(
            config,
            input_ids.shape[1],
            custom=logits_processor or (),
            encoder_input_ids=input_ids if inputs_embeds is None else None,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        )
        criteria = build_stopping_criteria(
            config,
            custom=stopping_criteria or (),
            tokenizer=tokenizer,
            max_position_embeddings=longest,
        )
        if streamer is not None:
            streamer.put(state.input_ids.cpu())
        decode(
            self._step,
            state,
            self._chooser(config, seed, generator),
            processors=processors,
            criteria=criteria,
            record=record,
            pad_token_id=_pad_token(config),
            prefill_chunk_size=config.prefill_chunk_size,
            streamer=streamer,
        )
        sequences = state.input_ids.clone(memory_format=torch.contiguous_format)
        if not config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=None if record.scores is None else tuple(record.scores),
            logits=None if record.logits is None else tuple(record.logits),
            attentions=None if record.attentions is None else tuple(record.attentions),
            hidden_states=None if record.hidden_states is None else tuple(record.hidden_states),
            past_key_values=state.cache,
        )

    def prepare_inputs_for_generation(self, state: DecodeState) -> dict[str, Any]:
        """The model's keywords for the next step; a model overrides it to change what it is given, or the state.

        Only `logits_to_keep=1` row of logits is asked for: nobody reads those of the prompt.
        """
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
        if unknown := sorted(set(model_kwargs) - _PROMPT - (names - _OF_THE_LOOP)):
            raise ValueError(f"generate: neither generation parameters nor keywords of the model: {', '.join(unknown)}")
        return config, {name: value for name, value in model_kwargs.items() if value is not None}

    def _first_state(
        self,
        config: GenerationConfig,
        input_ids: Tensor,
        inputs_embeds: Tensor | None,
        mask: Tensor | None,
        model_kwargs: dict[str, Any],
    ) -> DecodeState:
        """The state before the first step, with `num_return_sequences` rows for every prompt."""
        times = config.num_return_sequences
        past = model_kwargs.pop("past_key_values", None)
        if past is not None and config.cache_implementation is not None:
            raise ValueError("generate: pass past_key_values or cache_implementation, not both")
        make_cache = None
        if config.use_cache and past is None:
            length = input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1]
            make_cache = self._cache_maker(
                config, input_ids.shape[0] * times, length + config.max_length - input_ids.shape[1] - 1
            )
        state = DecodeState(
            _expanded(input_ids, times),
            _expanded(mask, times),
            inputs_embeds=_expanded(inputs_embeds, times),
            make_cache=make_cache,
            cache=past if config.use_cache else None,
            max_length=config.max_length,
            model_kwargs={name: _expanded(value, times) for name, value in model_kwargs.items()},
        )
        if state.cached >= state.target:
            raise ValueError(
                f"generate: past_key_values holds {state.cached} positions, and the prompt {state.target}: input_ids "
                "must be the whole prompt, with at least one token that is not cached"
            )
        return state

    def _cache_maker(self, config: GenerationConfig, num_rows: int, max_cache_len: int) -> Callable[[], Any]:
        """Makes the cache that `cache_implementation` names."""
        if config.cache_implementation != _STATIC_CACHE:
            return DynamicCache
        return lambda: StaticCache(
            self.config, max_batch_size=num_rows, max_cache_len=max_cache_len, device=self.device, dtype=self.dtype
        )

    def _chooser(self, config: GenerationConfig, seed: int | None, generator: torch.Generator | None) -> Chooser:
        if seed is not None and generator is not None:
            raise ValueError("generate: pass seed or generator, not both")
        if not config.do_sample:
            return choose_greedily
        if seed is not None:
            generator = torch.Generator(self.device).manual_seed(seed)
        return Sampler(generator)


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


def _refuse_unsupported(config: GenerationConfig, is_encoder_decoder: bool, **arguments: Any) -> None:
    """Raises NotImplementedError for what this version cannot do, rather than doing something else."""
    wanted = {
        "encoder-decoder generation": is_encoder_decoder,
        "beam search (num_beams)": config.num_beams > 1,
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
