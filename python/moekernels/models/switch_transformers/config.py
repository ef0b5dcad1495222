"""The configuration of Switch Transformers, and what its fields amount to."""

from __future__ import annotations

from typing import Any, ClassVar

from moekernels.models.configuration import PretrainedConfig
from moekernels.models.fields import choice, count, is_integer, is_token, layers, must_be, number, setting, token
from moekernels.nn.activations import op_activation

_GATED = "gated-"

_is_number_of_layers = must_be("a number of layers", lambda value: is_integer(value, 0))


class SwitchTransformersConfig(PretrainedConfig):
    """The configuration of Switch Transformers.

    Files on the hub also hold `router_type`, `num_selected_experts`, `feed_forward_proj` and `is_gated_act`; they are
    kept, and nothing reads them.
    """

    model_type = "switch_transformers"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "layer_norm_eps": "layer_norm_epsilon",
        "output_router_logits": "add_router_probs",
    }

    vocab_size: int = count(32128, "number of tokens")
    d_model: int = count(768, "H, the width of a token")
    d_kv: int = count(64, "width of one attention head; the heads together need not be as wide as a token")
    d_ff: int = count(2048, "inner width of the MLPs, and of one expert")
    expert_capacity: int = count(64, "tokens that an expert takes of one sequence; the others pass the layer by")
    num_layers: int = layers(12, "number of encoder layers")
    num_sparse_encoder_layers: int = setting(
        3, "roughly this many encoder layers are sparse, evenly spaced; see `encoder_sparse_step`", _is_number_of_layers
    )
    num_decoder_layers: int = layers(
        12, "number of decoder layers; None is as many as the encoder has", like="num_layers"
    )
    num_sparse_decoder_layers: int = setting(3, "as `num_sparse_encoder_layers`", _is_number_of_layers)
    num_heads: int = count(12, "heads of all attentions")
    num_experts: int = count(8, "E")
    router_bias: bool = setting(False, "give the router's classifier a bias")
    router_jitter_noise: float = number(
        0.01, "in training the router's input is multiplied by random numbers this close to 1", high=1.0
    )
    router_dtype: str = choice(
        "float32",
        '"float32", "float16" or "bfloat16", in which the router computes',
        *("float32", "float16", "bfloat16"),
    )
    router_ignore_padding_tokens: bool = setting(False, "send padding to no expert")
    relative_attention_num_buckets: int = count(
        32,
        "of distances, each with a position bias per head",
        must_be("an integer of at least 4", lambda value: value >= 4),
    )
    relative_attention_max_distance: int = setting(128, "longer distances share a bucket")
    dropout_rate: float = number(0.1, "of everything that has a dropout", high=1.0)
    layer_norm_epsilon: float = number(1e-6, "of the norms; `layer_norm_eps` is another name")
    router_z_loss_coef: float = number(0.001, "weight of the routers' z-losses")
    router_aux_loss_coef: float = number(0.001, "weight of the load-balancing losses")
    initializer_factor: float = number(1.0, "factor of new weights")
    dense_act_fn: str = setting(
        "relu",
        'activation of MLPs and experts. After "gated-" it is that of a gate: "gated-gelu" has the tanh approximation, '
        "as in T5 1.1",
    )
    is_encoder_decoder: bool = setting(True, "True")
    add_router_probs: bool = setting(
        False,
        "return the routers' logits, and their losses, unless told otherwise; `output_router_logits` is another name",
    )
    use_cache: bool = setting(True, "return keys and values for decoding unless told otherwise")
    pad_token_id: int | None = token(0, "the token that fills up shorter sequences")
    eos_token_id: int | list[int] | None = setting(
        1,
        "the token, or tokens, that sequences end with. `decoder_start_token_id` has no default; released models have "
        "0",
    )
    encoder_sparse_step: int = setting(
        None,
        "layers 1, 1 + step, 1 + 2 step ... are sparse, counted from 0; all of them with 1, none with 0. None is the "
        "number of layers divided by that of sparse ones",
        must_be("a number of layers, 0 for no sparse ones", lambda value: is_integer(value, 0)),
    )
    decoder_sparse_step: int = setting(
        None,
        "as `encoder_sparse_step`",
        must_be("a number of layers, 0 for no sparse ones", lambda value: is_integer(value, 0)),
    )

    def _complete(self, others: dict[str, Any]) -> None:
        for stack, num_layers in (("encoder", self.num_layers), ("decoder", self.num_decoder_layers)):
            if getattr(self, f"{stack}_sparse_step") is None:
                num_sparse = getattr(self, f"num_sparse_{stack}_layers")
                # No sparse layers asked for still give one, the second: released files and transformers count on it.
                setattr(self, f"{stack}_sparse_step", num_layers // num_sparse if num_sparse > 0 else num_layers)

    def validate(self) -> None:
        super().validate()
        self._check_weights("vocab_size", "d_model")
        self._check_weights("num_heads", "d_kv", "d_model")
        self._check_weights("relative_attention_num_buckets", "num_heads")
        self._check_weights("num_experts", "d_ff", "d_model")
        half = self.relative_attention_num_buckets // 2
        self._check(
            "relative_attention_max_distance",
            must_be(
                f"an integer above {half}, half of relative_attention_num_buckets",
                lambda value: is_integer(value, half + 1),
            ),
        )
        self._check("decoder_start_token_id", is_token)
        op_activation(activation_and_gate(self.dense_act_fn)[0])


def activation_and_gate(dense_act_fn: str) -> tuple[str, bool]:
    """The name of the activation, and whether it is that of a gate."""
    name = str(dense_act_fn).removeprefix(_GATED)
    gated = name != dense_act_fn
    return "gelu_new" if gated and name == "gelu" else name, gated
