"""The arguments of `generate` that are not parameters, against transformers with the same ones."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

import moekernels
from moekernels import generation
from tests.generation.adapter import Adapted, AdaptedSeq2Seq, prompts, sources, tiny_m2m100, tiny_olmoe

STRATEGIES = [{}, {"num_beams": 3}, {"do_sample": True}, {"do_sample": True, "num_beams": 3}]


def both(models: tuple[Any, Any], ids: torch.Tensor, mine: dict[str, Any], theirs: dict[str, Any]) -> tuple[Any, Any]:
    results = []
    for model, kwargs in zip(models, (mine, theirs), strict=True):
        torch.manual_seed(7)
        results.append(model.generate(ids, max_new_tokens=12, **kwargs))
    return results[0], results[1]


def decoders() -> tuple[Any, Any]:
    return Adapted(tiny_olmoe()), tiny_olmoe()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda kwargs: "-".join(kwargs) or "greedy")
def test_prefix_allowed_tokens_fn(strategy: dict[str, Any]) -> None:
    def allowed(prompt: int, ids: torch.Tensor) -> list[int]:
        return [token for token in range(3, 97) if token % 3 == (prompt + len(ids)) % 3]

    kwargs = {"prefix_allowed_tokens_fn": allowed, **strategy}
    for ids in (prompts(3, 5), prompts(2, 6, padded=True)):
        ours, theirs = both(decoders(), ids, kwargs, kwargs)
        assert torch.equal(ours, theirs)
    # Beams of an encoder-decoder; it draws other numbers there.
    if "do_sample" not in strategy:
        models = AdaptedSeq2Seq(tiny_m2m100()), tiny_m2m100()
        ours, theirs = both(models, sources(3, 6), kwargs, kwargs)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda kwargs: "-".join(kwargs) or "greedy")
def test_logits_processor(strategy: dict[str, Any]) -> None:
    """One of a class that the parameters ask for takes that one's place; others come after all of those."""

    def bent(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + (ids[:, -1:] % 5) * torch.linspace(-1, 1, scores.shape[1])

    kwargs = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "top_p": 0.9, "do_sample": False, **strategy}
    if not kwargs["do_sample"]:
        del kwargs["top_p"]
    mine, theirs = (
        [bent, where.RepetitionPenaltyLogitsProcessor(penalty=3.0)] for where in (generation, transformers.generation)
    )
    ours, expected = both(
        decoders(),
        prompts(3, 5),
        {**kwargs, "logits_processor": mine},
        {**kwargs, "logits_processor": transformers.LogitsProcessorList(theirs)},
    )
    assert torch.equal(ours, expected)
    without, _ = both(decoders(), prompts(3, 5), {**kwargs, "logits_processor": [bent]}, kwargs)
    assert not torch.equal(ours, without)
    # Lists of transformers' own processors serve as well.
    mixed, _ = both(
        decoders(), prompts(3, 5), {**kwargs, "repetition_penalty": 1.0, "logits_processor": theirs}, kwargs
    )
    assert mixed.shape == ours.shape


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda kwargs: "-".join(kwargs) or "greedy")
def test_stopping_criteria(strategy: dict[str, Any]) -> None:
    def sevens(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return ids[:, -1] % 7 == 0

    mine, theirs = (
        {**strategy, "stopping_criteria": [sevens, where.MaxLengthCriteria(11)]}
        for where in (generation, transformers.generation)
    )
    theirs["stopping_criteria"] = transformers.StoppingCriteriaList(theirs["stopping_criteria"])
    ours, expected = both(decoders(), prompts(3, 5), mine, theirs)
    assert torch.equal(ours, expected)


@pytest.fixture
def with_defaults() -> Iterator[tuple[Any, Any]]:
    """Models whose own config asks for a penalty, three beams and other end tokens."""
    theirs = tiny_olmoe()
    before = copy.deepcopy(theirs.generation_config)
    theirs.generation_config.update(repetition_penalty=2.0, num_beams=3, eos_token_id=list(range(2, 12)))
    yield Adapted(theirs, moekernels.GenerationConfig(**theirs.generation_config.to_diff_dict())), theirs
    theirs.generation_config = before


@pytest.mark.parametrize("use_model_defaults", [None, True, False])
@pytest.mark.parametrize("given", [None, {}, {"num_beams": 2}, {"repetition_penalty": 1.1, "do_sample": True}])
def test_generation_config_and_model_defaults(
    with_defaults: tuple[Any, Any], use_model_defaults: bool | None, given: dict[str, Any] | None
) -> None:
    mine, theirs = (
        {"generation_config": None if given is None else where.GenerationConfig(**given)}
        for where in (moekernels, transformers)
    )
    more = {"use_model_defaults": use_model_defaults, "no_repeat_ngram_size": 3}
    ours, expected = both(with_defaults, prompts(3, 5), {**mine, **more}, {**theirs, **more})
    assert torch.equal(ours, expected)


def test_the_arguments_are_those_of_transformers() -> None:
    """By position too; what is ours alone follows by keyword."""
    mine, theirs = (
        inspect.signature(where.GenerationMixin.generate).parameters for where in (generation, transformers)
    )
    positional = [name for name, parameter in mine.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert positional == [name for name in theirs if name != "kwargs"]


def test_names_are_those_of_transformers() -> None:
    for name in generation.__all__:
        if name not in ("DecodeState", "build_logits_processors"):
            assert hasattr(transformers.generation, name), name
    for name in moekernels.__all__:
        if name.startswith("Generate"):
            assert getattr(moekernels, name) is getattr(generation, name)
    assert sum(name.startswith("Generate") for name in moekernels.__all__) == 4


def test_results_are_ordinary_tensors() -> None:
    """They may be trained on."""
    out = Adapted(tiny_olmoe()).generate(
        prompts(1, 5), max_new_tokens=3, output_scores=True, return_dict_in_generate=True
    )
    assert not out.sequences.is_inference() and not out.scores[0].is_inference()
    assert torch.is_grad_enabled()
