"""NLLB-MoE (arXiv 2207.04672): M2M100 whose every n-th layer sends each token to two of many experts."""

from moekernels.models.nllb_moe.config import NllbMoeConfig
from moekernels.models.nllb_moe.layers import NllbMoeDecoderLayer, NllbMoeEncoderLayer
from moekernels.models.nllb_moe.mlp import NllbMoeDenseActDense, NllbMoeSparseMLP
from moekernels.models.nllb_moe.model import (
    NllbMoeDecoder,
    NllbMoeEncoder,
    NllbMoeForConditionalGeneration,
    NllbMoeModel,
    NllbMoePreTrainedModel,
)
from moekernels.models.nllb_moe.router import NllbMoeTop2Router

__all__ = [
    "NllbMoeConfig",
    "NllbMoeDecoder",
    "NllbMoeDecoderLayer",
    "NllbMoeDenseActDense",
    "NllbMoeEncoder",
    "NllbMoeEncoderLayer",
    "NllbMoeForConditionalGeneration",
    "NllbMoeModel",
    "NllbMoePreTrainedModel",
    "NllbMoeSparseMLP",
    "NllbMoeTop2Router",
]
