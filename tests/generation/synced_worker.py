"""One process of `test_synced.py`: generates with a model whose every run waits for the other processes.

    python -m tests.generation.synced_worker RANK WORLD_SIZE RENDEZVOUS_FILE OPTIONS

OPTIONS is a JSON list with the keywords of `generate` for every rank. Prints the tokens and the number of runs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from tests.generation.adapter import Adapted, prompts, tiny_olmoe


class Spread(Adapted):
    """Every run is one of all processes, as with parameters that each has a part of."""

    def forward(self, **kwargs: Any) -> Any:
        dist.all_reduce(torch.ones(()), op=dist.ReduceOp.MAX)
        return super().forward(**kwargs)

    __call__ = forward


def main() -> None:
    rank, world_size, rendezvous = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    model = Spread(tiny_olmoe())
    tokens = model.generate(prompts(1, 5), eos_token_id=None, synced_gpus=True, **json.loads(sys.argv[4])[rank])
    print(json.dumps({"tokens": tokens.tolist(), "runs": len(model.calls)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
