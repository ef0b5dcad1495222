"""Experts on several processes: `torchrun`, DeviceMesh, DTensor, FSDP2 and distributed checkpoints, as they are.

::

    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    expert_parallel(model, mesh["ep"])

Every process then holds its share of the experts of each sparse layer, and tokens travel.
"""

from moekernels.distributed.batch import SplitBatch
from moekernels.distributed.checkpoints import is_main_rank, together, whole_weights
from moekernels.distributed.collectives import CommunicationError, Ranks
from moekernels.distributed.dispatchers import ExchangingDispatcher, SummingDispatcher
from moekernels.distributed.experts import ShardedExperts, held_experts, shard_experts, whole_tensor
from moekernels.distributed.parallel import (
    ExpertParallel,
    dropped_choices,
    expert_parallel,
    held_parameters,
    is_expert_parallel,
    ranks_of,
    splits_batch,
)
from moekernels.distributed.training import clip_grad_norm_, parameter_groups, reduce_gradients

__all__ = [
    "CommunicationError",
    "ExchangingDispatcher",
    "ExpertParallel",
    "Ranks",
    "ShardedExperts",
    "SplitBatch",
    "SummingDispatcher",
    "clip_grad_norm_",
    "dropped_choices",
    "expert_parallel",
    "held_experts",
    "held_parameters",
    "is_expert_parallel",
    "is_main_rank",
    "parameter_groups",
    "ranks_of",
    "reduce_gradients",
    "shard_experts",
    "splits_batch",
    "together",
    "whole_tensor",
    "whole_weights",
]
