"""Classifier-free guidance: tokens of transformers, and by definition where transformers cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moekernels.generation import UnbatchedClassifierFreeGuidanceLogitsProcessor
from tests.generation.adapter import EOS, PAD, Adapted, AdaptedSeq2Seq, prompts, sources, tiny_m2m100, tiny_olmoe

NEGATIVE = prompts(3, 4)
PADDED = torch.cat([torch.full((3, 2), PAD), NEGATIVE], dim=1)
PADDED_MASK = (PADDED != PAD).long()


def both(ids: torch.Tensor, **kwargs: Any) -> tuple[Any, Any]:
    torch.manual_seed(11)
    ours = Adapted(tiny_olmoe()).generate(ids, **kwargs)
    torch.manual_seed(11)
    return ours, tiny_olmoe().generate(ids, **kwargs)


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.5, 3])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_cache": False},
        {"negative_prompt_ids": NEGATIVE},
        {"negative_prompt_ids": PADDED, "negative_prompt_attention_mask": PADDED_MASK},
        {"negative_prompt_ids": NEGATIVE, "use_cache": False, "repetition_penalty": 1.3},
        {"negative_prompt_ids": NEGATIVE, "do_sample": True, "top_k": 10},
        {"negative_prompt_ids": NEGATIVE, "eos_token_id": list(range(2, 20))},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "default",
)
def test_tokens_are_those_of_transformers(scale: float, kwargs: dict[str, Any]) -> None:
    ids = prompts(3, 6, padded=True)
    ours, theirs = both(ids, guidance_scale=scale, max_new_tokens=15, **kwargs)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, Adapted(tiny_olmoe()).generate(ids, max_new_tokens=15))


def test_scores_are_those_of_transformers() -> None:
    options = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 5}
    ours, theirs = both(prompts(3, 6), guidance_scale=1.7, negative_prompt_ids=NEGATIVE, **options)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)


def test_the_second_run_reads_every_token_once() -> None:
    model = Adapted(tiny_olmoe())
    model.generate(prompts(3, 6), guidance_scale=2.0, negative_prompt_ids=NEGATIVE, max_new_tokens=4, eos_token_id=None)
    lengths = [call["input_ids"].shape[1] for call in model.calls]
    assert lengths == [6, 4, 1, 1, 1, 1, 1, 1]


def guided_log_probs(model: Any, negative: dict[str, Any], positive: dict[str, Any], scale: float) -> torch.Tensor:
    """By definition, for the last position, without caches."""
    with torch.no_grad():
        given, without = (model(**inputs).logits[:, -1].log_softmax(-1) for inputs in (positive, negative))
    return scale * (given - without) + without


def test_beams_and_rejected_candidates_are_followed() -> None:
    """transformers does not reorder the second run's cache with the beams."""
    ids, options = prompts(1, 6), {"guidance_scale": 1.8, "max_new_tokens": 8, "eos_token_id": None}
    options["negative_prompt_ids"] = NEGATIVE[:1]
    out = Adapted(tiny_olmoe()).generate(
        ids, num_beams=3, output_scores=True, return_dict_in_generate=True, num_return_sequences=3, **options
    )
    for row, sequence in enumerate(out.sequences):
        total = 0.0
        for end in range(6, 14):
            negative = torch.cat([NEGATIVE[:1], sequence[None, 6:end]], dim=1)
            log_probs = guided_log_probs(
                tiny_olmoe(), {"input_ids": negative}, {"input_ids": sequence[None, :end]}, 1.8
            )
            total += float(log_probs[0, sequence[end]])
        torch.testing.assert_close(out.sequences_scores[row], torch.tensor(total / 8), rtol=1e-4, atol=1e-4)
    plain = Adapted(tiny_olmoe()).generate(ids, **options)
    assert torch.equal(Adapted(tiny_olmoe()).generate(ids, prompt_lookup_num_tokens=3, **options), plain)
    model = Adapted(tiny_olmoe())
    assert torch.equal(model.generate(ids, assistant_model=Adapted(tiny_olmoe()), **options), plain)
    # The second run is one per token of the result, and none for the assistant's.
    assert len(model.calls) < 2 * 8


@pytest.mark.parametrize("use_cache", [True, False])
def test_encoder_decoder(use_cache: bool) -> None:
    """The negative prompt is a second source. transformers runs the decoder without tokens, which is an error."""
    ids, negative = sources(3, 8, padded=True), sources(3, 5, padded=True)
    with pytest.raises(ValueError, match="decoder_input_ids"):
        tiny_m2m100().generate(ids, guidance_scale=2.0, negative_prompt_ids=negative)
    got = AdaptedSeq2Seq(tiny_m2m100()).generate(
        ids, guidance_scale=2.0, negative_prompt_ids=negative, max_new_tokens=8, eos_token_id=None, use_cache=use_cache
    )
    tokens = torch.full((3, 1), EOS)
    for _ in range(8):
        positive, without = (
            {"input_ids": source, "attention_mask": (source != PAD).long(), "decoder_input_ids": tokens}
            for source in (ids, negative)
        )
        log_probs = guided_log_probs(tiny_m2m100(), without, positive, 2.0)
        tokens = torch.cat([tokens, log_probs.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(got, tokens)
    beams = {"num_beams": 2, "max_new_tokens": 6}
    same = AdaptedSeq2Seq(tiny_m2m100()).generate(ids, guidance_scale=5.0, negative_prompt_ids=ids, **beams)
    assert torch.equal(same, AdaptedSeq2Seq(tiny_m2m100()).generate(ids, **beams))


def test_the_processor_alone() -> None:
    ids, scores = prompts(2, 5), torch.randn(2, 97)
    off = UnbatchedClassifierFreeGuidanceLogitsProcessor(1, Adapted(tiny_olmoe()))
    torch.testing.assert_close(off(ids, scores), scores.log_softmax(-1))
    on = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, Adapted(tiny_olmoe()))
    with torch.no_grad():
        without = tiny_olmoe()(ids[:, -1:]).logits[:, -1].log_softmax(-1)
        expected = 1.5 * (scores.log_softmax(-1) - without) + without
        torch.testing.assert_close(on(ids, scores), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"negative_prompt_ids": torch.ones(3, 4)}, r"integer tensor \[batch, length\], got torch.float32 \[3, 4\]"),
        ({"negative_prompt_ids": NEGATIVE[0]}, r"got torch.int64 \[4\]"),
        ({"negative_prompt_ids": NEGATIVE[:, :0]}, r"got torch.int64 \[3, 0\]"),
        ({"negative_prompt_ids": NEGATIVE[:2]}, "one row per prompt, got 2 for 3 rows"),
        ({"negative_prompt_attention_mask": PADDED_MASK}, "needs negative_prompt_ids"),
        ({"negative_prompt_ids": NEGATIVE, "negative_prompt_attention_mask": PADDED_MASK}, r"must be \[3, 4\]"),
        ({"guidance_scale": "much"}, "must be a number, got 'much'"),
        ({"input_ids": None, "inputs_embeds": torch.ones(3, 5, 32)}, "beside a prompt given as inputs_embeds"),
    ],
)
def test_errors(kwargs: dict[str, Any], message: str) -> None:
    model = Adapted(tiny_olmoe())
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": prompts(3, 6), "guidance_scale": 2.0, **kwargs})
    assert not model.calls


def test_an_encoder_decoder_needs_a_negative_source() -> None:
    model = AdaptedSeq2Seq(tiny_m2m100())
    with pytest.raises(ValueError, match="needs negative_prompt_ids: a source"):
        model.generate(sources(2, 6), guidance_scale=2.0)
    assert not model.calls


def test_a_negative_prompt_alone_has_no_effect() -> None:
    ids = prompts(3, 6)
    with pytest.warns(UserWarning, match="negative_prompt_ids has no effect without guidance_scale"):
        got = Adapted(tiny_olmoe()).generate(ids, negative_prompt_ids=NEGATIVE, max_new_tokens=5)
    assert torch.equal(got, tiny_olmoe().generate(ids, max_new_tokens=5))
