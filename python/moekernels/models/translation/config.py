"""The configuration fields that M2M100 and NLLB-MoE have in common."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from moekernels.models.configuration import PretrainedConfig
from moekernels.models.fields import activation, count, is_token, layers, must_be, number, setting


class TranslationConfig(PretrainedConfig):
    """The fields that both configurations have."""

    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
        "initializer_range": "init_std",
    }
    #: Dense models have no routers.
    output_router_logits: bool = False

    vocab_size: int = count(128112, "number of tokens")
    max_position_embeddings: int = count(1024, "the longest sequence the model is made for; longer ones work too")
    encoder_layers: int = layers(12, "number of layers")
    encoder_ffn_dim: int = count(4096, "inner width of the MLPs, and of one expert where there are any")
    encoder_attention_heads: int = count(16, "heads of the attentions")
    decoder_layers: int = layers(12, "number of layers")
    decoder_ffn_dim: int = count(4096, "inner width of the MLPs, and of one expert where there are any")
    decoder_attention_heads: int = count(16, "heads of the attentions")
    encoder_layerdrop: float = number(0.05, "probability of leaving a layer out in training", high=1.0)
    decoder_layerdrop: float = number(0.05, "probability of leaving a layer out in training", high=1.0)
    use_cache: bool = setting(True, "return keys and values for decoding unless told otherwise")
    is_encoder_decoder: bool = setting(True, "True")
    activation_function: str = activation("relu", "of the MLPs and experts")
    d_model: int = count(1024, "H, the width of a token")
    dropout: float = number(
        0.1, "dropout of embeddings, and of what attention adds; in M2M100 also of what the MLPs add", high=1.0
    )
    attention_dropout: float = number(0.1, "dropout of attention probabilities", high=1.0)
    activation_dropout: float = number(
        0.0, "dropout within the MLPs and experts; in NLLB-MoE also of what they add", high=1.0
    )
    init_std: float = number(0.02, "standard deviation of new weights")
    decoder_start_token_id: int | None = setting(2, "what the decoder begins with", is_token)
    scale_embedding: bool = setting(True, "multiply embeddings by the square root of H")
    pad_token_id: int = setting(
        1,
        "the token that fills up shorter sequences; positions begin after it",
        must_be("a token id (positions begin after it)", lambda value: isinstance(value, int) and value >= 0),
        is_token,
    )
    bos_token_id: int | None = setting(0, "the token that sequences begin with")
    eos_token_id: int | list[int] | None = setting(2, "the token, or tokens, that sequences end with")

    def _complete(self, others: dict[str, Any]) -> None:
        # Files hold it beside encoder_layers, of which it is but another name.
        others.pop("num_hidden_layers", None)

    def validate(self) -> None:
        super().validate()
        self._check_weights("vocab_size", "d_model")
        for stack in ("encoder", "decoder"):
            self._check_weights(f"{stack}_ffn_dim", "d_model")
            heads = getattr(self, f"{stack}_attention_heads")
            expected = f"a multiple of {heads} {stack} heads, and 4 at least"
            self._check("d_model", must_be(expected, partial(_divides, heads)))


def _divides(num_heads: int, d_model: int) -> bool:
    return d_model >= 4 and d_model % num_heads == 0
