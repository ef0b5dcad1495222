"""A transformers model behind our `generate`, so that the loop alone is compared with transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers

from moekernels.generation import GenerationConfig, GenerationMixin

VOCAB, PAD, EOS = 97, 1, 2


class Adapted(GenerationMixin):
    """Takes the keywords of the wrapped model and uses transformers' caches; counts the tokens the model is run on."""

    def __init__(self, model: transformers.PreTrainedModel, generation_config: GenerationConfig | None = None) -> None:
        self.model = model
        self.config = model.config
        self.device = model.device
        self.dtype = model.dtype
        self.generation_config = generation_config or GenerationConfig.from_model_config(model.config)
        self.calls: list[dict[str, Any]] = []

    def forward(self, **kwargs: Any) -> Any:
        self.calls.append(kwargs)
        return self.model(**kwargs, return_dict=True)

    __call__ = forward

    @property
    def tokens_run(self) -> int:
        return sum(call["cache_position"].numel() for call in self.calls)

    def _cache_maker(self, config: GenerationConfig, num_rows: int, max_cache_len: int) -> Callable[[], Any]:
        if config.cache_implementation == "static":
            return lambda: transformers.StaticCache(config=self.config, max_cache_len=max_cache_len)
        return lambda: Cache(config=self.config)


class Cache(transformers.DynamicCache):
    def reorder(self, beam_idx: torch.Tensor, start: int = 0) -> None:
        self.reorder_cache(beam_idx)


class AdaptedSeq2Seq(Adapted):
    """The same for an encoder-decoder model, which wants a row of the encoder's output for every row of the decoder."""

    def __init__(self, model: transformers.PreTrainedModel, generation_config: GenerationConfig | None = None) -> None:
        super().__init__(model, generation_config)
        self.encoder_runs = 0
        self.encoder = _CountedEncoder(self)

    def get_encoder(self) -> Any:
        return self.encoder

    def forward(self, encoder_outputs: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        self.calls.append(kwargs)
        hidden = encoder_outputs[0]
        times = len(kwargs["decoder_input_ids"]) // len(hidden)
        mask = hidden.new_ones(hidden.shape[:2]) if attention_mask is None else attention_mask
        kwargs.pop("logits_to_keep", None)
        return self.model(
            encoder_outputs=(hidden.repeat_interleave(times, 0),),
            attention_mask=mask.repeat_interleave(times, 0),
            **kwargs,
            return_dict=True,
        )

    __call__ = forward

    def _cache_maker(self, config: GenerationConfig, num_rows: int, max_cache_len: int) -> Callable[[], Any]:
        return lambda: Seq2SeqCache(transformers.DynamicCache(), transformers.DynamicCache())


class Seq2SeqCache(transformers.EncoderDecoderCache):
    def reorder(self, beam_idx: torch.Tensor, start: int = 0) -> None:
        self.reorder_cache(beam_idx)


class _CountedEncoder:
    def __init__(self, owner: AdaptedSeq2Seq) -> None:
        self.owner = owner
        self.forward = owner.model.get_encoder().forward

    def __call__(self, **kwargs: Any) -> Any:
        self.owner.encoder_runs += 1
        return self.owner.model.get_encoder()(**kwargs)


@cache
def tiny_m2m100() -> transformers.M2M100ForConditionalGeneration:
    torch.manual_seed(3)
    config = transformers.M2M100Config(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=256,
        init_std=0.3,
        # With the head of its own embedding such a model would say the same token for ever.
        tie_word_embeddings=False,
    )
    return transformers.M2M100ForConditionalGeneration(config).eval()


def sources(rows: int, length: int, padded: bool = False) -> torch.Tensor:
    """Token ids that end with the end token; in padded ones r pads follow in row r."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(rows * 50 + length))
    for row in range(rows):
        kept = length - row if padded else length
        ids[row, kept - 1] = EOS
        ids[row, kept:] = PAD
    return ids


@cache
def tiny_olmoe() -> transformers.OlmoeForCausalLM:
    torch.manual_seed(7)
    config = transformers.OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        pad_token_id=PAD,
        eos_token_id=EOS,
        initializer_range=0.3,
    )
    return transformers.OlmoeForCausalLM(config).eval()


def prompts(rows: int, length: int, padded: bool = False) -> torch.Tensor:
    """Token ids without pads or ends; `padded` ones have row r begin with r pads."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(rows * 100 + length))
    if padded:
        for row in range(rows):
            ids[row, :row] = PAD
    return ids
