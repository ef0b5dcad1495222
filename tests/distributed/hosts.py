"""What both hosts of `test_two_hosts.py` run: a layer across the network, which is then cut."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moekernels.distributed import CommunicationError, expert_parallel
from tests.distributed import layers
from tests.distributed.faults import layer

TIMEOUT = 5.0


def received() -> int:
    """Bytes that came through the adapter between the hosts."""
    adapter = os.environ["GLOO_SOCKET_IFNAME"]
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.split()[0] == f"{adapter}:")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    rank = dist.get_rank()
    mesh: Any = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))["ep"]
    before = received()
    found: dict[str, Any] = {
        way: layers.compare("6 experts, 3 choices", way, torch.float32, mesh, rank) for way in layers.WAYS
    }
    found["received"] = received() - before
    shared = expert_parallel(layer(), mesh)
    shared(torch.randn(3, 8))
    dist.barrier()
    if rank == 1:
        (folder / "cut").touch()
    start = time.monotonic()
    try:
        while time.monotonic() < start + 10 * TIMEOUT:
            shared(torch.randn(3, 8))
    except CommunicationError as error:
        found["told"] = str(error)
    found["seconds"] = time.monotonic() - start
    torch.save(found, folder / f"written-{rank}")
    (folder / f"written-{rank}").rename(folder / f"rank-{rank}")
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
