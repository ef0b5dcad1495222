"""OLMoE (arXiv 2409.02060): a decoder whose every MLP is sparse, with dropless top-k routing.

Letters: B batch, S new tokens, H hidden size, E experts.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from moekernels.models.configuration import PretrainedConfig
from moekernels.models.decoder import SparseDecoder, SparseDecoderForCausalLM
from moekernels.nn import (
    ATTENTION_FUNCTIONS,
    AttentionMask,
    Cache,
    Linear,
    RMSNorm,
    RotaryEmbedding,
    SparseMLP,
    apply_rotary,
)
from moekernels.nn.activations import op_activation
from moekernels.nn.rope import check_rope_scaling


class OlmoeConfig(PretrainedConfig):
    """The configuration of OLMoE; the defaults are close to OLMoE-1B-7B.

    Args:
        vocab_size: number of tokens.
        hidden_size: H, the width of a token.
        intermediate_size: inner width of one expert.
        num_hidden_layers: number of layers.
        num_attention_heads: heads of the queries.
        num_key_value_heads: heads of keys and values; None for as many as queries have.
        hidden_act: activation of the experts' gate.
        max_position_embeddings: the longest sequence the model is made for.
        initializer_range: standard deviation of new weights.
        rms_norm_eps: added to the mean square in norms.
        use_cache: return keys and values for decoding unless told otherwise.
        pad_token_id, bos_token_id, eos_token_id: special tokens.
        tie_word_embeddings: share the embedding with the head.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched: a dictionary with "rope_type" (default, linear, dynamic, yarn, llama3 or
            longrope) and what that type needs; None for not at all.
        attention_bias: give the attention's projections a bias.
        attention_dropout: dropout of attention probabilities in training.
        clip_qkv: clamp queries, keys and values to this magnitude.
        num_experts_per_tok: experts that a token visits.
        num_experts: E.
        output_router_logits: return the router's logits, and the load-balancing loss, unless told otherwise.
        router_aux_loss_coef: weight of that loss in the total.
        norm_topk_prob: divide a token's expert weights by their sum.
        **kwargs: the fields of :class:`PretrainedConfig`; others are kept.
    """

    model_type = "olmoe"
    attribute_map: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}

    def __init__(
        self,
        vocab_size: int = 50304,
        hidden_size: int = 2048,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 4096,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-5,
        use_cache: bool = True,
        pad_token_id: int | None = 1,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = 50279,
        tie_word_embeddings: bool = False,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        clip_qkv: float | None = None,
        num_experts_per_tok: int = 8,
        num_experts: int = 64,
        output_router_logits: bool = False,
        router_aux_loss_coef: float = 0.01,
        norm_topk_prob: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.clip_qkv = clip_qkv
        self.num_experts_per_tok = num_experts_per_tok
        self.num_experts = num_experts
        self.output_router_logits = output_router_logits
        self.router_aux_loss_coef = router_aux_loss_coef
        self.norm_topk_prob = norm_topk_prob
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def validate(self) -> None:
        self._check_counts(
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "num_experts_per_tok",
            "num_experts",
        )
        heads, experts = self.num_attention_heads, self.num_experts
        self._check("hidden_size", f"an even multiple of {heads} heads", lambda v: v % (2 * heads) == 0)
        self._check("num_key_value_heads", f"a divisor of {heads} heads", lambda v: heads % v == 0)
        self._check("num_experts_per_tok", f"at most num_experts = {experts}", lambda v: v <= experts)
        self._check_numbers("attention_dropout", high=1.0)
        self._check_numbers("initializer_range", "rms_norm_eps", "router_aux_loss_coef", "rope_theta")
        self._check("clip_qkv", "a positive number or None", lambda v: v is None or v > 0)
        self._check_token_ids("pad_token_id")
        op_activation(self.hidden_act)
        check_rope_scaling(self.rope_scaling, self.hidden_size // heads)


class OlmoeAttention(nn.Module):
    """Attention with norms over the whole width of queries and keys, and rotary positions."""

    def __init__(self, config: OlmoeConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scale = self.head_dim**-0.5
        kv_size = self.head_dim * config.num_key_value_heads
        self.q_proj = Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.k_norm = RMSNorm(kv_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: AttentionMask,
        implementation: str,
        cache: Cache | None,
        cache_position: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """``hidden [B, S, H]`` -> output ``[B, S, H]``, and probabilities ``[B, heads, S, keys]`` if eager."""
        kv_shape = (*hidden.shape[:-1], self.config.num_key_value_heads, self.head_dim)
        query_shape = (*hidden.shape[:-1], self.config.num_attention_heads, self.head_dim)
        query = self.q_norm(self.q_proj(hidden))
        key = self.k_norm(self.k_proj(hidden))
        value = self.v_proj(hidden)
        if self.config.clip_qkv is not None:
            clip = self.config.clip_qkv
            query, key, value = query.clamp(-clip, clip), key.clamp(-clip, clip), value.clamp(-clip, clip)
        query = apply_rotary(query.view(query_shape), *rotary).transpose(1, 2)
        key = apply_rotary(key.view(kv_shape), *rotary).transpose(1, 2)
        value = value.view(kv_shape).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer, cache_position)
        dropout = self.config.attention_dropout if self.training else 0.0
        attend = ATTENTION_FUNCTIONS[implementation]
        out, probs = attend(query, key, value, mask, scale=self.scale, dropout=dropout)
        return self.o_proj(out), probs


class OlmoeDecoderLayer(nn.Module):
    """Attention, then the sparse MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, config: OlmoeConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = OlmoeAttention(config, layer)
        self.mlp = SparseMLP(
            config.hidden_size,
            config.intermediate_size,
            config.num_experts,
            config.num_experts_per_tok,
            activation=op_activation(config.hidden_act),
            renormalize=config.norm_topk_prob,
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, *attention_inputs: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        """``hidden [B, S, H]`` -> output ``[B, S, H]``, attention probabilities, router logits ``[B * S, E]``."""
        attended, probs = self.self_attn(self.input_layernorm(hidden), *attention_inputs)
        hidden = hidden + attended
        mixed, router_logits = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + mixed, probs, router_logits


class OlmoeModel(SparseDecoder):
    """The decoder without a head: tokens to hidden states."""

    config_class = OlmoeConfig

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(OlmoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(
            config.hidden_size // config.num_attention_heads,
            config.rope_theta,
            config.rope_scaling,
            max_position_embeddings=config.max_position_embeddings,
            original_max_position_embeddings=getattr(config, "original_max_position_embeddings", None),
        )
        self.post_init()


class OlmoeForCausalLM(SparseDecoderForCausalLM):
    """The decoder with a language-modelling head."""

    config_class = OlmoeConfig

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__(config)
        self.model = OlmoeModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
