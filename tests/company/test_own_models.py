"""Our models among what other people do to modules."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moekernels as mk
import tests.company
from moekernels import ops
from moekernels.nn import GroupedExperts
from moekernels.nn.linear import project_in
from tests.company.matrix import ROWS, Column, Row, verdict
from tests.company.own_models import COLUMNS, MODELS, inputs, make

for _module in pkgutil.iter_modules(tests.company.__path__):
    if _module.name.startswith("rows"):  # they fill the table
        importlib.import_module(f"tests.company.{_module.name}")

pytestmark = pytest.mark.filterwarnings("ignore")
SPARSE = [name for name in MODELS if name != "M2M100"]


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
def test_others(row: Row, column: Column) -> None:
    if reason := row.missing(column):
        pytest.skip(reason)
    found = verdict(row, column)
    if "stacks" not in column.tags and "empty" in found.detail:
        pytest.skip("it has no experts")
    # Both sides are ours: an error of both is ours as well.
    assert found.kind in ("kernels", "modules"), found.detail


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_vmap_is_a_loop(name: str) -> None:
    model = make(name)
    given = {} if name in ("OLMoE", "PhiMoE") else {"decoder_input_ids": inputs(name)["labels"]}
    embeds = model.get_input_embeddings()(inputs(name)["input_ids"])
    batches = torch.stack([embeds, embeds.flip(1), embeds * 0.5])

    def logits(embeds: Tensor) -> Tensor:
        return model(inputs_embeds=embeds, use_cache=False, **given).logits

    expected = torch.stack([logits(batch) for batch in batches])
    # Attention is torch's there, whose sums round otherwise.
    torch.testing.assert_close(torch.vmap(logits)(batches), expected, atol=1e-4, rtol=1e-4)


def backward(model: nn.Module, name: str, **options: Any) -> dict[str, Tensor | None]:
    model.zero_grad()
    out = model(**inputs(name), **options)
    out.loss.backward()
    return {"logits": out.logits.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def assert_same(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], atol: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=atol, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_every_module_that_owns_weights_is_called_once(name: str) -> None:
    model = make(name)
    calls: Counter[str] = Counter()
    owners = {n: m for n, m in model.named_modules() if any(True for _ in m.parameters())}
    for n, module in owners.items():
        if isinstance(module, nn.ModuleList):
            continue
        module.register_forward_hook(lambda *_, n=n: calls.update([f"forward {n}"]))
        module.register_full_backward_hook(lambda *_, n=n: calls.update([f"backward {n}"]))
    backward(model, name)
    called = {n for n, m in owners.items() if not isinstance(m, nn.ModuleList)}
    # Encoder and decoder share the embedding.
    twice = {n for n in called if n.endswith("shared")}
    for n in called:
        # Models return no tuple of tensors, which torch's backward hooks want.
        for kind in ("forward",) if isinstance(owners[n], mk.PreTrainedModel) else ("forward", "backward"):
            assert calls[f"{kind} {n}"] == (2 if n in twice else 1), (kind, n)
    assert {n for n in called if n.endswith(("experts", "router", "classifier", "ffn", "block.0"))} or name == "M2M100"


class Wrapper(nn.Module):
    """A module in place of another one, which knows nothing of it but how to call it."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_any_module_may_be_wrapped(name: str) -> None:
    """All at once, from the leaves up; but for the embeddings, which the head is tied to, and the model's own parts."""
    model = make(name)
    expected = backward(model, name)
    prefix = "model." if hasattr(model, "model") else ""
    for n, module in reversed(list(model.named_modules())):
        parts = n.removeprefix(prefix).split(".")
        is_part = len(parts) > 2 or parts[0] == "layers" or n == "lm_head"
        if not is_part or isinstance(module, nn.ModuleList) or not any(True for _ in module.parameters()):
            continue
        parent, _, child = n.rpartition(".")
        setattr(model.get_submodule(parent), child, Wrapper(module))
    actual = backward(model, name)
    assert sum(isinstance(m, Wrapper) for m in model.modules()) > 20
    assert_same({n.replace(".base_layer", "").replace("base_layer.", ""): t for n, t in actual.items()}, expected)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_quantisers_find_every_linear(name: str) -> None:
    model = make(name)
    expected = model(**inputs(name)).logits
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert linears == [n for n, m in quantised.named_modules() if type(m) is torch.ao.nn.quantized.dynamic.Linear]
    actual = quantised(**inputs(name)).logits
    assert not torch.equal(actual, expected)
    # Eight bits, and a choice of experts that may fall otherwise.
    assert (actual - expected).norm() < 0.4 * expected.norm()
    many = {n: t.repeat(40, 1) for n, t in inputs(name).items()}
    if "SparseMLP" not in str(model):  # capacities count tokens
        assert (quantised(**many).logits[:2] - actual).norm() < 0.01 * actual.norm()


@pytest.mark.parametrize("name", ["NLLB-MoE", "Switch"])
def test_an_adapter_on_the_classifier(name: str) -> None:
    peft = pytest.importorskip("peft")
    adapted = make(name)
    adapted = peft.get_peft_model(
        adapted, peft.LoraConfig(r=2, target_modules=["classifier"], init_lora_weights=False)
    ).eval()
    merged = make(name)
    for n, module in adapted.get_base_model().named_modules():
        if n.endswith("classifier"):
            weight = merged.get_submodule(n).weight
            weight.data += module.get_delta_weight("default")
    with torch.no_grad():
        actual, expected = adapted(**inputs(name)).logits, merged(**inputs(name)).logits
        assert not torch.allclose(expected, make(name)(**inputs(name)).logits, atol=1e-3)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    adapted(**inputs(name), output_router_logits=True).loss.backward()
    grads = [p.grad for n, p in adapted.named_parameters() if "classifier.lora" in n]
    assert len(grads) == 4 and all(grad is not None and grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("name", MODELS)
def test_every_module_sharded(name: str) -> None:
    """FSDP2 of one process: each module that owns weights alone, but for tied ones; everything is trained."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    expected = backward(make(name), name)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = make(name)
        for n, module in list(model.named_modules()):
            own = list(module.parameters(recurse=False))
            if own and not isinstance(module, nn.Embedding) and n != "lm_head":
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        actual = {
            n: t if t is None else getattr(t, "full_tensor", lambda t=t: t)() for n, t in backward(model, name).items()
        }
    finally:
        dist.destroy_process_group()
    assert_same(actual, expected)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_exported(name: str) -> None:
    model = make(name)
    given = {n: t for n, t in inputs(name).items() if n != "labels"}
    if name not in ("OLMoE", "PhiMoE"):
        given["decoder_input_ids"] = inputs(name)["labels"]
    given["use_cache"] = False
    program = torch.export.export(model, (), given)
    torch.testing.assert_close(program.module()(**given).logits, model(**given).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SPARSE)
def test_an_expert_that_no_token_visits(name: str) -> None:
    """Experts are stacks: its gradient is zero to the bit, and theirs is not."""
    model = make(name)
    visited: dict[str, set[int]] = {}

    def record(name: str, plan: ops.Plan) -> None:
        visited[name] = set(plan.expert_offsets.diff().nonzero()[:, 0].tolist())

    for n, module in model.named_modules():
        if isinstance(module, GroupedExperts):
            module.register_forward_hook(lambda _m, args, _out, n=n: record(n, args[2]))
    given = {n: t[:1, :1] for n, t in inputs(name).items()}
    if name not in ("OLMoE", "PhiMoE"):
        given["decoder_input_ids"] = given.pop("labels")
    model(**given).logits.square().sum().backward()
    assert visited
    for n, experts in visited.items():
        for parameter in model.get_submodule(n).parameters():
            assert parameter.grad is not None and 0 < len(experts) < len(parameter)
            assert all((parameter.grad[e] != 0).any().item() == (e in experts) for e in range(len(parameter)))


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_offloaded_weights(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    ids = inputs(name)["input_ids"]
    expected = make(name).generate(ids, max_new_tokens=4, num_beams=2)
    model = make(name)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.device == torch.device("cpu")
    assert torch.equal(model.generate(ids, max_new_tokens=4, num_beams=2), expected)


def test_a_router_in_its_own_dtype_behind_hooks() -> None:
    """A classifier whose weights have another dtype and come at the time of the call, as with offloading."""
    accelerate = pytest.importorskip("accelerate")
    layer, x = nn.Linear(8, 4).bfloat16(), torch.randn(3, 8).bfloat16()
    expected = layer(x).float()
    accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    assert layer.weight.is_meta
    torch.testing.assert_close(project_in(torch.float32, layer, x), expected, atol=0.02, rtol=0.02)
