"""Which logits processors a generation config asks for, in the order transformers applies them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor

from moekernels.generation.config import GenerationConfig
from moekernels.generation.processors import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    token_list,
)
from moekernels.generation.warpers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

T = TypeVar("T")


def merged(defaults: Iterable[T], custom: Iterable[T]) -> list[T]:
    """`defaults` followed by `custom`, where a custom object takes the place of a default one of the same class."""
    custom = list(custom)
    replaced = {type(item): item for item in reversed(custom)}
    result = [replaced.get(type(item), item) for item in defaults]
    return result + [item for item in custom if not any(item is placed for placed in result)]


def rules(
    config: GenerationConfig,
    prompt_length: int,
    encoder_input_ids: Tensor | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
) -> LogitsProcessorList:
    """The penalties, bans and forced tokens of `config`, whose `max_length` is final."""
    processors = LogitsProcessorList()
    eos = config.eos_token_id

    if config.sequence_bias is not None:
        processors.append(SequenceBiasLogitsProcessor(config.sequence_bias))
    if encoder_input_ids is not None and (config.encoder_repetition_penalty or 1.0) != 1.0:
        assert config.encoder_repetition_penalty is not None
        processors.append(EncoderRepetitionPenaltyLogitsProcessor(config.encoder_repetition_penalty, encoder_input_ids))
    if config.repetition_penalty is not None and config.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if encoder_input_ids is not None and config.encoder_no_repeat_ngram_size:
        processors.append(EncoderNoRepeatNGramLogitsProcessor(config.encoder_no_repeat_ngram_size, encoder_input_ids))
    if config.bad_words_ids is not None:
        processors.append(NoBadWordsLogitsProcessor(config.bad_words_ids, eos))
    if config.min_length and eos is not None:
        processors.append(MinLengthLogitsProcessor(config.min_length, eos))
    if config.min_new_tokens and eos is not None:
        processors.append(MinNewTokensLengthLogitsProcessor(prompt_length, config.min_new_tokens, eos))
    if prefix_allowed_tokens_fn is not None:
        beams = config.num_beams // config.num_beam_groups
        processors.append(PrefixConstrainedLogitsProcessor(prefix_allowed_tokens_fn, beams))
    if config.forced_bos_token_id is not None:
        processors.append(ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        processors.append(ForcedEOSTokenLogitsProcessor(config.max_length, config.forced_eos_token_id))
    if config.remove_invalid_values:
        processors.append(InfNanRemoveLogitsProcessor())
    if config.exponential_decay_length_penalty is not None and eos is not None:
        processors.append(ExponentialDecayLengthPenalty(config.exponential_decay_length_penalty, eos, prompt_length))
    if config.suppress_tokens is not None:
        processors.append(SuppressTokensLogitsProcessor(config.suppress_tokens))
    if config.begin_suppress_tokens is not None:
        forced_first = prompt_length == 1 and config.forced_bos_token_id is not None
        begin = prompt_length + 1 if forced_first else prompt_length
        processors.append(SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin))
    return processors


def warpers(config: GenerationConfig) -> LogitsProcessorList:
    """The filters of `config` for sampling; none when it does not sample."""
    processors = LogitsProcessorList()
    if not config.do_sample:
        return processors
    # Beam search must be left with a token that does not end the sequence.
    keep = 1
    if config.num_beams > 1:
        keep = 2 if config.eos_token_id is None else len(token_list("eos_token_id", config.eos_token_id)) + 1

    if config.temperature is not None and config.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        processors.append(TopKLogitsWarper(config.top_k, min_tokens_to_keep=keep))
    if config.top_p is not None and config.top_p < 1.0:
        processors.append(TopPLogitsWarper(config.top_p, min_tokens_to_keep=keep))
    if config.min_p is not None:
        processors.append(MinPLogitsWarper(config.min_p, min_tokens_to_keep=keep))
    if config.typical_p is not None and config.typical_p < 1.0:
        processors.append(TypicalLogitsWarper(config.typical_p, min_tokens_to_keep=keep))
    if config.epsilon_cutoff:
        processors.append(EpsilonLogitsWarper(config.epsilon_cutoff, min_tokens_to_keep=keep))
    if config.eta_cutoff:
        processors.append(EtaLogitsWarper(config.eta_cutoff, min_tokens_to_keep=keep))
    return processors


def build_logits_processors(
    config: GenerationConfig,
    prompt_length: int,
    *,
    custom: Iterable[Callable[[Tensor, Tensor], Tensor]] = (),
    encoder_input_ids: Tensor | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    guidance: LogitsProcessor | None = None,
) -> LogitsProcessorList:
    """Everything to apply to the scores of one step: guidance, rules, the caller's processors, filters, normalisation.

    Args:
        config: the resolved parameters; `max_length` counts the prompt.
        prompt_length: tokens per sequence before the first generated one.
        custom: the caller's processors; one of a class that the config asks for too takes its place.
        encoder_input_ids: int64 `[B, length]`, what the encoder penalties apply to.
        prefix_allowed_tokens_fn: see `PrefixConstrainedLogitsProcessor`.
        guidance: what comes before everything else.

    Raises:
        ValueError: a parameter is out of its range.
    """
    defaults = rules(config, prompt_length, encoder_input_ids, prefix_allowed_tokens_fn)
    processors = LogitsProcessorList(merged(defaults if guidance is None else [guidance, *defaults], custom))
    processors += warpers(config)
    if config.renormalize_logits:
        processors.append(LogitNormalization())
    return processors
