"""The router of DeepSeek-V3 and its kin: a score of its own for every expert, and a bias that balances them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_reduce
from torch.distributed.device_mesh import DeviceMesh

from moekernels import ops
from moekernels.nn._checks import check, check_counts, check_one_of
from moekernels.nn.router import RouterOutput, TopKRouter
from moekernels.ops.route_by_score import SCORES


class ScoreRouter(TopKRouter):
    """A linear layer in float32, then :func:`moekernels.ops.route_by_score`: ``SparseMLP(router, experts)`` takes it.

    Args:
        hidden_size: width of a token.
        num_experts: number of experts.
        top_k: experts per token.
        score: "sigmoid", "sqrt_softplus" or "softmax".
        num_groups: groups of neighbouring experts.
        top_groups: of which so many stay for a token; None: all.
        renormalize: divide the chosen weights by their sum.
        scale: what weights are multiplied with.
        selection_bias: keep ``e_score_correction_bias [E]``, a buffer that chooses and does not weight.

    Raises:
        ValueError: a size is not positive, there is no such score, or the sizes do not go together.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "sigmoid",
        num_groups: int = 1,
        top_groups: int | None = None,
        renormalize: bool = True,
        scale: float = 1.0,
        selection_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, renormalize=renormalize, device=device, dtype=dtype)
        check_one_of(self, "score", score, tuple(SCORES))
        check_counts(self, num_groups=num_groups)
        check(
            self, "num_groups", num_groups, num_experts % num_groups == 0, f"a divisor of num_experts ({num_experts})"
        )
        groups = num_groups if top_groups is None else top_groups
        least = -(-top_k * num_groups // num_experts)
        fits = isinstance(groups, int) and least <= groups <= num_groups
        check(
            self, "top_groups", top_groups, fits, f"between {least}, for top_k experts, and num_groups ({num_groups})"
        )
        self.score = score
        self.num_groups = num_groups
        self.top_groups = groups
        self.scale = scale
        bias = torch.zeros(num_experts, device=device, dtype=torch.float32) if selection_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> RouterOutput:
        """``hidden [..., H]`` of T tokens, optional ``mask [T]`` bool: tokens with False are not routed.

        Raises:
            ValueError: `hidden` has another width.
        """
        logits = self._logits(hidden)
        routing_weights, expert_ids = ops.route_by_score(
            logits,
            self.top_k,
            score=self.score,
            selection_bias=self.e_score_correction_bias,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            renormalize=self.renormalize,
            scale=self.scale,
            mask=mask,
        )
        return RouterOutput(logits, routing_weights, expert_ids)

    def _logits(self, hidden: Tensor) -> Tensor:
        """In float32, also of weights in half precision and under autocast, as the models' own code has it."""
        if hidden.shape[-1] != self.hidden_size:
            return super()._logits(hidden)  # which raises
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.reshape(-1, self.hidden_size).float(), self.weight.float())

    @torch.no_grad()
    def balance(self, expert_ids: Tensor, rate: float = 1e-3, group: ProcessGroup | DeviceMesh | None = None) -> Tensor:
        """Move the bias towards experts with fewer tokens than the mean: loss-free balancing (arXiv 2408.15664).

        ``bias[e] += rate * sign(mean(counts) - counts[e])``, once per step of the optimiser.

        Args:
            expert_ids: ``[T, K]``, what the step has chosen; -1 counts for nothing.
            rate: how far an expert's bias moves.
            group: processes, or a mesh of them, whose counts are summed first, so that all move alike.

        Returns:
            The counts ``[E]``, float32.

        Raises:
            ValueError: the router has no selection bias.
        """
        bias = self.e_score_correction_bias
        if bias is None:
            raise ValueError(f"{type(self).__name__}: there is no selection bias to balance with")
        ids = expert_ids.reshape(-1).long()
        inside = (ids >= 0) & (ids < self.num_experts)
        counts = torch.zeros_like(bias).index_add_(0, ids.clamp(0, self.num_experts - 1), inside.to(bias.dtype))
        groups = group.get_all_groups() if isinstance(group, DeviceMesh) else [] if group is None else [group]
        for processes in groups:
            all_reduce(counts, group=processes)
        bias.add_(torch.sign(counts.mean() - counts), alpha=rate)
        return counts

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"score={self.score!r}, num_groups={self.num_groups}, top_groups={self.top_groups}, scale={self.scale}"
        )
