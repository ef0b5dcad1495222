"""Assisted decoding: the text of plain decoding, in fewer runs of the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from moekernels.generation import BaseStreamer, GenerationConfig
from moekernels.generation.assisted import _token_at, tokens_at_once
from moekernels.generation.candidates import Candidates, PromptLookup
from moekernels.generation.loop import Search
from tests.generation.adapter import (
    EOS,
    PAD,
    VOCAB,
    Adapted,
    AdaptedSeq2Seq,
    prompts,
    sources,
    tiny_m2m100,
    tiny_olmoe,
)


def noisy(model: Any, amount: float) -> Any:
    """A model that says much the same."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        spread = parameter.detach().std(correction=0).clamp(min=0.01)
        parameter.data += amount * spread * torch.randn(parameter.shape, generator=generator)
    return model


@cache
def olmoe_assistant() -> transformers.OlmoeForCausalLM:
    return noisy(tiny_olmoe(), 0.1)


@cache
def m2m100_assistant() -> transformers.M2M100ForConditionalGeneration:
    return noisy(tiny_m2m100(), 0.1)


@pytest.fixture
def olmoe() -> Adapted:
    return Adapted(tiny_olmoe())


@pytest.fixture
def assistant() -> Adapted:
    return Adapted(olmoe_assistant())


@pytest.fixture
def fresh_assistant() -> Iterator[Any]:
    """transformers' assistant, on whose generation config it leaves traces."""
    before = copy.deepcopy(olmoe_assistant().generation_config)
    yield olmoe_assistant()
    olmoe_assistant().generation_config = before


KWARGS = [
    {},
    {"eos_token_id": None},
    {"eos_token_id": list(range(2, 30))},
    {"use_cache": False},
    {"prefill_chunk_size": 2},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    {"min_new_tokens": 30, "bad_words_ids": [[5], [6, 7]]},
    {"forced_eos_token_id": EOS},
]


@pytest.mark.parametrize("kwargs", KWARGS, ids=lambda kwargs: "-".join(kwargs) or "default")
@pytest.mark.parametrize("how", ["model", "lookup"])
@pytest.mark.parametrize(("length", "masked"), [(6, False), (6, True), (1, False)])
def test_greedy_tokens(
    olmoe: Adapted, assistant: Adapted, kwargs: dict[str, Any], how: str, length: int, masked: bool
) -> None:
    ids = prompts(1, length)
    if masked:
        kwargs = {**kwargs, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}
    helped = {"assistant_model": assistant} if how == "model" else {"prompt_lookup_num_tokens": 3}
    expected = olmoe.generate(ids, max_new_tokens=40, **kwargs)
    plain_runs = len(olmoe.calls)
    olmoe.calls.clear()
    assert torch.equal(olmoe.generate(ids, max_new_tokens=40, **helped, **kwargs), expected)
    if how == "model" and expected.shape[1] - length > 10:
        assert len(olmoe.calls) < plain_runs


def test_an_assistant_that_is_always_right(olmoe: Adapted) -> None:
    """k candidates and one more token in every run, and the last run does not overshoot."""
    twin = Adapted(tiny_olmoe())
    options = {"num_assistant_tokens": 4, "assistant_confidence_threshold": 0.0, "eos_token_id": None}
    got = olmoe.generate(prompts(1, 6), max_new_tokens=12, assistant_model=twin, **options)
    assert torch.equal(got, tiny_olmoe().generate(prompts(1, 6), max_new_tokens=12, eos_token_id=None))
    assert [call["input_ids"].shape[1] for call in olmoe.calls] == [6 + 4, 1 + 4, 1 + 1]
    assert [call["logits_to_keep"] for call in olmoe.calls] == [5, 5, 2]
    # What the assistant has read it does not read again, but for the token it had not proposed.
    assert [call["input_ids"].shape[1] for call in twin.calls] == [6, 1, 1, 1, 2, 1, 1, 1, 2]


def test_a_candidate_that_is_wrong_is_forgotten(olmoe: Adapted) -> None:
    contrary = Adapted(noisy(tiny_olmoe(), 0))
    contrary.model.lm_head.weight.data *= -1
    options = {"num_assistant_tokens": 3, "assistant_confidence_threshold": 0.0, "eos_token_id": None}
    out = olmoe.generate(
        prompts(1, 6), max_new_tokens=9, assistant_model=contrary, return_dict_in_generate=True, **options
    )
    assert torch.equal(out.sequences, tiny_olmoe().generate(prompts(1, 6), max_new_tokens=9, eos_token_id=None))
    assert out.past_key_values.get_seq_length() == 6 + 9 - 1
    assert [call["cache_position"][0].item() for call in olmoe.calls] == [0, *range(6, 14)]


@pytest.mark.parametrize("how", ["model", "lookup"])
@pytest.mark.parametrize("ends", [None, list(range(2, 12))])
def test_encoder_decoder(how: str, ends: list[int] | None) -> None:
    model = AdaptedSeq2Seq(tiny_m2m100())
    assistant = AdaptedSeq2Seq(m2m100_assistant())
    for ids in (sources(1, 6), torch.cat([sources(1, 6), torch.full((1, 2), PAD)], dim=1)):
        for more in ({}, {"decoder_input_ids": torch.tensor([[EOS, 15, 16]])}):
            helped = {"assistant_model": assistant} if how == "model" else {"prompt_lookup_num_tokens": 2}
            kwargs = {"max_new_tokens": 25, "eos_token_id": ends, **more}
            got = model.generate(ids, **kwargs, **helped)
            assert torch.equal(got, tiny_m2m100().generate(ids, **kwargs))
    assert assistant.encoder_runs == (4 if how == "model" else 0)


def test_outputs(olmoe: Adapted, assistant: Adapted) -> None:
    """One entry per token in every field, as if there had been no assistant."""
    names = {f"output_{name}": True for name in ("scores", "logits", "hidden_states", "attentions")}
    kwargs = {"max_new_tokens": 8, "return_dict_in_generate": True, "repetition_penalty": 1.3, "eos_token_id": None}
    tiny_olmoe().set_attn_implementation("eager")
    plain = olmoe.generate(prompts(1, 5), **kwargs, **names)
    helped = olmoe.generate(prompts(1, 5), **kwargs, **names, assistant_model=assistant)
    tiny_olmoe().set_attn_implementation("sdpa")
    assert helped.keys() == plain.keys() and torch.equal(helped.sequences, plain.sequences)
    for name in ("scores", "logits", "hidden_states", "attentions"):
        torch.testing.assert_close(helped[name], plain[name], rtol=1e-4, atol=1e-5)


def test_outputs_of_an_encoder_decoder() -> None:
    names = {f"output_{name}": True for name in ("scores", "hidden_states", "attentions")}
    kwargs = {"max_new_tokens": 7, "return_dict_in_generate": True, "eos_token_id": None, **names}
    model = AdaptedSeq2Seq(tiny_m2m100())
    tiny_m2m100().set_attn_implementation("eager")
    plain = model.generate(sources(1, 6), **kwargs)
    helped = model.generate(sources(1, 6), **kwargs, assistant_model=AdaptedSeq2Seq(m2m100_assistant()))
    tiny_m2m100().set_attn_implementation("sdpa")
    assert helped.keys() == plain.keys() and torch.equal(helped.sequences, plain.sequences)
    for name in ("scores", "decoder_hidden_states", "decoder_attentions", "cross_attentions", "encoder_attentions"):
        torch.testing.assert_close(helped[name], plain[name], rtol=1e-4, atol=1e-5)


def test_streamer_and_criteria_see_every_token(olmoe: Adapted, assistant: Adapted) -> None:
    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.pieces.append(value.tolist())

        def end(self) -> None:
            self.pieces.append("end")

    lengths = []

    def until_nine(ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
        lengths.append(ids.shape[1])
        return ids.shape[1] >= 9

    streamer, ids = Kept(), prompts(1, 4)
    out = olmoe.generate(
        ids, max_new_tokens=30, eos_token_id=None, assistant_model=assistant, streamer=streamer,
        stopping_criteria=[until_nine], assistant_confidence_threshold=0.01, num_assistant_tokens=20,
    )  # fmt: skip
    assert out.shape == (1, 9) and lengths == [5, 6, 7, 8, 9]
    assert streamer.pieces == [ids.tolist(), *([token] for token in out[0, 4:].tolist()), "end"]


@pytest.mark.parametrize(
    "kwargs", [{}, {"temperature": 0.6, "top_k": 9}, {"top_p": 0.8}], ids=lambda kwargs: "-".join(kwargs) or "plain"
)
@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_sampled_tokens_are_those_of_transformers(
    olmoe: Adapted, fresh_assistant: Any, kwargs: dict[str, Any], schedule: str
) -> None:
    """The same draws in the same order: of the assistant's tokens, of the acceptances, of the token after them."""
    mine = Adapted(olmoe_assistant())
    for config in (mine.generation_config, fresh_assistant.generation_config):
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = 5, schedule
        config.assistant_confidence_threshold = 0.2
    kwargs = {"do_sample": True, "max_new_tokens": 30, "eos_token_id": None, **kwargs}
    for seed in range(3):
        torch.manual_seed(seed)
        got = olmoe.generate(prompts(1, 6), assistant_model=mine, **kwargs)
        torch.manual_seed(seed)
        assert torch.equal(got, tiny_olmoe().generate(prompts(1, 6), assistant_model=fresh_assistant, **kwargs))


@pytest.mark.parametrize("place", [0, 1])
def test_accepted_tokens_follow_the_distribution_of_the_model(place: int) -> None:
    """A chi-squared test of 20000 tokens, at the candidate's place and at the one after; once in 10^6 by chance."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 6, generator=generator)
    theirs = torch.randn(1, 6, generator=generator).softmax(-1)
    config = GenerationConfig(do_sample=True)
    search = Search(None, None, config, None, None, generator=generator)  # type: ignore[arg-type]
    counts, times = torch.zeros(6, dtype=torch.double), 20000
    drawn = torch.multinomial(theirs[0], times, replacement=True, generator=generator)
    chances = torch.rand(times, generator=generator)
    for token, chance in zip(drawn, chances, strict=True):
        got, accepted = _token_at(place, scores, Candidates(token[None], theirs), chance[None], search)
        assert not accepted or (place == 0 and got == token)
        counts[got] += 1
    expected = times * scores[0].double().softmax(-1)
    assert ((counts - expected) ** 2 / expected).sum() < 35.9  # chi-squared with 5 degrees of freedom


def test_an_assistant_that_is_the_model_is_never_rejected(olmoe: Adapted) -> None:
    options = {"num_assistant_tokens": 4, "assistant_confidence_threshold": 0.0, "eos_token_id": None}
    twin = Adapted(tiny_olmoe().double())
    double = Adapted(tiny_olmoe())
    double.generate(prompts(1, 6), do_sample=True, max_new_tokens=20, assistant_model=twin, seed=1, **options)
    tiny_olmoe().float()
    assert [call["input_ids"].shape[1] for call in double.calls] == [6 + 4, 5, 5, 5]


def test_schedules(olmoe: Adapted) -> None:
    def proposed(schedule: str, assistant: Adapted) -> list[int]:
        olmoe.calls.clear()
        olmoe.generate(
            prompts(1, 6), max_new_tokens=24, eos_token_id=None, assistant_model=assistant,
            num_assistant_tokens=2, num_assistant_tokens_schedule=schedule, assistant_confidence_threshold=0.0,
        )  # fmt: skip
        return [call["logits_to_keep"] - 1 for call in olmoe.calls]

    twin = Adapted(tiny_olmoe())
    assert proposed("constant", twin) == [2] * 8
    assert proposed("heuristic_transient", twin) == [2, 4, 6, 8]
    assert twin.generation_config.num_assistant_tokens == 20
    assert proposed("heuristic", twin) == [2, 4, 6, 8]
    assert twin.generation_config.num_assistant_tokens == 10
    contrary = Adapted(noisy(tiny_olmoe(), 0))
    contrary.model.lm_head.weight.data *= -1
    assert proposed("heuristic", contrary)[:4] == [2, 1, 1, 1]


def test_the_settings_of_the_assistant_count(olmoe: Adapted) -> None:
    twin = Adapted(tiny_olmoe())
    twin.generation_config.num_assistant_tokens = 3
    twin.generation_config.assistant_confidence_threshold = 0.0
    olmoe.generate(prompts(1, 6), max_new_tokens=9, eos_token_id=None, assistant_model=twin)
    assert [call["logits_to_keep"] - 1 for call in olmoe.calls] == [3, 3, 0]
    olmoe.calls.clear()
    # Nobody is that sure: every round ends after the first candidate.
    options = {"assistant_confidence_threshold": 1.0, "num_assistant_tokens": 7}
    olmoe.generate(prompts(1, 6), max_new_tokens=9, eos_token_id=None, assistant_model=twin, **options)
    assert [call["logits_to_keep"] - 1 for call in olmoe.calls] == [1, 1, 1, 1, 0]


class Turning(Adapted):
    """Reads everything again, and in another way, beyond a length, as models do that have two sets of rope factors."""

    def __init__(self, model: Any, turning_point: int) -> None:
        super().__init__(model)
        self.config = copy.deepcopy(model.config)
        self.config.original_max_position_embeddings = turning_point

    def prepare_inputs_for_generation(self, state: Any) -> dict[str, Any]:
        beyond = state.length > self.config.original_max_position_embeddings
        if beyond and state.cached <= self.config.original_max_position_embeddings:
            state.forget()
        inputs = super().prepare_inputs_for_generation(state)
        return {**inputs, "position_ids": inputs["position_ids"] * (3 if beyond else 1)}


@pytest.mark.parametrize("turning_point", [5, 6, 7, 12, 30])
def test_no_run_crosses_a_turning_point(assistant: Adapted, turning_point: int) -> None:
    model = Turning(tiny_olmoe(), turning_point)
    expected = model.generate(prompts(1, 6), max_new_tokens=20, eos_token_id=None)
    assert not torch.equal(expected, tiny_olmoe().generate(prompts(1, 6), max_new_tokens=20, eos_token_id=None)) or (
        turning_point == 30
    )
    assert torch.equal(
        model.generate(prompts(1, 6), max_new_tokens=20, eos_token_id=None, assistant_model=assistant), expected
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"expert_capacity": 64}, 64),
        ({"expert_capacity": 64, "moe_eval_capacity_token_fraction": 1.0}, None),
        ({"expert_capacity": 64, "moe_eval_capacity_token_fraction": 0.5}, 1),
        ({"expert_capacity": 64, "moe_eval_capacity_token_fraction": -1.0}, 64),
        ({"expert_capacity": None, "moe_eval_capacity_token_fraction": 0.0}, 1),
    ],
)
def test_tokens_at_once(fields: dict[str, Any], expected: int | None) -> None:
    assert tokens_at_once(SimpleNamespace(**fields)) == expected


@pytest.mark.parametrize(
    ("ids", "most", "ends", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], 9, None, [3, 4, 1, 2]),
        ([1, 2, 3, 4, 1, 2], 3, None, [3, 4, 1]),
        ([1, 2, 3, 4, 1, 2], 9, [4], [3]),
        ([1, 2, 3, 4, 1, 2], 9, [3], []),
        ([5, 2, 3, 4, 1, 2], 9, None, [3, 4, 1, 2]),  # one token is found where two are not
        ([2, 7, 1, 2, 8, 1, 2], 9, None, [8, 1, 2]),  # the longer match before the earlier one
        ([1, 2, 3, 4, 5], 9, None, []),
        ([6, 6, 6], 9, None, [6]),
        ([6], 9, None, []),
        ([1, 2, 3, 1, 2], 0, None, []),
    ],
)
def test_prompt_lookup(ids: list[int], most: int, ends: list[int] | None, expected: list[int]) -> None:
    got = PromptLookup(8, 2, ends).propose(torch.tensor([ids]), most)
    assert got.tokens.tolist() == expected and got.probs is None
    if most == 9:
        oracle = transformers.generation.PromptLookupCandidateGenerator(torch.tensor(ends or [-1]), 8, 2, 100)
        assert oracle.get_candidates(torch.tensor([ids]))[0][0, len(ids) :].tolist() == expected


def test_sampling_with_prompt_lookup(olmoe: Adapted) -> None:
    """Every token is drawn by the model's own scores."""
    ids = torch.tensor([[7, 8, 9, 7, 8, 9, 7]])
    kwargs = {
        "do_sample": True,
        "top_k": 4,
        "max_new_tokens": 20,
        "eos_token_id": None,
        "return_dict_in_generate": True,
    }
    out = olmoe.generate(ids, prompt_lookup_num_tokens=3, output_scores=True, output_logits=True, seed=2, **kwargs)
    for scores, token in zip(out.scores, out.sequences[0, 7:], strict=True):
        assert (scores > -torch.inf).sum() == 4 and scores[0, token] > -torch.inf
    expected = tiny_olmoe()(out.sequences[:, :-1]).logits[0, 6:]
    torch.testing.assert_close(torch.cat(out.logits), expected, rtol=1e-4, atol=1e-4)


def with_config(model: Adapted, **fields: Any) -> Adapted:
    model = copy.copy(model)
    model.config = copy.deepcopy(model.config)
    vars(model.config).update(fields)
    return model


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"assistant_model": "gpt2"}, r"must be a model with generate\(\), got str"),
        ({"assistant_model": True, "prompt_lookup_num_tokens": 3}, "not both"),
        ({"assistant_model": True, "num_beams": 2}, "goes with one sequence, got num_beams=2"),
        ({"prompt_lookup_num_tokens": 3, "num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens must be a positive integer, got 0"),
        ({"assistant_model": True, "cache_implementation": "static"}, "a cache that can shrink"),
        ({"assistant_model": True, "num_assistant_tokens": 0}, "num_assistant_tokens must be a positive number, got 0"),
        ({"assistant_model": True, "num_assistant_tokens_schedule": "magic"}, "constant, heuristic.*got 'magic'"),
        ({"assistant_model": {"vocab_size": 50}}, f"vocab_size={VOCAB} as the model has, got 50"),
        ({"assistant_model": {"is_encoder_decoder": True}}, "is_encoder_decoder=False as the model has, got True"),
        ({"input_ids": prompts(2, 5), "assistant_model": True}, "one prompt at a time, got 2"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 3, 32), "assistant_model": True}, "embeddings of its own"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors(olmoe: Adapted, assistant: Adapted, kwargs: dict[str, Any], message: str) -> None:
    kwargs = {"input_ids": prompts(1, 5), **kwargs}
    if kwargs.get("assistant_model") is True:
        kwargs["assistant_model"] = assistant
    elif isinstance(kwargs.get("assistant_model"), dict):
        kwargs["assistant_model"] = with_config(assistant, **kwargs["assistant_model"])
    with pytest.raises(ValueError, match=message):
        olmoe.generate(**kwargs)
    assert not olmoe.calls


def test_an_encoder_decoder_needs_the_source_as_ids() -> None:
    model, assistant = AdaptedSeq2Seq(tiny_m2m100()), AdaptedSeq2Seq(m2m100_assistant())
    encoded = tiny_m2m100().get_encoder()(sources(1, 6))
    with pytest.raises(ValueError, match="pass it as input_ids"):
        model.generate(encoder_outputs=encoded, assistant_model=assistant)
