"""The token embeddings of a model: access, tying to the head, and another size of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moekernels.quantization import QuantizedWeight


class TokenEmbeddingsMixin(nn.Module):
    """Access to the embedding and the head. A model whose embedding has another name overrides the first two."""

    config: Any
    #: The attribute that holds the base model in a model with a head.
    base_model_prefix: ClassVar[str] = "model"
    _input_gradients: Any = None

    def get_input_embeddings(self) -> nn.Embedding:
        embeddings: Any = self.base_model.embed_tokens
        return embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.embed_tokens = value

    def _embeddings(self) -> list[nn.Embedding]:
        """The embeddings of tokens, the input embedding first: several where encoder and decoder have their own."""
        return [self.get_input_embeddings()]

    @property
    def base_model(self) -> Any:
        """The model without its head."""
        return getattr(self, self.base_model_prefix, self)

    def get_output_embeddings(self) -> nn.Linear | None:
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def tie_weights(self) -> None:
        """Make the head share the input embedding, if the configuration says so."""
        head = self.get_output_embeddings()
        if head is not None and self.config.tie_word_embeddings:
            head.weight = self.get_input_embeddings().weight

    def enable_input_require_grads(self) -> None:
        """Let the output of the embedding require a gradient, which training of adapters on a frozen model needs."""

        def require(module: nn.Module, args: Any, output: Tensor) -> None:
            output.requires_grad_(True)

        self.disable_input_require_grads()
        self._input_gradients = self.get_input_embeddings().register_forward_hook(require)

    def disable_input_require_grads(self) -> None:
        """Undo :meth:`enable_input_require_grads`."""
        if self._input_gradients is not None:
            self._input_gradients.remove()
            self._input_gradients = None

    @torch.no_grad()
    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Change the size of the vocabulary. Rows both have stay.

        Args:
            new_num_tokens: the new size; None is the old one.
            pad_to_multiple_of: enlarge that to a multiple.
            mean_resizing: new rows are the mean of the old ones, which changes what the model predicts least
                (https://nlp.stanford.edu/~johnhew/vocab-expansion.html); otherwise they get the initialisation of new
                weights.

        Returns:
            The input embedding.
        """
        old = self.get_input_embeddings()
        size = old.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size < 1:
            raise ValueError(f"resize_token_embeddings: the vocabulary must have at least one token, got {size}")
        if size == old.num_embeddings:
            return old
        head = self.get_output_embeddings()
        for module in (*self._embeddings(), *([] if head is None else [head])):
            if isinstance(module.weight, QuantizedWeight):
                raise ValueError(
                    f"resize_token_embeddings: the weight of {type(module).__name__} is quantised "
                    f"({module.weight.format.name}) and cannot get rows; resize before quantising"
                )
        fill = _fill_with_mean if mean_resizing else self._fill_with_noise
        for embeddings in self._embeddings():
            embeddings.weight = _resized(embeddings.weight, size, fill)
            embeddings.num_embeddings = size
            if embeddings.padding_idx is not None and embeddings.padding_idx >= size:
                embeddings.padding_idx = None
        if head is not None and not self.config.tie_word_embeddings:
            head.weight = _resized(head.weight, size, fill)
            if head.bias is not None:
                head.bias = _resized(head.bias, size, _fill_with_mean if mean_resizing else _fill_with_zeros)
        if head is not None:
            head.out_features = size
        self.config.vocab_size = size
        self.tie_weights()
        return self.get_input_embeddings()

    @property
    def _new_token_std(self) -> float:
        """Standard deviation of the embeddings of tokens that are added, without `mean_resizing`."""
        return self.config.initializer_range

    def _fill_with_noise(self, old: Tensor, added: Tensor) -> None:
        added.normal_(std=self._new_token_std)


def _fill_with_mean(old: Tensor, added: Tensor) -> None:
    added.copy_(old.to(torch.promote_types(old.dtype, torch.float32)).mean(dim=0))


def _fill_with_zeros(old: Tensor, added: Tensor) -> None:
    added.zero_()


def _resized(weight: Tensor, size: int, fill: Callable[[Tensor, Tensor], None]) -> nn.Parameter:
    resized = weight.new_empty(size, *weight.shape[1:])
    kept = min(size, weight.shape[0])
    resized[:kept] = weight[:kept]
    fill(weight.detach(), resized[kept:])
    return nn.Parameter(resized, requires_grad=weight.requires_grad)
