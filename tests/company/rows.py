"""Rows: hooks, weights that move, and what torch itself does to modules."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.company.matrix import Case, Results, row

# The last Linear of an expert, by the names that it has in these models.
_LAST = ("down_proj", "w2", "wo", "fc2")


def expert_linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The last Linear of every expert, with its expert and its name there."""
    for name, module in list(model.named_modules()):
        for child_name, child in module.named_children():
            if ".experts." in name and child_name in _LAST and isinstance(child, nn.Linear):
                yield module, child_name, child


def expert_weights(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules that hold the last weights of experts, one by one or as a stack, and the weights' names there."""
    for expert, name, linear in expert_linears(model):
        del expert, name
        yield linear, "weight"
    for module in list(model.modules()):
        if isinstance(module._parameters.get("down_proj"), nn.Parameter):
            yield module, "down_proj"


@row("as it is")
def untouched(case: Case) -> Results:
    return case.results(case.model())


# --- hooks ------------------------------------------------------------------------------------------------------------


def _count(model: nn.Module) -> Counter[str]:
    """Calls of forward and backward hooks on every module, from now on."""
    calls: Counter[str] = Counter()

    def counter(what: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[what] += 1

        return hook

    for name, module in model.named_modules():
        module.register_forward_pre_hook(counter(f"before {name}"))
        module.register_forward_hook(counter(f"forward {name}"))
        module.register_full_backward_pre_hook(counter(f"before backward {name}"))
        module.register_full_backward_hook(counter(f"backward {name}"))
    return calls


@row("hooks on every module, their counts")
def hooks(case: Case) -> Results:
    model = case.model()
    case.logits(model)
    calls = _count(model)
    return {**case.results(model), "calls": calls}


@row("hooks that were there before")
def hooks_before(case: Case) -> Results:
    model = case.make()
    calls = _count(model)
    return {**case.results(case.attach(model)), "calls": calls}


@row("a hook that changes what experts return, and its removal")
def changing_hook(case: Case) -> Results:
    model = case.model()
    before = case.logits(model)
    handles = [
        module.register_forward_hook(lambda _m, _i, out: out * 0.5)
        for name, module in model.named_modules()
        if name.endswith((".experts.1", ".experts.expert_1", ".act_fn", ".act"))
    ]
    changed = case.logits(model)
    for handle in handles:
        handle.remove()
    return {"before": before, "changed": changed, "hooks": len(handles) > 0, **case.results(model)}


@row("a hook on all modules (register_module_forward_hook)")
def global_hook(case: Case) -> Results:
    model = case.model()
    calls: Counter[str] = Counter()
    names = {id(module): name for name, module in model.named_modules()}

    def hook(module: nn.Module, *_: Any) -> None:
        calls[names.get(id(module), "")] += 1

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        return {**case.results(model), "calls": calls}
    finally:
        handle.remove()


@row("forward replaced on an instance")
def own_forward(case: Case) -> Results:
    model = case.model()
    for module, name in list(expert_weights(model)):
        if name == "weight":
            module.forward = lambda rows, module=module: torch.nn.functional.linear(rows, module.weight * 2)
        else:
            forward = module.forward
            module.forward = lambda *args, forward=forward: forward(*args) * 2
    return case.results(model)


# --- weights that move ------------------------------------------------------------------------------------------------


@row("load_state_dict(assign=True)")
def load_assign(case: Case) -> Results:
    model = case.model()
    case.logits(model)
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()}, assign=True)
    return case.results(model)


@row("new memory for every weight: .to(float64), .to(float32)")
def other_dtype(case: Case) -> Results:
    model = case.model()
    case.logits(model)
    return case.results(model.to(torch.float64).to(torch.float32))


@row("float64")
def float64(case: Case) -> Results:
    return case.results(case.model().double())


@row("meta, to_empty, load_state_dict")
def from_meta(case: Case) -> Results:
    model = case.model()
    state = copy.deepcopy(model.state_dict())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    for name, buffer in model.named_buffers():  # those outside the state dict
        buffer.copy_(buffers[name])
    return case.results(model)


@row("a pass in inference_mode, then training")
def inference_then_training(case: Case) -> Results:
    model = case.model()
    model.to(torch.float64).to(torch.float32)
    with torch.inference_mode():
        model(**case.column.inputs())
    return case.results(model)


@row("torch.func.functional_call with other weights")
def functional_call(case: Case) -> Results:
    model = case.model()
    weights = {name: (value * 0.9).detach().requires_grad_() for name, value in model.named_parameters()}
    out = torch.func.functional_call(model, weights, (), case.column.inputs())
    grads = torch.autograd.grad(out.loss, list(weights.values()), allow_unused=True)
    return {"logits": out.logits.detach(), **dict(zip(weights, grads, strict=True))}


@row("autograd.grad twice over one graph, and a second backward")
def graph_kept(case: Case) -> Results:
    model = case.model()
    loss = model(**case.column.inputs()).loss
    weights = [getattr(module, name) for module, name in expert_weights(model)]
    first = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, weights, allow_unused=True)
    return {str(i): pair for i, pair in enumerate([*first, *second])}


# --- copies -----------------------------------------------------------------------------------------------------------


@row("deepcopy")
def deep_copy(case: Case) -> Results:
    return case.results(copy.deepcopy(case.model()))


@row("pickle and torch.save")
def pickled(case: Case) -> Results:
    model = pickle.loads(pickle.dumps(case.model()))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return case.results(torch.load(file, weights_only=False))


@row("two models over the same parameters")
def shared_parameters(case: Case) -> Results:
    model = case.model()
    other = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    first = case.results(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return {**first, **{f"second {name}": value for name, value in case.results(other).items()}}


# --- other modules, other weights -------------------------------------------------------------------------------------


@row("Linears exchanged after a pass", tags=("linears",))
def exchanged(case: Case) -> Results:
    model = case.model()
    case.logits(model)
    torch.manual_seed(3)
    for expert, name, linear in expert_linears(model):
        setattr(expert, name, nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None))
    return case.results(model)


def _low_rank(model: nn.Module) -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base
            self.a = nn.Linear(base.in_features, 2, bias=False)
            self.b = nn.Linear(2, base.out_features, bias=False)

        @property
        def weight(self) -> Tensor:
            return self.base_layer.weight

        def forward(self, rows: Tensor) -> Tensor:
            return self.base_layer(rows) + self.b(self.a(rows))

    torch.manual_seed(3)
    for expert, name, linear in list(expert_linears(model)):
        setattr(expert, name, Adapter(linear))


@row("adapters written by hand, after", tags=("linears",))
def adapters(case: Case) -> Results:
    model = case.model()
    case.logits(model)
    _low_rank(model)
    return case.results(model)


@row("adapters written by hand, before", tags=("linears",))
def adapters_before(case: Case) -> Results:
    model = case.make()
    _low_rank(model)
    return case.results(case.attach(model, strict=False))


def _prune(model: nn.Module) -> None:
    for module, name in list(expert_weights(model)):
        prune.l1_unstructured(module, name, amount=0.5)


def _norm(model: nn.Module) -> None:
    for module, name in list(expert_weights(model)):
        parametrizations.weight_norm(module, name)


def _old_norm(model: nn.Module) -> None:
    for module, name in list(expert_weights(model)):
        nn.utils.weight_norm(module, name)


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def _parametrize(model: nn.Module) -> None:
    for module, name in list(expert_weights(model)):
        parametrize.register_parametrization(module, name, _Doubled())


for _name, _treat in {
    "prune": _prune,
    "parametrizations.weight_norm": _norm,
    "utils.weight_norm": _old_norm,
    "parametrize": _parametrize,
}.items():

    @row(f"{_name}, after")
    def _after(case: Case, treat: Callable[[nn.Module], None] = _treat) -> Results:
        model = case.model()
        case.logits(model)
        treat(model)
        return case.results(model)

    @row(f"{_name}, before")
    def _before(case: Case, treat: Callable[[nn.Module], None] = _treat) -> Results:
        model = case.make()
        treat(model)
        return case.results(case.attach(model, strict=False))


@row("pruned, then made permanent")
def pruned_for_good(case: Case) -> Results:
    model = case.model()
    weights = list(expert_weights(model))
    _prune(model)
    case.logits(model)
    for module, name in weights:
        prune.remove(module, name)
    return case.results(model)


# --- quantised --------------------------------------------------------------------------------------------------------


@row("quantize_dynamic", tags=("linears",))
def quantized(case: Case) -> Results:
    model = torch.ao.quantization.quantize_dynamic(case.model(), {nn.Linear}, dtype=torch.qint8)
    return {"logits": case.logits(model)}


class EightBit(Tensor):
    """A weight held as torchao holds one: a tensor of its own class, which multiplies in its own way."""

    rows: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, rows: Tensor, scale: Tensor) -> EightBit:
        made = Tensor._make_wrapper_subclass(cls, rows.shape, dtype=scale.dtype, device=rows.device)
        made.rows, made.scale = rows, scale
        return made

    @classmethod
    def of(cls, weight: Tensor) -> EightBit:
        scale = weight.abs().amax(-1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].rows, args[0].scale)
        whole = [a.rows * a.scale if isinstance(a, EightBit) else a for a in args]
        return func(*whole, **(kwargs or {}))


@row("weights of a tensor subclass, after (torchao)", tags=("linears",))
def subclass(case: Case) -> Results:
    model = case.model()
    case.logits(model)
    for _, _, linear in expert_linears(model):
        linear.weight = nn.Parameter(EightBit.of(linear.weight.detach()), requires_grad=False)
    return {"logits": case.logits(model)}


# --- training ---------------------------------------------------------------------------------------------------------


# Adam divides a gradient by its own size, and so makes steps of what rounding leaves of a small one: here a hundredth.
@row("AdamW with experts that no token visits", atol=1e-4)
def adamw(case: Case) -> Results:
    model = case.model().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.01, weight_decay=0.5, eps=0.1
    )  # eps: no signs of rounding errors
    inputs = {name: value[:, :2] for name, value in case.column.inputs().items()}
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@row("frozen experts, frozen gate projections")
def frozen(case: Case) -> Results:
    model = case.model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name or "down" in name)
    return case.results(model)


@row("gradient checkpointing")
def checkpointed(case: Case) -> Results:
    model = case.model().train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    return case.results(model)


@row("autocast to bfloat16", rtol=0.0, atol=0.05)
def autocast(case: Case) -> Results:
    model = case.model()
    for name, parameter in model.named_parameters():
        if "gate.weight" in name:  # no ties between logits in half precision, where torch.topk picks any
            parameter.data.mul_(1 + torch.arange(len(parameter))[:, None] / 7)
    with torch.autocast("cpu", torch.bfloat16):
        logits = case.logits(model).float()
    return {"logits": logits / logits.abs().max()}


@row("torch.func.grad")
def functional_grad(case: Case) -> Results:
    model = case.model()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, kwargs=case.column.inputs()).loss

    grads, value = torch.func.grad_and_value(loss)(weights)
    return {"loss": value, **{f"grad {name}": grad for name, grad in grads.items()}}


@row("torch.func.vmap", tags=("drop-in",))
def mapped(case: Case) -> Results:
    """Of embeddings, a sequence at a time."""
    model = case.model()
    given = {name: value for name, value in case.column.inputs().items() if name != "labels"}
    embeds = model.get_input_embeddings()(given.pop("input_ids")).detach()
    embeds = torch.stack([embeds, embeds.flip(1)])

    def logits(embeds: Tensor) -> Tensor:
        with torch.no_grad():
            return model(inputs_embeds=embeds, use_cache=False, **given).logits

    return {"logits": torch.vmap(logits)(embeds)}
