"""The configuration fields that M2M100 and NLLB-MoE have in common."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from moekernels.models.configuration import PretrainedConfig
from moekernels.nn.activations import op_activation


class TranslationConfig(PretrainedConfig):
    """The fields that both configurations have; :class:`moekernels.models.M2M100Config` lists them."""

    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
        "initializer_range": "init_std",
    }
    #: Dense models have no routers.
    output_router_logits: bool = False

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
        pad_token_id: int = 1,
        bos_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 2,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.d_model = d_model
        self.encoder_layers = encoder_layers
        self.encoder_ffn_dim = encoder_ffn_dim
        self.encoder_attention_heads = encoder_attention_heads
        self.decoder_layers = decoder_layers
        self.decoder_ffn_dim = decoder_ffn_dim
        self.decoder_attention_heads = decoder_attention_heads
        self.encoder_layerdrop = encoder_layerdrop
        self.decoder_layerdrop = decoder_layerdrop
        self.use_cache = use_cache
        self.activation_function = activation_function
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.activation_dropout = activation_dropout
        self.init_std = init_std
        self.scale_embedding = scale_embedding
        # Files hold it beside encoder_layers, of which it is but another name.
        kwargs.pop("num_hidden_layers", None)
        super().__init__(
            is_encoder_decoder=is_encoder_decoder,
            decoder_start_token_id=decoder_start_token_id,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )

    def validate(self) -> None:
        self._check_counts("vocab_size", "max_position_embeddings", "d_model")
        for stack in ("encoder", "decoder"):
            self._check_counts(f"{stack}_layers", f"{stack}_ffn_dim", f"{stack}_attention_heads")
            self._check_numbers(f"{stack}_layerdrop", high=1.0)
            heads = getattr(self, f"{stack}_attention_heads")
            expected = f"a multiple of {heads} {stack} heads, and 4 at least"
            self._check("d_model", expected, partial(_divides, heads))
        self._check_numbers("dropout", "attention_dropout", "activation_dropout", high=1.0)
        self._check_numbers("init_std")
        self._check("pad_token_id", "a token id (positions begin after it)", lambda v: isinstance(v, int) and v >= 0)
        self._check_token_ids("pad_token_id", "decoder_start_token_id")
        op_activation(self.activation_function)


def _divides(num_heads: int, d_model: int) -> bool:
    return d_model >= 4 and d_model % num_heads == 0
