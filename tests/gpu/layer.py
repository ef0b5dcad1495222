"""The whole sparse MLP from router logits on, its gradients, and the definition of both."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moekernels import ops
from moekernels.ops import reference
from tests.generators import LayerInputs, LayerShape, layer_inputs


@dataclass
class Layer:
    shape: LayerShape
    x: LayerInputs
    logits: Tensor  # [T, E]

    @classmethod
    def random(
        cls, shape: LayerShape, num_tokens: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0
    ) -> Layer:
        torch.manual_seed(seed)
        x = layer_inputs(shape, num_tokens, dtype, device)
        return cls(shape, x, torch.randn(num_tokens, shape.num_experts, device=device))

    def forward(self, capacity: int | None = None) -> Tensor:
        """Route, plan, sparse_mlp. -> [T, H]"""
        return self._run(ops, capacity)

    def gradients(self, direction: Tensor, capacity: int | None = None) -> dict[str, Tensor]:
        """The gradients of ``<output, direction>``, those of the logits among them."""
        return self._gradients(ops, direction, capacity)

    def truth(self, capacity: int | None = None) -> Tensor:
        """The definition of the output in float64, on the CPU."""
        return self._wide()._run(reference, capacity)

    def true_gradients(self, direction: Tensor, capacity: int | None = None) -> dict[str, Tensor]:
        return self._wide()._gradients(reference, direction.cpu().double(), capacity)

    def error_scale(self, truth: Tensor | None = None) -> float:
        """A bound on rounding: half precision rounds the inner values and the outputs, float32 its long sums."""
        roundings = 64 if self.x.hidden.dtype == torch.float32 else 8
        truth = self.truth() if truth is None else truth
        return roundings * torch.finfo(self.x.hidden.dtype).eps * max(truth.abs().max().item(), 1.0)

    def assert_gradients(self, actual: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
        assert list(actual) == list(truth)
        for name, grad in actual.items():
            error = (grad.cpu().double() - truth[name]).abs().max().item()
            allowed = self.error_scale(truth[name])
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"

    def _wide(self) -> Layer:
        x = self.x.to(torch.float64)
        on_cpu = {f.name: getattr(x, f.name) for f in fields(x)}
        on_cpu = {name: None if value is None else value.cpu() for name, value in on_cpu.items()}
        return Layer(self.shape, LayerInputs(**on_cpu), self.logits.detach().cpu().double())

    def _gradients(self, module: object, direction: Tensor, capacity: int | None) -> dict[str, Tensor]:
        names = ("hidden", "up_weight", "down_weight", "up_bias", "down_bias")
        leaves = {name: getattr(self.x, name) for name in names if getattr(self.x, name) is not None}
        leaves["logits"] = self.logits
        with torch.enable_grad():
            for leaf in leaves.values():
                leaf.requires_grad_()
            out = self._run(module, capacity)
        grads = torch.autograd.grad(out, list(leaves.values()), direction)
        for leaf in leaves.values():
            leaf.requires_grad_(False)
        return dict(zip(leaves, grads, strict=True))

    def _run(self, module: object, capacity: int | None) -> Tensor:
        weights, expert_ids = module.route(self.logits, self.shape.top_k)  # type: ignore[attr-defined]
        plan = module.plan(expert_ids, self.shape.num_experts, capacity=capacity)  # type: ignore[attr-defined]
        return module.sparse_mlp(  # type: ignore[attr-defined]
            self.x.hidden,
            weights,
            plan,
            self.x.up_weight,
            self.x.down_weight,
            up_bias=self.x.up_bias,
            down_bias=self.x.down_bias,
            activation=self.shape.activation,
            gated=self.shape.gated,
        )


# Small enough to be quick, wide enough for every path: 16-byte rows, several tiles and experts.
SHAPE = LayerShape("gpu", 512, 256, 16, 4)
UNGATED = LayerShape("gpu-ungated", 256, 384, 8, 2, activation="relu", gated=False, bias=True)
# One token: the path for few rows; 700 tokens: the tiled ones.
TOKENS = (1, 8, 40, 700)
