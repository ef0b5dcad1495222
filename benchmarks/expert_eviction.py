"""Which expert should make room for another one? Policies, simulated over the routing of a small trained model.

    python benchmarks/expert_eviction.py --steps 400 --tokens 512

An OLMoE of eight layers with 32 experts each learns the bytes of this project's own files, then writes text, one token
after the other; every layer's choices are recorded. Policies see the choices as they come, but for "optimal", which
knows the future (Belady, https://doi.org/10.1147/sj.52.0078) and bounds what any can do. The last line is what a guess
of the next layer's experts is worth: its router applied to what the layer before it was given.
"""

from __future__ import annotations

import argparse
import sys
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moekernels.bench.machine import described, machine
from moekernels.models import OlmoeConfig, OlmoeForCausalLM
from moekernels.nn import TopKRouter

ROOT = Path(__file__).resolve().parent.parent
LAYERS, EXPERTS, TOP_K = 8, 32, 4
_CONTEXT = 128
#: After so many tokens a visit counts half.
_HALF_LIFE = 64

Key = tuple[int, int]
#: A step is a layer of a token; the experts that it visits.
Trace = list[tuple[int, list[int]]]


def trained(steps: int) -> tuple[OlmoeForCausalLM, Tensor]:
    """A model of bytes, and the bytes."""
    files = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "python").rglob("*.py")])
    text = torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()
    torch.manual_seed(0)
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=256, hidden_size=128, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_experts=EXPERTS, num_experts_per_tok=TOP_K, output_router_logits=True,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(steps):
        begins = torch.randint(0, len(text) - _CONTEXT, (8,)).tolist()
        batch = torch.stack([text[begin : begin + _CONTEXT] for begin in begins])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.2f}", file=sys.stderr)
    return model.eval(), text


@torch.no_grad()
def recorded(model: OlmoeForCausalLM, text: Tensor, tokens: int) -> tuple[Trace, float]:
    """The experts of every step of a generation, and the share of guesses for the next layer that are right."""
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    trace: Trace = []
    guess: list[int] = []
    right = total = 0

    def record(layer: int) -> Callable[..., None]:
        def hook(router: TopKRouter, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            nonlocal guess, right, total
            if args[0].shape[0] != 1:  # the prompt
                return
            chosen = output[2][0].tolist()
            trace.append((layer, chosen))
            if layer > 0:
                right += len({*guess} & {*chosen})
                total += len(chosen)
            if layer + 1 < len(routers):
                logits = torch.nn.functional.linear(args[0], routers[layer + 1].weight)
                guess = logits[0].topk(TOP_K).indices.tolist()

        return hook

    for layer, router in enumerate(routers):
        router.register_forward_hook(record(layer))
    for begin in range(0, tokens, _CONTEXT):
        prompt = text[begin * 97 : begin * 97 + 32][None]
        model.generate(input_ids=prompt, max_new_tokens=min(_CONTEXT, tokens), do_sample=True, seed=begin, top_k=20)
    return trace, right / total


# Policies: what is known of an expert -> a number; that with the lowest number goes.


class Known:
    """What a policy may look at."""

    def __init__(self, trace: Trace) -> None:
        self.now = 0
        self.layer = 0
        self.last: dict[Key, int] = {}
        self.visits: dict[Key, float] = defaultdict(float)
        self.recent: dict[Key, tuple[float, int]] = {}
        self._uses: dict[Key, list[int]] = defaultdict(list)
        for step, (layer, experts) in enumerate(trace):
            for expert in experts:
                self._uses[layer, expert].append(step)

    def visit(self, key: Key) -> None:
        self.last[key] = self.now
        self.visits[key] += 1
        self.recent[key] = (self.frequency(key) + 1, self.now)

    def frequency(self, key: Key) -> float:
        """Visits, those long ago counting less."""
        value, then = self.recent.get(key, (0.0, 0))
        return float(value * 0.5 ** ((self.now - then) / (LAYERS * _HALF_LIFE)))

    def next_use(self, key: Key) -> float:
        uses = self._uses[key]
        later = bisect_right(uses, self.now)
        return uses[later] if later < len(uses) else float("inf")

    def distance(self, key: Key) -> float:
        """Steps until the expert is expected again: until its layer comes, and comes with it."""
        ahead = (key[0] - self.layer - 1) % LAYERS + 1
        share = min(max(self.frequency(key) / (_HALF_LIFE / 0.693), 1e-4), 1.0)
        return ahead + LAYERS * (1 / share - 1)


POLICIES: dict[str, Callable[[Known, Key], float]] = {
    "longest unused (LRU)": lambda known, key: known.last[key],
    "least visits": lambda known, key: known.visits[key],
    "least recent visits": lambda known, key: known.frequency(key),
    "layer order alone": lambda known, key: -((key[0] - known.layer - 1) % LAYERS),
    "layer order and recent visits": lambda known, key: -known.distance(key),
    "optimal": lambda known, key: -known.next_use(key),
}


def hits(trace: Trace, room: int, policy: Callable[[Known, Key], float]) -> float:
    """The share of visits that find their expert in memory, which holds `room` experts."""
    known, memory, found, total = Known(trace), set[Key](), 0, 0
    for known.now, (known.layer, experts) in enumerate(trace):
        keys = [(known.layer, expert) for expert in experts]
        found += sum(key in memory for key in keys)
        total += len(keys)
        for key in keys:
            if key not in memory and len(memory) >= room:
                memory.remove(min(memory - {*keys}, key=lambda other: policy(known, other)))
            memory.add(key)
            known.visit(key)
    return found / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--tokens", type=int, default=512, help="that are written")
    args = parser.parse_args()
    start = time.perf_counter()
    trace, guessed = recorded(*trained(args.steps), args.tokens)
    shares = (0.15, 0.25, 0.5, 0.75)
    print(f"{described(machine(torch.device('cpu')))}\n")
    print(f"{len(trace)} steps, {LAYERS} layers, {EXPERTS} experts, {TOP_K} visited\n")
    print(f"| hits with room for | {' | '.join(f'{share:.0%}' for share in shares)} |")
    print(f"| --- |{' --- |' * len(shares)}")
    for name, policy in POLICIES.items():
        rates = [hits(trace, int(share * LAYERS * EXPERTS), policy) for share in shares]
        print(f"| {name} | {' | '.join(f'{rate:.1%}' for rate in rates)} |", flush=True)
    print(f"\nguesses of the next layer's experts that are right: {guessed:.1%}")
    print(f"({time.perf_counter() - start:.0f} s)", file=sys.stderr)


if __name__ == "__main__":
    main()
