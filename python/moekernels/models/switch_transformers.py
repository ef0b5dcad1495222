"""Switch Transformers (arXiv 2101.03961): T5 whose every n-th MLP sends each token to one of many experts.

Letters: B batch, S tokens of a sequence, T tokens of a batch, E experts, H hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekernels import ops
from moekernels.checkpoint import KeyMap
from moekernels.models.configuration import PretrainedConfig
from moekernels.models.encoder_decoder import (
    DecoderStack,
    EncoderDecoderAttention,
    EncoderDecoderForConditionalGeneration,
    EncoderDecoderModel,
    EncoderDecoderPreTrainedModel,
    EncoderDecoderStack,
    EncoderStack,
    LayerContext,
    clamp_float16,
    encode_and_decode,
)
from moekernels.models.losses import switch_router_losses
from moekernels.models.outputs import MoEModelOutput, Seq2SeqMoEModelOutput
from moekernels.nn import GroupedExperts, Linear, RMSNorm
from moekernels.nn.activations import activation_function, op_activation
from moekernels.nn.linear import linear_in
from moekernels.nn.positions import relative_position_buckets

_GATED = "gated-"
_ROUTER_DTYPES = ("float32", "float16", "bfloat16")


class SwitchTransformersConfig(PretrainedConfig):
    """The configuration of Switch Transformers.

    Files on the hub also hold `router_type`, `num_selected_experts`, `feed_forward_proj` and `is_gated_act`; they are
    kept, and nothing reads them.

    Args:
        vocab_size: number of tokens.
        d_model: H, the width of a token.
        d_kv: width of one attention head; the heads together need not be as wide as a token.
        d_ff: inner width of the MLPs, and of one expert.
        expert_capacity: tokens that an expert takes of one sequence; the others pass the layer by.
        num_layers: number of encoder layers.
        num_sparse_encoder_layers: every so many-th encoder layer is sparse that there are about so many; see
            `encoder_sparse_step`.
        num_decoder_layers: number of decoder layers; None is as many as the encoder has.
        num_sparse_decoder_layers: as `num_sparse_encoder_layers`.
        num_heads: heads of all attentions.
        num_experts: E.
        router_bias: give the router's classifier a bias.
        router_jitter_noise: in training the router's input is multiplied by numbers within so much of 1.
        router_dtype: "float32", "float16" or "bfloat16", in which the router computes.
        router_ignore_padding_tokens: send padding to no expert.
        relative_attention_num_buckets: of distances, each with a position bias per head.
        relative_attention_max_distance: longer distances share a bucket.
        dropout_rate: of everything that has a dropout.
        layer_norm_epsilon: of the norms; `layer_norm_eps` is another name.
        router_z_loss_coef, router_aux_loss_coef: weights of the routers' losses.
        initializer_factor: factor of new weights.
        dense_act_fn: activation of MLPs and experts. After "gated-" it is that of a gate: "gated-gelu" has the tanh
            approximation, as in T5 1.1.
        is_encoder_decoder: True.
        add_router_probs: return the routers' logits, and their losses, unless told otherwise; `output_router_logits` is
            another name.
        use_cache: return keys and values for decoding unless told otherwise.
        pad_token_id, eos_token_id: special tokens. `decoder_start_token_id` has no default; released models have 0.
        encoder_sparse_step, decoder_sparse_step: layers 1, 1 + step, 1 + 2 step ... are sparse, counted from 0; all of
            them with 1, none with 0. None is the number of layers divided by that of sparse ones.
        **kwargs: the fields of :class:`moekernels.models.PretrainedConfig`; others are kept.
    """

    model_type = "switch_transformers"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "layer_norm_eps": "layer_norm_epsilon",
        "output_router_logits": "add_router_probs",
    }

    def __init__(
        self,
        vocab_size: int = 32128,
        d_model: int = 768,
        d_kv: int = 64,
        d_ff: int = 2048,
        expert_capacity: int = 64,
        num_layers: int = 12,
        num_sparse_encoder_layers: int = 3,
        num_decoder_layers: int | None = 12,
        num_sparse_decoder_layers: int = 3,
        num_heads: int = 12,
        num_experts: int = 8,
        router_bias: bool = False,
        router_jitter_noise: float = 0.01,
        router_dtype: str = "float32",
        router_ignore_padding_tokens: bool = False,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 128,
        dropout_rate: float = 0.1,
        layer_norm_epsilon: float = 1e-6,
        router_z_loss_coef: float = 0.001,
        router_aux_loss_coef: float = 0.001,
        initializer_factor: float = 1.0,
        dense_act_fn: str = "relu",
        is_encoder_decoder: bool = True,
        add_router_probs: bool = False,
        use_cache: bool = True,
        pad_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 1,
        encoder_sparse_step: int | None = None,
        decoder_sparse_step: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.d_kv = d_kv
        self.d_ff = d_ff
        self.expert_capacity = expert_capacity
        self.num_layers = num_layers
        self.num_sparse_encoder_layers = num_sparse_encoder_layers
        self.num_decoder_layers = num_layers if num_decoder_layers is None else num_decoder_layers
        self.num_sparse_decoder_layers = num_sparse_decoder_layers
        self.encoder_sparse_step = _sparse_step(encoder_sparse_step, num_layers, num_sparse_encoder_layers)
        self.decoder_sparse_step = _sparse_step(decoder_sparse_step, self.num_decoder_layers, num_sparse_decoder_layers)
        self.num_heads = num_heads
        self.num_experts = num_experts
        self.router_bias = router_bias
        self.router_jitter_noise = router_jitter_noise
        self.router_dtype = router_dtype
        self.router_ignore_padding_tokens = router_ignore_padding_tokens
        self.relative_attention_num_buckets = relative_attention_num_buckets
        self.relative_attention_max_distance = relative_attention_max_distance
        self.dropout_rate = dropout_rate
        self.layer_norm_epsilon = layer_norm_epsilon
        self.router_z_loss_coef = router_z_loss_coef
        self.router_aux_loss_coef = router_aux_loss_coef
        self.initializer_factor = initializer_factor
        self.dense_act_fn = dense_act_fn
        self.add_router_probs = add_router_probs
        self.use_cache = use_cache
        super().__init__(
            is_encoder_decoder=is_encoder_decoder, pad_token_id=pad_token_id, eos_token_id=eos_token_id, **kwargs
        )

    def validate(self) -> None:
        self._check_counts("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers")
        self._check_counts("num_experts", "expert_capacity")
        for name in ("num_sparse_encoder_layers", "num_sparse_decoder_layers"):
            self._check(name, "a number of layers", _is_count)
        for name in ("encoder_sparse_step", "decoder_sparse_step"):
            self._check(name, "a number of layers, 0 for no sparse ones", _is_count)
        self._check("router_dtype", f"one of {', '.join(_ROUTER_DTYPES)}", lambda v: v in _ROUTER_DTYPES)
        self._check("relative_attention_num_buckets", "an integer of at least 4", lambda v: _is_count(v) and v >= 4)
        half = self.relative_attention_num_buckets // 2
        self._check(
            "relative_attention_max_distance",
            f"an integer above {half}, half of relative_attention_num_buckets",
            lambda v: _is_count(v) and v > half,
        )
        self._check_numbers("dropout_rate", "router_jitter_noise", high=1.0)
        self._check_numbers("layer_norm_epsilon", "initializer_factor")
        self._check_numbers("router_z_loss_coef", "router_aux_loss_coef")
        self._check_token_ids("pad_token_id", "decoder_start_token_id")
        op_activation(_activation(self.dense_act_fn)[0])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _sparse_step(given: int | None, num_layers: int, num_sparse: int) -> int:
    if given is not None:
        return given
    # No sparse layers asked for still give one, the second: released files and transformers count on it.
    return num_layers // num_sparse if num_sparse > 0 else num_layers


def _activation(dense_act_fn: str) -> tuple[str, bool]:
    """The name of the activation, and whether it is that of a gate."""
    name = str(dense_act_fn).removeprefix(_GATED)
    gated = name != dense_act_fn
    return "gelu_new" if gated and name == "gelu" else name, gated


class Top1Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        logits: ``[B, S, E]``, in the router's dtype.
        weights: ``[T, 1]`` float32, the probability of each token's expert.
        expert_ids: ``[T, 1]`` int32, -1 where a token is not routed.
        plan: who finds a place.
    """

    logits: Tensor
    weights: Tensor
    expert_ids: Tensor
    plan: ops.Plan


class SwitchTransformersTop1Router(nn.Module):
    """Sends each token to its most probable expert, and within a sequence the first `expert_capacity` of an expert
    find a place.

    Args:
        config: of the model.
    """

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.expert_capacity = config.expert_capacity
        self.classifier = nn.Linear(config.d_model, config.num_experts, bias=config.router_bias)
        self.jitter_noise = config.router_jitter_noise
        self.ignore_padding_tokens = config.router_ignore_padding_tokens
        self.dtype: torch.dtype = getattr(torch, config.router_dtype)

    def route(self, hidden_states: Tensor, kept: Tensor | None = None) -> Top1Routing:
        """Route ``[B, S, H]``; `kept` is bool ``[B, S]``, or what is broadcast to it, False at padding."""
        batch_size, num_tokens, _ = hidden_states.shape
        logits = self._logits(hidden_states)
        mask = None
        if kept is not None and self.ignore_padding_tokens:
            mask = kept.expand(batch_size, num_tokens).reshape(-1)
        in_float32 = self.dtype == torch.float32
        # Probabilities are compared as the tokens' dtype can tell them apart.
        weights, expert_ids = ops.route(
            logits.reshape(-1, self.num_experts),
            1,
            probs_dtype=hidden_states.dtype if in_float32 else self.dtype,
            mask=mask,
        )
        if not in_float32:
            weights = weights.to(hidden_states.dtype).float()
        # What no sequence can overflow needs no count.
        limits = (self.expert_capacity, num_tokens) if self.expert_capacity < num_tokens else (None, None)
        plan = ops.plan(expert_ids, self.num_experts, capacity=limits[0], group_size=limits[1])
        return Top1Routing(logits, weights, expert_ids, plan)

    def _logits(self, hidden_states: Tensor) -> Tensor:
        hidden = hidden_states.to(self.dtype)
        if self.training and self.jitter_noise > 0:
            # Of the router's input alone: the experts get the tokens as they are.
            hidden = hidden * torch.empty_like(hidden).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
        return linear_in(self.dtype, hidden, self.classifier.weight, self.classifier.bias)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``hidden_states [B, S, H]`` -> one-hot experts int64 ``[B, S, E]``, all zero where a token found no place,
        their probabilities ``[B, S, 1]``, and the logits ``[B, S, E]``."""
        routing = self.route(hidden_states)
        # A token without a row goes to a column that is cut off.
        columns = routing.expert_ids.masked_fill(routing.plan.row_of_slot < 0, self.num_experts).long()
        one_hot = columns.new_zeros(columns.shape[0], self.num_experts + 1).scatter(1, columns, 1)[:, :-1]
        shape = hidden_states.shape[:2]
        weights = routing.weights.to(hidden_states.dtype)
        return one_hot.reshape(*shape, self.num_experts), weights.view(*shape, 1), routing.logits


class SwitchTransformersDenseActDense(nn.Module):
    """The MLP of a dense layer: ``wo(act(wi(x)))``, or ``wo(act(wi_0(x)) * wi_1(x))`` with a gate."""

    wi: nn.Linear
    wi_0: nn.Linear
    wi_1: nn.Linear

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__()
        activation, self.gated = _activation(config.dense_act_fn)
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            self.add_module(name, Linear(config.d_model, config.d_ff, bias=False))
        self.wo = Linear(config.d_ff, config.d_model, bias=False)
        self.activation = activation_function(activation)
        self.dropout = config.dropout_rate

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` -> ``[..., H]``."""
        if self.gated:
            inner = self.activation(self.wi_0(hidden_states)) * self.wi_1(hidden_states)
        else:
            inner = self.activation(self.wi(hidden_states))
        return self.wo(F.dropout(inner, self.dropout, self.training))


class SwitchTransformersSparseMLP(nn.Module):
    """Router and experts in place of the MLP. The experts' weights are stacks, and not one module each.

    Args:
        config: of the model.
        expert_class: what an expert is; only :class:`SwitchTransformersDenseActDense`, as the experts run fused.
    """

    def __init__(
        self, config: SwitchTransformersConfig, expert_class: type[nn.Module] = SwitchTransformersDenseActDense
    ) -> None:
        super().__init__()
        if expert_class is not SwitchTransformersDenseActDense:
            raise ValueError(
                "SwitchTransformersSparseMLP: experts are fused, so expert_class must be "
                f"SwitchTransformersDenseActDense, got {expert_class.__name__}"
            )
        activation, gated = _activation(config.dense_act_fn)
        self.router = SwitchTransformersTop1Router(config)
        self.experts = GroupedExperts(
            config.d_model, config.d_ff, config.num_experts, activation=op_activation(activation), gated=gated
        )
        self.dropout = config.dropout_rate

    def forward(self, hidden_states: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the layer.

        Args:
            hidden_states: ``[B, S, H]``.
            kept: bool ``[B, S]``, False at padding; only looked at if the router ignores padding.

        Returns:
            The output ``[B, S, H]``, zero for tokens whose expert had no place for them, and the router's logits
            ``[B, S, E]``.
        """
        shape = hidden_states.shape
        logits, weights, _, plan = self.router.route(hidden_states, kept)
        hidden = hidden_states.reshape(-1, shape[-1])
        if self.training and self.dropout:
            rows = ops.permute(hidden, plan.token_of_row, plan.row_of_slot)
            rows = self.experts(rows, plan.expert_offsets, self.dropout)
            out = ops.unpermute(rows, plan.row_of_slot, weights)
        else:
            out = self.experts.forward_fused(hidden, weights, plan)
        return out.view(shape), logits


class SwitchTransformersAttention(EncoderDecoderAttention):
    """Attention without biases and without a scale, which the initialisation of the queries makes up for.

    Args:
        config: of the model.
        layer: the decoder layer it is part of.
        has_relative_attention_bias: whether it holds the position bias of all layers of its stack.
    """

    def __init__(
        self, config: SwitchTransformersConfig, layer: int = 0, *, has_relative_attention_bias: bool = False
    ) -> None:
        super().__init__(config.num_heads, config.d_kv, scale=1.0, dropout=config.dropout_rate, layer=layer)
        inner_size = config.num_heads * config.d_kv
        self.q = Linear(config.d_model, inner_size, bias=False)
        self.k = Linear(config.d_model, inner_size, bias=False)
        self.v = Linear(config.d_model, inner_size, bias=False)
        self.o = Linear(inner_size, config.d_model, bias=False)
        self.has_relative_attention_bias = has_relative_attention_bias
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(self.num_buckets, config.num_heads)

    def position_bias(self, positions: Tensor, num_keys: int, *, bidirectional: bool) -> Tensor:
        """What is added to the scores ``[1, heads, T, num_keys]`` of queries at `positions` ``[T]``."""
        distance = torch.arange(num_keys, device=positions.device) - positions[:, None]
        buckets = relative_position_buckets(
            distance, bidirectional=bidirectional, num_buckets=self.num_buckets, max_distance=self.max_distance
        )
        # This block may be on another device than the rest of the stack.
        bias = self.relative_attention_bias(buckets.to(self.relative_attention_bias.weight.device))
        return bias.permute(2, 0, 1)[None].to(positions.device)

    def project_query(self, hidden: Tensor) -> Tensor:
        return self.q(hidden)

    def project_keys(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.k(hidden), self.v(hidden)

    def project_output(self, attended: Tensor) -> Tensor:
        return self.o(attended)


class _SwitchTransformersLayer(nn.Module):
    """A part of a block: what it adds is computed from a normalised input."""

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__()
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = config.dropout_rate

    def _add(self, hidden: Tensor, added: Tensor) -> Tensor:
        return clamp_float16(hidden + F.dropout(added, self.dropout, self.training))


class SwitchTransformersLayerSelfAttention(_SwitchTransformersLayer):
    """Attention to the tokens themselves."""

    def __init__(self, config: SwitchTransformersConfig, layer: int) -> None:
        super().__init__(config)
        self.SelfAttention = SwitchTransformersAttention(config, layer, has_relative_attention_bias=layer == 0)

    def forward(self, hidden: Tensor, context: LayerContext, head_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``hidden [B, T, H]`` -> output ``[B, T, H]`` and probabilities."""
        attended, probs = self.SelfAttention(self.layer_norm(hidden), context, head_mask)
        return self._add(hidden, attended), probs


class SwitchTransformersLayerCrossAttention(_SwitchTransformersLayer):
    """Attention to the source, which has no position bias."""

    def __init__(self, config: SwitchTransformersConfig, layer: int) -> None:
        super().__init__(config)
        self.EncDecAttention = SwitchTransformersAttention(config, layer)

    def forward(
        self, hidden: Tensor, source: Tensor, context: LayerContext, head_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``hidden [B, T, H]``, ``source [B, S, H]`` -> output ``[B, T, H]`` and probabilities."""
        attended, probs = self.EncDecAttention(self.layer_norm(hidden), context, head_mask, source)
        return self._add(hidden, attended), probs


class SwitchTransformersLayerFF(_SwitchTransformersLayer):
    """MLP or experts."""

    def __init__(self, config: SwitchTransformersConfig, is_sparse: bool) -> None:
        super().__init__(config)
        self.mlp = SwitchTransformersSparseMLP(config) if is_sparse else SwitchTransformersDenseActDense(config)

    def forward(self, hidden: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``hidden [B, T, H]`` -> output ``[B, T, H]``, and router logits ``[B, T, E]`` if there are experts."""
        normalised = self.layer_norm(hidden)
        logits = None
        if isinstance(self.mlp, SwitchTransformersSparseMLP):
            mixed, logits = self.mlp(normalised, kept)
        else:
            mixed = self.mlp(normalised)
        return self._add(hidden, mixed), logits


class SwitchTransformersEncoderBlock(nn.Module):
    """One layer of the encoder."""

    def __init__(self, config: SwitchTransformersConfig, layer: int) -> None:
        super().__init__()
        is_sparse = _is_sparse(layer, config.encoder_sparse_step)
        self.layer = nn.ModuleList(
            [SwitchTransformersLayerSelfAttention(config, layer), SwitchTransformersLayerFF(config, is_sparse)]
        )

    def forward(
        self, hidden: Tensor, context: LayerContext, head_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``hidden [B, S, H]`` -> output ``[B, S, H]``, probabilities, router logits ``[B, S, E]``."""
        attention, feed_forward = self.layer
        hidden, probs = attention(hidden, context, head_mask)
        hidden, logits = feed_forward(hidden, context.kept)
        return hidden, probs, logits


class SwitchTransformersDecoderBlock(nn.Module):
    """One layer of the decoder."""

    def __init__(self, config: SwitchTransformersConfig, layer: int) -> None:
        super().__init__()
        is_sparse = _is_sparse(layer, config.decoder_sparse_step)
        self.layer = nn.ModuleList(
            [
                SwitchTransformersLayerSelfAttention(config, layer),
                SwitchTransformersLayerCrossAttention(config, layer),
                SwitchTransformersLayerFF(config, is_sparse),
            ]
        )

    def forward(
        self,
        hidden: Tensor,
        source: Tensor,
        context: LayerContext,
        head_mask: Tensor | None,
        cross_head_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """``hidden [B, T, H]`` -> output, probabilities of both attentions, router logits ``[B, T, E]``."""
        attention, cross_attention, feed_forward = self.layer
        hidden, probs = attention(hidden, context, head_mask)
        hidden, cross_probs = cross_attention(hidden, source, context, cross_head_mask)
        hidden, logits = feed_forward(hidden, context.kept)
        return hidden, probs, cross_probs, logits


def _is_sparse(layer: int, step: int) -> bool:
    return step == 1 or (step > 1 and layer % step == 1)


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
    is_bidirectional: ClassVar[bool]

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

    def _position_bias(self, positions: Tensor, num_keys: int) -> Tensor:
        first: Any = self.block[0]
        attention: SwitchTransformersAttention = first.layer[0].SelfAttention
        return attention.position_bias(positions, num_keys, bidirectional=self.is_bidirectional)

    def _finish(self, hidden: Tensor) -> Tensor:
        return self._drop(self.final_layer_norm(hidden))

    def _drop(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, self.config.dropout_rate, self.training)


class SwitchTransformersEncoder(SwitchTransformersStack, EncoderStack):
    """Source tokens to hidden states."""

    is_bidirectional = True

    def __init__(self, config: SwitchTransformersConfig, shared: nn.Embedding) -> None:
        super().__init__(config, shared, (SwitchTransformersEncoderBlock(config, i) for i in range(config.num_layers)))


class SwitchTransformersDecoder(SwitchTransformersStack, DecoderStack):
    """Target tokens and the encoder's output to hidden states."""

    is_bidirectional = False

    def __init__(self, config: SwitchTransformersConfig, shared: nn.Embedding) -> None:
        num_layers = config.num_decoder_layers
        super().__init__(config, shared, (SwitchTransformersDecoderBlock(config, i) for i in range(num_layers)))


class SwitchTransformersModel(EncoderDecoderModel, SwitchTransformersPreTrainedModel):
    """Encoder and decoder without a head: tokens to hidden states."""

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = SwitchTransformersEncoder(config, self.shared)
        self.decoder = SwitchTransformersDecoder(config, self.shared)
        self.post_init()


class SwitchTransformersForConditionalGeneration(  # type: ignore[override]
    EncoderDecoderForConditionalGeneration, SwitchTransformersPreTrainedModel
):
    """Encoder and decoder with a language-modelling head. A head that is tied to the embedding gets a hidden state
    divided by the square root of its width."""

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = SwitchTransformersEncoder(config, self.shared)
        self.decoder = SwitchTransformersDecoder(config, self.shared)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The decoder's input for labels ``[B, T]``: the start token, then all labels but the last."""
        return self._shift_right(labels)

    def _hidden_states(self, **inputs: Any) -> Any:
        return encode_and_decode(self.encoder, self.decoder, Seq2SeqMoEModelOutput, **inputs)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden * self.config.d_model**-0.5 if self.config.tie_word_embeddings else hidden)

    def _add_router_losses(
        self, loss: Tensor | None, outputs: Any, attention_mask: Tensor | None, decoder_attention_mask: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor | None]]:
        fields: dict[str, Tensor | None] = {}
        for stack in ("encoder", "decoder"):
            logits = getattr(outputs, f"{stack}_router_logits")
            if not logits:
                continue
            z_loss, aux_loss = switch_router_losses(logits)
            fields |= {f"{stack}_z_loss": z_loss, f"{stack}_aux_loss": aux_loss}
            if loss is not None:
                added = self.config.router_z_loss_coef * z_loss + self.config.router_aux_loss_coef * aux_loss
                loss = loss + added.to(loss.device)
        return loss, fields


class SwitchTransformersEncoderModel(SwitchTransformersPreTrainedModel):
    """The encoder alone: tokens to hidden states. It also loads from checkpoints of whole models."""

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = SwitchTransformersEncoder(config, self.shared)
        self.post_init()

    @property
    def key_map(self) -> KeyMap:
        whole = super().key_map
        return dataclasses.replace(whole, ignored=(*whole.ignored, r"decoder\..*"))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the encoder. Options that are None are taken from the configuration.

        Args:
            input_ids: int64 ``[B, S]``.
            attention_mask: ``[B, S]``, 0 at padding; or ``[B, 1, S, S]``, additive or boolean.
            head_mask: ``[layers, heads]`` or ``[heads]``, a factor for every head, 0 to silence it.
            inputs_embeds: ``[B, S, H]`` instead of `input_ids`.
            output_attentions: return attention probabilities (by the eager implementation, in this call).
            output_hidden_states: return the hidden states between layers.
            output_router_logits: return the logits of the routers and their probabilities ``[B, S, E]``.
            return_dict: False returns a tuple of the fields that are there.
            use_cache: an encoder has none.

        Raises:
            ValueError: tokens are missing or given twice, a mask does not fit, or `use_cache` is True.
        """
        if use_cache:
            raise ValueError("SwitchTransformersEncoderModel: an encoder has no cache, but use_cache is True")
        output: MoEModelOutput = self.encoder(
            input_ids,
            attention_mask,
            head_mask,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            output_router_logits,
            return_dict=True,
        )
        if output.router_logits is not None:
            output.router_probs = tuple(torch.softmax(logits.float(), dim=-1) for logits in output.router_logits)
        return self._returned(output, return_dict)
