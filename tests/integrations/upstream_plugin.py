"""A pytest plugin for transformers' own tests: the drop-in in every model they make, and what came of it as JSON.

`run_upstream_suite.py` beside this file starts pytest with it. Environment variables:

    MOEKERNELS_UPSTREAM_WAY     "stock" changes nothing, "replace" calls `replace_moe_layers`, "register" replaces the
                                default of the experts interface (transformers 5)
    MOEKERNELS_UPSTREAM_REPORT  the file for the outcomes, what failed tests said, the calls of our kernels and the
                                models that were refused
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moekernels import ops
from moekernels.integrations.transformers import register, replace_moe_layers

WAYS = ("stock", "replace", "register")
# Every forward pass of a layer's experts goes through one of these.
_KERNELS = ("sparse_mlp", "grouped_gemm")

outcomes: dict[str, str] = {}
messages: dict[str, str] = {}
calls: Counter[str] = Counter()
replaced: Counter[str] = Counter()
refused: Counter[str] = Counter()


def pytest_configure() -> None:
    way = os.environ["MOEKERNELS_UPSTREAM_WAY"]
    for name in _KERNELS:
        setattr(ops, name, _counted(name, getattr(ops, name)))
    if way == "register":
        register("grouped_mm")
    elif way == "replace":
        _replace_in_every_model()
    elif way != "stock":
        raise ValueError(f"MOEKERNELS_UPSTREAM_WAY must be one of {', '.join(WAYS)}, not {way!r}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # A failure in set-up or tear-down outweighs what the test itself did.
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        messages[report.nodeid] = crash.message if crash else str(report.longrepr)


def pytest_sessionfinish() -> None:
    report = {
        "transformers": transformers.__version__,
        "outcomes": outcomes,
        "messages": messages,
        "calls": dict(calls),
        "replaced": dict(replaced),
        "refused": dict(refused),
    }
    Path(os.environ["MOEKERNELS_UPSTREAM_REPORT"]).write_text(json.dumps(report, indent=1) + "\n")


def _counted(name: str, kernel: Any) -> Any:
    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        # A counter in a traced function would be a guard of the graph.
        if not torch.compiler.is_compiling():
            calls[name] += 1
        return kernel(*args, **kwargs)

    return call


def _replace_in_every_model() -> None:
    """`replace_moe_layers` at the end of construction, and of `from_pretrained`, which constructs without data."""
    base = transformers.PreTrainedModel
    post_init, from_pretrained = base.post_init, base.from_pretrained.__func__

    @functools.wraps(post_init)
    def replacing_post_init(self: Any) -> None:
        post_init(self)
        _replace(self)

    @functools.wraps(from_pretrained)
    def replacing_from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        result = from_pretrained(cls, *args, **kwargs)
        _replace(result[0] if isinstance(result, tuple) else result)
        return result

    base.post_init = replacing_post_init
    base.from_pretrained = classmethod(replacing_from_pretrained)


def _replace(model: Any) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    try:
        replaced.update(replace_moe_layers(model).classes)
    except ValueError as error:
        # A refusal leaves a stock model, and is told of in the report; a model without experts is none.
        if not str(error).endswith("has no MoE module that moekernels knows"):
            refused[str(error)] += 1
