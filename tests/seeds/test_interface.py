"""Every class, parameter and output field of the documentation pages is here, and the documentation says so."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import moekernels as mk
from moekernels.models import outputs
from tests.seeds.interface import ALL_CONFIGS, ALL_MODELS, PAGES, Documented

TABLES = Path(__file__).parents[2] / "docs" / "compatibility.md"

CASES = [pytest.param(name, documented, id=name) for page in PAGES.values() for name, documented in page.items()]


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize(("name", "documented"), CASES)
def test_constructor(name: str, documented: Documented) -> None:
    found = getattr(mk, name)
    if isinstance(documented.constructor, str):
        ours = parameters(found.__init__)
        # In this order, as examples pass them by position.
        assert [each for each in ours if each in documented.constructor.split()] == documented.constructor.split()
        return
    signature = inspect.signature(found.__init__).parameters
    made = found()
    for parameter, default in documented.constructor.items():
        assert parameter in signature or parameter in ("pad_token_id", "tie_word_embeddings"), parameter
        value = getattr(made, parameter)
        # A head of its own for every query head is what None stands for.
        assert value == default or (parameter == "num_key_value_heads" and value == made.num_attention_heads), parameter
    for parameter in documented.kept.split():
        assert getattr(found(**{parameter: 0.25}), parameter) == 0.25


@pytest.mark.parametrize(("name", "documented"), CASES)
def test_methods(name: str, documented: Documented) -> None:
    found = getattr(mk, name)
    for method, expected in documented.methods.items():
        ours = parameters(getattr(found, method))
        assert [each for each in ours if each in expected.split()] == expected.split(), method


@pytest.mark.parametrize(("name", "documented"), CASES)
def test_outputs(name: str, documented: Documented) -> None:
    if documented.output is not None:
        output_name, fields = documented.output
        found = {field.name for field in dataclasses.fields(getattr(outputs, output_name))}
        assert set(fields.split()) <= found


@pytest.mark.parametrize(("name", "documented"), CASES)
def test_methods_of_all_classes(name: str, documented: Documented) -> None:
    found = getattr(mk, name)
    if issubclass(found, mk.PretrainedConfig):
        assert [method for method in ALL_CONFIGS.split() if not hasattr(found, method)] == []
    elif issubclass(found, mk.PreTrainedModel):
        assert [method for method in ALL_MODELS.split() if not hasattr(found, method)] == []
        # Left out on purpose; docs/compatibility.md says why.
        assert not hasattr(found, "push_to_hub") and not hasattr(found, "prune_heads")


def test_masks_that_mask_nothing() -> None:
    """NLLB-MoE's page gives `padding_mask=False` as the default of the sparse layer."""
    config = mk.NllbMoeConfig(d_model=16, encoder_attention_heads=2, decoder_attention_heads=2, num_experts=4)
    layer = mk.NllbMoeSparseMLP(config, ffn_dim=8).eval()
    hidden = torch.randn(2, 3, 16)
    with torch.no_grad():
        assert torch.equal(layer(hidden, padding_mask=False)[0], layer(hidden)[0])


def test_the_documentation_lists_every_class() -> None:
    section = TABLES.read_text(encoding="utf-8").partition("## The documented interface")[2].partition("\n## ")[0]
    for page, classes in PAGES.items():
        table = section.partition(f"| {page} |")[2].partition("\n\n")[0]
        rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, flags=re.MULTILINE))
        assert list(rows) == list(classes), page
