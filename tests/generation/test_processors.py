"""Every processor against transformers' processor of the same name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig as OracleConfig
from transformers import GenerationMixin as OracleMixin
from transformers.generation import logits_process as oracle

from moekernels import generation as ours
from moekernels.generation import GenerationConfig, build_logits_processors

V = 61
EOS = [3, 17]


def _scores(rows: int) -> Tensor:
    scores = torch.randn(rows, V) * 3
    scores[:, 5] = scores[:, 6]  # ties
    scores[:, 20:24] = float("-inf")  # already banned
    return scores


def _history(rows: int, length: int) -> Tensor:
    return torch.randint(0, 7, (rows, length))


CASES: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    name: (lambda m=name, a=args: getattr(ours, m)(*a), lambda m=name, a=args: getattr(oracle, m)(*a))
    for name, args in {
        "TemperatureLogitsWarper": (0.7,),
        "RepetitionPenaltyLogitsProcessor": (1.3,),
        "NoRepeatNGramLogitsProcessor": (2,),
        "MinLengthLogitsProcessor": (9, EOS),
        "MinNewTokensLengthLogitsProcessor": (4, 3, EOS),
        "ForcedBOSTokenLogitsProcessor": (8,),
        "ForcedEOSTokenLogitsProcessor": (9, EOS),
        "InfNanRemoveLogitsProcessor": (),
        "ExponentialDecayLengthPenalty": ((2, 1.2), EOS, 4),
        "SuppressTokensLogitsProcessor": ([1, 2, 60],),
        "SuppressTokensAtBeginLogitsProcessor": ([1, 2, 60], 8),
        "TopKLogitsWarper": (5,),
        "TopPLogitsWarper": (0.8,),
        "MinPLogitsWarper": (0.1,),
        "TypicalLogitsWarper": (0.6,),
        "EpsilonLogitsWarper": (0.02,),
        "EtaLogitsWarper": (0.02,),
        "LogitNormalization": (),
    }.items()
}


@pytest.mark.parametrize("length", [1, 2, 7, 8, 40])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name: str, rows: int, length: int) -> None:
    make, make_oracle = CASES[name]
    ids, scores = _history(rows, length), _scores(rows)
    before_ids, before = ids.clone(), scores.clone()
    got, expected = make()(ids, scores), make_oracle()(ids.clone(), scores.clone())  # type: ignore[operator]
    # The entropy is summed in another way, so the last bit may differ; what is kept may not.
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert torch.equal(ids, before_ids) and torch.equal(scores, before)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 30])
def test_no_repeat_ngram(n: int, length: int) -> None:
    ids, scores = _history(4, length), _scores(4)
    got = ours.NoRepeatNGramLogitsProcessor(n)(ids, scores)
    assert torch.equal(got, oracle.NoRepeatNGramLogitsProcessor(n)(ids, scores))
    if n == 2 and length == 30:
        assert (got == float("-inf")).sum() > (scores == float("-inf")).sum()


@pytest.mark.parametrize("keep", [1, 4])
def test_filters_keep_enough_tokens(keep: int) -> None:
    scores = _scores(3)
    for name, argument in (("TopKLogitsWarper", 1), ("TopPLogitsWarper", 0.01), ("MinPLogitsWarper", 0.9)):
        got = getattr(ours, name)(argument, min_tokens_to_keep=keep)(None, scores)
        expected = getattr(oracle, name)(argument, min_tokens_to_keep=keep)(None, scores)
        assert torch.equal(got, expected), name
        assert ((got > float("-inf")).sum(-1) >= keep).all(), name


def test_top_p_at_its_ends() -> None:
    scores = _scores(2)
    for top_p in (0.0, 1.0):
        assert torch.equal(ours.TopPLogitsWarper(top_p)(None, scores), oracle.TopPLogitsWarper(top_p)(None, scores))


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("keep", [1, 3])
def test_top_p_of_a_long_vocabulary(top_p: float, keep: int) -> None:
    """Sharp and flat rows, alone and together: where the best tokens do not suffice, all are sorted."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(4, 9000, generator=generator) * torch.tensor([[9.0], [3.0], [1.0], [0.0]])
    scores[1, 60:] = float("-inf")
    for rows in (scores[:2], scores[1:2], scores[:3], scores[:3] + 1000):
        got = ours.TopPLogitsWarper(top_p, min_tokens_to_keep=keep)(None, rows)
        assert torch.equal(got, oracle.TopPLogitsWarper(top_p, min_tokens_to_keep=keep)(None, rows))
    # Which of equal tokens are kept is open, but not how many.
    flat = ours.TopPLogitsWarper(0.25)(None, scores[3:])
    assert abs(int((flat > float("-inf")).sum()) - 2250) <= 1


def test_ties_at_the_boundary() -> None:
    scores = torch.tensor([[4.0, 4.0, 1.0, 4.0]])
    assert torch.equal(ours.MinPLogitsWarper(1.0)(None, scores), oracle.MinPLogitsWarper(1.0)(None, scores))
    assert ours.MinPLogitsWarper(1.0)(None, scores).isinf().tolist() == [[False, False, True, False]]
    # Four equal probabilities of exactly 1/4: half of the mass is two tokens, not three.
    even = torch.zeros(1, 4)
    assert torch.equal(ours.TopPLogitsWarper(0.5)(None, even), oracle.TopPLogitsWarper(0.5)(None, even))
    assert ours.TopPLogitsWarper(0.5)(None, even).isinf().sum() == 2


def test_top_k_beyond_the_vocabulary() -> None:
    scores = _scores(2)
    assert torch.equal(ours.TopKLogitsWarper(1000)(None, scores), scores)


def test_infinities_and_nan() -> None:
    scores = torch.tensor([[float("nan"), float("inf"), float("-inf"), 1.0]])
    expected = oracle.InfNanRemoveLogitsProcessor()(None, scores)
    assert torch.equal(ours.InfNanRemoveLogitsProcessor()(None, scores), expected)


def test_sequence_bias() -> None:
    bias = {(4,): -2.5, (1, 2): 3.0, (5, 6, 1): float("-inf"), (2, 2): 1.5, (0, 1, 2, 3, 4, 5, 6, 0, 1, 2): 9.0}
    for length in (1, 2, 9, 30):
        ids, scores = _history(5, length), _scores(5)
        got = ours.SequenceBiasLogitsProcessor(bias)(ids, scores)
        assert torch.equal(got, oracle.SequenceBiasLogitsProcessor(bias)(ids, scores))
        as_list = ours.SequenceBiasLogitsProcessor([[list(tokens), value] for tokens, value in bias.items()])
        assert torch.equal(got, as_list(ids, scores))


def test_bad_words() -> None:
    words = [[4], [3], [1, 2], [6, 5]]  # [3] is an end token and stays allowed
    ids, scores = _history(6, 30), _scores(6)
    got = ours.NoBadWordsLogitsProcessor(words, EOS)(ids, scores)
    assert torch.equal(got, oracle.NoBadWordsLogitsProcessor(words, EOS)(ids, scores))
    assert (got[:, 3] == scores[:, 3]).all()
    assert torch.equal(ours.NoBadWordsLogitsProcessor([[3]], EOS)(ids, scores), scores)


def test_encoder_repetition_penalty() -> None:
    source, scores = torch.randint(0, V, (2, 9)), _scores(2)
    got = ours.EncoderRepetitionPenaltyLogitsProcessor(1.4, source)(_history(2, 3), scores)
    expected = oracle.EncoderRepetitionPenaltyLogitsProcessor(1.4, source)(_history(2, 3), scores)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_prefix_constraint() -> None:
    def allowed(prompt: int, ids: Tensor) -> list[int]:
        return [prompt, int(ids[-1])]

    ids, scores = _history(4, 5), _scores(4)
    got = ours.PrefixConstrainedLogitsProcessor(allowed, 2)(ids, scores)
    assert torch.equal(got, oracle.PrefixConstrainedLogitsProcessor(allowed, 2)(ids, scores))
    with pytest.raises(ValueError, match="allowed no token for prompt 0"):
        ours.PrefixConstrainedLogitsProcessor(lambda prompt, ids: [], 1)(ids, scores)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("TemperatureLogitsWarper", (0.0,), "do_sample=False"),
        ("TemperatureLogitsWarper", (-1.0,), "greater than 0"),
        ("TopKLogitsWarper", (0,), "top_k"),
        ("TopPLogitsWarper", (1.5,), "top_p"),
        ("MinPLogitsWarper", (-0.1,), "min_p"),
        ("TypicalLogitsWarper", (1.0,), "typical_p"),
        ("RepetitionPenaltyLogitsProcessor", (0.0,), "repetition_penalty"),
        ("NoRepeatNGramLogitsProcessor", (0,), "no_repeat_ngram_size"),
        ("MinLengthLogitsProcessor", (-1, 3), "min_length"),
        ("MinLengthLogitsProcessor", (5, -3), "eos_token_id"),
        ("ForcedEOSTokenLogitsProcessor", (5, [2, -1]), "forced_eos_token_id"),
        ("SequenceBiasLogitsProcessor", ({(): 1.0},), "at least one token"),
    ],
)
def test_bad_arguments(name: str, args: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(ours, name)(*args)


def test_bias_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match=f"token {V}.*{V} tokens"):
        ours.SequenceBiasLogitsProcessor({(V,): 1.0})(_history(1, 3), _scores(1))


EVERYTHING = dict(
    do_sample=True,
    sequence_bias=[[[7], 2.0]],
    repetition_penalty=1.2,
    encoder_repetition_penalty=1.1,
    no_repeat_ngram_size=2,
    bad_words_ids=[[9]],
    min_length=12,
    min_new_tokens=5,
    forced_bos_token_id=4,
    forced_eos_token_id=3,
    remove_invalid_values=True,
    exponential_decay_length_penalty=(1, 1.3),
    suppress_tokens=[10],
    begin_suppress_tokens=[11],
    temperature=0.6,
    top_k=30,
    top_p=0.9,
    min_p=0.01,
    typical_p=0.95,
    epsilon_cutoff=1e-4,
    eta_cutoff=1e-4,
    renormalize_logits=True,
    eos_token_id=EOS,
    max_length=40,
)


def _oracle_names(config: OracleConfig, ids: Tensor, custom: list) -> list[str]:
    config._eos_token_tensor = torch.tensor(EOS)
    model = type("Model", (OracleMixin,), {"config": None})()
    processors = model._get_logits_processor(
        config, input_ids_seq_length=ids.shape[1], encoder_input_ids=ids, logits_processor=custom, device="cpu"
    )
    return [type(processor).__name__ for processor in processors]


@pytest.mark.parametrize("changes", [{}, {"do_sample": False}, {"num_beams": 3}])
def test_order_is_that_of_transformers(changes: dict) -> None:
    ids = _history(2, 6)
    oracle_config = OracleConfig(**{**EVERYTHING, **changes})
    custom = [oracle.SuppressTokensLogitsProcessor([12])]
    names = _oracle_names(oracle_config, ids, custom)
    built = build_logits_processors(
        GenerationConfig(**{**EVERYTHING, **changes}),
        ids.shape[1],
        custom=[ours.SuppressTokensLogitsProcessor([12])],
        encoder_input_ids=ids,
    )
    assert [type(processor).__name__ for processor in built] == names
    # The caller's processor took the place of the config's.
    suppressed = next(p for p in built if isinstance(p, ours.SuppressTokensLogitsProcessor))
    assert suppressed(ids, torch.zeros(2, V))[0].isinf().nonzero().flatten().tolist() == [12]


def test_a_banned_end_stays_banned() -> None:
    scores = torch.tensor([[1.0, float("-inf"), -2.0]])
    penalty = ours.ExponentialDecayLengthPenalty((0, 2.0), [0, 1, 2], 1)
    # transformers returns NaN for the second: -inf + inf.
    assert penalty(_history(1, 3), scores).tolist() == [[4.0, float("-inf"), 4.0]]


@pytest.mark.parametrize("length", [1, 6, 20, 39])
def test_whole_pipeline_equals_transformers(length: int) -> None:
    # Ends are banned in some of these cases, where transformers' length penalty gives NaN (see above).
    parameters = {**EVERYTHING, "exponential_decay_length_penalty": None}
    ids, scores = torch.randint(0, V, (3, length)), torch.randn(3, V) * 2
    oracle_config = OracleConfig(**parameters)
    oracle_config._eos_token_tensor = torch.tensor(EOS)
    model = type("Model", (OracleMixin,), {"config": None})()
    expected = model._get_logits_processor(oracle_config, input_ids_seq_length=1, encoder_input_ids=ids, device="cpu")(
        ids, scores
    )
    got = build_logits_processors(GenerationConfig(**parameters), 1, encoder_input_ids=ids)(ids, scores)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(got, scores)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 40])
@pytest.mark.parametrize("name", CASES)
def test_overwriting_scores_gives_the_same(name: str, length: int) -> None:
    ids, scores = _history(3, length), _scores(3)
    processors = ours.LogitsProcessorList([CASES[name][0]()])  # type: ignore[list-item]
    expected = processors(ids, scores)
    given = scores.clone()
    got = processors.overwrite(ids, given)
    assert torch.equal(got, expected)
    if ("Min" in name and "Length" in name) or "Suppress" in name:
        assert got is given  # whether or not there is something to ban


def test_which_processors_are_our_own() -> None:
    class Derived(ours.MinLengthLogitsProcessor):
        pass

    own = ours.MinLengthLogitsProcessor(3, 2)
    assert ours.LogitsProcessorList().are_own
    assert ours.LogitsProcessorList([own, ours.TopKLogitsWarper(3)]).are_own
    for other in (Derived(3, 2), oracle.MinLengthLogitsProcessor(3, 2), lambda ids, scores: scores, own.__call__):
        assert not ours.LogitsProcessorList([own, other]).are_own
