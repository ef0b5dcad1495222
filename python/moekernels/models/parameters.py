"""The parameters of a model: where they are, in which dtype, and how many."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class ParametersMixin(nn.Module):
    """What can be asked of a model's parameters. A model may keep some of them in float32."""

    #: Parts of the names of parameters that stay float32 whatever the dtype of the model.
    keep_in_float32: ClassVar[tuple[str, ...]] = ()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; of most of them where some stay float32."""
        for name, parameter in self.named_parameters():
            if parameter.is_floating_point() and not self._keeps_float32(name):
                return parameter.dtype
        return torch.get_default_dtype()

    def _keeps_float32(self, name: str) -> bool:
        return any(part in name for part in self.keep_in_float32)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of weights, tied ones counted once."""
        embeddings = (
            {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else set()
        )
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable) and id(parameter) not in embeddings
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes that the weights take, tied ones counted once, with the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    def get_parameter_or_buffer(self, target: str) -> Tensor:
        """The parameter or buffer of that name. Raises AttributeError if there is neither."""
        try:
            return self.get_parameter(target)
        except AttributeError:
            return self.get_buffer(target)
