"""Encoder and decoder: the embedding, the norm after the last layer, and how weights begin."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional as F

from moekernels.models.encoder_decoder import (
    DecoderStack,
    EncoderDecoderPreTrainedModel,
    EncoderDecoderStack,
    EncoderStack,
)
from moekernels.models.switch_transformers.config import SwitchTransformersConfig
from moekernels.models.switch_transformers.layers import (
    SwitchTransformersAttention,
    SwitchTransformersDecoderBlock,
    SwitchTransformersEncoderBlock,
)
from moekernels.models.switch_transformers.mlp import SwitchTransformersDenseActDense
from moekernels.models.switch_transformers.router import SwitchTransformersTop1Router
from moekernels.nn import GroupedExperts, RMSNorm


class SwitchTransformersPreTrainedModel(EncoderDecoderPreTrainedModel):
    """Creation of layers, as Mesh TensorFlow initialises them."""

    config_class = SwitchTransformersConfig
    # The flash-attn package has no position bias.
    attention_implementations = ("sdpa", "eager")

    @property
    def _new_token_std(self) -> float:
        return self.config.initializer_factor

    def _keeps_float32(self, name: str) -> bool:
        return self.config.router_dtype == "float32" and ".router.classifier." in name

    def _init_weights(self, module: nn.Module) -> None:
        config = self.config

        def normal(weight: Tensor, fan: int = 1) -> None:
            nn.init.normal_(weight, std=config.initializer_factor * fan**-0.5)

        if isinstance(module, RMSNorm):
            nn.init.constant_(module.weight, config.initializer_factor)
        elif isinstance(module, nn.Embedding):
            normal(module.weight)
        elif isinstance(module, SwitchTransformersAttention):
            normal(module.q.weight, config.d_model * config.d_kv)
            normal(module.k.weight, config.d_model)
            normal(module.v.weight, config.d_model)
            normal(module.o.weight, config.num_heads * config.d_kv)
            if module.has_relative_attention_bias:
                normal(module.relative_attention_bias.weight, config.d_model)
        elif isinstance(module, SwitchTransformersDenseActDense):
            for projection in (module.wi_0, module.wi_1) if module.gated else (module.wi,):
                normal(projection.weight, config.d_model)
            normal(module.wo.weight, config.d_ff)
        elif isinstance(module, SwitchTransformersTop1Router):
            normal(module.classifier.weight)
            if module.classifier.bias is not None:
                nn.init.zeros_(module.classifier.bias)
        elif isinstance(module, GroupedExperts):
            normal(module.up_weight, config.d_model)
            normal(module.down_proj, config.d_model)
        elif module is self.get_output_embeddings():
            normal(module.weight)


class SwitchTransformersStack(EncoderDecoderStack, SwitchTransformersPreTrainedModel):
    """What encoder and decoder have in common.

    Args:
        config: of the model.
        shared: the embedding.
        blocks: the layers; the first one holds the position bias of all.
    """

    has_position_bias = True

    def __init__(self, config: SwitchTransformersConfig, shared: nn.Embedding, blocks: Iterable[nn.Module]) -> None:
        super().__init__(config)
        self.num_heads = config.num_heads
        self.embed_tokens = shared
        self.block = nn.ModuleList(blocks)
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    @property
    def _layers(self) -> nn.ModuleList:
        return self.block

    def _embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, past: Tensor | int, num_positions: int
    ) -> Tensor:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return self._drop(hidden)

    def _finish(self, hidden: Tensor) -> Tensor:
        return self._drop(self.final_layer_norm(hidden))

    def _drop(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, self.config.dropout_rate, self.training)


class SwitchTransformersEncoder(SwitchTransformersStack, EncoderStack):
    """Source tokens to hidden states."""

    def __init__(self, config: SwitchTransformersConfig, shared: nn.Embedding) -> None:
        super().__init__(config, shared, (SwitchTransformersEncoderBlock(config, i) for i in range(config.num_layers)))


class SwitchTransformersDecoder(SwitchTransformersStack, DecoderStack):
    """Target tokens and the encoder's output to hidden states."""

    def __init__(self, config: SwitchTransformersConfig, shared: nn.Embedding) -> None:
        num_layers = config.num_decoder_layers
        super().__init__(config, shared, (SwitchTransformersDecoderBlock(config, i) for i in range(num_layers)))
