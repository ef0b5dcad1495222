"""Encoder and decoder together, with a language-modelling head, and the encoder alone.

Letters: B batch, S source tokens, T target tokens, E experts, H hidden size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from moekernels.checkpoint import KeyMap
from moekernels.models.encoder_decoder import (
    EncoderDecoderForConditionalGeneration,
    EncoderDecoderModel,
)
from moekernels.models.losses import switch_router_losses, total
from moekernels.models.options import refuse_unknown
from moekernels.models.outputs import MoEModelOutput
from moekernels.models.switch_transformers.config import SwitchTransformersConfig
from moekernels.models.switch_transformers.stacks import (
    SwitchTransformersDecoder,
    SwitchTransformersEncoder,
    SwitchTransformersPreTrainedModel,
)
from moekernels.nn.linear import project


class SwitchTransformersModel(EncoderDecoderModel, SwitchTransformersPreTrainedModel):
    """Encoder and decoder without a head: tokens to hidden states."""

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = SwitchTransformersEncoder(config, self.shared)
        self.decoder = SwitchTransformersDecoder(config, self.shared)
        self.post_init()


class SwitchTransformersForConditionalGeneration(  # type: ignore[override]
    EncoderDecoderForConditionalGeneration, SwitchTransformersPreTrainedModel
):
    """Encoder and decoder with a language-modelling head. A head that is tied to the embedding gets a hidden state
    divided by the square root of its width."""

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = SwitchTransformersEncoder(config, self.shared)
        self.decoder = SwitchTransformersDecoder(config, self.shared)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The decoder's input for labels ``[B, T]``: the start token, then all labels but the last."""
        return self._shift_right(labels)

    def _hidden_states(self, **inputs: Any) -> Any:
        # The stacks are its own, and not those of a model within it.
        return EncoderDecoderModel.forward(self, **inputs)  # type: ignore[arg-type]

    def _logits(self, hidden: Tensor) -> Tensor:
        return project(self.lm_head, hidden * self.config.d_model**-0.5 if self.config.tie_word_embeddings else hidden)

    def _router_losses(
        self, outputs: Any, attention_mask: Tensor | None, decoder_attention_mask: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor | None]]:
        fields: dict[str, Tensor | None] = {}
        weighted = []
        for stack in ("encoder", "decoder"):
            logits = getattr(outputs, f"{stack}_router_logits")
            if not logits:
                continue
            z_loss, aux_loss = switch_router_losses(logits, self.batch)
            fields |= {f"{stack}_z_loss": z_loss, f"{stack}_aux_loss": aux_loss}
            weighted.append(self.config.router_z_loss_coef * z_loss + self.config.router_aux_loss_coef * aux_loss)
        return total(weighted), fields


class SwitchTransformersEncoderModel(SwitchTransformersPreTrainedModel):
    """The encoder alone: tokens to hidden states. It also loads from checkpoints of whole models."""

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = SwitchTransformersEncoder(config, self.shared)
        self.post_init()

    @property
    def key_map(self) -> KeyMap:
        whole = super().key_map
        return dataclasses.replace(whole, ignored=(*whole.ignored, r"decoder\..*"))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the encoder. Options that are None are taken from the configuration.

        Args:
            input_ids: int64 ``[B, S]``.
            attention_mask: ``[B, S]``, 0 at padding; or ``[B, 1, S, S]``, additive or boolean.
            head_mask: ``[layers, heads]`` or ``[heads]``, a factor for every head, 0 to silence it.
            inputs_embeds: ``[B, S, H]`` instead of `input_ids`.
            output_attentions: return attention probabilities (by the eager implementation, in this call).
            output_hidden_states: return the hidden states between layers.
            output_router_logits: return the logits of the routers and their probabilities ``[B, S, E]``.
            return_dict: False returns a tuple of the fields that are there.
            use_cache: an encoder has none.

        Raises:
            ValueError: tokens are missing or given twice, a mask does not fit, or `use_cache` is True.
        """
        refuse_unknown(self, kwargs)
        if use_cache:
            raise ValueError("SwitchTransformersEncoderModel: an encoder has no cache, but use_cache is True")
        output: MoEModelOutput = self.encoder(
            input_ids,
            attention_mask,
            head_mask,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            output_router_logits,
            return_dict=True,
        )
        if output.router_logits is not None:
            output.router_probs = tuple(torch.softmax(logits.float(), dim=-1) for logits in output.router_logits)
        return self._returned(output, return_dict)
