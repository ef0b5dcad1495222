"""The drop-in against the modules it replaces, in the installed version of transformers.

`in_newest.py` beside this file runs it in an environment with the newest one.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moekernels
from moekernels.integrations.transformers import fused_experts, register, replace_moe_layers, restore_moe_layers
from tests.integrations.transformers_models import (
    ARCHITECTURES,
    MAJOR,
    gradients,
    make_inputs,
    make_model,
    router_logits,
)

# Where transformers itself computes what the model is defined to be.
TRUE_HERE = [name for name in ARCHITECTURES if not (MAJOR >= 5 and name == "nllb")]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:NLLB-MoE in transformers")


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


def storage_bytes(model: nn.Module) -> int:
    """Memory behind the parameters, shared memory counted once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("name", TRUE_HERE)
def test_outputs_losses_and_gradients(name: str) -> None:
    model, inputs = make_model(name), make_inputs(name)
    expected = model(**inputs)
    expected.loss.backward()
    expected_gradients = gradients(model)
    model.zero_grad()

    replaced = replace_moe_layers(model)
    got = model(**inputs)
    got.loss.backward()
    assert replaced.names
    close(got.logits, expected.logits)
    close(got.loss, expected.loss)
    assert len(router_logits(got)) == len(router_logits(expected)) > 0
    for mine, theirs in zip(router_logits(got), router_logits(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)
    got_gradients = gradients(model)
    assert got_gradients.keys() == expected_gradients.keys()  # an expert without tokens may have none
    for key, expected_gradient in expected_gradients.items():
        torch.testing.assert_close(got_gradients[key], expected_gradient, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_state_dict_and_memory_stay(name: str) -> None:
    model = make_model(name)
    before, memory = copy.deepcopy(model.state_dict()), storage_bytes(model)
    replaced = replace_moe_layers(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert storage_bytes(model) == memory
    assert replaced.expert_bytes == sum(
        p.numel() * p.element_size() for name, p in model.named_parameters() if ".experts." in name
    )


@pytest.mark.parametrize("name", TRUE_HERE)
def test_generate_gives_the_same_tokens(name: str) -> None:
    model = make_model(name)
    ids = make_inputs(name)["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    replace_moe_layers(model)
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("name", TRUE_HERE)
def test_a_checkpoint_from_disk_generates_the_same_tokens(name: str, tmp_path: Path) -> None:
    made = make_model(name)
    made.save_pretrained(tmp_path)
    model = type(made).from_pretrained(tmp_path)
    ids = make_inputs(name)["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    assert replace_moe_layers(model).names
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("name", TRUE_HERE)
def test_saved_checkpoints_are_those_of_the_stock_model(name: str, tmp_path: Path) -> None:
    model, inputs = make_model(name), make_inputs(name)
    expected = model(**inputs).logits
    replace_moe_layers(model)
    model.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(tmp_path).eval()
    assert not any(hasattr(module, "swap") for module in stock.modules())
    close(stock(**inputs).logits, expected)


def test_nllb_runs_the_experts_that_were_chosen(tmp_path: Path) -> None:
    """Right in every version, also where transformers runs only two experts."""
    model, inputs = make_model("nllb"), make_inputs("nllb")
    model.save_pretrained(tmp_path)
    ours = moekernels.NllbMoeForConditionalGeneration.from_pretrained(tmp_path)
    expected = ours(input_ids=inputs["input_ids"], decoder_input_ids=inputs["decoder_input_ids"]).logits
    replace_moe_layers(model)
    close(model(**inputs).logits, expected)


@pytest.mark.skipif(MAJOR < 5, reason="transformers 4 is right")
def test_the_repair_of_nllb_is_said_once() -> None:
    from moekernels.integrations.transformers import layers

    layers.warn_of_nllb.cache_clear()
    with pytest.warns(UserWarning, match="only the experts 0 and 1"):
        replace_moe_layers(make_model("nllb"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        replace_moe_layers(make_model("nllb"))


# --- training ---------------------------------------------------------------------------------------------------------

# No dropout inside the experts: the order in which it draws is not that of the original.
_TRAINING = {
    # Norms of 0.5: with larger ones every step makes a difference in rounding ten times as large.
    "switch": {"dropout_rate": 0.0, "initializer_factor": 0.5},
    "nllb": {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "moe_token_dropout": 0.0},
    "phimoe": {"input_jitter_noise": 0.0},
}


@pytest.mark.parametrize("name", TRUE_HERE)
def test_training_with_the_same_seed_takes_the_same_steps(name: str) -> None:
    """Router jitter, sampled experts and capacity limits of training included."""
    inputs = make_inputs(name, length=12)
    losses = []
    for replace in (False, True):
        model = make_model(name, **_TRAINING.get(name, {})).train()
        if replace:
            replace_moe_layers(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        torch.manual_seed(5)
        steps = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            steps.append(loss.detach())
        losses.append(torch.stack(steps))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_dropout_inside_and_behind_the_experts() -> None:
    hidden = torch.randn(1, 12, 32)
    blocks: dict[str, nn.Module] = {}
    for name, fields in (("switch", {"dropout_rate": 0.99}), ("nllb", {"moe_token_dropout": 0.99})):
        model = make_model(name, **fields)
        replace_moe_layers(model)
        kind = "SwitchTransformersSparseMLP" if name == "switch" else "NllbMoeSparseMLP"
        blocks[name] = next(module for module in model.modules() if type(module).__name__ == kind)
    for name, block in blocks.items():

        def out(block: nn.Module = block) -> Tensor:
            result = block(hidden.clone())  # Switch's router jitters its input in place
            return result[0] if isinstance(result, tuple) else result

        kept = (out() != 0).float().mean()
        block.train()
        torch.manual_seed(0)
        first = out()
        torch.manual_seed(0)
        assert torch.equal(out(), first), name
        assert not torch.equal(out(), first), name
        if name == "nllb":  # outputs are dropped, not inner activations
            assert (first != 0).float().mean() < 0.1 * kept, name


def test_gradient_checkpointing() -> None:
    model, inputs = make_model("olmoe").train(), make_inputs("olmoe")
    replace_moe_layers(model)
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**inputs, use_cache=False).loss.backward()
    got = gradients(model)
    assert all(torch.equal(got[key], value) for key, value in expected.items())


def test_frozen_experts_get_no_gradient() -> None:
    model, inputs = make_model("olmoe").train(), make_inputs("olmoe")
    replace_moe_layers(model)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in key)
    model(**inputs).loss.backward()
    assert all(("experts" in key) == (p.grad is None) for key, p in model.named_parameters())


# --- weights that move ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["olmoe", "nllb"])
def test_weights_may_get_new_memory(name: str) -> None:
    model, inputs = make_model(name), make_inputs(name)
    replace_moe_layers(model)
    expected = model(**inputs).logits
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, expected)
    assert torch.equal(model.double().float()(**inputs).logits, expected)

    doubled = {key: value * 2 for key, value in model.state_dict().items()}
    for assign in (False, True):
        other = make_model(name)
        replace_moe_layers(other)
        other.load_state_dict(doubled, assign=assign)
        stock = make_model(name)
        stock.load_state_dict(doubled)
        replace_moe_layers(stock)
        assert torch.equal(other(**inputs).logits, stock(**inputs).logits)


def test_one_expert_may_be_replaced() -> None:
    model, inputs = make_model("nllb"), make_inputs("nllb")
    replace_moe_layers(model)
    experts = [module for name, module in model.named_modules() if name.endswith("expert_1")]
    for expert in experts:
        expert.fc1.weight = nn.Parameter(expert.fc1.weight.detach() * -1)
    got = model(**inputs).logits
    restore_moe_layers(model)
    replace_moe_layers(model)
    assert torch.equal(model(**inputs).logits, got)


@pytest.mark.parametrize("name", ["olmoe", "nllb"])
def test_pickle(name: str) -> None:
    model, inputs = make_model(name), make_inputs(name)
    replace_moe_layers(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_half_precision() -> None:
    model, inputs = make_model("olmoe").bfloat16(), make_inputs("olmoe")
    expected = model(**inputs).logits
    exact = make_model("olmoe")
    exact.load_state_dict(model.state_dict())
    replace_moe_layers(model)
    truth = exact(**inputs).logits
    error, theirs = (model(**inputs).logits - truth).abs().max(), (expected - truth).abs().max()
    assert error <= 2 * theirs


# --- undoing and refusing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_restore(name: str) -> None:
    model, inputs = make_model(name), make_inputs(name)
    expected = model(**inputs).logits
    classes = [type(module) for module in model.modules()]
    replaced = replace_moe_layers(model)
    model(**inputs)
    assert restore_moe_layers(model) == len(replaced.names)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(**inputs).logits, expected)
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    assert restore_moe_layers(model) == 0


def test_replacing_twice_changes_nothing() -> None:
    model = make_model("olmoe")
    assert replace_moe_layers(model).names
    assert not replace_moe_layers(model).names


def untouched(model: nn.Module, match: str) -> None:
    """`replace_moe_layers` refuses, and everything is as it was."""
    classes = [type(module) for module in model.modules()]
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=match):
        replace_moe_layers(model)
    assert [type(module) for module in model.modules()] == classes
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers


def last_experts(model: nn.Module) -> nn.Module:
    return [module for name, module in model.named_modules() if name.endswith("experts")][-1]


def test_nothing_to_replace() -> None:
    untouched(nn.Sequential(nn.Linear(2, 2)), "Sequential has no MoE module")

    class DeepMoE(nn.Module):
        pass

    untouched(nn.Sequential(DeepMoE()), r"unknown: 0 \(DeepMoE\)")


def test_quantised_weights_are_refused() -> None:
    class Linear8bit(nn.Linear):
        pass

    model = make_model("nllb")
    last_experts(model).expert_2.fc2.__class__ = Linear8bit
    untouched(model, r"decoder.layers.1.ffn.*as it is: .*expert_2.fc2 is a Linear8bit")


def test_other_dtypes_are_refused() -> None:
    untouched(make_model("olmoe").double(), "float64; the kernels take float32, bfloat16 and float16")


def test_weights_on_the_meta_device_are_refused() -> None:
    untouched(make_model("olmoe").to("meta"), r"layers.0.mlp.*has no data \(meta device\)")
    untouched(make_model("switch").to("meta"), r"expert_0.wi.weight has no data \(meta device\)")


@pytest.mark.skipif(MAJOR >= 5, reason="the module's own activation is called between the kernels")
def test_unknown_activations_are_refused() -> None:
    untouched(make_model("olmoe", hidden_act="tanh"), "its activation Tanh is none of")


def test_experts_of_different_shape_are_refused() -> None:
    model = make_model("switch")
    last_experts(model).expert_3.wi = nn.Linear(32, 40, bias=False)
    untouched(model, "expert_3.wi differs from that of the first expert")


def test_forwards_of_instances_are_refused() -> None:
    model = make_model("olmoe")
    module: Any = last_experts(model) if MAJOR >= 5 else model.model.layers[1].mlp
    module.forward = lambda *arguments: arguments[0]
    untouched(model, "its forward was replaced on the instance")


# --- the experts interface --------------------------------------------------------------------------------------------


@pytest.mark.skipif(MAJOR >= 5, reason="transformers 5 has the interface")
def test_register_needs_the_experts_interface() -> None:
    with pytest.raises(ImportError, match="needs transformers 5 or newer"):
        register()


@pytest.mark.skipif(MAJOR < 5, reason="transformers 4 has no experts interface")
@pytest.mark.parametrize("name", ["olmoe", "phimoe", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_register(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    register()
    model, inputs = make_model(name), make_inputs(name)
    model.set_experts_implementation("eager")
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    ours = type(model).from_pretrained(tmp_path, experts_implementation="moekernels").eval()
    calls = []

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments[0])
        return fused_experts(*arguments)

    ALL_EXPERTS_FUNCTIONS.register("moekernels", counted)
    close(ours(**inputs).logits, expected)
    register()
    assert len(calls) == 2


def test_experts_of_another_rank_add_nothing() -> None:
    """The number of experts, as an id, marks a choice that is served elsewhere."""
    experts = nn.Module()
    experts.gate_up_proj, experts.down_proj = nn.Parameter(torch.randn(4, 12, 8)), nn.Parameter(torch.randn(4, 8, 6))
    experts.act_fn = nn.SiLU()
    hidden, weights = torch.randn(5, 8), torch.rand(5, 2)
    ids = torch.tensor([[0, 4], [4, 4], [1, 2], [3, 4], [2, 0]])
    out = fused_experts(experts, hidden, ids, weights)
    assert not out[1].any()
    kept = ids[:, 1] == 4
    alone = fused_experts(experts, hidden[kept], ids[kept][:, :1], weights[kept][:, :1])
    close(out[kept], alone)


@pytest.mark.skipif(MAJOR < 5, reason="transformers 4 has no experts interface")
def test_what_had_the_name_computes_experts_that_are_unknown() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model, inputs = make_model("olmoe"), make_inputs("olmoe")
    before, expected = ALL_EXPERTS_FUNCTIONS["grouped_mm"], model(**inputs).logits
    calls = []

    def counted(module: nn.Module, *arguments: Any) -> Tensor:
        calls.append(module)
        return before(module, *arguments)

    ALL_EXPERTS_FUNCTIONS.register("grouped_mm", counted)
    try:
        register("grouped_mm")
        register("grouped_mm")
        for layer in model.model.layers:
            layer.mlp.experts.is_concatenated = False
        with pytest.warns(UserWarning, match=r"OlmoeExperts is computed by .* interleaved"):
            close(model(**inputs).logits, expected)
        assert calls == [layer.mlp.experts for layer in model.model.layers]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**inputs)
    finally:
        ALL_EXPERTS_FUNCTIONS.register("grouped_mm", before)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"act_fn": nn.SiLU()}, "it has no gate_up_proj"),
        ({"has_gate": False, "up_proj": 1}, "it has no down_proj"),
        ({"gate_up_proj": 1, "down_proj": 1, "act_fn": nn.Tanh()}, "its activation Tanh is none of"),
        ({"gate_up_proj": 1, "down_proj": 1, "act_fn": nn.SiLU(), "is_concatenated": False}, "are interleaved"),
        ({"gate_up_proj": 1, "down_proj": 1, "act_fn": nn.SiLU(), "has_post_expert_norm": True}, "no post_expert_norm"),
    ],
)
def test_experts_that_nothing_can_compute(attributes: dict[str, Any], reason: str) -> None:
    experts = nn.Module()
    for name, value in attributes.items():
        setattr(experts, name, value)
    with pytest.raises(ValueError, match=f"the experts of Module: .*{reason}"):
        fused_experts(experts, torch.randn(1, 8), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
