"""Training of whole models: seeds, loss curves, compilation, autocast, checkpoints, and several processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moekernels import ops
from moekernels.checkpoint import checkpoint_tensors
from moekernels.models import OlmoeForCausalLM, PhimoeForSequenceClassification
from moekernels.ops import reference
from tests.models import translation_checkpoints
from tests.models.tiny import CONFIGS, head_class
from tests.processes import run_processes

VOCAB = 61
SPARSE = ["olmoe", "phimoe", "nllb-moe", "switch_transformers"]

_TRANSLATION = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
#: Every switch of a configuration that makes training random.
NOISE: dict[str, dict[str, Any]] = {
    "olmoe": {"attention_dropout": 0.2},
    "phimoe": {"attention_dropout": 0.2, "input_jitter_noise": 0.1, "router_jitter_noise": 0.4},
    "m2m_100": dict.fromkeys(_TRANSLATION, 0.2),
    "nllb-moe": {**dict.fromkeys(_TRANSLATION, 0.2), "moe_token_dropout": 0.2, "second_expert_policy": "sampling"},
    "switch_transformers": {"dropout_rate": 0.2, "router_jitter_noise": 0.1},
}
#: What keeps training free of chance; PhiMoE draws its experts nevertheless.
CALM: dict[str, dict[str, Any]] = {
    "olmoe": {},
    "phimoe": {},
    "m2m_100": dict.fromkeys(_TRANSLATION, 0.0),
    "nllb-moe": {**dict.fromkeys(_TRANSLATION, 0.0), "moe_token_dropout": 0.0},
    "switch_transformers": {"dropout_rate": 0.0, "router_jitter_noise": 0.0},
}
#: An expert has fewer places than there are tokens for it.
FEW_PLACES = {"nllb-moe": {"expert_capacity": 2}, "switch_transformers": {"expert_capacity": 2}}

every_model = pytest.mark.parametrize("name", CONFIGS)
every_sparse_model = pytest.mark.parametrize("name", SPARSE)


def make(name: str, **overrides: Any) -> Any:
    """A tiny model in training mode, with weights at a scale where mistakes show."""
    config = copy.deepcopy(CONFIGS[name])
    for field, value in {**FEW_PLACES.get(name, {}), **overrides}.items():
        setattr(config, field, value)
    torch.manual_seed(1)
    model = head_class(name).from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" not in key and "bias" not in key:
                parameter.normal_(std=0.2)
    return model.train()


def batch(name: str, rows: int = 3, length: int = 7) -> dict[str, Any]:
    """Random tokens, those of the first row padded, and labels; router losses are asked for where there are any."""
    generator = torch.Generator().manual_seed(rows * 100 + length)
    ids, labels = (torch.randint(3, VOCAB, (rows, length), generator=generator) for _ in range(2))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return inputs if name == "m2m_100" else {**inputs, "output_router_logits": True}


def loss_and_gradients(model: nn.Module, inputs: dict[str, Any], forward: Any = None) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter; zero for a parameter of a layer that was left out."""
    model.zero_grad()
    loss = (model if forward is None else forward)(**inputs).loss
    loss.backward()
    parameters = model.named_parameters()
    grads = {key: torch.zeros_like(p) if p.grad is None else p.grad.clone() for key, p in parameters}
    return {"loss": loss.detach(), **grads}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], msg=lambda text, key=key: f"{key}: {text}", **tolerance)


# --- chance -----------------------------------------------------------------------------------------------------------


@every_model
def test_a_seed_decides_everything(name: str) -> None:
    """Loss and gradients to the bit, with every kind of noise; another seed gives others."""
    model, inputs = make(name, **NOISE[name]), batch(name)
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(loss_and_gradients(model, inputs))
    assert_same(results[0], results[1], rtol=0, atol=0)
    assert not torch.equal(results[0]["loss"], results[2]["loss"])
    # "sampling" draws in evaluation too, as it does in transformers.
    if name != "nllb-moe":
        model.eval()
        assert torch.equal(model(**inputs).loss, model(**inputs).loss)


@torch.no_grad()
@pytest.mark.parametrize(("name", "switch"), [(name, switch) for name in NOISE for switch in NOISE[name]])
def test_every_switch_makes_noise(name: str, switch: str) -> None:
    """Alone, in training and, but for the draw of experts, not in evaluation."""
    noise = NOISE[name][switch]
    noisy = make(name, **{**CALM[name], switch: 0.5 if isinstance(noise, float) else noise})
    inputs = batch(name)

    def losses(model: nn.Module) -> list[float]:
        found = []
        for seed in range(6):
            torch.manual_seed(seed)
            found.append(model(**inputs).loss.item())
        return found

    trained = losses(noisy)
    assert len(set(trained)) > 1
    # PhiMoE draws its experts whatever the switches say.
    assert trained != losses(make(name, **CALM[name]))
    assert (len(set(losses(noisy.eval()))) == 1) == (switch != "second_expert_policy")


@every_model
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_draw_the_same(name: str, reentrant: bool) -> None:
    model, inputs = make(name, **NOISE[name]), batch(name)
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(8)
        results.append(loss_and_gradients(model, {**inputs, "use_cache": False}))
    assert_same(results[1], results[0])


# --- against transformers, and against the definition -----------------------------------------------------------------


@pytest.mark.parametrize("policy", ["all", "sampling", "random"])
def test_nllb_moe_with_router_losses(tmp_path: Path, policy: str) -> None:
    """Few places, and the same experts drawn from a seed. The auxiliary loss is put together from the logits of
    transformers' routers, since 4.56.2 computes it of other numbers."""
    options = {**CALM["nllb-moe"], "second_expert_policy": policy, "expert_capacity": 4, "router_aux_loss_coef": 0.5}
    # Never so low a number, but drawn: transformers draws it in any case.
    options |= {"encoder_layerdrop": 1e-12, "decoder_layerdrop": 1e-12}
    theirs, ours, _ = translation_checkpoints.pair(tmp_path, "nllb-moe", **options)
    inputs = translation_checkpoints.batch()
    labels = inputs["decoder_input_ids"]
    routed: dict[str, list[Tensor]] = {"encoder": [], "decoder": []}
    for key, module in theirs.named_modules():
        if key.endswith("router.classifier"):
            stack = routed["encoder" if ".encoder." in key else "decoder"]
            # The router adds its noise to these logits in place.
            module.register_forward_hook(lambda module, args, out, stack=stack: stack.append(out.clone()))

    torch.manual_seed(2)
    loss = theirs.train()(**inputs, labels=labels).loss
    for stack, mask in (("encoder", inputs["attention_mask"]), ("decoder", None)):
        logits = tuple(each.flatten(0, -2) for each in routed[stack])
        loss = loss + 0.5 * load_balancing_loss_func(logits, 6, 2, mask)
    loss.backward()
    torch.manual_seed(2)
    actual = ours.train()(**inputs, labels=labels, output_router_logits=True).loss
    actual.backward()
    torch.testing.assert_close(actual, loss, rtol=1e-5, atol=1e-5)
    assert_gradients_agree(ours, theirs)


def assert_gradients_agree(ours: Any, theirs: Any) -> None:
    """Every parameter, by the names of the checkpoint."""
    for parameter in ours.parameters():
        parameter.data = parameter.grad
    expected = dict(theirs.named_parameters())
    actual = dict(checkpoint_tensors(ours, ours.key_map))
    assert actual.keys() == expected.keys()
    for key, gradient in actual.items():
        grad = expected[key].grad
        # An expert that no token visits has no gradient there, and a zero one here.
        other = torch.zeros_like(gradient) if grad is None else grad
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=2e-5)


def losses_of_training(
    model: nn.Module, inputs: Callable[[int], dict[str, Any]], optimiser: str, num_steps: int = 50
) -> list[float]:
    options = {"SGD": {"lr": 0.05, "momentum": 0.9}, "AdamW": {"lr": 2e-3}}[optimiser]
    steps = getattr(torch.optim, optimiser)(model.parameters(), **options)
    losses = []
    for step in range(num_steps):
        torch.manual_seed(step)
        loss = model(**inputs(step)).loss
        steps.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
        losses.append(loss.item())
    return losses


@every_sparse_model
@pytest.mark.parametrize("optimiser", ["SGD", "AdamW"])
def test_loss_curves_are_those_of_the_definition(name: str, optimiser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty steps with every kind of noise, kernels against plain PyTorch with its own gradients."""

    def losses() -> list[float]:
        return losses_of_training(make(name, **NOISE[name]), lambda step: batch(name, 4, 5 + step % 3), optimiser)

    actual = losses()
    for op in ("route", "plan", "permute", "grouped_gemm", "unpermute", "sparse_mlp", "router_stats"):
        monkeypatch.setattr(ops, op, getattr(reference, op))
    expected = losses()
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=2e-4, atol=2e-4)
    assert sum(actual[-10:]) < 0.98 * sum(actual[:10])


@pytest.mark.parametrize("optimiser", ["SGD", "AdamW"])
def test_loss_curve_of_olmoe(saved_olmoe: Callable[..., Any], token_ids: Tensor, optimiser: str) -> None:
    """Fifty steps beside transformers."""
    saved, directory = saved_olmoe()
    theirs = copy.deepcopy(saved).train()
    ours = OlmoeForCausalLM.from_pretrained(directory, progress=False).train()

    def inputs(step: int) -> dict[str, Any]:
        ids = token_ids.roll(step % 4, dims=1)
        return {"input_ids": ids, "labels": ids, "output_router_logits": True}

    expected = losses_of_training(theirs, inputs, optimiser)
    actual = losses_of_training(ours, inputs, optimiser)
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=2e-4, atol=2e-4)
    assert actual[-1] < 0.7 * actual[0]


# --- compilation ------------------------------------------------------------------------------------------------------

#: As few layers as there are kinds of them: tracing takes long.
SHALLOW: dict[str, dict[str, Any]] = {
    "olmoe": {"num_hidden_layers": 1},
    # A graph leaves unused draws out, and so has others from a seed; without near-ties they decide nothing.
    "phimoe": {"num_hidden_layers": 1, "router_jitter_noise": 0.0},
    # A layer that is always left out is one that a graph runs in vain.
    "m2m_100": {"encoder_layers": 1, "decoder_layers": 1, "encoder_layerdrop": 1.0},
    "nllb-moe": {"encoder_layers": 1, "decoder_layers": 1, "encoder_sparse_step": 1, "decoder_sparse_step": 0},
    "switch_transformers": {
        "num_layers": 1,
        "num_decoder_layers": 1,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 0,
    },
}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# PyTorch's compiler uses what PyTorch deprecates: instances of autograd functions, and `torch.jit`.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("phimoe", "aot_eager"),
        ("m2m_100", "aot_eager"),
        pytest.param("switch_transformers", "aot_eager", marks=pytest.mark.slow),
        pytest.param("nllb-moe", "aot_eager", marks=pytest.mark.slow),
        # Traced as by "aot_eager", and what was traced becomes C++: for one, as our ops stay what they are.
        pytest.param("olmoe", "inductor", marks=pytest.mark.slow),
    ],
)
def test_one_graph_trains_every_batch(name: str, backend: str) -> None:
    """Forward and backward of a batch of any size and length, and experts without places for all tokens."""
    model = make(name, **{**CALM[name], **SHALLOW[name]})
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    loss_and_gradients(model, batch(name, 2, 7), compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows, length in ((5, 7), (3, 9), (2, 12)):
            inputs = batch(name, rows, length)
            results = []
            for forward in (model, compiled):
                torch.manual_seed(rows)
                results.append(loss_and_gradients(model, inputs, forward))
            assert_same(results[1], results[0], rtol=1e-4, atol=1e-5)


# --- autocast ---------------------------------------------------------------------------------------------------------


@every_model
def test_autocast(name: str) -> None:
    """The loss of a bfloat16 model, and gradients in float32 that point where those of float32 do."""
    model, inputs = make(name, **CALM[name]), batch(name)
    results = {}
    for how in ("float32", "autocast", "bfloat16"):
        torch.manual_seed(3)
        if how == "bfloat16":
            half = copy.deepcopy(model)
            for key, parameter in half.named_parameters():
                parameter.data = parameter.data if half._keeps_float32(key) else parameter.data.bfloat16()
            results[how] = loss_and_gradients(half, inputs)
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
                results[how] = loss_and_gradients(model, inputs)
    exact, cast, half_ = results["float32"], results["autocast"], results["bfloat16"]
    assert all(value.dtype == torch.float32 for value in cast.values())
    torch.testing.assert_close(cast["loss"], half_["loss"], rtol=0.02, atol=0.0)
    torch.testing.assert_close(cast["loss"], exact["loss"], rtol=0.02, atol=0.0)
    flat = [torch.cat([value.flatten() for key, value in of.items() if key != "loss"]) for of in (cast, exact)]
    assert F.cosine_similarity(*flat, dim=0) > 0.97


@pytest.mark.parametrize("name", ["nllb-moe", "switch_transformers"])
def test_autocast_leaves_the_router_in_its_dtype(name: str) -> None:
    """As in a bfloat16 model, whose router is float32 too."""
    model = make(name, **CALM[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch(name))
    for logits in (*out.encoder_router_logits, *out.decoder_router_logits):
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())


# --- PyTorch's tools --------------------------------------------------------------------------------------------------


@every_model
def test_functional_call(name: str) -> None:
    """With weights that are not the model's, which stay as they are."""
    model, other, inputs = make(name, **CALM[name]), make(name, **CALM[name]), batch(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    torch.manual_seed(4)
    expected = loss_and_gradients(other, inputs)
    weights = {key: parameter.detach().requires_grad_() for key, parameter in other.named_parameters()}
    torch.manual_seed(4)
    loss = torch.func.functional_call(model, weights, kwargs=inputs).loss
    grads = torch.autograd.grad(loss, list(weights.values()))
    assert_same({"loss": loss.detach(), **dict(zip(weights, grads, strict=True))}, expected)


@every_sparse_model
def test_second_derivatives_are_refused(name: str) -> None:
    model = make(name, **CALM[name])
    # PyTorch's fused attention has no second derivative either.
    model.set_attn_implementation("eager")
    loss = model(**batch(name)).loss
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match=r"moekernels: .* is itself a gradient and cannot be differentiated again"):
        sum(grad.square().sum() for grad in grads).backward()


@every_model
@pytest.mark.parametrize("label", [VOCAB, -1])
def test_labels_out_of_range(name: str, label: int) -> None:
    model, inputs = make(name), batch(name)
    inputs["labels"][1, 2] = label
    with pytest.raises(ValueError, match=f"labels must be from 0 to {VOCAB - 1}, or -100 where .*, got {label}"):
        model(**inputs)


def test_classes_out_of_range() -> None:
    model = PhimoeForSequenceClassification.from_config(CONFIGS["phimoe"])
    with pytest.raises(ValueError, match=r"labels must be from 0 to 1, .* got 2"):
        model(batch("phimoe")["input_ids"], labels=torch.tensor([0, 2, 1]))


# --- stopping and going on --------------------------------------------------------------------------------------------


@every_model
def test_training_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    """From a checkpoint and the optimiser's state, to the bit."""

    def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: range) -> dict[str, Tensor]:
        for step in steps:
            torch.manual_seed(step)
            optimiser.zero_grad()
            model(**batch(name, 2 + step)).loss.backward()
            optimiser.step()
        return dict(model.named_parameters())

    model = make(name, **NOISE[name])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimiser, range(2))
    model.save_pretrained(tmp_path)
    torch.save(optimiser.state_dict(), tmp_path / "optimiser.pt")
    expected = train(model, optimiser, range(2, 4))

    resumed = head_class(name).from_pretrained(tmp_path, progress=False).train()
    optimiser = torch.optim.AdamW(resumed.parameters())
    optimiser.load_state_dict(torch.load(tmp_path / "optimiser.pt"))
    assert_same(train(resumed, optimiser, range(2, 4)), expected, rtol=0, atol=0)


# --- several processes ------------------------------------------------------------------------------------------------


def model_and_halves() -> tuple[Any, list[dict[str, Any]]]:
    """A model, and the inputs of two processes."""
    inputs = [batch("olmoe", 2, length) for length in (7, 7)]
    inputs[1]["input_ids"] = inputs[1]["input_ids"].flip(0, 1)
    return make("olmoe"), inputs


def train_in_parallel(rank: int) -> dict[str, dict[str, Tensor]]:
    """One process of two: its half of the batch, and the gradients of all of it."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    replicated, halves = model_and_halves()
    sharded, _ = model_and_halves()
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    results = {}
    for how, parallel in (("ddp", DistributedDataParallel(replicated)), ("fsdp", sharded)):
        loss = parallel(**halves[rank]).loss
        loss.backward()
        results[how] = {"loss": dist.nn.functional.all_reduce(loss.detach()) / 2}
    results["ddp"] |= {name: p.grad for name, p in replicated.named_parameters()}
    results["fsdp"] |= {name: p.grad.full_tensor() for name, p in sharded.named_parameters()}
    return results


@pytest.fixture(scope="module")
def parallel_results() -> dict[str, dict[str, Tensor]]:
    return run_processes(train_in_parallel, 2)[0]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes(parallel_results: dict[str, dict[str, Tensor]], how: str) -> None:
    """The mean of both halves, as one process finds it."""
    model, halves = model_and_halves()
    one, two = (loss_and_gradients(model, half) for half in halves)
    assert_same(parallel_results[how], {name: (one[name] + two[name]) / 2 for name in one})
