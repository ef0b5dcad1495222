from __future__ import annotations

import inspect
from typing import Any

import pytest

from moekernels.models.arguments import with_arguments_of


class Base:
    def forward(self, ids: Any = None, mask: Any = None, use_cache: Any = None, **kwargs: Any) -> Any:
        return {"ids": ids, "mask": mask, "use_cache": use_cache}


class Head:
    @with_arguments_of(Base.forward, labels="use_cache")
    def forward(self, *, mask: Any = None, labels: Any = None, scale: float = 1.0, **inputs: Any) -> Any:
        """Run the head."""
        return mask, labels, scale, inputs


def test_signature() -> None:
    parameters = inspect.signature(Head.forward).parameters
    assert list(parameters) == ["self", "ids", "mask", "labels", "use_cache", "scale", "kwargs"]
    assert parameters["scale"].default == 1.0 and Head.forward.__doc__ == "Run the head."
    assert parameters["labels"].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD


def test_by_position_and_by_name() -> None:
    head = Head()
    assert head.forward() == (None, None, 1.0, {})
    assert head.forward(1, 2, 3, 4, 5.0) == (2, 3, 5.0, {"ids": 1, "use_cache": 4})
    assert head.forward(1, labels=3, use_cache=False) == (None, 3, 1.0, {"ids": 1, "use_cache": False})
    assert head.forward(token_type_ids=0) == (None, None, 1.0, {})  # of tokenizers


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"Head.forward\(\) got multiple values for argument 'ids'"):
        Head().forward(1, ids=2)
    with pytest.raises(TypeError, match=r"Head.forward\(\) takes at most 5 positional arguments, got 6"):
        Head().forward(*range(6))
    with pytest.raises(
        TypeError, match=r"Head.forward\(\) got an unexpected keyword argument 'label'; did you mean 'la"
    ):
        Head().forward(label=1)
