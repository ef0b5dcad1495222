"""Our M2M100 and our loop together, against transformers on the same checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moekernels.models import AutoModelForSeq2SeqLM
from moekernels.nn import EncoderDecoderCache
from tests.generation.adapter import EOS, PAD, AdaptedSeq2Seq, sources, tiny_m2m100

ENDS = list(range(2, 12))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory: Path = tmp_path_factory.mktemp("m2m100")
    tiny_m2m100().save_pretrained(directory)
    return AutoModelForSeq2SeqLM.from_pretrained(directory, progress=False)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_beams": 4},
        {"num_beams": 4, "use_cache": False},
        {"num_beams": 4, "cache_implementation": "static"},
        {"cache_implementation": "static"},
        {"num_beams": 3, "early_stopping": True, "num_return_sequences": 2, "forced_bos_token_id": 9},
        {"num_beams": 5, "length_penalty": 2.0, "no_repeat_ngram_size": 2, "eos_token_id": ENDS},
        {"num_beams": 3, "decoder_input_ids": torch.tensor([[EOS, 15, 16]] * 4)},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "greedy",
)
def test_tokens(model: Any, kwargs: dict[str, Any]) -> None:
    ids = sources(4, 8, padded=True)
    got = model.generate(ids, max_new_tokens=20, **kwargs)
    same = {name: value for name, value in kwargs.items() if name != "cache_implementation"}
    assert torch.equal(got, tiny_m2m100().generate(ids, max_new_tokens=20, **same))


@pytest.fixture
def eager() -> Iterator[Any]:
    """transformers' model, which returns attentions and heeds head masks with eager attention alone."""
    tiny_m2m100().set_attn_implementation("eager")
    yield tiny_m2m100()
    tiny_m2m100().set_attn_implementation("sdpa")


def test_samples_share_their_source(model: Any) -> None:
    """No draws to compare: transformers' encoder draws too, for layers it would leave out in training."""
    kwargs = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 9, "eos_token_id": None, "top_k": 4}
    options = {"output_logits": True, "return_dict_in_generate": True}
    out = model.generate(sources(2, 7), seed=1, **kwargs, **options)
    assert out.past_key_values.cross_attention_cache[0][0].shape[0] == 2
    assert len(set(map(tuple, out.sequences.tolist()))) == 6
    expected = tiny_m2m100()(sources(2, 7).repeat_interleave(3, 0), decoder_input_ids=out.sequences[:, :-1]).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, rtol=1e-4, atol=1e-4)


def test_a_source_is_encoded_and_stored_once(model: Any, eager: Any) -> None:
    kwargs = {"num_beams": 3, "max_new_tokens": 6, "eos_token_id": None}
    out = model.generate(sources(2, 7), return_dict_in_generate=True, output_attentions=True, **kwargs)
    cache = out.past_key_values
    assert isinstance(cache, EncoderDecoderCache)
    assert cache.cross_attention_cache[0][0].shape[0] == 2  # sources
    assert cache.self_attention_cache[0][0].shape[0] == 6  # beams
    theirs = eager.generate(sources(2, 7), return_dict_in_generate=True, output_attentions=True, **kwargs)
    torch.testing.assert_close(out.cross_attentions, theirs.cross_attentions)
    torch.testing.assert_close(out.encoder_attentions, theirs.encoder_attentions)


def test_going_on_from_a_cache(model: Any) -> None:
    """An empty one of the caller's is filled, and what is in it is not run again."""
    ids, cache = sources(2, 7), EncoderDecoderCache()
    first = model.generate(ids, max_new_tokens=4, eos_token_id=None, past_key_values=cache)
    assert cache.get_seq_length() == 4
    expected = model.generate(ids, max_new_tokens=8, eos_token_id=None)
    more = {"max_new_tokens": 4, "eos_token_id": None, "past_key_values": cache}
    assert torch.equal(model.generate(ids, decoder_input_ids=first, **more), expected)
    assert cache.get_seq_length() == 8
    with pytest.raises(ValueError, match="past_key_values holds 8 positions"):
        model.generate(ids, decoder_input_ids=first, **more)


def test_assisted(model: Any) -> None:
    """What is cropped is the decoder's own cache; keys and values of the source stay."""
    ids = torch.cat([sources(1, 7), torch.full((1, 2), PAD)], dim=1)
    kwargs = {"max_new_tokens": 40, "eos_token_id": None}
    for more in ({}, {"forced_bos_token_id": 9}, {"decoder_input_ids": torch.tensor([[EOS, 15, 16]])}):
        expected = tiny_m2m100().generate(ids, **kwargs, **more)
        for helper in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 4}):
            out = model.generate(ids, **kwargs, **more, **helper, return_dict_in_generate=True)
            assert torch.equal(out.sequences, expected)
            assert out.past_key_values.get_seq_length() == expected.shape[1] - 1


def test_guided(model: Any) -> None:
    """Away from another source, beside beams too; the definition is in test_guidance.py."""
    ids, negative = sources(3, 7, padded=True), sources(3, 5)
    kwargs = {"guidance_scale": 1.5, "negative_prompt_ids": negative, "max_new_tokens": 12}
    for more in ({}, {"num_beams": 3}, {"use_cache": False}):
        expected = AdaptedSeq2Seq(tiny_m2m100()).generate(ids, **kwargs, **more)
        assert torch.equal(model.generate(ids, **kwargs, **more), expected)


def test_scores(model: Any) -> None:
    kwargs = {"num_beams": 3, "max_new_tokens": 9, "output_scores": True, "return_dict_in_generate": True}
    ids = sources(3, 7, padded=True)
    ours, theirs = model.generate(ids, **kwargs), tiny_m2m100().generate(ids, **kwargs)
    assert torch.equal(ours.beam_indices, theirs.beam_indices)
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores)
    for mine, their in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-4)


def test_head_masks_reach_the_model(model: Any, eager: Any) -> None:
    model.set_attn_implementation("eager")
    ids = sources(2, 7)
    mask = torch.ones(2, 4)
    mask[:, 1:] = 0
    plain = model.generate(ids, max_new_tokens=8)
    for name in ("head_mask", "decoder_head_mask", "cross_attn_head_mask"):
        got = model.generate(ids, max_new_tokens=8, **{name: mask})
        assert torch.equal(got, eager.generate(ids, max_new_tokens=8, **{name: mask}))
        assert not torch.equal(got, plain)
        assert torch.equal(
            model.generate(ids, max_new_tokens=8, num_beams=2, **{name: torch.ones(2, 4)}),
            model.generate(ids, max_new_tokens=8, num_beams=2),
        )
    model.set_attn_implementation("sdpa")


def test_mismatched_encoder_outputs(model: Any) -> None:
    for hidden in (torch.zeros(2, 6, 31), torch.zeros(0, 6, 32)):
        with pytest.raises(ValueError, match="encoder_outputs"):
            model.generate(encoder_outputs=(hidden,))
    with pytest.raises(ValueError, match="encoder_outputs has 2 rows"):
        model(encoder_outputs=(torch.zeros(2, 6, 32),), decoder_input_ids=torch.full((3, 1), EOS))
