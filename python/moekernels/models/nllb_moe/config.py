"""The configuration of NLLB-MoE."""

from __future__ import annotations

import math

from moekernels.models.fields import choice, count, inherited, is_count, is_integer, must_be, number, setting
from moekernels.models.translation import TranslationConfig

TOP_K = 2

_is_step = must_be("an integer, 0 for no sparse layer", lambda value: isinstance(value, int) and value >= 0)


class NllbMoeConfig(TranslationConfig):
    """The configuration of NLLB-MoE."""

    model_type = "nllb-moe"

    router_bias: bool = setting(False, "give the router's classifier a bias")
    router_dtype: str = choice(
        "float32",
        '"float32", "float16" or "bfloat16", in which the router computes its logits',
        *("float32", "float16", "bfloat16"),
    )
    router_ignore_padding_tokens: bool = setting(
        False, "True routes padding like any token; False sends it to no expert"
    )
    num_experts: int = setting(
        128,
        "E",
        must_be(f"an integer of {TOP_K} at least", lambda value: is_integer(value, TOP_K)),
        is_count,
    )
    expert_capacity: int | None = count(
        64, "tokens that an expert takes of a batch in training; None is twice an even share", optional=True
    )
    encoder_sparse_step: int = setting(4, "every so many-th layer is sparse; 0 for none", _is_step)
    decoder_sparse_step: int = setting(4, "every so many-th layer is sparse; 0 for none", _is_step)
    router_z_loss_coef: float = number(0.001, "kept, but the model has no z-loss")
    router_aux_loss_coef: float = number(0.001, "weight of the load-balancing losses")
    second_expert_policy: str = choice(
        "all",
        '"all" takes a token\'s second expert always, "sampling" draws it in proportion to its probability (Gumbel '
        'noise), "random" takes it with twice its probability',
        *("all", "sampling", "random"),
    )
    normalize_router_prob_before_dropping: bool = setting(
        False, "make a token's two weights sum to one before, and not after, experts that are full drop tokens"
    )
    batch_prioritized_routing: bool = setting(
        False, "the tokens with the highest probability, and not the first ones, find a place"
    )
    moe_eval_capacity_token_fraction: float = number(
        1.0,
        "tokens that an expert takes in evaluation, as a fraction of the batch; at most 0 means as in training",
        low=-math.inf,
    )
    moe_token_dropout: float = number(
        0.2, "dropout of experts' outputs; in evaluation they are multiplied by one minus it", high=1.0
    )
    # In the order of the documentation page, these come after the router's.
    pad_token_id: int = inherited(TranslationConfig, "pad_token_id")
    bos_token_id: int | None = inherited(TranslationConfig, "bos_token_id")
    eos_token_id: int | list[int] | None = inherited(TranslationConfig, "eos_token_id")
    output_router_logits: bool = setting(
        False, "return the routers' logits, and the load-balancing losses, unless told otherwise"
    )

    def validate(self) -> None:
        super().validate()
        for stack in ("encoder", "decoder"):
            self._check_weights("num_experts", f"{stack}_ffn_dim", "d_model")
