"""A sparse layer inside other people's programs: torch.export, AOTInductor and torch.compile."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moekernels import ops
from moekernels.nn import LocalDispatcher, SparseMLP

HIDDEN = 16
#: Batch and length: none is one that was traced, and no, one and many tokens are among them.
SHAPES = ((1, 1), (7, 3), (2, 0), (0, 4), (3, 33))
#: What torch's decompositions and Inductor say about torch's own code.
TORCHS_OWN = (
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning",
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
)


class Block(nn.Module):
    """A sparse layer in a residual branch."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.mlp = SparseMLP(HIDDEN, 12, 6, 2, **options)
        for parameter in self.mlp.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        self.eval()

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, logits = self.mlp(self.norm(hidden), mask)
        return hidden + out, logits


OPTIONS: dict[str, dict[str, Any]] = {
    "gated": {},
    "biased": {"activation": "relu", "gated": False, "bias": True, "renormalize": True},
    "capacity": {"dispatcher": LocalDispatcher(6, capacity=1, group_size=4)},
    "sparsemixer": {"scoring": "sparsemixer"},
}


def export(block: Block) -> torch.export.ExportedProgram:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    sizes = {0: batch, 1: length}
    inputs = {"hidden": torch.randn(4, 5, HIDDEN), "mask": torch.ones(4, 5, dtype=torch.bool)}
    return torch.export.export(block, (), inputs, dynamic_shapes={"hidden": sizes, "mask": sizes})


def export_for_inference(block: Block) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return export(block)


def inputs_of(shape: tuple[int, int]) -> dict[str, Tensor]:
    return {"hidden": torch.randn(*shape, HIDDEN), "mask": torch.rand(shape) < 0.8}


def calls(graph: torch.fx.Graph) -> list[str]:
    """The names of our ops in a graph."""
    names = [node.target.name() for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [name.removeprefix("moekernels::") for name in names if name.startswith("moekernels::")]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_exported_layer_is_loaded_and_runs(options: dict[str, Any], tmp_path: Path) -> None:
    block = Block(**options)
    torch.export.save(export_for_inference(block), tmp_path / "block.pt2")
    program = torch.export.load(tmp_path / "block.pt2")
    assert calls(program.graph) == ["route", "plan", "sparse_mlp"]
    loaded = program.module()
    for shape in SHAPES:
        inputs = inputs_of(shape)
        for actual, expected in zip(loaded(**inputs), block(**inputs), strict=True):
            assert torch.equal(actual, expected), shape


@pytest.mark.filterwarnings(*TORCHS_OWN)
def test_an_exported_layer_keeps_its_ops_when_others_are_decomposed() -> None:
    """What a compiler for another runtime starts from."""
    assert calls(export_for_inference(Block()).run_decompositions().graph) == ["route", "plan", "sparse_mlp"]


def test_a_layer_exported_with_gradients_is_trained() -> None:
    """A fine-tuned program: outside of `no_grad` the graph holds the ops that keep what a gradient needs."""
    block = Block(bias=True)
    program = export(block)
    assert calls(program.graph) == ["route", "plan", "sparse_mlp_train"]
    inputs = inputs_of((3, 7))

    def gradients(module: nn.Module) -> dict[str, Tensor]:
        names, parameters = zip(*module.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(module(**inputs)[0].square().sum(), parameters), strict=True))

    torch.testing.assert_close(gradients(program.module()), gradients(block))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.filterwarnings(*TORCHS_OWN)
def test_a_package_compiled_ahead_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    block = Block(bias=True)
    path = torch._inductor.aoti_compile_and_package(
        export_for_inference(block),
        package_path=str(tmp_path / "block.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},  # nothing here is worth g++'s time
    )
    compiled = torch._inductor.aoti_load_package(path)
    for shape in SHAPES:
        inputs = inputs_of(shape)
        for actual, expected in zip(compiled(**inputs), block(**inputs), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_graph_for_every_number_of_tokens(options: dict[str, Any]) -> None:
    block = Block(**options)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        compiled(**inputs_of((4, 5)))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for shape in ((2, 3), (3, 2), (9, 64)):
                inputs = inputs_of(shape)
                for actual, expected in zip(compiled(**inputs), block(**inputs), strict=True):
                    assert torch.equal(actual, expected), shape


def test_sizes_that_become_dynamic_by_themselves() -> None:
    """Without being told, torch compiles once for one size and once for all others; 0 and 1 are sizes of their own."""
    block = Block()
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(block, fullgraph=True, backend=count)
    with torch.no_grad():
        for num_tokens in (8, 12, 5, 300, 2, 1, 0, 8):
            hidden = torch.randn(num_tokens, HIDDEN)
            for actual, expected in zip(compiled(hidden), block(hidden), strict=True):
                assert torch.equal(actual, expected), num_tokens
    assert len(graphs) <= 4


# --- ops alone --------------------------------------------------------------------------------------------------------

EXPERTS = 5


def route(logits: Tensor) -> tuple[Tensor, Tensor]:
    return ops.route(logits, 2, renormalize=True)


def plan(logits: Tensor) -> ops.Plan:
    return ops.plan(route(logits)[1], EXPERTS, capacity=3, group_size=logits.shape[0] // 2, priority=logits[:, 0])


def permute(logits: Tensor) -> Tensor:
    return ops.permute(logits, plan(logits).token_of_row)


def grouped_gemm(logits: Tensor) -> Tensor:
    offsets, tokens, _ = plan(logits)
    weight = torch.linspace(-1, 1, EXPERTS * 8 * EXPERTS).view(EXPERTS, 8, EXPERTS)
    scale = torch.arange(logits.shape[0] * 2).float()
    return ops.grouped_gemm(
        logits, weight, offsets, activation="gelu", gated=True, row_scale=scale, token_of_row=tokens
    )


def unpermute(logits: Tensor) -> Tensor:
    return ops.unpermute(permute(logits), plan(logits).row_of_slot, route(logits)[0])


@pytest.mark.parametrize("function", [route, plan, permute, grouped_gemm, unpermute])
def test_an_op_alone_compiles(function: Callable[[Tensor], Any]) -> None:
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(torch.randn(6, EXPERTS))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_tokens in (9, 4, 31):
            logits = torch.randn(num_tokens, EXPERTS)
            actual, expected = compiled(logits), function(logits)
            for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
                assert torch.equal(a, b)


def test_what_is_wrong_is_found_while_running_what_was_compiled() -> None:
    """A traced shape is not a checked one: the kernel's own check answers, by the name of the op."""
    compiled = torch.compile(ops.permute, fullgraph=True, dynamic=True, backend="aot_eager")
    with pytest.raises((ValueError, RuntimeError), match=r"moekernels::permute: .*int32"):
        compiled(torch.randn(4, 3), torch.zeros(8, dtype=torch.int64))
