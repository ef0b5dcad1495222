"""The configuration of Switch Transformers, and what its fields amount to."""

from __future__ import annotations

from typing import Any, ClassVar

from moekernels.models.configuration import PretrainedConfig
from moekernels.nn.activations import op_activation

_GATED = "gated-"


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
        self._check_one_of("router_dtype", "float32", "float16", "bfloat16")
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
        op_activation(activation_and_gate(self.dense_act_fn)[0])


def activation_and_gate(dense_act_fn: str) -> tuple[str, bool]:
    """The name of the activation, and whether it is that of a gate."""
    name = str(dense_act_fn).removeprefix(_GATED)
    gated = name != dense_act_fn
    return "gelu_new" if gated and name == "gelu" else name, gated


def _sparse_step(given: int | None, num_layers: int, num_sparse: int) -> int:
    if given is not None:
        return given
    # No sparse layers asked for still give one, the second: released files and transformers count on it.
    return num_layers // num_sparse if num_sparse > 0 else num_layers


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
