"""One model in eight threads, as a server has it: every thread gets the bits that it gets alone."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from moekernels.generation import TextIteratorStreamer
from tests.models.tiny import CONFIGS, head_class

THREADS, ROUNDS = 8, 1


@pytest.fixture(autouse=True)
def _threads_change_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    made = head_class(request.param).from_config(copy.deepcopy(CONFIGS[request.param])).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def prompts(thread: int) -> dict[str, Tensor]:
    """Prompts of another length, number and padding for every thread."""
    generator = torch.Generator().manual_seed(thread)
    ids = torch.randint(3, 61, (1 + thread % 3, 4 + 5 * (thread % 4)), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, : thread % 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


class Words:
    """A tokenizer as far as a streamer needs one."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{index} " for index in ids)


def forward(model: Any, thread: int) -> Any:
    given = prompts(thread)
    targets = {"decoder_input_ids": given["input_ids"]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(**given, **targets).logits


def generated(**parameters: Any) -> Callable[[Any, int], Any]:
    def call(model: Any, thread: int) -> Any:
        own = {"seed": thread} if parameters.get("do_sample") else {}
        return model.generate(**prompts(thread), max_new_tokens=6 + thread, eos_token_id=None, **parameters, **own)

    return call


def streamed(model: Any, thread: int) -> Any:
    streamer = TextIteratorStreamer(Words())
    model.generate(prompts(thread)["input_ids"][:1], max_new_tokens=9, eos_token_id=None, streamer=streamer)
    return list(streamer)


CALLS: dict[str, Callable[[Any, int], Any]] = {
    "forward": forward,
    "greedy": generated(),
    "beams": generated(num_beams=3, repetition_penalty=1.3, no_repeat_ngram_size=2),
    "sampling": generated(do_sample=True, top_p=0.9, temperature=0.7),
    "static cache": generated(cache_implementation="static"),
    "streamer": streamed,
}


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_every_call(model: Any) -> None:
    names = list(CALLS)
    alone = {(name, thread): CALLS[name](model, thread) for name in names for thread in range(THREADS)}
    # Nothing that is made at the first call is there when the threads meet.
    for module in model.modules():
        if hasattr(module, "_table"):
            module._table, module.num_positions = None, 4
    barrier = Barrier(THREADS)

    def work(thread: int) -> list[str]:
        barrier.wait()
        calls = [names[(thread + turn) % len(names)] for turn in range(ROUNDS * len(names))]
        return [name for name in calls if not same(CALLS[name](model, thread), alone[name, thread])]

    with ThreadPoolExecutor(THREADS) as pool:
        wrong = list(pool.map(work, range(THREADS)))
    assert wrong == [[]] * THREADS


def test_gradients(model: Any) -> None:
    """Passes with gradients in other threads leave those of a pass without alone, and the reverse."""
    expected = forward(model, 3)

    def work(thread: int) -> bool:
        if thread % 2:
            return same(forward(model, 3), expected)
        given = {"input_ids": prompts(thread)["input_ids"], "labels": prompts(thread)["input_ids"]}
        loss = model(**given).loss
        gradient = torch.autograd.grad(loss, [model.get_input_embeddings().weight])[0]
        return bool(loss.requires_grad and gradient.isfinite().all())

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, list(range(THREADS)) * 3))
