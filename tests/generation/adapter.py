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
        return lambda: transformers.DynamicCache(config=self.config)


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
