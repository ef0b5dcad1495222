"""Splitting a model over devices: the plan, which needs none of them, and how tensors follow.

Two kinds of fake tensors, "meta" and "cpu", stand for two devices: PyTorch computes shapes and devices, and refuses to
mix them, as it does with the real ones.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import moekernels as mk
from moekernels._devices import existing_device
from moekernels.generation.outputs import GenerateDecoderOnlyOutput
from moekernels.models.base import _CONTAINERS
from moekernels.models.outputs import BaseModelOutput
from moekernels.models.placement import Placement, Unit, follow, moved, plan_placement, spread
from moekernels.nn import AttentionMask, DynamicCache, StaticCache
from tests.models.tiny import CONFIGS, head_class, inputs

CPU, META = torch.device("cpu"), torch.device("meta")
PARTS = [
    Unit(("model.embed_tokens",), 40, True),
    Unit(("model.layers.0",), 100, True),
    Unit(("model.layers.1",), 100, True),
    Unit(("model.norm",), 1, True),
    Unit(("model.rotary_emb",), 0, False),
    Unit(("lm_head",), 40, True),
]


# The plan.


@pytest.mark.parametrize("device", [None, "cpu", CPU, {"": "cpu"}, {"model": "cpu", "lm_head": CPU}])
def test_one_device(device: Any) -> None:
    placement = plan_placement(PARTS, device)
    assert placement.devices == {part.names[0]: CPU for part in PARTS} and not placement.is_split


def test_a_map_of_names() -> None:
    placement = plan_placement(PARTS, {"model.layers": "cpu", "": "meta", "model.layers.1": "meta"})
    assert placement.is_split
    assert {name: str(device) for name, device in placement.devices.items()} == {
        "model.embed_tokens": "meta",
        "model.layers.0": "cpu",
        "model.layers.1": "meta",
        "model.norm": "meta",
        "model.rotary_emb": "meta",
        "lm_head": "meta",
    }
    assert placement.device_of("model.layers.0.self_attn.q_proj.weight") == CPU
    assert placement.device_of("model.layers.1.mlp.router.weight") == META
    assert placement.device_of("model.embed_tokens") == placement.device_of("elsewhere.buffer") == META


def test_parts_without_weights_need_no_device() -> None:
    device_map = {"model.embed_tokens": "meta", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    assert plan_placement(PARTS, device_map).devices["model.rotary_emb"] == META


def test_the_first_name_of_a_shared_part_counts() -> None:
    parts = [Unit(("shared", "encoder.embed", "decoder.embed"), 8, True), Unit(("encoder.layer.0",), 8, True)]
    assert plan_placement(parts, {"shared": "meta", "encoder": "cpu", "decoder": "cpu"}).devices["shared"] == META
    assert plan_placement(parts, {"encoder": "cpu", "decoder": "meta"}).devices["shared"] == CPU


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"model": "cpu"}, r'device_map: no device for lm_head \("" stands for the whole model\)'),
        ({"model.layers": "cpu"}, r"no device for model.embed_tokens, model.norm, lm_head"),
        ({}, r"no device for model.embed_tokens, "),
        ({"": "cpu", "model.layer.1": "cpu"}, r"the model has no part 'model.layer.1'; near names: model.layers"),
        ({"": "cpu", "model.layers.11": "cpu"}, r"the model has no part 'model.layers.11'"),
        ({"": "cpu", "model.layers.1.mlp": "cpu"}, r"'model.layers.1.mlp' is a part of 'model.layers.1', which has to"),
        ({"": "nowhere"}, r"not a device: 'nowhere'"),
        ({"": "disk"}, r"not a device: 'disk'"),
        ({"": 99}, r"no such device: 'cuda:99'; this machine has \d+ CUDA devices"),
        (99, r"no such device: 'cuda:99'"),
        ("cuda:99", r"no such device: 'cuda:99'"),
        ("balanced_low_0", r"not a device: 'balanced_low_0'"),
    ],
)
def test_impossible_maps(device_map: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_placement(PARTS, device_map)


def test_devices_are_checked() -> None:
    assert existing_device("cpu") == CPU and existing_device(META) == META
    with pytest.raises(ValueError, match=r"max_memory is for device_map='auto' or 'balanced' or .*got 'cpu'"):
        plan_placement(PARTS, "cpu", {"cpu": "1GB"})


def test_spread() -> None:
    sizes = [40, 100, 100, 1, 0, 40]
    assert spread(sizes, [1000], even=True) == [0] * 6
    assert spread(sizes, [], even=True) == [0] * 6
    assert spread(sizes, [1000, 1000], even=True) == [0, 0, 1, 1, 1, 1]
    assert spread(sizes, [1000, 1000], even=False) == [0] * 6
    assert spread(sizes, [145, 1000], even=False) == [0, 0, 1, 1, 1, 1]
    assert spread(sizes, [100, 1000], even=True) == [0, 1, 1, 1, 1, 1]
    # No room: from the first part that finds none everything goes to the index behind the devices.
    assert spread(sizes, [145, 50], even=True) == [0, 0, 2, 2, 2, 2]
    assert spread(sizes, [10], even=True) == [1] * 6


def test_an_even_spread_is_the_best_there_is() -> None:
    def best(sizes: list[int], devices: int) -> int:
        """The smallest possible load of the fullest device, by trying all cuts."""
        if devices == 1:
            return sum(sizes)
        return min(max(sum(sizes[:cut]), best(sizes[cut:], devices - 1)) for cut in range(len(sizes) + 1))

    numbers = random.Random(0)
    for _ in range(50):
        sizes = [numbers.randrange(20) for _ in range(numbers.randrange(1, 8))]
        devices = numbers.randrange(1, 5)
        chosen = spread(sizes, [sum(sizes)] * devices, even=True)
        assert chosen == sorted(chosen) and max(chosen) < devices
        loads = [sum(size for size, index in zip(sizes, chosen, strict=True) if index == i) for i in range(devices)]
        assert max(loads) == best(sizes, devices), (sizes, devices)


@pytest.mark.parametrize(
    ("device_map", "max_memory", "expected"),
    [
        ("auto", None, [0, 0, 1, 1, 1, 1]),
        ("balanced", None, [0, 0, 1, 1, 1, 1]),
        ("sequential", None, [0, 0, 0, 0, 0, 0]),
        ("auto", {0: "60", 1: 1000}, [0, 1, 1, 1, 1, 1]),
        ("auto", {1: 1000}, [1, 1, 1, 1, 1, 1]),
        ("sequential", {0: 150, 1: 100, "cpu": "1GB"}, [0, 0, 1, "cpu", "cpu", "cpu"]),
        ("auto", {0: 10, 1: 10}, ["cpu"] * 6),
    ],
)
def test_strategies(device_map: str, max_memory: Any, expected: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    devices = [torch.device(device if device == "cpu" else f"cuda:{device}") for device in expected]
    assert list(plan_placement(PARTS, device_map, max_memory).devices.values()) == devices


def test_without_a_gpu_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert set(plan_placement(PARTS, "auto").devices.values()) == {CPU}


@pytest.mark.parametrize("name", CONFIGS)
def test_units_hold_every_weight_once(name: str) -> None:
    model = head_class(name)(CONFIGS[name])
    units = model._units(torch.bfloat16)
    in_float32 = sum(p.numel() for n, p in model.named_parameters() if model._keeps_float32(n))
    assert sum(unit.nbytes for unit in units) == 2 * (model.num_parameters() + in_float32)
    placement = Placement({unit.names[0]: torch.device("cpu", i) for i, unit in enumerate(units)})
    for parameter, _ in model.named_parameters():
        assert any(parameter.startswith(f"{unit.names[0]}.") for unit in units)
        assert placement.device_of(parameter).index is not None
    assert set(model.hf_device_map.values()) == {CPU}


# Following.


def _split(model: nn.Module, head: str = "lm_head") -> set[torch.device]:
    """Put every other part of a model of fake tensors on the CPU, and its head; the first part on "meta"."""
    parts = model._units(torch.float32)  # type: ignore[operator]
    placement = Placement({part.names[0]: (META, CPU)[i % 2] for i, part in enumerate(parts)})
    placement.devices[head] = CPU
    for part in parts:
        for module in model.get_submodule(part.names[0]).modules():
            device = placement.device_of(part.names[0])
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=device))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device=device)
    model.tie_weights()  # type: ignore[operator]
    follow(model, _CONTAINERS, placement)
    return {parameter.device for parameter in model.parameters()}


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode(), torch.no_grad():
        yield


def _devices(value: Any) -> set[torch.device]:
    if isinstance(value, Tensor):
        return {value.device}
    if isinstance(value, dict | tuple | list):
        return {device for item in (value.values() if isinstance(value, dict) else value) for device in _devices(item)}
    return set()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("attention", "tied"), [("sdpa", True), ("eager", False)])
def test_a_split_model_runs(name: str, attention: str, tied: bool, fake: None) -> None:
    config = copy.deepcopy(CONFIGS[name])
    config.tie_word_embeddings = tied
    model = head_class(name)(config).eval()
    model.set_attn_implementation(attention)
    assert _split(model) == {META, CPU}
    every = {"output_hidden_states": True, "output_attentions": attention == "eager", "output_router_logits": True}
    for device in (CPU, META):
        given = inputs(name, device)
        labels = given["decoder_input_ids" if "decoder_input_ids" in given else "input_ids"]
        output = model(**given, labels=labels, **every)
        assert _devices(dict(output)) == {META}, "outputs come back to the device of the model"
        assert output.loss.shape == () and output.logits.shape[-1] == 61
    # One step with the cache, which stays where the layers are.
    cache = output.past_key_values
    stored = cache.self_attention_cache if CONFIGS[name].is_encoder_decoder else cache
    assert {stored[layer][0].device for layer in range(len(stored))} == {META, CPU}
    step = {"decoder_input_ids": labels[:, -1:]} if CONFIGS[name].is_encoder_decoder else {"input_ids": labels[:, -1:]}
    if CONFIGS[name].is_encoder_decoder:
        step |= {"encoder_outputs": (output.encoder_last_hidden_state,)}
    assert model(**step, past_key_values=cache).logits.shape[1] == 1
    stored.reorder(torch.tensor([1, 0, 1]).to(META))
    assert stored[1][0].shape[0] == 3


def test_a_split_classifier_runs(fake: None) -> None:
    model = mk.PhimoeForSequenceClassification(CONFIGS["phimoe"]).eval()
    _split(model, "score")
    for device in (CPU, META):
        output = model(**inputs("phimoe", device))
        assert _devices(dict(output)) == {META} and output.logits.shape == (2, 2)


def test_without_following_it_does_not(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = head_class("olmoe")(CONFIGS["olmoe"]).eval()
    monkeypatch.setitem(globals(), "follow", lambda *_: None)
    _split(model)
    with pytest.raises(RuntimeError, match="device"):
        model(**inputs("olmoe", META))


def test_a_static_cache_follows_its_layers(fake: None) -> None:
    model = head_class("olmoe")(CONFIGS["olmoe"]).eval()
    _split(model)
    cache = StaticCache(model.config, max_batch_size=2, max_cache_len=9, device=META, dtype=torch.float32)
    for ids in (torch.zeros(2, 5, dtype=torch.int64, device=META), torch.zeros(2, 1, dtype=torch.int64, device=META)):
        assert model(ids, past_key_values=cache).logits.device == META
    assert [cache[layer][0].device for layer in range(3)] == [CPU, META, CPU]


@torch.no_grad()
def test_a_split_model_can_be_moved_together() -> None:
    model = head_class("olmoe")(CONFIGS["olmoe"]).eval()
    _split(model)
    model.to("meta")
    assert set(model.hf_device_map.values()) == {META}
    assert _devices(dict(model(**inputs("olmoe", META), output_hidden_states=True))) == {META}


@pytest.mark.parametrize("name", CONFIGS)
def test_loading(name: str, tmp_path: Path) -> None:
    """On the one device there is, under two names: loaded and run like a split model."""
    config = copy.deepcopy(CONFIGS[name])
    config.dtype = torch.float32
    head_class(name)(config).save_pretrained(tmp_path)
    whole = head_class(name).from_pretrained(tmp_path)
    parts = [unit.names[0] for unit in whole._units(torch.float32)]
    device_map = {part: ("cpu", "cpu:0")[i % 2] for i, part in enumerate(parts)}
    split = head_class(name).from_pretrained(tmp_path, device_map=device_map)
    assert split._forward_pre_hooks and not whole._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(split(**inputs(name)).logits, whole(**inputs(name)).logits)
    ids = {key: value for key, value in inputs(name).items() if not key.startswith("decoder")}
    for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        found, expected = (m.generate(**ids, max_new_tokens=4, **options) for m in (split, whole))
        assert torch.equal(found, expected)
    # A copy follows its own weights.
    again = copy.deepcopy(split).bfloat16()
    assert again(**inputs(name)).logits.dtype == torch.bfloat16


def test_tensors_are_found_in_containers(fake: None) -> None:
    cache = DynamicCache()
    tensor = torch.zeros(2)
    mask = AttentionMask(tensor, True)
    output = BaseModelOutput(last_hidden_state=tensor, hidden_states=(tensor, tensor))
    generated = GenerateDecoderOnlyOutput(sequences=tensor)
    given: tuple[Any, ...] = ([tensor, mask, "name", None, 3], {"a": tensor, "cache": cache}, output, generated)
    (first, second, third, fourth) = moved(given, META)
    assert first[0].device == first[1].bias.device == META and first[1].is_causal and first[2:] == ["name", None, 3]
    assert type(first[1]) is AttentionMask
    assert second["a"].device == META and second["cache"] is cache
    assert type(third) is BaseModelOutput and {t.device for t in third.hidden_states} == {META}
    assert third.attentions is None and output.last_hidden_state.device == CPU
    assert fourth.sequences.device == META


def test_gradients_cross_devices() -> None:
    """On two names of one device, with checkpointing."""
    torch.manual_seed(0)
    whole = head_class("olmoe")(CONFIGS["olmoe"]).train()
    split = copy.deepcopy(whole)
    parts = {unit.names[0]: torch.device("cpu") for unit in split._units(torch.float32)}
    follow(split, _CONTAINERS, Placement(parts))
    split.gradient_checkpointing_enable()
    ids = inputs("olmoe")["input_ids"]
    for model in (whole, split):
        model(ids, labels=ids).loss.backward()
    for (name, mine), theirs in zip(split.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
