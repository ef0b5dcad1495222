"""Which experts the tokens of each language visit, and how many tokens find no place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekernels import ops
from moekernels._files import replacing
from moekernels.demo.corpus import Pair
from moekernels.demo.learners import Learner


@dataclass
class Usage:
    """Choices of experts, by sparse layer. L languages, E experts.

    Attributes:
        languages: their codes.
        counts: per layer int64 ``[L, E]``, how often tokens of a language chose an expert.
        chosen, dropped: choices, and those that found no place under the capacity of training, of all layers.
    """

    languages: tuple[str, ...]
    counts: dict[str, Tensor] = field(default_factory=dict)
    chosen: int = 0
    dropped: int = 0

    @property
    def dropped_rate(self) -> float:
        return self.dropped / max(self.chosen, 1)

    def shares(self, layer: str) -> Tensor:
        """float64 ``[L, E]``: of the choices of a language, the share of each expert."""
        counts = self.counts[layer].double()
        return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


@torch.no_grad()
def expert_usage(learner: Learner, pairs: Sequence[Pair], languages: Sequence[str]) -> Usage:
    """Runs the model on pairs and counts its routers' choices, by the language that a layer reads.

    Encoder layers read the source; decoder layers, and all layers of a decoder-only model, are counted by the target.
    """
    usage = Usage(tuple(languages))
    for language in languages:
        for part, mine in (
            ("encoder", [pair for pair in pairs if pair.source_language == language]),
            ("decoder", [pair for pair in pairs if pair.target_language == language]),
        ):
            batch = learner.batch(mine)
            output = learner.model(**batch, output_router_logits=True)
            for layer, logits, mask in _routers(part, output, batch):
                counts = usage.counts.setdefault(layer, torch.zeros(len(languages), logits.shape[-1], dtype=torch.long))
                _count(usage, counts[languages.index(language)], learner.model.config, logits, mask)
    return usage


def _routers(part: str, output: Any, batch: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """The sparse layers of a part: name, logits ``[B, S, E]``, and mask ``[B, S]`` of the tokens that count."""
    labels, encoder_mask = batch["labels"], batch["attention_mask"] != 0
    if hasattr(output, "encoder_router_logits"):
        logits = output.encoder_router_logits if part == "encoder" else output.decoder_router_logits
        mask = encoder_mask if part == "encoder" else labels >= 0
    elif part == "encoder":
        return []
    else:
        logits, mask = output.router_logits, encoder_mask
        part = "layer"
    return [(f"{part} {i}", x.reshape(*mask.shape, x.shape[-1]), mask) for i, x in enumerate(logits or ())]


def _count(usage: Usage, counts: Tensor, config: Any, logits: Tensor, mask: Tensor) -> None:
    batch, length, num_experts = logits.shape
    scoring, top_k, capacity, group = _rule(config, batch, length)
    _, expert_ids = ops.route(logits.flatten(0, 1).float(), top_k, scoring=scoring, mask=mask.flatten())
    plan = ops.plan(expert_ids, num_experts, capacity=capacity, group_size=group)
    chosen = expert_ids >= 0
    counts += torch.bincount(expert_ids[chosen].long(), minlength=num_experts).cpu()
    usage.chosen += int(chosen.sum())
    usage.dropped += int((chosen & (plan.row_of_slot < 0)).sum())


def _rule(config: Any, batch: int, length: int) -> tuple[str, int, int | None, int | None]:
    """Scoring rule, choices per token, capacity in training, and tokens that share it."""
    if config.model_type == "nllb-moe":
        tokens = batch * length
        return "top2_gate", 2, config.expert_capacity or 2 * -(-tokens // config.num_experts), tokens
    if config.model_type == "switch_transformers":
        return "softmax", 1, config.expert_capacity, length
    if config.model_type == "phimoe":
        return "sparsemixer", 2, None, None
    return "softmax", config.num_experts_per_tok, None, None


def draw(usage: Usage, file: Path) -> None:
    """A picture: the experts of every language, layer by layer, and the share of choices that found no place.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(usage.counts) + 1.2, 0.55 * len(usage.languages) + 1.9), layout="constrained")
    axes = figure.subplots(1, len(usage.counts), squeeze=False)[0]
    images = []
    for axis, layer in zip(axes, usage.counts, strict=True):
        shares = usage.shares(layer)
        images.append(axis.imshow(shares.numpy(), vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto"))
        axis.set_title(layer, fontsize=10)
        axis.set_xticks(range(shares.shape[1]))
        axis.set_yticks(range(len(usage.languages)), usage.languages if axis is axes[0] else [])
        axis.set_xlabel("expert")
    figure.colorbar(images[-1], ax=list(axes), label="share of choices")
    figure.suptitle(f"Experts by language; {usage.dropped_rate:.1%} of choices found no place", fontsize=11)
    with replacing(file) as picture:
        figure.savefig(picture, dpi=150, format=file.suffix.removeprefix(".") or "png")
