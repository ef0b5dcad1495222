"""Modules to build Transformers from."""

from moekernels.nn.attention import (
    ATTENTION_FUNCTIONS,
    AttentionMask,
    causal_mask,
    eager_attention,
    padding_mask,
    sdpa_attention,
)
from moekernels.nn.batch import Batch
from moekernels.nn.cache import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from moekernels.nn.dispatcher import Dispatcher, LocalDispatcher
from moekernels.nn.experts import GroupedExperts
from moekernels.nn.linear import Linear
from moekernels.nn.norm import RMSNorm
from moekernels.nn.rope import RotaryEmbedding, apply_rotary
from moekernels.nn.router import RouterOutput, TopKRouter
from moekernels.nn.score_router import ScoreRouter
from moekernels.nn.sparse_mlp import SparseMLP
from moekernels.nn.sparsemixer import SparsemixerRouter

__all__ = [
    "ATTENTION_FUNCTIONS",
    "AttentionMask",
    "Batch",
    "Cache",
    "Dispatcher",
    "DynamicCache",
    "EncoderDecoderCache",
    "GroupedExperts",
    "Linear",
    "LocalDispatcher",
    "RMSNorm",
    "RotaryEmbedding",
    "RouterOutput",
    "ScoreRouter",
    "SparseMLP",
    "SparsemixerRouter",
    "StaticCache",
    "TopKRouter",
    "apply_rotary",
    "causal_mask",
    "eager_attention",
    "padding_mask",
    "sdpa_attention",
]
