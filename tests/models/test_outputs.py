"""What models return: mappings, tuples, containers of tensors; against the classes of transformers."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils import _pytree as pytree
from transformers import modeling_outputs
from transformers.generation import utils as generation_utils

from moekernels.generation import outputs as generate_outputs
from moekernels.models import outputs
from moekernels.models.outputs import ModelOutput, MoeModelOutputWithPast
from tests.models.tiny import CONFIGS, base_class, head_class, inputs

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")

CLASSES = [
    found
    for module in (outputs, generate_outputs)
    for _, found in inspect.getmembers(module, inspect.isclass)
    if issubclass(found, ModelOutput) and found.__module__ == module.__name__ and found is not ModelOutput
]
# Fields of later versions of transformers, or that only some of its classes have.
NEWER = {"router_logits"}


@pytest.mark.parametrize("ours", CLASSES, ids=lambda found: found.__name__)
def test_fields_are_those_of_transformers(ours: Any) -> None:
    theirs = getattr(modeling_outputs, ours.__name__, None) or getattr(generation_utils, ours.__name__)
    expected = [field.name for field in dataclasses.fields(theirs)]
    found = [field.name for field in dataclasses.fields(ours)]
    assert [name for name in found if name in expected] == expected
    assert set(found) - set(expected) <= NEWER


def test_reading() -> None:
    one, two = torch.ones(2), torch.zeros(3)
    output = MoeModelOutputWithPast(last_hidden_state=one, router_logits=(two,))
    assert (
        output.last_hidden_state is output["last_hidden_state"] is output[0] is output.get("last_hidden_state") is one
    )
    assert output[1] is output[-1] is output["router_logits"] and output[:1] == (one,) and output[5:] == ()
    assert output.to_tuple() == (one, (two,)) == tuple(output.values())
    assert list(output) == output.keys() == ["last_hidden_state", "router_logits"]
    assert dict(output) == dict(output.items()) == dict(**output) == {"last_hidden_state": one, "router_logits": (two,)}
    assert len(output) == 2 and "attentions" not in output and output.get("attentions", 3) == 3
    assert output.attentions is None
    for missing in ("attentions", "no_such_field"):
        with pytest.raises(KeyError, match=missing):
            output[missing]
    with pytest.raises(IndexError):
        output[2]


def test_writing() -> None:
    output = MoeModelOutputWithPast()
    output.last_hidden_state = torch.ones(2)
    output["attentions"] = (torch.zeros(1),)
    assert output.keys() == ["last_hidden_state", "attentions"]
    with pytest.raises(KeyError, match="no_such_field"):
        output["no_such_field"] = 1
    again = pickle.loads(pickle.dumps(copy.deepcopy(output)))
    assert type(again) is MoeModelOutputWithPast and torch.equal(again[0], output[0])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("headed", [False, True])
def test_tuples(name: str, headed: bool) -> None:
    """`return_dict=False`, in the call or the configuration, gives the values of the output in order."""
    model = (head_class if headed else base_class)(name)(copy.deepcopy(CONFIGS[name])).eval()
    every = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True, **inputs(name)}
    if headed:
        every["labels"] = every["decoder_input_ids" if CONFIGS[name].is_encoder_decoder else "input_ids"]
    with torch.no_grad():
        output = model(**every)
        flat = model(**every, return_dict=False)
        model.config.return_dict = False
        configured = model(**every)
        assert isinstance(model(**every, return_dict=True), type(output))
    for result in (flat, configured):
        assert type(result) is tuple and len(result) == len(output)
        for (field, expected), value in zip(output.items(), result, strict=True):
            assert type(value) is type(expected), field
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, expected), field


@pytest.mark.parametrize("name", CONFIGS)
def test_the_classes_are_those_of_transformers(name: str) -> None:
    config = transformers.AutoConfig.for_model(**CONFIGS[name].to_dict())
    for build in (base_class, head_class):
        ours = build(name)(CONFIGS[name]).eval()
        theirs = getattr(transformers, type(ours).__name__)(config).eval()
        with torch.no_grad():
            mine, other = (model(**inputs(name), use_cache=False) for model in (ours, theirs))
        assert type(mine).__name__ == type(other).__name__
        # Switch of 4.56.2 returns router logits unasked; see docs/compatibility.md.
        unasked = {key for key in other if "router" in key or "_loss" in key}
        assert list(mine) == [key for key in other if key not in unasked]


# Containers of tensors.


@pytest.mark.parametrize("ours", CLASSES, ids=lambda found: found.__name__)
def test_pytrees(ours: Any) -> None:
    names = [field.name for field in dataclasses.fields(ours)]
    given = {names[0]: torch.ones(2), names[-1]: (torch.zeros(3), torch.ones(1))}
    leaves, spec = pytree.tree_flatten(ours(**given))
    assert [leaf.shape[0] for leaf in leaves] == [2, 3, 1]
    again = pytree.tree_map(lambda tensor: tensor + 1, ours(**given))
    assert type(again) is ours and again.keys() == [names[0], names[-1]]
    assert torch.equal(again[0], torch.full((2,), 2.0)) and again[1][1].item() == 2
    assert pytree.tree_unflatten(leaves, spec)[0] is leaves[0]
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, hidden: torch.Tensor) -> MoeModelOutputWithPast:
        hidden = self.inner(hidden)
        return MoeModelOutputWithPast(last_hidden_state=hidden, hidden_states=(hidden, hidden + 1))


def test_compiled() -> None:
    model = _Model()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    hidden = torch.randn(2, 3)
    output = compiled(hidden)
    assert type(output) is MoeModelOutputWithPast and output.keys() == ["last_hidden_state", "hidden_states"]
    assert torch.equal(output[0], model(hidden)[0]) and torch.equal(output.hidden_states[1], model(hidden)[1][1])


def test_distributed_data_parallel(tmp_path: Any) -> None:
    """DDP has to find the tensors of an output, so that the backward pass finds the parameters that were used."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        _check_distributed_data_parallel()  # whose wrapper is gone before the group: it may wait for ever for that
    finally:
        torch.distributed.destroy_process_group()


def _check_distributed_data_parallel() -> None:
    model = _Model()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    hidden = torch.randn(2, 3)
    output = wrapped(hidden)
    assert type(output) is MoeModelOutputWithPast
    output.hidden_states[1].sum().backward()
    expected = torch.autograd.grad(model(hidden).hidden_states[1].sum(), model.inner.weight)[0]
    torch.testing.assert_close(model.inner.weight.grad, expected)
