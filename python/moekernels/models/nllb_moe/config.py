"""The configuration of NLLB-MoE."""

from __future__ import annotations

import math
from typing import Any

from moekernels.models.translation import TranslationConfig

TOP_K = 2


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
        self._check("num_experts", "an integer of 2 at least", lambda v: isinstance(v, int) and v >= TOP_K)
        self._check(
            "expert_capacity", "a positive integer or None", lambda v: v is None or (isinstance(v, int) and v > 0)
        )
        for name in ("encoder_sparse_step", "decoder_sparse_step"):
            self._check(name, "an integer, 0 for no sparse layer", lambda v: isinstance(v, int) and v >= 0)
        self._check_one_of("router_dtype", "float32", "float16", "bfloat16")
        self._check_one_of("second_expert_policy", "all", "sampling", "random")
        self._check_numbers("moe_token_dropout", high=1.0)
        self._check_numbers("router_aux_loss_coef", "router_z_loss_coef")
        self._check_numbers("moe_eval_capacity_token_fraction", low=-math.inf)
