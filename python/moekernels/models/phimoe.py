"""PhiMoE (arXiv 2404.14219): a decoder whose every MLP is sparse, with two experts chosen by sparsemixer.

Letters: B batch, S new tokens, H hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moekernels.generation.state import DecodeState
from moekernels.models.arguments import with_arguments_of
from moekernels.models.base import PreTrainedModel
from moekernels.models.configuration import PretrainedConfig
from moekernels.models.context import LayerContext, LayerOutput
from moekernels.models.decoder import SparseDecoder, SparseDecoderForCausalLM
from moekernels.models.fields import activation, count, layers, must_be, number, setting, token
from moekernels.models.losses import classification_loss, classification_problem
from moekernels.models.outputs import SequenceClassifierOutputWithPast
from moekernels.nn import (
    ATTENTION_FUNCTIONS,
    RotaryEmbedding,
    SparseMLP,
    apply_rotary,
)
from moekernels.nn.activations import op_activation
from moekernels.nn.linear import project
from moekernels.nn.rope import check_rope_scaling, rope_type

_TOP_K = 2  # sparsemixer chooses two experts


class PhimoeConfig(PretrainedConfig):
    """The configuration of PhiMoE; the defaults are close to Phi-3.5-MoE-instruct.

    `original_max_position_embeddings`, which some files have beside `rope_scaling`, is an entry of that.
    """

    model_type = "phimoe"
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "num_local_experts"}

    vocab_size: int = count(32064, "number of tokens")
    hidden_size: int = count(4096, "H, the width of a token")
    intermediate_size: int = count(6400, "inner width of one expert")
    num_hidden_layers: int = layers(32, "number of layers")
    num_attention_heads: int = count(32, "heads of the queries")
    num_key_value_heads: int = count(
        8, "heads of keys and values; None for as many as queries have", like="num_attention_heads"
    )
    hidden_act: str = activation("silu", "activation of the experts' gate")
    max_position_embeddings: int = count(131072, "the longest sequence the model is made for")
    initializer_range: float = number(0.02, "standard deviation of new weights")
    rms_norm_eps: float = number(1e-5, "added to the variance in the layer norms")
    use_cache: bool = setting(True, "return keys and values for decoding unless told otherwise")
    pad_token_id: int | None = token(None, "the token that fills up shorter sequences")
    bos_token_id: int | None = setting(1, "the token that sequences begin with")
    eos_token_id: int | list[int] | None = setting(2, "the token, or tokens, that sequences end with")
    tie_word_embeddings: bool = setting(False, "share the embedding with the head")
    rope_theta: float = number(1e6, "base of the rotary frequencies")
    rope_scaling: dict[str, Any] | None = setting(
        None,
        'None, or a dictionary of "type" (or "rope_type") "longrope" with `short_factor` and `long_factor` (one number '
        "per pair of a head's dimensions), `short_mscale`, `long_mscale` and `original_max_position_embeddings`, the "
        "length past which a batch takes the long ones",
    )
    sliding_window: int | None = count(
        None, "how many tokens, itself included, a token attends to; None for all before it", optional=True
    )
    attention_dropout: float = number(0.0, "dropout of attention probabilities in training", high=1.0)
    num_experts_per_tok: int = count(
        _TOP_K,
        f"experts that a token visits: {_TOP_K}",
        must_be(f"{_TOP_K}, which is what sparsemixer chooses", lambda value: value == _TOP_K),
    )
    num_local_experts: int = count(16, "E", must_be(f"at least {_TOP_K}", lambda value: value >= _TOP_K))
    output_router_logits: bool = setting(
        False, "return the router's logits, and the load-balancing loss, unless told otherwise"
    )
    router_aux_loss_coef: float = number(0.001, "weight of that loss in the total")
    router_jitter_noise: float = number(
        0.01, "half the relative width of what counts as a near-tie in the router, also in evaluation"
    )
    input_jitter_noise: float = number(
        0.0, "in training the sparse layer's input is multiplied by random numbers this close to one", high=1.0
    )
    attention_bias: bool = setting(False, "give the attention's projections a bias")
    lm_head_bias: bool = setting(False, "give the head a bias")

    @property
    def original_max_position_embeddings(self) -> int | None:
        """The length past which a batch takes the long rotary factors; None without `rope_scaling`."""
        scaling = self.rope_scaling
        return scaling.get("original_max_position_embeddings") if isinstance(scaling, Mapping) else None

    @original_max_position_embeddings.setter
    def original_max_position_embeddings(self, value: int | None) -> None:
        if value is not None and isinstance(self.rope_scaling, Mapping):
            self.rope_scaling = {**self.rope_scaling, "original_max_position_embeddings": value}

    def validate(self) -> None:
        super().validate()
        heads = self.num_attention_heads
        self._check("hidden_size", must_be(f"an even multiple of {heads} heads", lambda v: v % (2 * heads) == 0))
        self._check("num_key_value_heads", must_be(f"a divisor of {heads} heads", lambda v: heads % v == 0))
        self._check_weights("vocab_size", "hidden_size")
        self._check_weights("num_local_experts", "intermediate_size", "hidden_size")
        scaling = self.rope_scaling
        check_rope_scaling(scaling, self.hidden_size // heads)
        kind = rope_type(scaling)
        if scaling is None or kind == "default":
            return
        if kind != "longrope":
            raise ValueError(f"PhimoeConfig: rope_scaling must be of type 'longrope', got {kind!r}")
        for name in ("short_mscale", "long_mscale", "original_max_position_embeddings"):
            value = scaling.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise ValueError(f"PhimoeConfig: rope_scaling[{name!r}] must be a positive number, got {value!r}")


class PhimoeAttention(nn.Module):
    """Attention with rotary positions."""

    def __init__(self, config: PhimoeConfig, layer: int) -> None:
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

    def forward(self, hidden: Tensor, context: LayerContext) -> tuple[Tensor, Tensor | None]:
        """``hidden [B, S, H]`` -> output ``[B, S, H]``, and probabilities ``[B, heads, S, keys]`` if eager."""
        kv_shape = (*hidden.shape[:-1], self.config.num_key_value_heads, self.head_dim)
        query_shape = (*hidden.shape[:-1], self.config.num_attention_heads, self.head_dim)
        query = apply_rotary(project(self.q_proj, hidden).view(query_shape), *context.rotary).transpose(1, 2)
        key = apply_rotary(project(self.k_proj, hidden).view(kv_shape), *context.rotary).transpose(1, 2)
        value = project(self.v_proj, hidden).view(kv_shape).transpose(1, 2)
        if context.cache is not None:
            key, value = context.cache.update(key, value, self.layer, context.cache_position)
        dropout = self.config.attention_dropout if self.training else 0.0
        attend = ATTENTION_FUNCTIONS[context.implementation]
        out, probs = attend(query, key, value, context.mask, scale=self.scale, dropout=dropout)
        return project(self.o_proj, out), probs


class PhimoeDecoderLayer(nn.Module):
    """Attention, then the sparse MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, config: PhimoeConfig, layer: int) -> None:
        super().__init__()
        self.input_jitter_noise = config.input_jitter_noise
        self.self_attn = PhimoeAttention(config, layer)
        self.block_sparse_moe = SparseMLP(
            config.hidden_size,
            config.intermediate_size,
            config.num_local_experts,
            config.num_experts_per_tok,
            activation=op_activation(config.hidden_act),
            scoring="sparsemixer",
            eps=config.router_jitter_noise,
        )
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, context: LayerContext) -> LayerOutput:
        """``hidden [B, S, H]`` -> output ``[B, S, H]``, attention probabilities, router logits ``[B * S, E]``."""
        attended, probs = self.self_attn(self.input_layernorm(hidden), context)
        hidden = hidden + attended
        normed = self.post_attention_layernorm(hidden)
        if self.training and self.input_jitter_noise:
            # Router and experts see the same jittered input.
            normed = normed * torch.empty_like(normed).uniform_(
                1.0 - self.input_jitter_noise, 1.0 + self.input_jitter_noise
            )
        mixed, router_logits = self.block_sparse_moe(normed)
        return LayerOutput(hidden + mixed, probs, router_logits)


class PhimoeModel(SparseDecoder):
    """The decoder without a head: tokens to hidden states."""

    config_class = PhimoeConfig

    def __init__(self, config: PhimoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(PhimoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(
            config.hidden_size // config.num_attention_heads,
            config.rope_theta,
            config.rope_scaling,
            max_position_embeddings=config.max_position_embeddings,
        )
        self.post_init()

    @property
    def _sliding_window(self) -> int | None:
        return self.config.sliding_window

    def _rotary(self, position_ids: Tensor, cache_position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # The place in the cache decides, padding included, so that `generate` knows when that is without asking the
        # device.
        return self.rotary_emb(position_ids, dtype, length=cache_position[-1:] + 1)


class PhimoeForCausalLM(SparseDecoderForCausalLM):
    """The decoder with a language-modelling head."""

    config_class = PhimoeConfig

    def __init__(self, config: PhimoeConfig) -> None:
        super().__init__(config)
        self.model = PhimoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def prepare_inputs_for_generation(self, state: DecodeState) -> dict[str, Any]:
        """As for every decoder; but when the sequences outgrow the short rotary factors, they are read again, since
        keys that were turned by short factors do not fit queries turned by long ones."""
        trained_length = self.config.original_max_position_embeddings
        if trained_length is not None and 0 < state.cached <= trained_length < state.target:
            state.forget(self.get_input_embeddings())
        return super().prepare_inputs_for_generation(state)


class PhimoeForSequenceClassification(PreTrainedModel):
    """The decoder with a linear head on the last token of every sequence."""

    config_class = PhimoeConfig
    new_heads = ("score.",)

    def __init__(self, config: PhimoeConfig) -> None:
        super().__init__(config)
        self.model = PhimoeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @with_arguments_of(SparseDecoder.forward, labels="use_cache")
    def forward(
        self,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Run the model. What is not listed here is as in :meth:`SparseDecoder.forward`.

        The logits are those of the last token that is not the pad token, on whichever side padding is; of the last
        token of all where `inputs_embeds` are given.

        Args:
            labels: classes int64 ``[B]`` (cross entropy); or floats ``[B, num_labels]``, 1 at every class that holds
                (binary cross entropy); or, with one label, numbers ``[B]`` (squared error). `config.problem_type`, set
                by the first labels, says which.
            num_items_in_batch: labels in all parts of a batch whose gradients are accumulated; the loss is divided by
                it.

        Raises:
            ValueError: several sequences are given and the configuration has no pad token, or labels do not fit.
        """
        config = self.config
        batch_size = 1 if input_ids is None else input_ids.shape[0]
        if inputs_embeds is not None:
            batch_size = inputs_embeds.shape[0]
        if config.pad_token_id is None and batch_size != 1:
            raise ValueError(
                f"{type(self).__name__}: {batch_size} sequences need config.pad_token_id to find their last tokens, "
                "got None"
            )
        outputs = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, return_dict=True, **inputs)
        logits = project(self.score, self._last_tokens(outputs.last_hidden_state, input_ids))
        loss = None
        if labels is not None:
            if config.problem_type is None:
                config.problem_type = classification_problem(config.num_labels, labels)
            loss = classification_loss(logits, labels, config.problem_type, num_items_in_batch=num_items_in_batch)
        output = SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return self._returned(output, return_dict)

    def _last_tokens(self, hidden: Tensor, input_ids: Tensor | None) -> Tensor:
        """The hidden states ``[B, H]`` of ``hidden [B, S, H]`` at the last token that is not padding."""
        pad_token_id = self.config.pad_token_id
        if pad_token_id is None or input_ids is None:
            return hidden[:, -1]
        positions = torch.arange(input_ids.shape[1], device=hidden.device)
        last = (positions * (input_ids != pad_token_id).to(hidden.device)).argmax(dim=-1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
