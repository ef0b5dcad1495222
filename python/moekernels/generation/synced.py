"""Steps that several processes take together, as a model that is spread over them needs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from moekernels.generation.loop import Step
from moekernels.generation.state import DecodeState


class SyncedStep:
    """Runs the model in step with the other processes of the default group.

    Every run of the model is announced to the others, so that one that has finished can go on running it for them.

    Args:
        step: runs the model.
        device: where the group's backend communicates from.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step = step
        self._device = device

    def __call__(self, state: DecodeState, extra: dict[str, bool]) -> Any:
        self._num_running(1)
        return self._step(state, extra)

    def _num_running(self, own: int) -> torch.Tensor:
        running = torch.tensor(own, device=self._device)
        dist.all_reduce(running)
        return running

    def wait(self, state: DecodeState) -> None:
        """Runs the model on the last token of every row, without a cache, until all processes have come here."""
        idle = DecodeState(state.input_ids[:, -1:], model_kwargs=state.model_kwargs)
        while int(self._num_running(0)):
            self._step(idle, {})


def is_synced(synced_gpus: bool | None, model: Any) -> bool:
    """What `synced_gpus` means for a model: None is True for one that FSDP spreads over several processes, or whose
    tokens visit experts of other processes.

    Raises:
        ValueError: it is True, but there is no process group.
    """
    available = dist.is_available() and dist.is_initialized()
    if synced_gpus and not available:
        raise ValueError("generate: synced_gpus=True needs torch.distributed.init_process_group")
    if synced_gpus is False or not available or dist.get_world_size() == 1:
        return False
    return bool(synced_gpus) or _uses_fsdp(model) or _sends_tokens(model)


def _sends_tokens(model: Any) -> bool:
    if not isinstance(model, torch.nn.Module):
        return False
    return any(getattr(getattr(m, "dispatcher", None), "splits_batch", False) for m in model.modules())


def _uses_fsdp(model: Any) -> bool:
    if not isinstance(model, torch.nn.Module):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())
