"""Beam search against transformers' on the same weights, for decoder-only and encoder-decoder models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moekernels.generation import DecodeState
from moekernels.generation.beam_search import best_continuations
from tests.generation.adapter import (
    PAD,
    Adapted,
    AdaptedSeq2Seq,
    prompts,
    sources,
    tiny_m2m100,
    tiny_olmoe,
)

# Many end tokens, so that sequences end at all sorts of lengths.
ENDS = list(range(2, 12))
SEARCHES = [
    {},
    {"num_beams": 2, "eos_token_id": None},
    {"early_stopping": True, "num_return_sequences": 4},
    {"early_stopping": True, "eos_token_id": ENDS, "num_return_sequences": 3},
    {"early_stopping": False, "eos_token_id": ENDS, "length_penalty": 2.0},
    {"early_stopping": "never", "eos_token_id": ENDS, "length_penalty": 1.5, "num_return_sequences": 2},
    {"early_stopping": "never", "eos_token_id": ENDS, "length_penalty": -1.0},
    {"eos_token_id": ENDS, "length_penalty": 0.0, "num_return_sequences": 4},
    {"eos_token_id": ENDS, "min_new_tokens": 9, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    {"eos_token_id": ENDS[:2], "forced_eos_token_id": 2, "pad_token_id": 0},
    {"use_cache": False, "eos_token_id": ENDS},
    {"do_sample": True, "eos_token_id": ENDS, "top_k": 30, "num_return_sequences": 2},
]


def both(ours: Adapted, theirs: Any, ids: torch.Tensor, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Both results. Sampling draws from the global generator in both."""
    kwargs = {"num_beams": 4, "max_new_tokens": 16, **kwargs}
    torch.manual_seed(5)
    mine = ours.generate(ids, **kwargs)
    torch.manual_seed(5)
    return mine, theirs.generate(ids, **kwargs)


def name(kwargs: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in kwargs.items() if key != "eos_token_id") or "default"


@pytest.mark.parametrize("kwargs", SEARCHES, ids=name)
def test_tokens_of_a_decoder(kwargs: dict[str, Any]) -> None:
    for ids in (prompts(1, 5), prompts(3, 6, padded=True)):
        ours, theirs = both(Adapted(tiny_olmoe()), tiny_olmoe(), ids, kwargs)
        assert torch.equal(ours, theirs)
        assert len(ours) == len(ids) * kwargs.get("num_return_sequences", 1) and ours.is_contiguous()


@pytest.mark.parametrize("kwargs", [*SEARCHES, {"forced_bos_token_id": 9, "eos_token_id": ENDS}], ids=name)
def test_tokens_of_an_encoder_decoder(kwargs: dict[str, Any]) -> None:
    for ids in (sources(1, 5), sources(3, 7, padded=True)):
        ours, theirs = both(AdaptedSeq2Seq(tiny_m2m100()), tiny_m2m100(), ids, kwargs)
        assert torch.equal(ours, theirs)


def test_the_searches_above_differ_from_greedy_and_end_early() -> None:
    """Else they would show nothing."""
    ids = prompts(3, 6, padded=True)
    model = Adapted(tiny_olmoe())
    greedy = model.generate(ids, max_new_tokens=16, eos_token_id=ENDS)
    beams = model.generate(ids, max_new_tokens=16, eos_token_id=ENDS, num_beams=4, num_return_sequences=4)
    assert not torch.equal(beams[::4, : greedy.shape[1]], greedy[:, : beams.shape[1]])
    lengths = (beams[:, 6:] != PAD).sum(1)
    assert lengths.unique().numel() > 2 and lengths.min() < 16


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_outputs(is_encoder_decoder: bool) -> None:
    options = {f"output_{name}": True for name in ("scores", "logits", "hidden_states", "attentions")}
    kwargs = {"eos_token_id": ENDS, "num_return_sequences": 3, "return_dict_in_generate": True, **options}
    ours, theirs = (
        both(AdaptedSeq2Seq(tiny_m2m100()), tiny_m2m100(), sources(2, 6, padded=True), kwargs)
        if is_encoder_decoder
        else both(Adapted(tiny_olmoe()), tiny_olmoe(), prompts(2, 5), kwargs)
    )
    assert set(ours.keys()) == set(theirs.keys())
    assert type(ours).__name__ == type(theirs).__name__
    assert ours.beam_indices.dtype == theirs.beam_indices.dtype
    for field in ("sequences", "sequences_scores", "beam_indices", "scores", "logits"):
        torch.testing.assert_close(ours[field], theirs[field])
    prefix = "decoder_" if is_encoder_decoder else ""
    for field in (f"{prefix}hidden_states", f"{prefix}attentions", *(["cross_attentions"] * is_encoder_decoder)):
        torch.testing.assert_close(ours[field], theirs[field])
    for field in ("encoder_hidden_states", "encoder_attentions"):
        assert (field in ours) == is_encoder_decoder
        if is_encoder_decoder:
            torch.testing.assert_close(ours[field], theirs[field])


def test_scores_and_beams_lead_to_the_sequences() -> None:
    """The score of a sequence is the sum of what its steps say, divided by the length to the penalty."""
    out = Adapted(tiny_olmoe()).generate(
        prompts(2, 5), num_beams=3, num_return_sequences=3, max_new_tokens=10, eos_token_id=ENDS, length_penalty=0.7,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    for sequence, beams, score in zip(out.sequences, out.beam_indices.tolist(), out.sequences_scores, strict=True):
        chosen = [row for row in beams if row >= 0]
        steps = [out.scores[i][row, sequence[5 + i]] for i, row in enumerate(chosen)]
        torch.testing.assert_close(torch.stack(steps).sum() / len(chosen) ** 0.7, score)
    for scores in out.sequences_scores.view(2, 3):
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)


class Recorded(Adapted):
    """Notes how the beams move."""

    def _first_state(self, *args: Any) -> DecodeState:
        state = super()._first_state(*args)
        self.moves: list[tuple[list[int], int, torch.Tensor]] = []

        def reorder(rows: torch.Tensor, start: int = 0) -> None:
            self.moves.append((rows.tolist(), start, state.input_ids.clone()))
            DecodeState.reorder(state, rows, start)

        state.reorder = reorder  # type: ignore[method-assign]
        return state


def test_only_what_differs_is_reordered() -> None:
    model = Recorded(tiny_olmoe())
    model.generate(prompts(2, 20), num_beams=4, max_new_tokens=24, eos_token_id=None)
    copied = total = 0
    for rows, start, ids in model.moves:
        assert start >= 20  # prompts are never copied
        assert [row // 4 for row in rows] == [0] * 4 + [1] * 4
        assert torch.equal(ids[rows, :start], ids[:, :start])
        copied += sum(row != i for i, row in enumerate(rows)) * (ids.shape[1] - start)
        total += ids.numel()
    assert 0 < copied < total / 5


def test_a_criterion_sees_every_candidate() -> None:
    seen = []

    def short(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(ids.shape)
        return torch.full((len(ids),), ids.shape[1] >= 9)

    out = Adapted(tiny_olmoe()).generate(
        prompts(2, 5), num_beams=3, max_new_tokens=20, stopping_criteria=[short], eos_token_id=ENDS[:2]
    )
    assert seen == [(2 * 9, n) for n in range(6, 10)] and out.shape[1] <= 9


def test_prompts_as_embeddings() -> None:
    ids = prompts(2, 6)
    embeds = tiny_olmoe().get_input_embeddings()(ids).detach()
    kwargs = {"num_beams": 3, "max_new_tokens": 9, "eos_token_id": ENDS}
    expected = Adapted(tiny_olmoe()).generate(ids, **kwargs)[:, 6:]
    assert torch.equal(Adapted(tiny_olmoe()).generate(inputs_embeds=embeds, **kwargs), expected)


def test_chunked_prefill_changes_nothing() -> None:
    ids = prompts(2, 7, padded=True)
    kwargs = {"num_beams": 3, "max_new_tokens": 9, "eos_token_id": ENDS}
    expected = Adapted(tiny_olmoe()).generate(ids, **kwargs)
    assert torch.equal(Adapted(tiny_olmoe()).generate(ids, prefill_chunk_size=3, **kwargs), expected)


def test_seed_repeats() -> None:
    kwargs = {"num_beams": 3, "do_sample": True, "max_new_tokens": 12}
    first, again, other = (Adapted(tiny_olmoe()).generate(prompts(2, 5), seed=seed, **kwargs) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("vocab_size", [5, 127, 128, 300, 1000, 4096])
def test_best_continuations(vocab_size: int) -> None:
    """The same as sorting everything, ties among minus infinities aside."""
    generator = torch.Generator().manual_seed(vocab_size)
    log_probs = torch.randn(6, vocab_size, generator=generator).log_softmax(-1)
    log_probs[:, ::3] = float("-inf")
    log_probs[4, :] = float("-inf")
    running = torch.tensor([[0.0, -1e9, -1e9], [-1.5, -2.0, -1.0]])
    values, places = best_continuations(log_probs, running, 6)
    totals = (log_probs.view(2, 3, -1) + running[..., None]).flatten(1)
    torch.testing.assert_close(values, totals.topk(6).values, rtol=0, atol=0)
    assert torch.equal(totals.gather(1, places), values)
    assert all(len(set(row)) == 6 for row in places.tolist())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 3, "num_return_sequences": 4}, "num_beams=3 sequences to return, got num_return_sequences=4"),
        ({"num_beams": 3, "num_return_sequences": 4, "do_sample": True}, "num_return_sequences=4"),
        ({"num_beams": 0}, "num_beams must be a positive integer, got 0"),
        ({"num_beams": -2}, "num_beams must be a positive integer, got -2"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping must be a boolean or 'never', got 'soon'"),
        ({"num_beams": 2, "streamer": object()}, "beam search has no tokens to stream"),
    ],
)
def test_errors_name_the_argument(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adapted(tiny_olmoe()).generate(prompts(1, 5), **kwargs)
