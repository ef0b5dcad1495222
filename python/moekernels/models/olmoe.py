"""OLMoE (arXiv 2409.02060): a decoder whose every MLP is sparse, with dropless top-k routing.

Letters: B batch, S new tokens, H hidden size, E experts.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from moekernels.models.configuration import PretrainedConfig
from moekernels.models.context import LayerContext, LayerOutput
from moekernels.models.decoder import SparseDecoder, SparseDecoderForCausalLM
from moekernels.models.fields import activation, count, layers, must_be, number, setting, token
from moekernels.nn import (
    ATTENTION_FUNCTIONS,
    RMSNorm,
    RotaryEmbedding,
    SparseMLP,
    apply_rotary,
)
from moekernels.nn.activations import op_activation
from moekernels.nn.linear import project
from moekernels.nn.rope import check_rope_scaling


class OlmoeConfig(PretrainedConfig):
    """The configuration of OLMoE; the defaults are close to OLMoE-1B-7B."""

    model_type = "olmoe"
    attribute_map: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}

    vocab_size: int = count(50304, "number of tokens")
    hidden_size: int = count(2048, "H, the width of a token")
    intermediate_size: int = count(2048, "inner width of one expert")
    num_hidden_layers: int = layers(16, "number of layers")
    num_attention_heads: int = count(16, "heads of the queries")
    num_key_value_heads: int = count(
        None, "heads of keys and values; None for as many as queries have", like="num_attention_heads"
    )
    hidden_act: str = activation("silu", "activation of the experts' gate")
    max_position_embeddings: int = count(4096, "the longest sequence the model is made for")
    initializer_range: float = number(0.02, "standard deviation of new weights")
    rms_norm_eps: float = number(1e-5, "added to the mean square in norms")
    use_cache: bool = setting(True, "return keys and values for decoding unless told otherwise")
    pad_token_id: int | None = token(1, "the token that fills up shorter sequences")
    bos_token_id: int | None = setting(None, "the token that sequences begin with")
    eos_token_id: int | list[int] | None = setting(50279, "the token, or tokens, that sequences end with")
    tie_word_embeddings: bool = setting(False, "share the embedding with the head")
    rope_theta: float = number(10000.0, "base of the rotary frequencies")
    rope_scaling: dict[str, Any] | None = setting(
        None,
        'how they are stretched: a dictionary with "rope_type" (default, linear, dynamic, yarn, llama3 or longrope) '
        "and what that type needs; None for not at all",
    )
    attention_bias: bool = setting(False, "give the attention's projections a bias")
    attention_dropout: float = number(0.0, "dropout of attention probabilities in training", high=1.0)
    clip_qkv: float | None = setting(
        None,
        "clamp queries, keys and values to this magnitude",
        must_be("a positive number or None", lambda value: value is None or value > 0),
    )
    num_experts_per_tok: int = count(8, "experts that a token visits")
    num_experts: int = count(64, "E")
    output_router_logits: bool = setting(
        False, "return the router's logits, and the load-balancing loss, unless told otherwise"
    )
    router_aux_loss_coef: float = number(0.01, "weight of that loss in the total")
    norm_topk_prob: bool = setting(False, "divide a token's expert weights by their sum")

    def validate(self) -> None:
        super().validate()
        heads, experts = self.num_attention_heads, self.num_experts
        self._check("hidden_size", must_be(f"an even multiple of {heads} heads", lambda v: v % (2 * heads) == 0))
        self._check("num_key_value_heads", must_be(f"a divisor of {heads} heads", lambda v: heads % v == 0))
        self._check("num_experts_per_tok", must_be(f"at most num_experts = {experts}", lambda v: v <= experts))
        self._check_weights("vocab_size", "hidden_size")
        self._check_weights("num_experts", "intermediate_size", "hidden_size")
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
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.k_norm = RMSNorm(kv_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, context: LayerContext) -> tuple[Tensor, Tensor | None]:
        """``hidden [B, S, H]`` -> output ``[B, S, H]``, and probabilities ``[B, heads, S, keys]`` if eager."""
        kv_shape = (*hidden.shape[:-1], self.config.num_key_value_heads, self.head_dim)
        query_shape = (*hidden.shape[:-1], self.config.num_attention_heads, self.head_dim)
        query = self.q_norm(project(self.q_proj, hidden))
        key = self.k_norm(project(self.k_proj, hidden))
        value = project(self.v_proj, hidden)
        if self.config.clip_qkv is not None:
            clip = self.config.clip_qkv
            query, key, value = query.clamp(-clip, clip), key.clamp(-clip, clip), value.clamp(-clip, clip)
        query = apply_rotary(query.view(query_shape), *context.rotary).transpose(1, 2)
        key = apply_rotary(key.view(kv_shape), *context.rotary).transpose(1, 2)
        value = value.view(kv_shape).transpose(1, 2)
        if context.cache is not None:
            key, value = context.cache.update(key, value, self.layer, context.cache_position)
        dropout = self.config.attention_dropout if self.training else 0.0
        attend = ATTENTION_FUNCTIONS[context.implementation]
        out, probs = attend(query, key, value, context.mask, scale=self.scale, dropout=dropout)
        return project(self.o_proj, out), probs


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

    def forward(self, hidden: Tensor, context: LayerContext) -> LayerOutput:
        """``hidden [B, S, H]`` -> output ``[B, S, H]``, attention probabilities, router logits ``[B * S, E]``."""
        attended, probs = self.self_attn(self.input_layernorm(hidden), context)
        hidden = hidden + attended
        mixed, router_logits = self.mlp(self.post_attention_layernorm(hidden))
        return LayerOutput(hidden + mixed, probs, router_logits)


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
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
