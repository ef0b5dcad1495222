"""One process of `test_synced.py`: generates with a model whose every run waits for the other processes.

    python -m tests.generation.synced_worker RANK WORLD_SIZE RENDEZVOUS_FILE OPTIONS

OPTIONS is a JSON list with the keywords of `generate` for every rank. Prints the tokens and the number of runs.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from moekernels.generation import GenerationConfig, GenerationMixin

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


def main() -> None:
    rank, world_size, rendezvous = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    model = Counting()
    prompt = torch.arange(5)[None]
    tokens = model.generate(prompt, synced_gpus=True, **json.loads(sys.argv[4])[rank])
    print(json.dumps({"tokens": tokens.tolist(), "runs": model.runs}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
