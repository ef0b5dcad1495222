"""NLLB-MoE (arXiv 2207.04672): M2M100 whose every n-th layer sends each token to two of many experts.

Letters: B batch, S source tokens, T tokens of a batch, E experts, H hidden size.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekernels import ops
from moekernels.models.losses import load_balancing_loss
from moekernels.models.translation import (
    LayerContext,
    TranslationAttention,
    TranslationConfig,
    TranslationDecoder,
    TranslationEncoder,
    TranslationForConditionalGeneration,
    TranslationModel,
    TranslationPreTrainedModel,
    clamp_float16,
)
from moekernels.nn import GroupedExperts, Linear
from moekernels.nn.activations import activation_function, op_activation
from moekernels.nn.linear import linear_in

_TOP_K = 2
_SECOND_EXPERT_POLICIES = ("all", "sampling", "random")
_ROUTER_DTYPES = ("float32", "float16", "bfloat16")


class NllbMoeConfig(TranslationConfig):
    """The configuration of NLLB-MoE.

    Args:
        vocab_size: number of tokens.
        max_position_embeddings: the longest sequence the model is made for; longer ones work too.
        encoder_layers, decoder_layers: number of layers.
        encoder_ffn_dim, decoder_ffn_dim: inner width of the MLPs, and of one expert.
        encoder_attention_heads, decoder_attention_heads: heads of the attentions.
        encoder_layerdrop, decoder_layerdrop: probability of leaving a layer out in training.
        use_cache: return keys and values for decoding unless told otherwise.
        is_encoder_decoder: True.
        activation_function: of the MLPs and experts.
        d_model: H, the width of a token.
        dropout: dropout of embeddings, and of what attention adds.
        attention_dropout: dropout of attention probabilities.
        activation_dropout: dropout within the MLPs and experts, and of what they add.
        init_std: standard deviation of new weights.
        decoder_start_token_id: what the decoder begins with.
        scale_embedding: multiply embeddings by the square root of H.
        router_bias: give the router's classifier a bias.
        router_dtype: "float32", "float16" or "bfloat16", in which the router computes its logits.
        router_ignore_padding_tokens: True routes padding like any token; False sends it to no expert.
        num_experts: E.
        expert_capacity: tokens that an expert takes of a batch in training; None is twice an even share.
        encoder_sparse_step, decoder_sparse_step: every so many-th layer is sparse; 0 for none.
        router_z_loss_coef: kept, but the model has no z-loss.
        router_aux_loss_coef: weight of the load-balancing losses.
        second_expert_policy: "all" takes a token's second expert always, "sampling" draws it in proportion to its
            probability (Gumbel noise), "random" takes it with twice its probability.
        normalize_router_prob_before_dropping: make a token's two weights sum to one before, and not after, experts that
            are full drop tokens.
        batch_prioritized_routing: the tokens with the highest probability, and not the first ones, find a place.
        moe_eval_capacity_token_fraction: tokens that an expert takes in evaluation, as a fraction of the batch; at most
            0 means as in training.
        moe_token_dropout: dropout of experts' outputs; in evaluation they are multiplied by one minus it.
        pad_token_id, bos_token_id, eos_token_id: special tokens; positions begin after `pad_token_id`.
        output_router_logits: return the routers' logits, and the load-balancing losses, unless told otherwise.
        **kwargs: the fields of :class:`moekernels.models.PretrainedConfig`; others are kept.
    """

    model_type = "nllb-moe"

    def __init__(
        self,
        vocab_size: int = 128112,
        max_position_embeddings: int = 1024,
        encoder_layers: int = 12,
        encoder_ffn_dim: int = 4096,
        encoder_attention_heads: int = 16,
        decoder_layers: int = 12,
        decoder_ffn_dim: int = 4096,
        decoder_attention_heads: int = 16,
        encoder_layerdrop: float = 0.05,
        decoder_layerdrop: float = 0.05,
        use_cache: bool = True,
        is_encoder_decoder: bool = True,
        activation_function: str = "relu",
        d_model: int = 1024,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        activation_dropout: float = 0.0,
        init_std: float = 0.02,
        decoder_start_token_id: int | None = 2,
        scale_embedding: bool = True,
        router_bias: bool = False,
        router_dtype: str = "float32",
        router_ignore_padding_tokens: bool = False,
        num_experts: int = 128,
        expert_capacity: int | None = 64,
        encoder_sparse_step: int = 4,
        decoder_sparse_step: int = 4,
        router_z_loss_coef: float = 0.001,
        router_aux_loss_coef: float = 0.001,
        second_expert_policy: str = "all",
        normalize_router_prob_before_dropping: bool = False,
        batch_prioritized_routing: bool = False,
        moe_eval_capacity_token_fraction: float = 1.0,
        moe_token_dropout: float = 0.2,
        pad_token_id: int = 1,
        bos_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 2,
        output_router_logits: bool = False,
        **kwargs: Any,
    ) -> None:
        self.router_bias = router_bias
        self.router_dtype = router_dtype
        self.router_ignore_padding_tokens = router_ignore_padding_tokens
        self.num_experts = num_experts
        self.expert_capacity = expert_capacity
        self.encoder_sparse_step = encoder_sparse_step
        self.decoder_sparse_step = decoder_sparse_step
        self.router_z_loss_coef = router_z_loss_coef
        self.router_aux_loss_coef = router_aux_loss_coef
        self.second_expert_policy = second_expert_policy
        self.normalize_router_prob_before_dropping = normalize_router_prob_before_dropping
        self.batch_prioritized_routing = batch_prioritized_routing
        self.moe_eval_capacity_token_fraction = moe_eval_capacity_token_fraction
        self.moe_token_dropout = moe_token_dropout
        self.output_router_logits = output_router_logits
        super().__init__(
            vocab_size=vocab_size,
            max_position_embeddings=max_position_embeddings,
            encoder_layers=encoder_layers,
            encoder_ffn_dim=encoder_ffn_dim,
            encoder_attention_heads=encoder_attention_heads,
            decoder_layers=decoder_layers,
            decoder_ffn_dim=decoder_ffn_dim,
            decoder_attention_heads=decoder_attention_heads,
            encoder_layerdrop=encoder_layerdrop,
            decoder_layerdrop=decoder_layerdrop,
            use_cache=use_cache,
            is_encoder_decoder=is_encoder_decoder,
            activation_function=activation_function,
            d_model=d_model,
            dropout=dropout,
            attention_dropout=attention_dropout,
            activation_dropout=activation_dropout,
            init_std=init_std,
            decoder_start_token_id=decoder_start_token_id,
            scale_embedding=scale_embedding,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )

    def validate(self) -> None:
        super().validate()
        self._check("num_experts", "an integer of 2 at least", lambda v: isinstance(v, int) and v >= _TOP_K)
        self._check(
            "expert_capacity", "a positive integer or None", lambda v: v is None or (isinstance(v, int) and v > 0)
        )
        for name in ("encoder_sparse_step", "decoder_sparse_step"):
            self._check(name, "an integer, 0 for no sparse layer", lambda v: isinstance(v, int) and v >= 0)
        self._check("router_dtype", f"one of {', '.join(_ROUTER_DTYPES)}", lambda v: v in _ROUTER_DTYPES)
        policies = ", ".join(_SECOND_EXPERT_POLICIES)
        self._check("second_expert_policy", f"one of {policies}", lambda v: v in _SECOND_EXPERT_POLICIES)
        self._check_numbers("moe_token_dropout", high=1.0)
        self._check_numbers("router_aux_loss_coef", "router_z_loss_coef")
        self._check_numbers("moe_eval_capacity_token_fraction", low=-math.inf)


class Top2Routing(NamedTuple):
    """Where the tokens of a batch go.

    Attributes:
        weights: ``[T, 2]`` float32, final; what an entry without a row holds has no meaning.
        expert_ids: ``[T, 2]`` int32, -1 where there is no such choice.
        plan: which row of which expert serves which choice.
    """

    weights: Tensor
    expert_ids: Tensor
    plan: ops.Plan


class NllbMoeTop2Router(nn.Module):
    """Chooses two experts for a token: the first by probability, the second by logit among the others.

    An expert has a capacity, counted over the whole batch: all first choices find their places before any second
    choice. There is no guarantee that a token reaches an expert. The capacity depends on the batch alone; nothing of an
    evaluation is carried over to training.
    """

    def __init__(self, config: NllbMoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.expert_capacity = config.expert_capacity
        self.classifier = nn.Linear(config.d_model, config.num_experts, bias=config.router_bias)
        self.router_ignore_padding_tokens = config.router_ignore_padding_tokens
        self.dtype: torch.dtype = getattr(torch, config.router_dtype)
        self.second_expert_policy = config.second_expert_policy
        self.normalize_router_prob_before_dropping = config.normalize_router_prob_before_dropping
        self.batch_prioritized_routing = config.batch_prioritized_routing
        self.moe_eval_capacity_token_fraction = config.moe_eval_capacity_token_fraction

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden [T, H]`` -> ``[T, E]``, computed in the router's dtype whatever that of the weights or autocast."""
        return linear_in(self.dtype, hidden, self.classifier.weight, self.classifier.bias)

    def route(self, router_logits: Tensor, input_dtype: torch.dtype, kept: Tensor | None = None) -> Top2Routing:
        """Assign tokens to experts.

        Args:
            router_logits: ``[T, E]``.
            input_dtype: of the hidden states; probabilities are rounded to it before they are compared.
            kept: ``[T]`` bool, False at padding.
        """
        noise = None
        if self.second_expert_policy == "sampling":
            zero = torch.zeros((), device=router_logits.device)
            noise = torch.distributions.Gumbel(zero, zero + 1).sample(router_logits.shape)
        mask = None if self.router_ignore_padding_tokens else kept
        weights, expert_ids = ops.route(
            router_logits, _TOP_K, scoring="top2_gate", probs_dtype=input_dtype, noise=noise, mask=mask
        )
        probability = weights
        smallest = torch.finfo(input_dtype).eps
        if self.normalize_router_prob_before_dropping:
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=smallest)
        if self.second_expert_policy == "random":
            second = probability[:, 1]
            is_taken = 2 * second > torch.rand_like(second)
            expert_ids = torch.stack((expert_ids[:, 0], expert_ids[:, 1].masked_fill(~is_taken, -1)), dim=1)
            # As transformers 4.56.2 has it: this policy's second weight is never normalised beforehand.
            weights = torch.stack((weights[:, 0], second), dim=1)
        plan = ops.plan(
            expert_ids,
            self.num_experts,
            capacity=self._capacity(router_logits.shape[0]),
            priority=probability[:, 0].detach() if self.batch_prioritized_routing else None,
        )
        if not self.normalize_router_prob_before_dropping:
            weights = weights * (plan.row_of_slot >= 0)
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=smallest)
        return Top2Routing(weights, expert_ids, plan)

    def _capacity(self, num_tokens: int) -> int | None:
        """Tokens that an expert takes; None where that is all there are."""
        fraction = self.moe_eval_capacity_token_fraction
        if not self.training and fraction > 0:
            capacity = math.ceil(fraction * num_tokens)
        elif self.expert_capacity is not None:
            capacity = self.expert_capacity
        else:
            capacity = 2 * math.ceil(num_tokens / self.num_experts)
        return capacity if capacity < num_tokens else None

    def route_tokens(
        self, router_logits: Tensor, input_dtype: torch.dtype = torch.float32, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Assign tokens to experts, as dense matrices. `router_logits` is not changed.

        Args:
            router_logits: ``[T, E]``.
            input_dtype: of the hidden states, and of the result.
            padding_mask: ``[T]``, nonzero at padding; or the additive ``[B, 1, Q, keys]`` of a full attention pass.

        Returns:
            One-hot first choices int64 ``[T, E]``, without those that were dropped, and the weights ``[T, E]``.
        """
        num_tokens = router_logits.shape[0]
        kept = _not_padding(padding_mask, num_tokens)
        routing = self.route(router_logits, input_dtype, None if kept is None else kept.reshape(-1)[-num_tokens:])
        served = routing.plan.row_of_slot >= 0
        # A choice without a row goes to a column that is cut off.
        columns = routing.expert_ids.masked_fill(~served, self.num_experts).long()
        shape = (num_tokens, self.num_experts + 1)
        weights = routing.weights.to(input_dtype)
        router_probs = weights.new_zeros(shape).scatter(1, columns, weights)[:, :-1]
        top_1_mask = torch.zeros(shape, dtype=torch.int64, device=columns.device).scatter(1, columns[:, :1], 1)[:, :-1]
        return top_1_mask, router_probs

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``hidden_states [B, S, H]`` -> what :meth:`route_tokens` returns for ``T = B * S`` tokens."""
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.route_tokens(self.logits(hidden), hidden_states.dtype, padding_mask)


class NllbMoeDenseActDense(nn.Module):
    """The MLP of a dense layer."""

    def __init__(self, config: NllbMoeConfig, ffn_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(config.d_model, ffn_dim)
        self.fc2 = Linear(ffn_dim, config.d_model)
        self.activation = activation_function(config.activation_function)
        self.dropout = config.activation_dropout

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` -> ``[..., H]``."""
        inner = self.activation(self.fc1(hidden_states))
        return self.fc2(F.dropout(inner, self.dropout, self.training))


class NllbMoeSparseMLP(nn.Module):
    """Router and experts in place of the MLP. The experts' weights are stacks, and not one module each.

    Args:
        config: of the model.
        ffn_dim: inner width of one expert.
        expert_class: what an expert is; only :class:`NllbMoeDenseActDense`, as the experts run fused.
    """

    def __init__(
        self, config: NllbMoeConfig, ffn_dim: int, expert_class: type[nn.Module] = NllbMoeDenseActDense
    ) -> None:
        super().__init__()
        if expert_class is not NllbMoeDenseActDense:
            raise ValueError(
                "NllbMoeSparseMLP: experts are fused, so expert_class must be NllbMoeDenseActDense, got "
                f"{expert_class.__name__}"
            )
        self.router = NllbMoeTop2Router(config)
        self.experts = GroupedExperts(
            config.d_model,
            ffn_dim,
            config.num_experts,
            activation=op_activation(config.activation_function),
            gated=False,
            bias=True,
        )
        self.moe_token_dropout = config.moe_token_dropout
        self.activation_dropout = config.activation_dropout

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the layer.

        Args:
            hidden_states: ``[B, S, H]``.
            padding_mask: additive attention mask ``[B, 1, Q, keys]`` of a full pass, or ``[B * S]``, nonzero at
                padding; None or False where there is none.

        Returns:
            The output ``[B, S, H]``, zero for padding and for tokens that no expert had a place for, and the router's
            logits ``[B * S, E]``.
        """
        batch_size, num_tokens = hidden_states.shape[:2]
        kept = _not_padding(padding_mask, batch_size * num_tokens)
        return self.mix(hidden_states, kept)

    def mix(self, hidden_states: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """:meth:`forward` with the tokens that are not padding, bool ``[B, S]`` or what is broadcast to it."""
        shape = hidden_states.shape
        hidden = hidden_states.reshape(-1, shape[-1])
        if kept is not None:
            kept = kept.reshape(-1) if kept.numel() == hidden.shape[0] else kept.expand(shape[:2]).reshape(-1)
        logits = self.router.logits(hidden)
        weights, _, plan = self.router.route(logits, hidden.dtype, kept)
        if self.training and (self.moe_token_dropout or self.activation_dropout):
            rows = ops.permute(hidden, plan.token_of_row, plan.row_of_slot)
            rows = self.experts(rows, plan.expert_offsets, self.activation_dropout)
            out = ops.unpermute(F.dropout(rows, self.moe_token_dropout), plan.row_of_slot, weights)
        else:
            out = self.experts.forward_fused(hidden, weights * (1 - self.moe_token_dropout), plan)
        return out.view(shape), logits


def _not_padding(padding_mask: Tensor | bool | None, num_tokens: int) -> Tensor | None:
    """Which tokens are not padding, bool ``[T]``, from the masks that transformers passes to this layer."""
    if not isinstance(padding_mask, Tensor):
        return None
    hidden = padding_mask[:, 0, -1] if padding_mask.dim() == 4 else padding_mask
    if hidden.numel() != num_tokens:
        raise ValueError(f"padding_mask must have one entry per token ({num_tokens}), got {list(padding_mask.shape)}")
    return ~hidden.bool().reshape(-1)


def _feed_forward(config: NllbMoeConfig, ffn_dim: int, layer: int, sparse_step: int) -> nn.Module:
    is_sparse = sparse_step > 0 and (layer + 1) % sparse_step == 0
    return NllbMoeSparseMLP(config, ffn_dim) if is_sparse else NllbMoeDenseActDense(config, ffn_dim)


class _NllbMoeLayer(nn.Module):
    """The second half of a layer, which encoder and decoder share."""

    ffn: nn.Module
    ff_layer_norm: nn.LayerNorm

    def __init__(self, config: NllbMoeConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout

    def _feed_forward(self, hidden: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        normalised = self.ff_layer_norm(hidden)
        logits = None
        if isinstance(self.ffn, NllbMoeSparseMLP):
            mixed, logits = self.ffn.mix(normalised, kept)
        else:
            mixed = self.ffn(normalised)
        return clamp_float16(hidden + F.dropout(mixed, self.activation_dropout, self.training)), logits


class NllbMoeEncoderLayer(_NllbMoeLayer):
    """Attention, then MLP or experts, each on a normalised input and added to the residual stream."""

    def __init__(self, config: NllbMoeConfig, layer: int) -> None:
        super().__init__(config)
        self.self_attn = TranslationAttention(config, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.ffn = _feed_forward(config, config.encoder_ffn_dim, layer, config.encoder_sparse_step)
        self.ff_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self, hidden: Tensor, context: LayerContext, head_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``hidden [B, S, H]`` -> output ``[B, S, H]``, attention probabilities, router logits ``[B * S, E]``."""
        attended, probs = self.self_attn(self.self_attn_layer_norm(hidden), context, head_mask)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        hidden, logits = self._feed_forward(hidden, context.kept)
        return hidden, probs, logits


class NllbMoeDecoderLayer(_NllbMoeLayer):
    """Attention to the target, attention to the source, then MLP or experts."""

    def __init__(self, config: NllbMoeConfig, layer: int) -> None:
        super().__init__(config)
        self.self_attn = TranslationAttention(config, config.decoder_attention_heads, layer)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.cross_attention = TranslationAttention(config, config.decoder_attention_heads, layer)
        self.cross_attention_layer_norm = nn.LayerNorm(config.d_model)
        self.ffn = _feed_forward(config, config.decoder_ffn_dim, layer, config.decoder_sparse_step)
        self.ff_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        hidden: Tensor,
        source: Tensor,
        context: LayerContext,
        head_mask: Tensor | None,
        cross_head_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """``hidden [B, T, H]`` -> output, probabilities of both attentions, router logits ``[B * T, E]``."""
        attended, probs = self.self_attn(self.self_attn_layer_norm(hidden), context, head_mask)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        normalised = self.cross_attention_layer_norm(hidden)
        attended, cross_probs = self.cross_attention(normalised, context, cross_head_mask, source)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        hidden, logits = self._feed_forward(hidden, context.kept)
        return hidden, probs, cross_probs, logits


class NllbMoePreTrainedModel(TranslationPreTrainedModel):
    config_class = NllbMoeConfig

    def _keeps_float32(self, name: str) -> bool:
        return self.config.router_dtype == "float32" and ".router.classifier." in name


class NllbMoeEncoder(TranslationEncoder, NllbMoePreTrainedModel):
    pass


class NllbMoeDecoder(TranslationDecoder, NllbMoePreTrainedModel):
    pass


class NllbMoeModel(TranslationModel, NllbMoePreTrainedModel):
    """Encoder and decoder without a head: tokens to hidden states."""

    def __init__(self, config: NllbMoeConfig) -> None:
        super().__init__(config)
        self.encoder = NllbMoeEncoder(
            config,
            self.shared,
            (NllbMoeEncoderLayer(config, i) for i in range(config.encoder_layers)),
        )
        self.decoder = NllbMoeDecoder(
            config,
            self.shared,
            (NllbMoeDecoderLayer(config, i) for i in range(config.decoder_layers)),
        )
        self.post_init()


class NllbMoeForConditionalGeneration(TranslationForConditionalGeneration, NllbMoePreTrainedModel):  # type: ignore[override]
    """Encoder and decoder with a language-modelling head, which generates translations."""

    def __init__(self, config: NllbMoeConfig) -> None:
        super().__init__(config, NllbMoeModel(config))

    def _add_router_losses(
        self, loss: Tensor | None, outputs: Any, attention_mask: Tensor | None, decoder_attention_mask: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor | None]]:
        losses = {
            "encoder_aux_loss": _balance(outputs.encoder_router_logits, attention_mask),
            "decoder_aux_loss": _balance(outputs.decoder_router_logits, decoder_attention_mask),
        }
        for aux_loss in losses.values():
            if loss is not None and aux_loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return loss, losses


def _balance(router_logits: tuple[Tensor, ...] | None, attention_mask: Tensor | None) -> Tensor | None:
    """The load-balancing loss of a stack, without its padding; None if it has no sparse layer."""
    if not router_logits:
        return None
    return load_balancing_loss(router_logits, _TOP_K, attention_mask)
