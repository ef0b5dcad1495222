"""Rows: weights that accelerate's hooks bring, layer by layer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tests.company.matrix import Case, Results, row


@contextmanager
def _folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def _to_cpu(model: nn.Module, folder: str) -> nn.Module:
    import accelerate

    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def _to_disk(model: nn.Module, folder: str) -> nn.Module:
    import accelerate

    return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


def _dispatch(model: nn.Module, folder: str) -> nn.Module:
    import accelerate

    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", offload_dir=folder, force_hooks=True)


def _dispatch_with_disk(model: nn.Module, folder: str) -> nn.Module:
    """Stacks of layers on disk, the rest in memory."""
    import accelerate

    places: dict[str, Any] = {}
    for name, child in model.named_children():
        inner = dict(child.named_children())
        places |= {f"{name}.{n}": "disk" if n in ("layers", "block") else "cpu" for n in inner} or {name: "cpu"}
        places |= {f"{name}.{n}": "cpu" for n, _ in child.named_parameters(recurse=False)}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


_WAYS: dict[str, Callable[[nn.Module, str], nn.Module]] = {
    "cpu_offload": _to_cpu,
    "disk_offload": _to_disk,
    "dispatch_model": _dispatch,
    "dispatch_model, layers on disk": _dispatch_with_disk,
}

for _name, _way in _WAYS.items():

    @row(f"accelerate: {_name}, after", packages=("accelerate",))
    def _after(case: Case, way: Callable[[nn.Module, str], nn.Module] = _way) -> Results:
        with _folder() as folder:
            model = way(case.model(), folder)
            return {"first": case.logits(model), "second": case.logits(model)}

    @row(f"accelerate: {_name}, before", packages=("accelerate",))
    def _before(case: Case, way: Callable[[nn.Module, str], nn.Module] = _way) -> Results:
        with _folder() as folder:
            model = case.attach(way(case.make(), folder), strict=False)
            return {"first": case.logits(model), "second": case.logits(model)}


@row("accelerate: hooks removed again", packages=("accelerate",))
def removed(case: Case) -> Results:
    from accelerate.hooks import remove_hook_from_submodules

    with _folder() as folder:
        model = _dispatch(case.model(), folder)
        first = case.logits(model)
        remove_hook_from_submodules(model)
        return {"first": first, **case.results(model)}
