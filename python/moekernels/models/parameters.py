"""The parameters of a model: where they are, in which dtype, and how many."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moekernels.expert_memory import ExpertCache
from moekernels.quantization import QuantizedWeight


class ParametersMixin(nn.Module):
    """What can be asked of a model's parameters. A model may keep some of them in float32."""

    #: Parts of the names of parameters that stay float32 whatever the dtype of the model.
    keep_in_float32: ClassVar[tuple[str, ...]] = ()
    #: What holds the experts of a model that was loaded with `expert_memory`.
    expert_cache: ExpertCache | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are, or where accelerate brings them when they are needed."""
        device = next(self.parameters()).device
        if device.type == "meta":
            for module in self.modules():
                hook: Any = getattr(module, "_hf_hook", None)
                for part in getattr(hook, "hooks", (hook,)):
                    if getattr(part, "execution_device", None) is not None:
                        return torch.device(part.execution_device)
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; of most of them where some stay float32."""
        for name, parameter in self.named_parameters():
            if parameter.is_floating_point() and not self._keeps_float32(name):
                return parameter.dtype
        return torch.get_default_dtype()

    def _keeps_float32(self, name: str) -> bool:
        return any(part in name for part in self.keep_in_float32)

    # accelerate looks a tied weight up under each of its names, and safetensors refuses tensors that share memory.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of every module, but of a weight that has several names the further ones hold a copy.

        `save_pretrained` writes such a weight once. With ``keep_vars=True`` all names hold the parameter itself.
        """
        state = super().state_dict(*args, **kwargs)
        if not kwargs.get("keep_vars", False):
            prefix = kwargs.get("prefix", "")
            for alias in self._tied_names():
                if prefix + alias in state:
                    state[prefix + alias] = state[prefix + alias].clone()
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for alias, name in self._tied_names().items():
            if prefix + name in state_dict:
                state_dict.setdefault(prefix + alias, state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _tied_names(self) -> dict[str, str]:
        """Further names of parameters, and their first ones."""
        first: dict[int, str] = {}
        names: dict[str, str] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if first.setdefault(id(parameter), name) != name:
                names[name] = first[id(parameter)]
        return names

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of weights, tied ones counted once; with those of experts that are in files."""
        embeddings = (
            {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else set()
        )
        number = sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable) and id(parameter) not in embeddings
        )
        return number if self.expert_cache is None or only_trainable else number + self.expert_cache.num_weights

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes that the weights take, tied ones counted once, quantised ones as they are stored, with the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.num_bytes if isinstance(tensor, QuantizedWeight) else tensor.nbytes for tensor in tensors)

    def get_parameter_or_buffer(self, target: str) -> Tensor:
        """The parameter or buffer of that name. Raises AttributeError if there is neither."""
        try:
            return self.get_parameter(target)
        except AttributeError:
            return self.get_buffer(target)
