"""Models whose experts are in files compute the same bits as with everything in memory."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moekernels as mk
from moekernels.expert_memory import StreamedExperts
from tests.expert_memory.conftest import EXPERT, MODELS, counts, everything, load
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("no_gradients")
#: One expert at a time, some of a layer's, all of them.
BUDGETS = (EXPERT, 3 * EXPERT, "1GiB")


def assert_same(got: Any, expected: Any) -> None:
    pairs = list(zip(everything(got), everything(expected), strict=True))
    assert pairs
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", MODELS)
def test_same_bits(name: str, budget: int | str, saved: Callable[..., Path]) -> None:
    in_memory, streamed = load(name, saved(name)), load(name, saved(name), expert_memory=budget)
    asked = {"output_router_logits": True, "output_hidden_states": True, "output_attentions": True}
    for model in (in_memory, streamed):
        model.set_attn_implementation("eager")
    expected = in_memory(**tiny.inputs(name), **asked)
    for _ in range(2):
        with torch.enable_grad():  # no weight wants one
            got = streamed(**tiny.inputs(name), **asked)
        assert len(everything(got)) > 8
        assert_same(got, expected)


@pytest.mark.parametrize("search", [{"num_beams": 3}, {"do_sample": True, "seed": 3}], ids=["beams", "drawn"])
@pytest.mark.parametrize("name", MODELS)
def test_same_text(name: str, search: dict[str, Any], saved: Callable[..., Path]) -> None:
    inputs = {key: value for key, value in tiny.inputs(name).items() if not key.startswith("decoder")}
    in_memory, streamed = load(name, saved(name)), load(name, saved(name), expert_memory=2 * EXPERT)
    texts = [model.generate(**inputs, max_new_tokens=4, **search) for model in (in_memory, streamed)]
    assert torch.equal(*texts)
    assert counts(streamed.expert_cache)[2] > 0


@pytest.mark.parametrize(
    ("name", "stored", "asked"),
    [
        ("olmoe", "bfloat16", "auto"),
        ("olmoe", "float32", "bfloat16"),
        ("phimoe", "float16", "float32"),
        ("nllb-moe", "bfloat16", "float32"),
        ("nllb-moe", "float32", "float16"),
        ("switch_transformers", "bfloat16", "auto"),
        ("switch_transformers", "bfloat16", "float64"),
    ],
)
def test_dtypes(name: str, stored: str, asked: str, saved: Callable[..., Path]) -> None:
    directory = saved(name, getattr(torch, stored))
    in_memory, streamed = load(name, directory, dtype=asked), load(name, directory, dtype=asked, expert_memory=EXPERT)
    assert_same(streamed(**tiny.inputs(name)), in_memory(**tiny.inputs(name)))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("nllb-moe", {"moe_eval_capacity_token_fraction": 0.2}),
        ("nllb-moe", {"router_ignore_padding_tokens": True}),
        ("switch_transformers", {"expert_capacity": 1}),
        ("switch_transformers", {"is_gated_act": True, "feed_forward_proj": "gated-gelu"}),
        ("olmoe", {"norm_topk_prob": True}),
        ("nllb-moe", {"decoder_ffn_dim": 40}),  # experts of two sizes, which take each other's memory
    ],
)
def test_other_settings(name: str, fields: dict[str, Any], saved: Callable[..., Path]) -> None:
    directory = saved(name, **fields)
    in_memory = load(name, directory)
    for budget in (EXPERT, 2 * EXPERT):
        streamed = load(name, directory, expert_memory=budget)
        for _ in range(2):
            assert_same(streamed(**tiny.inputs(name)), in_memory(**tiny.inputs(name)))


def test_autocast(saved: Callable[..., Path]) -> None:
    in_memory, streamed = load("olmoe", saved("olmoe")), load("olmoe", saved("olmoe"), expert_memory=EXPERT)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(streamed(**tiny.inputs("olmoe")), in_memory(**tiny.inputs("olmoe")))


@pytest.mark.slow
def test_compiled(saved: Callable[..., Path]) -> None:
    """The compiler leaves the experts to Python."""
    in_memory, streamed = load("olmoe", saved("olmoe")), load("olmoe", saved("olmoe"), expert_memory=2 * EXPERT)
    layers = [model.model.layers[1].mlp for model in (in_memory, streamed)]
    hidden = torch.randn(7, 16)
    assert_same([*torch.compile(layers[1], backend="eager")(hidden)], [*layers[0](hidden)])


def test_no_tokens(saved: Callable[..., Path]) -> None:
    """Nothing is visited, and nothing read."""
    in_memory, streamed = load("olmoe", saved("olmoe")), load("olmoe", saved("olmoe"), expert_memory=EXPERT)
    layers = [model.model.layers[0].mlp for model in (in_memory, streamed)]
    for hidden, mask in ((torch.zeros(0, 16), None), (torch.randn(3, 16), torch.zeros(3))):
        expected, got = (layer(hidden, mask) for layer in layers)
        assert_same([*got, *got], [*expected, *expected])
    assert counts(streamed.expert_cache) == (0, 0, 0)


def test_threads_and_models(saved: Callable[..., Path]) -> None:
    """Several threads on several models at once, all with room for one expert."""
    models = {name: load(name, saved(name), expert_memory=EXPERT) for name in MODELS}
    expected = {name: load(name, saved(name))(**tiny.inputs(name)).logits for name in MODELS}
    wrong: list[str] = []

    @torch.no_grad()
    def run(name: str) -> None:
        for _ in range(3):
            if not torch.equal(models[name](**tiny.inputs(name)).logits, expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in MODELS * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_hooks_on_experts(saved: Callable[..., Path]) -> None:
    streamed = load("olmoe", saved("olmoe"), expert_memory="1GiB")
    experts = [module for module in streamed.modules() if isinstance(module, StreamedExperts)]
    seen = []
    for module in experts:
        module.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    streamed(**tiny.inputs("olmoe"))
    assert seen == [(10, 16)] * 3 == [(10, 16)] * len(experts)


def test_copies_share_the_budget(saved: Callable[..., Path]) -> None:
    streamed = load("olmoe", saved("olmoe"), expert_memory=EXPERT)
    other = copy.deepcopy(streamed)
    assert other.expert_cache is streamed.expert_cache
    assert torch.equal(other(**tiny.inputs("olmoe")).logits, streamed(**tiny.inputs("olmoe")).logits)
    with pytest.raises(TypeError, match="cannot be pickled; load it again"):
        pickle.dumps(streamed)


def test_what_is_counted(saved: Callable[..., Path]) -> None:
    in_memory, streamed = load("olmoe", saved("olmoe")), load("olmoe", saved("olmoe"), expert_memory="auto")
    assert streamed.num_parameters() == in_memory.num_parameters()
    stats = streamed.expert_cache.stats()
    assert stats.num_experts == 12
    assert stats.budget == 12 * EXPERT  # no more than all take


def test_inference_alone(saved: Callable[..., Path]) -> None:
    streamed = load("olmoe", saved("olmoe"), expert_memory=EXPERT)
    with pytest.raises(RuntimeError, match=r"for inference: call model\.eval\(\)"):
        streamed.train()(**tiny.inputs("olmoe"))
    streamed.eval()
    embeds = torch.randn(1, 2, 16, requires_grad=True)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="load without expert_memory"):
        streamed(inputs_embeds=embeds)
    streamed(inputs_embeds=embeds)


def test_what_cannot_be_done(saved: Callable[..., Path], tmp_path: Path) -> None:
    streamed = load("olmoe", saved("olmoe"), expert_memory=EXPERT)
    with pytest.raises(ValueError, match="save_pretrained: the experts of this model are in files"):
        streamed.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    with pytest.raises(RuntimeError, match=r"are read as torch\.float32 to cpu; for torch\.float16 on cpu, load"):
        streamed.half()
    streamed.to("cpu").float()


@pytest.mark.parametrize("value", [0, -1, "8 gigs", "", True])
def test_sizes_that_are_none(value: Any, saved: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match='expert_memory must be a positive number of bytes, a string such as "8GiB"'):
        load("olmoe", saved("olmoe"), expert_memory=value)


def test_errors_at_load(saved: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expert 0 of model\.layers\.0\.mlp\.experts takes 8192 bytes, and .* 8191"):
        load("olmoe", saved("olmoe"), expert_memory=EXPERT - 1)
    weights = load("olmoe", saved("olmoe")).state_dict()
    with pytest.raises(ValueError, match="there can be no state_dict"):
        load("olmoe", saved("olmoe"), state_dict=weights, expert_memory=EXPERT)
    dense = mk.M2M100ForConditionalGeneration.from_config(tiny.CONFIGS["m2m_100"])
    dense.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expert_memory: M2M100ForConditionalGeneration has no experts"):
        load("m2m_100", tmp_path, expert_memory=EXPERT)
