"""Parts of a layer: the scaled embedding and attention."""

from __future__ import annotations

from torch import Tensor, nn

from moekernels.models.encoder_decoder import EncoderDecoderAttention
from moekernels.models.translation.config import TranslationConfig
from moekernels.nn.linear import project


class ScaledEmbedding(nn.Embedding):
    """An embedding whose output is multiplied by `scale`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int, scale: float) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.scale = scale

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * self.scale


class TranslationAttention(EncoderDecoderAttention):
    """Attention with biases, to the tokens themselves or to the encoder's output.

    Args:
        config: of the model.
        num_heads: number of heads.
        layer: the layer it is part of.
        cross: attend to the source.
    """

    def __init__(self, config: TranslationConfig, num_heads: int, layer: int = 0, *, cross: bool = False) -> None:
        hidden_size = config.d_model
        head_dim = hidden_size // num_heads
        super().__init__(
            num_heads, head_dim, scale=head_dim**-0.5, dropout=config.attention_dropout, layer=layer, cross=cross
        )
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def project_query(self, hidden: Tensor) -> Tensor:
        return project(self.q_proj, hidden)

    def project_keys(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return project(self.k_proj, hidden), project(self.v_proj, hidden)

    def project_output(self, attended: Tensor) -> Tensor:
        return project(self.out_proj, attended)
