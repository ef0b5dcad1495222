"""How a module of transformers becomes one of ours, and what those with a Linear per projection have in common.

A module is not rebuilt: it changes its class to a subclass of its own with another `forward`, so that parameters,
names, hooks and everything that asks for its type stay. It keeps nothing: every call looks at the modules as they are,
and where one of those that the kernels pass by is not plain, the layer computes what it did before.

Letters: T tokens, E experts, K choices per token, H hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from moekernels import ops
from moekernels.integrations.transformers.experts import ExpertWeights, activation_name, run_experts
from moekernels.integrations.transformers.plain import Layout, examine, layout_of, plain_experts, say_why
from moekernels.quantization import QuantizedWeight


class Swap(nn.Module):
    """The base of all replacements; never constructed, only mixed into a module's own class."""

    original: ClassVar[type[nn.Module]]  # the class the module had
    stock: ClassVar[type[nn.Module]]  # the one of transformers: the same, but for what others derive at run time
    swap: ClassVar[type[Swap]]

    if TYPE_CHECKING:  # the attributes of the original

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def prepare(cls, stock: type[nn.Module]) -> dict[str, Any]:
        """Attributes of the subclass of `stock`."""
        return {}

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why the kernels could never run this module; None if they could. Changes nothing."""
        return None

    @classmethod
    def hinders(cls, module: nn.Module) -> str | None:
        """Why they could not run it as it is now, hooks aside; None if they could. Changes nothing."""
        return None

    @classmethod
    def num_bytes(cls, module: nn.Module) -> int:
        """Of the experts' weights that the kernels read."""
        return 0

    @classmethod
    def expert_weights(cls, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """The matrices and stacks of the experts: modules, and the names of their parameters."""
        return []

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not swapped_class(self.original, self.swap):
            return super().__reduce_ex__(protocol)  # of a class that others derived from ours
        # The class was made at run time, so that pickle cannot find it by name.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _rebuild, (self.original, self.swap), state


_CLASSES: dict[tuple[type[nn.Module], type[Swap]], type[nn.Module]] = {}


def swapped_class(original: type[nn.Module], swap: type[Swap]) -> type[nn.Module]:
    """The subclass of `original` that runs `swap`; looks like `original` to whoever asks for names."""
    if (original, swap) not in _CLASSES:
        stock = stock_class(original)
        names = {
            "original": original,
            "stock": stock,
            "swap": swap,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            **swap.prepare(stock),
        }
        _CLASSES[original, swap] = type(original.__name__, (swap, original), names)
    return _CLASSES[original, swap]


def stock_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that defines `forward`: FSDP2 and torch's parametrizations give modules a class derived from theirs."""
    return next(base for base in cls.__mro__ if "forward" in base.__dict__)


def _rebuild(original: type[nn.Module], swap: type[Swap]) -> nn.Module:
    made = swapped_class(original, swap)
    return made.__new__(made)


def num_bytes(tensor: Tensor) -> int:
    """What a weight takes, quantised or not."""
    return tensor.num_bytes if isinstance(tensor, QuantizedWeight) else tensor.numel() * tensor.element_size()


class LinearExperts(Swap):
    """Experts with a Linear per projection."""

    expert: ClassVar[str]  # the class of the experts, in the module of the layer's class
    up: ClassVar[tuple[str, ...]]
    down: ClassVar[str]
    act: ClassVar[str]  # the attribute of an expert that holds its activation
    dropout: ClassVar[str | None] = None  # and its dropout
    where: ClassVar[str] = "experts."  # what the names of the experts begin with
    # Whether transformers calls experts without tokens as well, whose gradient is then zero; else they have none.
    calls_all: ClassVar[bool] = False
    layout: ClassVar[Layout]

    @classmethod
    def prepare(cls, stock: type[nn.Module]) -> dict[str, Any]:
        others = (cls.act,) if cls.dropout is None else (cls.act, cls.dropout)
        expert_class = getattr(sys.modules[stock.__module__], cls.expert)
        return {"layout": layout_of(expert_class, cls.up, cls.down, others)}

    @classmethod
    def experts_of(cls, module: nn.Module) -> Mapping[str, nn.Module]:
        """The expert modules in the order of their numbers."""
        experts: Any = module.experts
        return experts._modules

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        experts = cls.experts_of(module)
        if not experts:
            return "it has no experts"
        act = getattr(next(iter(experts.values())), cls.act, None)
        if activation_name(act) is None:
            return f"its activation {type(act).__name__} is none of {', '.join(ops.ACTIVATIONS)}"
        return None

    @classmethod
    def hinders(cls, module: nn.Module) -> str | None:
        layout = cls.prepare(stock_class(type(module)))["layout"]
        found = examine(cls.experts_of(module), layout, cls.where, lasting=True)
        return found if isinstance(found, str) else None

    @classmethod
    def num_bytes(cls, module: nn.Module) -> int:
        return sum(num_bytes(p) for e in cls.experts_of(module).values() for p in e.parameters())

    @classmethod
    def expert_weights(cls, module: nn.Module) -> list[tuple[nn.Module, str]]:
        names = (*cls.up, cls.down)
        return [(expert.get_submodule(name), "weight") for expert in cls.experts_of(module).values() for name in names]

    def plain_experts(self) -> ExpertWeights | None:
        """The weights for the kernels; None, and a warning, if calling the modules is more than computing with them."""
        found = plain_experts(self.experts_of(self), self.layout, self.where)
        if not isinstance(found, str) and (reason := self.refuses(self)):
            found = reason
        if isinstance(found, str):
            say_why(self.stock, found)
            return None
        return found

    def run(
        self,
        hidden: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        experts: ExpertWeights,
        *,
        output_dropout: float = 0.0,
    ) -> Tensor:
        """``hidden [T, H]``, ``expert_ids [T, K]``, ``weights [T, K]`` -> ``[T, H]``."""
        first: Any = next(iter(self.experts_of(self).values()))
        activation = activation_name(getattr(first, self.act))
        assert activation is not None
        dropout = None if self.dropout is None else getattr(first, self.dropout)
        return run_experts(
            hidden,
            expert_ids,
            weights,
            experts,
            activation=activation,
            gated=len(self.up) == 2,
            inner_dropout=dropout.p if dropout is not None and dropout.training else 0.0,
            output_dropout=output_dropout,
            zero_unvisited=self.calls_all,
        )
