"""The arguments of a model with a head: those of the model without it, written out there, and some of its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from moekernels.models.options import refuse_unknown


def with_arguments_of(base: Callable[..., Any], **before: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a method of keywords take all that `base` takes, by position or by name.

    The method lists what it looks at itself, and gets the rest in its ``**inputs``. What `base` does not know comes
    last; or, if `before` names it, before that argument of `base`.

    Raises:
        TypeError: of the method: an argument is unknown, or given twice.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        signature = _extended(inspect.signature(base), inspect.signature(method), before)
        names = [name for name in signature.parameters if name not in ("self", "kwargs")]
        known = frozenset(names)

        @functools.wraps(method)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if args:
                _add_positional(f"{type(self).__name__}.forward()", kwargs, names, args)
            for name in kwargs:
                if name not in known:
                    refuse_unknown(self, {name: kwargs[name] for name in kwargs if name not in known})
                    kwargs = {name: kwargs[name] for name in kwargs if name in known}
                    break
            return method(self, **kwargs)

        forward.__signature__ = signature  # type: ignore[attr-defined]
        return forward

    return decorate


def _extended(base: inspect.Signature, own: inspect.Signature, before: dict[str, str]) -> inspect.Signature:
    parameters = {**base.parameters}
    rest = parameters.popitem()  # **kwargs
    added = [
        parameter.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for name, parameter in own.parameters.items()
        if parameter.kind == inspect.Parameter.KEYWORD_ONLY and name not in parameters
    ]
    order: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        order += [new for new in added if before.get(new.name) == name]
        order.append(parameter)
    order += [new for new in added if new.name not in before]
    return own.replace(parameters=[*order, rest[1]])


def _add_positional(where: str, kwargs: dict[str, Any], names: list[str], args: tuple[Any, ...]) -> None:
    if len(args) > len(names):
        raise TypeError(f"{where} takes at most {len(names)} positional arguments, got {len(args)}")
    for name, value in zip(names, args, strict=False):
        if name in kwargs:
            raise TypeError(f"{where} got multiple values for argument {name!r}")
        kwargs[name] = value
