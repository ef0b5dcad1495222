"""Trading time for memory in training: activations of layers that are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint


class GradientCheckpointingMixin(nn.Module):
    """The switch. A model's `forward` takes its layers from `_checkpointed`."""

    supports_gradient_checkpointing: ClassVar[bool] = True

    gradient_checkpointing: bool = False
    _checkpoint_call: Callable[..., Any] = staticmethod(partial(checkpoint, use_reentrant=False))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute the layers' activations in the backward pass instead of keeping them.

        Args:
            gradient_checkpointing_kwargs: passed to :func:`torch.utils.checkpoint.checkpoint`.
        """
        if not self.supports_gradient_checkpointing:
            raise ValueError(f"{type(self).__name__} does not support gradient checkpointing")
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        call = partial(_with_all_tensors if options["use_reentrant"] else checkpoint, **options)
        for module in self.modules():
            if isinstance(module, GradientCheckpointingMixin):
                module.gradient_checkpointing = True
                module._checkpoint_call = call

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        for module in self.modules():
            if isinstance(module, GradientCheckpointingMixin):
                module.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(m.gradient_checkpointing for m in self.modules() if isinstance(m, GradientCheckpointingMixin))

    @property
    def _is_checkpointed(self) -> bool:
        """Whether a pass recomputes its layers: the switch is on, and the model trains."""
        return self.gradient_checkpointing and self.training

    def _checkpointed(self, layers: nn.ModuleList) -> Iterable[Callable[..., Any]]:
        """The layers as a pass calls them."""
        return [partial(self._checkpoint_call, layer) for layer in layers] if self._is_checkpointed else layers


def _with_all_tensors(layer: nn.Module, *inputs: Any, **options: Any) -> Any:
    """`checkpoint` for the reentrant variant, which looks for tensors among its arguments but not within tuples."""
    leaves, structure = pytree.tree_flatten(inputs)
    return checkpoint(lambda *leaves: layer(*pytree.tree_unflatten(leaves, structure)), *leaves, **options)
