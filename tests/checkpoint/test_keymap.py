from __future__ import annotations

import pytest
import torch

from moekernels.checkpoint import KEY_MAPS, KeyMap, Rule
from moekernels.checkpoint.keymap import Place

OLMOE = KEY_MAPS["olmoe"]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.11.mlp.experts.63.gate_proj.weight", Place("layers.11.mlp.experts.gate_up_proj", 63, 0, 2)),
        ("layers.11.mlp.experts.63.up_proj.weight", Place("layers.11.mlp.experts.gate_up_proj", 63, 1, 2)),
        ("model.layers.0.mlp.experts.7.down_proj.weight", Place("layers.0.mlp.experts.down_proj", 7)),
        ("model.layers.0.mlp.experts.down_proj", Place("layers.0.mlp.experts.down_proj")),
        ("model.layers.0.mlp.gate.weight", Place("layers.0.mlp.router.weight")),
        ("lm_head.weight", Place("lm_head.weight")),
        ("model.layers.0.mlp.experts.x.down_proj.weight", Place("layers.0.mlp.experts.x.down_proj.weight")),
    ],
)
def test_places(name: str, place: Place) -> None:
    assert OLMOE.place(name) == place


def test_names_and_places_are_inverse() -> None:
    for parameter, shape in (
        ("layers.3.mlp.experts.gate_up_proj", (5, 6, 4)),
        ("layers.3.mlp.experts.down_proj", (5, 4, 3)),
    ):
        names = list(OLMOE.checkpoint_names(parameter, shape))
        assert len({name for name, _ in names}) == len(names) == (10 if "gate" in parameter else 5)
        for name, place in names:
            assert OLMOE.place(name) == OLMOE.place("model." + name) == place


def test_views_cover_a_stack_exactly_once() -> None:
    stack = torch.zeros(3, 6, 4)
    for _, place in OLMOE.checkpoint_names("layers.0.mlp.experts.gate_up_proj", tuple(stack.shape)):
        view = place.view(stack)
        assert view.shape == (3, 4)
        view += 1
    assert (stack == 1).all()
    first_up = dict(OLMOE.checkpoint_names("layers.0.mlp.experts.gate_up_proj", (3, 6, 4)))[
        "layers.0.mlp.experts.0.up_proj.weight"
    ]
    assert first_up.view(stack).data_ptr() == stack[0, 3:].data_ptr()


def test_renamed_parameters_and_stacked_biases() -> None:
    key_map = KeyMap(
        rules=(
            Rule("layers.{layer}.moe.gate.weight", "layers.{layer}.mlp.router.weight"),
            Rule("layers.{layer}.ffn.experts.expert_{expert}.fc1.bias", "layers.{layer}.ffn.experts.up_proj_bias"),
        ),
        ignored=(r".*\.version",),
    )
    assert key_map.place("model.layers.2.moe.gate.weight") == Place("layers.2.mlp.router.weight")
    assert list(key_map.checkpoint_names("layers.2.mlp.router.weight", (4, 8))) == [
        ("layers.2.moe.gate.weight", Place("layers.2.mlp.router.weight"))
    ]
    place = key_map.place("layers.0.ffn.experts.expert_1.fc1.bias")
    assert place.view(torch.arange(6).view(2, 3)).tolist() == [3, 4, 5]
    assert key_map.is_ignored("model.encoder.version") and not key_map.is_ignored("lm_head.weight")


def test_aliases_are_read_and_not_written() -> None:
    phimoe = KEY_MAPS["phimoe"]
    gate, router = (f"layers.4.block_sparse_moe.{name}.weight" for name in ("gate", "router"))
    assert phimoe.place("model.layers.4.mlp.router.weight") == phimoe.place(f"model.{gate}") == Place(router)
    assert list(phimoe.checkpoint_names(router, (4, 8))) == [(gate, Place(router))]
    stack = "layers.4.block_sparse_moe.experts.down_proj"
    assert phimoe.place("layers.4.mlp.experts.down_proj") == Place(stack)
    assert [name for name, _ in phimoe.checkpoint_names(stack, (2, 8, 4))] == [
        f"layers.4.block_sparse_moe.experts.{e}.w2.weight" for e in range(2)
    ]
