"""Processes that share a model and take their steps together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moekernels.generation import GenerationConfig, GenerationMixin, synced
from tests.generation.adapter import Adapted, prompts, tiny_olmoe
from tests.processes import run_processes

VOCAB = 11


class Counting(GenerationMixin):
    """Says the number after the last one. Every run is one of all processes, as with parameters spread over them."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.generation_config = GenerationConfig()
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.runs = 0

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, logits_to_keep: int = 1) -> Any:
        dist.all_reduce(torch.ones(()), op=dist.ReduceOp.MAX)
        self.runs += 1
        following = (input_ids[:, -logits_to_keep:] + 1) % VOCAB
        logits = torch.nn.functional.one_hot(following, VOCAB).float()
        return SimpleNamespace(logits=logits, past_key_values=past_key_values)

    __call__ = forward


def generate(rank: int, options: list[dict[str, Any]]) -> tuple[list[list[int]], int]:
    """One process of several: its tokens, and how often it ran the model."""
    model = Counting()
    tokens = model.generate(torch.arange(5)[None], synced_gpus=True, **options[rank])
    return tokens.tolist(), model.runs


def test_the_first_to_finish_goes_on() -> None:
    """Both processes run the model equally often; one that stopped early would leave the other waiting for ever."""
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 3},
        {"max_new_tokens": 9, "prefill_chunk_size": 2, "guidance_scale": 1.5},
    ]
    for (tokens, runs), kwargs in zip(run_processes(generate, 2, options), options, strict=True):
        # The prompt in three pieces, eight more tokens, and as many runs without the prompt as there are tokens.
        assert runs == 3 + 8 + 9
        assert tokens == [[number % VOCAB for number in range(5 + kwargs["max_new_tokens"])]]


class Group:
    """A process group of which this process is one of two; the other one runs `others` more steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, others: int, size: int = 2) -> None:
        self.others = others
        self.own: list[int] = []
        for name, value in (("is_initialized", lambda: True), ("get_world_size", lambda: size)):
            monkeypatch.setattr(synced.dist, name, value)
        monkeypatch.setattr(synced.dist, "all_reduce", self.all_reduce)

    def all_reduce(self, running: torch.Tensor) -> None:
        self.own.append(int(running))
        self.others -= 1
        running += self.others >= 0


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
@pytest.mark.parametrize("others", [0, 2, 8])
def test_every_run_is_announced(monkeypatch: pytest.MonkeyPatch, kwargs: dict[str, Any], others: int) -> None:
    model = Adapted(tiny_olmoe())
    expected = model.generate(prompts(1, 5), max_new_tokens=4, eos_token_id=None, **kwargs)
    own_runs = len(model.calls)
    group = Group(monkeypatch, others)
    model.calls.clear()
    got = model.generate(prompts(1, 5), max_new_tokens=4, eos_token_id=None, synced_gpus=True, **kwargs)
    assert torch.equal(got, expected)
    assert len(model.calls) == max(own_runs, others)
    # Once more than there are runs: to learn that nobody runs any more.
    assert group.own == [1] * own_runs + [0] * (len(model.calls) - own_runs + 1)
    for call in model.calls[own_runs:]:
        assert call["past_key_values"] is None
        assert call["input_ids"].shape == (kwargs.get("num_beams", 1), 1)


def test_alone_there_is_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        Adapted(tiny_olmoe()).generate(prompts(1, 5), synced_gpus=True)
    group = Group(monkeypatch, 0, size=1)
    Adapted(tiny_olmoe()).generate(prompts(1, 5), synced_gpus=True, max_new_tokens=2)
    assert group.own == []


def test_by_default_models_under_fsdp_are_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp import FSDPModule

    class Sharded(torch.nn.Linear, FSDPModule):
        pass

    plain = torch.nn.Sequential(torch.nn.Linear(2, 2))
    sharded = torch.nn.Sequential(torch.nn.Linear(2, 2))
    sharded[0].__class__ = Sharded
    assert not synced.is_synced(None, sharded)
    Group(monkeypatch, 0)
    assert synced.is_synced(None, sharded) and not synced.is_synced(False, sharded)
    assert not synced.is_synced(None, plain) and not synced.is_synced(None, Adapted(tiny_olmoe()))
    assert synced.is_synced(True, plain)
