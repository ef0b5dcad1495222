"""`generate` against transformers' `generate` on the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from moekernels.generation import (
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteria,
    SuppressTokensLogitsProcessor,
)
from tests.generation.adapter import EOS, PAD, VOCAB, Adapted, prompts, tiny_olmoe


def both(ids: torch.Tensor, **kwargs: Any) -> tuple[Any, Any]:
    """Ours and theirs. Sampling draws from the global generator in both."""
    torch.manual_seed(11)
    ours = Adapted(tiny_olmoe()).generate(ids, **kwargs)
    # transformers 4.56.2 cannot run OLMoE with a static cache, nor chunk a padded prompt or one of one token.
    kwargs = {name: kwargs[name] for name in kwargs if name not in ("cache_implementation", "prefill_chunk_size")}
    torch.manual_seed(11)
    theirs = tiny_olmoe().generate(ids, **kwargs)
    return ours, theirs


@pytest.mark.parametrize(
    "kwargs",
    [
        {"max_new_tokens": 30},
        {"max_length": 12},
        {},
        {"max_new_tokens": 30, "use_cache": False},
        {"max_new_tokens": 30, "cache_implementation": "static"},
        {"max_new_tokens": 30, "prefill_chunk_size": 3},
        {"max_new_tokens": 40, "repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
        {"max_new_tokens": 40, "min_new_tokens": 25, "bad_words_ids": [[5], [6, 7]]},
        {"max_new_tokens": 8, "forced_eos_token_id": EOS},
        {"max_new_tokens": 30, "eos_token_id": list(range(2, 30))},
        {"max_new_tokens": 30, "eos_token_id": list(range(2, 30)), "pad_token_id": None},
        {"max_new_tokens": 20, "suppress_tokens": [9, 10], "begin_suppress_tokens": [11]},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "default",
)
@pytest.mark.parametrize(("rows", "length", "padded"), [(1, 6, False), (4, 7, False), (4, 7, True), (1, 1, False)])
def test_greedy_tokens_are_those_of_transformers(kwargs: dict, rows: int, length: int, padded: bool) -> None:
    ours, theirs = both(prompts(rows, length, padded), **kwargs)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] > length and ours.is_contiguous()


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"temperature": 0.5, "top_k": 7},
        {"top_p": 0.7, "top_k": 0},
        {"min_p": 0.05, "temperature": 1.4},
        {"num_return_sequences": 3, "top_k": 20},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "plain",
)
@pytest.mark.parametrize(("rows", "padded"), [(1, False), (3, True)])
def test_sampled_tokens_are_those_of_transformers(kwargs: dict, rows: int, padded: bool) -> None:
    """The same draws from the same generator: the filtered scores and the softmax are equal to the last bit."""
    ours, theirs = both(prompts(rows, 6, padded), do_sample=True, max_new_tokens=25, **kwargs)
    assert torch.equal(ours, theirs)


def test_mask_given_and_mask_inferred() -> None:
    ids = prompts(4, 7, padded=True)
    model = Adapted(tiny_olmoe())
    given = model.generate(ids, attention_mask=(ids != PAD).long(), max_new_tokens=12)
    assert torch.equal(model.generate(ids, max_new_tokens=12), given)
    assert torch.equal(model.generate(input_ids=ids.int(), attention_mask=ids != PAD, max_new_tokens=12), given)
    # A row alone, without its padding, gives the same tokens.
    alone = model.generate(ids[3:, 3:], max_new_tokens=12, eos_token_id=None)
    together = model.generate(ids, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(together[3, 7:], alone[0, 4:])


def test_no_mask_where_nothing_is_masked() -> None:
    model = Adapted(tiny_olmoe())
    model.generate(prompts(2, 5), attention_mask=torch.ones(2, 5), max_new_tokens=3)
    assert [call["attention_mask"] for call in model.calls] == [None] * 3


def test_every_token_is_run_once() -> None:
    model = Adapted(tiny_olmoe())
    model.generate(prompts(1, 6), max_new_tokens=10, eos_token_id=None)
    assert model.tokens_run == 6 + 9
    model.calls.clear()
    model.generate(prompts(1, 6), max_new_tokens=3, eos_token_id=None, use_cache=False)
    assert model.tokens_run == 6 + 7 + 8
    model.calls.clear()
    model.generate(prompts(1, 10), max_new_tokens=1, prefill_chunk_size=4)
    assert [call["cache_position"].tolist() for call in model.calls] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert all(call["logits_to_keep"] == 1 for call in model.calls)


@pytest.mark.parametrize("padded", [False, True])
def test_chunked_prefill_changes_nothing(padded: bool) -> None:
    ids = prompts(3, 9, padded)
    expected = tiny_olmoe().generate(ids, max_new_tokens=12)
    for size in (1, 2, 4, 9, 50):
        assert torch.equal(Adapted(tiny_olmoe()).generate(ids, max_new_tokens=12, prefill_chunk_size=size), expected)


def test_buffers_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekernels.generation.state._ROOM", 2)
    for padded in (False, True):
        ours, theirs = both(prompts(3, 5, padded), max_new_tokens=40, eos_token_id=None)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_who_may_keep_scores_and_logits(num_beams: int, dtype: torch.dtype) -> None:
    """The model its logits, a processor of the caller its scores; and the tokens are those without such a processor."""

    class Keeping(Adapted):
        def forward(self, **kwargs: Any) -> Any:
            out = super().forward(**kwargs)
            out.logits = out.logits.to(dtype)
            made.append((out.logits, out.logits.clone()))
            return out

        __call__ = forward

    def keep(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        given.append((scores, scores.clone()))
        return scores

    made: list[tuple[torch.Tensor, torch.Tensor]] = []
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    # Ends are banned at first; after that nothing stands between the model and the caller's processor.
    kwargs = {"num_beams": num_beams, "max_new_tokens": 12, "min_new_tokens": 3}
    plain = Keeping(tiny_olmoe()).generate(prompts(2, 5), **kwargs)
    kept = Keeping(tiny_olmoe()).generate(prompts(2, 5), logits_processor=[keep], **kwargs)
    assert torch.equal(plain, kept)
    assert len(given) >= 6 and len(made) == 2 * len(given)
    for now, then in made + given:
        assert torch.equal(now, then)
    assert len({scores.data_ptr() for scores, _ in given}) == len(given)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_processor_derived_from_ours_is_called(num_beams: int) -> None:
    class Only(SuppressTokensLogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return torch.full_like(scores, -1e4).index_fill_(1, torch.tensor([40, 41, 42]), 0.0)

    out = Adapted(tiny_olmoe()).generate(
        prompts(2, 5), num_beams=num_beams, max_new_tokens=6, logits_processor=[Only([1])]
    )
    assert set(out[:, 5:].flatten().tolist()) <= {40, 41, 42}


def test_outputs() -> None:
    names = {f"output_{name}": True for name in ("scores", "logits", "hidden_states", "attentions")}
    ids = prompts(2, 5)
    ours, theirs = both(ids, max_new_tokens=4, return_dict_in_generate=True, repetition_penalty=1.3, **names)
    assert ours.keys() == list(theirs.keys())
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(theirs[name]) > 0
        for mine, their in zip(ours[name], theirs[name], strict=True):
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine, their)
    assert not torch.equal(ours.scores[0], ours.logits[0])
    for mine, their in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        for layer, their_layer in zip(mine, their, strict=True):
            torch.testing.assert_close(layer, their_layer)
    assert len(ours.attentions) == 4
    assert ours.past_key_values.get_seq_length() == ours.sequences.shape[1] - 1
    assert torch.equal(ours[0], ours["sequences"]) and "past_key_values" in ours


def test_sequences_end_on_their_own() -> None:
    model = Adapted(tiny_olmoe())
    free = model.generate(prompts(4, 6), max_new_tokens=30, eos_token_id=None)
    ends = [int(free[0, 9]), int(free[1, 14])]
    got = model.generate(prompts(4, 6), max_new_tokens=30, eos_token_id=ends)
    for row, expected in zip(got, free, strict=True):
        stop = next((i for i in range(6, 36) if int(expected[i]) in ends), 35)
        assert torch.equal(row[: stop + 1], expected[: stop + 1][: len(row)])
        assert (row[stop + 1 :] == PAD).all()


def test_going_on_from_a_cache() -> None:
    ids = prompts(2, 9)
    model = Adapted(tiny_olmoe())
    expected = model.generate(ids, max_new_tokens=8)
    past = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model.model(ids[:, :5], past_key_values=past, use_cache=True)
    model.calls.clear()
    assert torch.equal(model.generate(ids, past_key_values=past, max_new_tokens=8), expected)
    assert model.calls[0]["input_ids"].shape == (2, 4)
    with pytest.raises(ValueError, match="at least one token that is not cached"):
        model.generate(ids, past_key_values=past, max_new_tokens=8)


def test_prompt_as_embeddings() -> None:
    ids = prompts(2, 6)
    embeds = tiny_olmoe().get_input_embeddings()(ids).detach()
    expected = Adapted(tiny_olmoe()).generate(ids, max_new_tokens=9)[:, 6:]
    for kwargs in ({}, {"prefill_chunk_size": 4}):
        got = Adapted(tiny_olmoe()).generate(inputs_embeds=embeds, max_new_tokens=9, **kwargs)
        assert torch.equal(got, expected)
    assert torch.equal(tiny_olmoe().generate(inputs_embeds=embeds, max_new_tokens=9), expected)


def test_seed_repeats_and_leaves_the_global_generator_alone() -> None:
    model, ids = Adapted(tiny_olmoe()), prompts(2, 5)
    before = torch.get_rng_state()
    first = model.generate(ids, do_sample=True, max_new_tokens=20, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, model.generate(ids, do_sample=True, max_new_tokens=20, seed=3))
    assert not torch.equal(first, model.generate(ids, do_sample=True, max_new_tokens=20, seed=4))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(first, model.generate(ids, do_sample=True, max_new_tokens=20, generator=generator))
    with pytest.raises(ValueError, match="seed or generator"):
        model.generate(ids, do_sample=True, seed=1, generator=generator)


def test_samples_follow_the_filtered_distribution() -> None:
    """A chi-squared test of 4000 first tokens; the bound is passed by chance once in 10^6."""
    model, ids = Adapted(tiny_olmoe()), prompts(1, 4)
    out = model.generate(
        ids, do_sample=True, temperature=1.5, top_k=8, max_new_tokens=1, num_return_sequences=4000, seed=0,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    probs = out.scores[0][0].softmax(-1).double()
    assert (probs > 0).sum() == 8
    counts = torch.bincount(out.sequences[:, -1], minlength=VOCAB).double()
    assert (counts[probs == 0] == 0).all()
    expected = 4000 * probs[probs > 0]
    statistic = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    assert 0.2 < statistic < 40.5  # chi-squared with 7 degrees of freedom


class StopAtLength(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length
        self.saw_scores: list[bool] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
        self.saw_scores.append(scores is not None)
        return input_ids.shape[1] >= self.length


def test_custom_criteria_and_processors() -> None:
    model, ids = Adapted(tiny_olmoe()), prompts(2, 5)
    stop = StopAtLength(9)
    assert model.generate(ids, max_new_tokens=30, stopping_criteria=[stop]).shape[1] == 9
    assert stop.saw_scores == [False] * 4
    model.generate(ids, max_new_tokens=2, stopping_criteria=[stop], return_dict_in_generate=True, output_scores=True)
    assert stop.saw_scores[-1]
    # A caller's length takes the place of the config's.
    assert model.generate(
        ids, max_new_tokens=30, eos_token_id=None, stopping_criteria=[MaxLengthCriteria(8)]
    ).shape == (2, 8)
    only_42 = model.generate(
        ids, max_new_tokens=3, logits_processor=[lambda i, s: s.index_fill(1, torch.tensor([42]), 99.0)]
    )
    assert (only_42[:, 5:] == 42).all()
    allowed = model.generate(ids, max_new_tokens=4, prefix_allowed_tokens_fn=lambda prompt, ids: [50 + prompt])
    assert allowed[:, 5:].tolist() == [[50] * 4, [51] * 4]


class Vocabulary:
    """Decodes token n to one letter."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + i % 26) for i in ids)


def test_stop_strings() -> None:
    model, ids = Adapted(tiny_olmoe()), prompts(1, 5)
    free = model.generate(ids, max_new_tokens=30, eos_token_id=None)[0]
    text = Vocabulary().decode(free.tolist())
    stop = text[12:15]
    end = text.index(stop, 3) + 3
    got = model.generate(
        ids, max_new_tokens=30, eos_token_id=None, stop_strings=["never there", stop], tokenizer=Vocabulary()
    )
    assert got.shape[1] == max(end, 6)
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(ids, stop_strings="x")


def test_max_time() -> None:
    got = Adapted(tiny_olmoe()).generate(prompts(1, 5), max_new_tokens=30, eos_token_id=None, max_time=0.0)
    assert got.shape[1] == 6


def test_config_precedence() -> None:
    ids = prompts(1, 5)
    own = GenerationConfig(max_new_tokens=3, eos_token_id=EOS, pad_token_id=PAD, repetition_penalty=3.0)
    model = Adapted(tiny_olmoe(), own)
    assert model.generate(ids).shape[1] <= 8
    assert model.generate(ids, max_new_tokens=2, eos_token_id=None).shape[1] == 7
    given = GenerationConfig(max_new_tokens=6)
    penalised = model.generate(ids, given)
    assert torch.equal(penalised, tiny_olmoe().generate(ids, max_new_tokens=6, repetition_penalty=3.0))
    assert torch.equal(
        model.generate(ids, given, use_model_defaults=False), tiny_olmoe().generate(ids, max_new_tokens=6)
    )
    own.transformers_version = "4.47.1"  # before configs fell back to the model's
    assert torch.equal(model.generate(ids, given), tiny_olmoe().generate(ids, max_new_tokens=6))
    assert given.eos_token_id is None and given.max_length == 20 and own.max_length == 20  # nothing was changed


def test_default_length_stays_within_the_model() -> None:
    model = Adapted(tiny_olmoe())
    assert model.generate(prompts(1, 250), eos_token_id=None).shape[1] == 256
    assert model.generate(prompts(1, 10), eos_token_id=None).shape[1] == 30


def test_warnings() -> None:
    model, ids = Adapted(tiny_olmoe()), prompts(1, 5)
    with pytest.warns(UserWarning, match=r"no effect.*temperature=0.0"):
        got = model.generate(ids, do_sample=False, temperature=0.0, max_new_tokens=5)
    assert torch.equal(got, model.generate(ids, max_new_tokens=5))
    with pytest.warns(UserWarning, match="padding_side='left'"):
        model.generate(torch.cat([ids, torch.full((1, 1), PAD)], dim=1), max_new_tokens=1)
    with pytest.warns(UserWarning, match="max_new_tokens=2 overrides max_length=9"):
        assert model.generate(ids, max_new_tokens=2, max_length=9, eos_token_id=None).shape[1] == 7
    with pytest.warns(UserWarning, match="minimum length 15"):
        model.generate(ids, max_new_tokens=2, min_new_tokens=10)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (["a prompt"], {}, r"integer tensor \[batch, length\], got str"),
        ([torch.ones(5, dtype=torch.long)], {}, r"got torch.int64 \[5\]"),
        ([torch.ones(1, 5)], {}, r"got torch.float32 \[1, 5\]"),
        ([torch.ones(0, 5, dtype=torch.long)], {}, r"at least one token per prompt, got \[0, 5\]"),
        ([torch.ones(2, 0, dtype=torch.long)], {}, r"at least one token per prompt"),
        ([], {}, "no prompt"),
        ([prompts(1, 5)], {"input_ids": prompts(1, 5)}, "given twice"),
        ([prompts(1, 5)], {"max_length": 5}, "prompt has 5 tokens"),
        ([prompts(1, 5)], {"max_new_tokens": 0}, "max_new_tokens must be a positive integer, got 0"),
        ([prompts(1, 5)], {"temperature": 0.0, "do_sample": True}, "do_sample=False"),
        ([prompts(1, 5)], {"num_return_sequences": 2}, "do_sample=True"),
        ([prompts(1, 5)], {"attention_mask": torch.ones(1, 4)}, r"attention_mask must be \[1, 5\]"),
        ([prompts(1, 5)], {"cache_implementation": "magic"}, "dynamic"),
        ([prompts(1, 5)], {"past_key_values": object(), "cache_implementation": "static"}, "not both"),
        ([], {"inputs_embeds": torch.ones(1, 5)}, r"\[batch, length, hidden\]"),
        ([], {"inputs_embeds": torch.ones(1, 5, 32), "use_cache": False}, "use_cache=True"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(args: list, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adapted(tiny_olmoe()).generate(*args, **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 4, "num_beam_groups": 2},
        {"penalty_alpha": 0.6},
        {"dola_layers": "low"},
        {"constraints": [object()]},
        {"assistant_early_exit": 1},
        {"assistant_tokenizer": object()},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_what_is_not_there_is_refused(kwargs: dict) -> None:
    with pytest.raises(NotImplementedError, match="not supported yet"):
        Adapted(tiny_olmoe()).generate(prompts(1, 5), **kwargs)


class Picky(Adapted):
    """Takes only some keywords."""

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:  # type: ignore[override]
        return self.model(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)

    __call__ = forward


def test_models_get_only_what_they_take() -> None:
    ids = prompts(2, 5)
    assert torch.equal(
        Picky(tiny_olmoe()).generate(ids, max_new_tokens=5), tiny_olmoe().generate(ids, max_new_tokens=5)
    )
    for model in (Picky(tiny_olmoe()), Adapted(tiny_olmoe())):
        for name in ("max_tokens", "position_ids"):
            with pytest.raises(ValueError, match=f"neither generation parameters nor keywords of the model: {name}"):
                model.generate(ids, **{name: 5})
    assert Picky(tiny_olmoe()).generate(ids, token_type_ids=torch.zeros_like(ids), max_new_tokens=1).shape == (2, 6)


class Forgetful(Adapted):
    """Reads everything again at the third token, as models do whose positions depend on the length."""

    def prepare_inputs_for_generation(self, state: Any) -> dict[str, Any]:
        if state.length == state.prompt_length + 3:
            state.forget()
        return super().prepare_inputs_for_generation(state)


def test_a_model_can_start_its_cache_again() -> None:
    ids = prompts(2, 5, padded=True)
    model = Forgetful(tiny_olmoe())
    assert torch.equal(model.generate(ids, max_new_tokens=8), tiny_olmoe().generate(ids, max_new_tokens=8))
    assert [call["cache_position"].numel() for call in model.calls] == [5, 1, 1, 8, 1, 1, 1, 1]
