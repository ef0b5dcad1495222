"""What `generate` returns when it is asked for more than token ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


class Output:
    """A dataclass that can also be read as a mapping and as a tuple; fields that are None are left out of both.

    PyTorch knows subclasses as containers of tensors (torch.compile, DistributedDataParallel, torch.func).
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(
            cls,
            lambda output: (output.values(), output.keys()),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def keys(self) -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]  # type: ignore[arg-type]

    def values(self) -> list[Any]:
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in self.keys()]

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name) if name in self else default

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self:
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in (field.name for field in fields(self)):  # type: ignore[arg-type]
            raise KeyError(name)
        setattr(self, name, value)

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass
class GenerateDecoderOnlyOutput(Output):
    """The result of greedy search or sampling with a decoder-only model. B sequences, V vocabulary, n steps.

    Attributes:
        sequences: int64 `[B, length]`, prompt and generated tokens, padded where a sequence ended early.
        scores: n tensors float32 `[B, V]`, after the logits processors (`output_scores=True`).
        logits: n tensors float32 `[B, V]`, as the model gave them (`output_logits=True`).
        attentions: n tuples with a map per layer (`output_attentions=True`).
        hidden_states: n tuples with a tensor per layer, and the embeddings (`output_hidden_states=True`).
        past_key_values: the cache after the last step (`use_cache=True`).
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    attentions: tuple[tuple[Tensor, ...], ...] | None = None
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    past_key_values: Any = None


@dataclass
class GenerateEncoderDecoderOutput(Output):
    """The result of greedy search or sampling with an encoder-decoder model. B sequences, V vocabulary, n steps.

    Attributes:
        sequences: int64 `[B, length]`, the decoder's tokens from its start token on, padded after the end.
        scores, logits, past_key_values: as in `GenerateDecoderOnlyOutput`.
        encoder_attentions: a map per layer of the encoder (`output_attentions=True`).
        encoder_hidden_states: a tensor per layer, and the embeddings (`output_hidden_states=True`).
        decoder_attentions, cross_attentions: n tuples with a map per layer of the decoder.
        decoder_hidden_states: n tuples with a tensor per layer, and the embeddings.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[tuple[Tensor, ...], ...] | None = None
    cross_attentions: tuple[tuple[Tensor, ...], ...] | None = None
    decoder_hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    past_key_values: Any = None


@dataclass
class GenerateBeamDecoderOnlyOutput(Output):
    """The result of beam search with a decoder-only model. B prompts, N beams, R returned sequences per prompt.

    Attributes:
        sequences: int64 `[B * R, length]`, the best first within each prompt.
        sequences_scores: float32 `[B * R]`, sums of log-probabilities over length ** length_penalty
            (`output_scores=True`).
        scores: n tensors float32 `[B * N, V]`, log-probabilities after the logits processors (`output_scores=True`).
        logits: n tensors float32 `[B * N, V]`, as the model gave them (`output_logits=True`).
        beam_indices: int32 `[B * R, generated]`, the row of `scores` that every token was chosen from; -1 after the
            end.
        attentions, hidden_states, past_key_values: as in `GenerateDecoderOnlyOutput`, with B * N rows.
    """

    sequences: Tensor
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    attentions: tuple[tuple[Tensor, ...], ...] | None = None
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    past_key_values: Any = None


@dataclass
class GenerateBeamEncoderDecoderOutput(Output):
    """The result of beam search with an encoder-decoder model.

    Attributes:
        sequences, sequences_scores, scores, logits, beam_indices: as in `GenerateBeamDecoderOnlyOutput`.
        others: as in `GenerateEncoderDecoderOutput`; what belongs to the decoder has a row per beam.
    """

    sequences: Tensor
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[tuple[Tensor, ...], ...] | None = None
    cross_attentions: tuple[tuple[Tensor, ...], ...] | None = None
    decoder_hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    past_key_values: Any = None
