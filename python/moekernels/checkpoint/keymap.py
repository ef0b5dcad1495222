"""What checkpoints call a weight, and where it lies in our models.

Names are canonical here: without the prefix ("model.") that a model with a head puts before its base model's names.
Where no rule matches, a checkpoint's name is the parameter's name. Files on the hub hold one tensor per expert and
projection; in memory they are slices of stacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor


class Place(NamedTuple):
    """Where a checkpoint's tensor goes: a whole parameter, or a part of a stack of experts.

    Attributes:
        parameter: canonical name.
        expert: index into the stack, None for all experts, or for a parameter that is no stack.
        part, parts: which of how many equal blocks of rows of each expert.
    """

    parameter: str
    expert: int | None = None
    part: int = 0
    parts: int = 1

    def view(self, parameter: Tensor) -> Tensor:
        """The part of the parameter that this place means."""
        block = parameter if self.expert is None else parameter[self.expert]
        return block if self.parts == 1 else block.chunk(self.parts, dim=-2)[self.part]

    def rows(self, num_rows: int) -> tuple[int, int]:
        """Which of an expert's rows those are: the first, and the one behind the last."""
        size = num_rows // self.parts
        return self.part * size, (self.part + 1) * size


@dataclass(frozen=True)
class Rule:
    """One pattern of checkpoint names and the parameters they fill.

    ``{expert}`` stands for the index into the stack; other names in braces stand for numbers that both sides share.
    """

    checkpoint: str
    parameter: str
    part: int = 0
    parts: int = 1

    @cached_property
    def _checkpoint_regex(self) -> re.Pattern[str]:
        return _regex(self.checkpoint)

    @cached_property
    def _parameter_regex(self) -> re.Pattern[str]:
        return _regex(self.parameter)

    def place(self, name: str) -> Place | None:
        """Where the tensor of that name goes, if this rule is about it."""
        match = self._checkpoint_regex.fullmatch(name)
        if match is None:
            return None
        numbers = match.groupdict()
        expert = numbers.pop("expert", None)
        return Place(self.parameter.format(**numbers), None if expert is None else int(expert), self.part, self.parts)

    def names(self, parameter: str, num_experts: int, first_expert: int = 0) -> list[tuple[str, Place]] | None:
        """The checkpoint names that fill the parameter of that name, if this rule is about it."""
        match = self._parameter_regex.fullmatch(parameter)
        if match is None:
            return None
        numbers = match.groupdict()
        if "{expert}" not in self.checkpoint:
            return [(self.checkpoint.format(**numbers), Place(parameter, None, self.part, self.parts))]
        return [
            (self.checkpoint.format(expert=first_expert + e, **numbers), Place(parameter, e, self.part, self.parts))
            for e in range(num_experts)
        ]


@dataclass(frozen=True)
class KeyMap:
    """The names of one architecture.

    Attributes:
        rules: names that differ between checkpoint and model.
        aliases: further names that are read, but not written.
        heads: parameters of heads, which a model without that head does not read.
        ignored: regular expressions of names that older files hold and no model needs.
        prefix: of the base model's names in a model with a head.
    """

    rules: tuple[Rule, ...]
    aliases: tuple[Rule, ...] = ()
    heads: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    prefix: str = "model."

    def canonical(self, name: str) -> str:
        """The name without the base model's prefix."""
        return name.removeprefix(self.prefix)

    def place(self, name: str) -> Place:
        """Where the tensor a checkpoint calls `name` goes."""
        name = self.canonical(name)
        for rule in (*self.rules, *self.aliases):
            found = rule.place(name)
            if found is not None:
                return found
        return Place(name)

    def is_ignored(self, name: str) -> bool:
        """Whether a model may lack a parameter for that name."""
        name = self.canonical(name)
        return name in self.heads or any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def checkpoint_names(
        self, parameter: str, shape: tuple[int, ...], first_expert: int = 0
    ) -> Iterator[tuple[str, Place]]:
        """The tensors that make up a parameter in a file on the hub: canonical names and places.

        `first_expert`: which expert the first one of a stack is.
        """
        rules = [rule.names(parameter, shape[0], first_expert) for rule in self.rules]
        found = [names for names in rules if names is not None]
        if not found:
            yield parameter, Place(parameter)
        for entries in zip(*found, strict=True):
            yield from entries


def _regex(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", pattern)
    return re.compile("".join(rf"(?P<{piece}>\d+)" if i % 2 else re.escape(piece) for i, piece in enumerate(pieces)))


def _per_expert(layer: str, **projections: str) -> tuple[Rule, ...]:
    """Rules for experts without a gate: one Linear each in the checkpoint, under the names given, and two stacks here.

    Args:
        layer: the sparse layer, with a number in braces.
        projections: our name of a stack -> the checkpoint's name of the Linear.
    """
    return tuple(
        Rule(f"{layer}.experts.expert_{{expert}}.{theirs}.{kind}", f"{layer}.experts.{ours}{suffix}")
        for ours, theirs in projections.items()
        for kind, suffix in (("weight", ""), ("bias", "_bias"))
    )


def _t5_experts(layer: str) -> tuple[Rule, ...]:
    """Rules for experts that are MLPs as T5 has them, with a gate (``wi_0``) and a value (``wi_1``) or without."""
    gated = f"{layer}.experts.expert_{{expert}}"
    return (
        *_per_expert(layer, up_proj="wi", down_proj="wo"),
        Rule(f"{gated}.wi_0.weight", f"{layer}.experts.gate_up_proj", part=0, parts=2),
        Rule(f"{gated}.wi_1.weight", f"{layer}.experts.gate_up_proj", part=1, parts=2),
    )


#: Of models that came from fairseq: position tables and versions.
_FAIRSEQ_LEFTOVERS = (r".*embed_positions\.weights", r".*_float_tensor", r"(encoder|decoder)\.version")

KEY_MAPS: dict[str, KeyMap] = {
    "olmoe": KeyMap(
        rules=(
            Rule("layers.{layer}.mlp.gate.weight", "layers.{layer}.mlp.router.weight"),
            Rule(
                "layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
                "layers.{layer}.mlp.experts.gate_up_proj",
                part=0,
                parts=2,
            ),
            Rule(
                "layers.{layer}.mlp.experts.{expert}.up_proj.weight",
                "layers.{layer}.mlp.experts.gate_up_proj",
                part=1,
                parts=2,
            ),
            Rule("layers.{layer}.mlp.experts.{expert}.down_proj.weight", "layers.{layer}.mlp.experts.down_proj"),
        ),
        heads=("lm_head.weight",),
        ignored=(r".*rotary_emb\.inv_freq",),
    ),
    "phimoe": KeyMap(
        rules=(
            Rule("layers.{layer}.block_sparse_moe.gate.weight", "layers.{layer}.block_sparse_moe.router.weight"),
            Rule(
                "layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
                "layers.{layer}.block_sparse_moe.experts.gate_up_proj",
                part=0,
                parts=2,
            ),
            Rule(
                "layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
                "layers.{layer}.block_sparse_moe.experts.gate_up_proj",
                part=1,
                parts=2,
            ),
            Rule(
                "layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
                "layers.{layer}.block_sparse_moe.experts.down_proj",
            ),
        ),
        # What transformers 5 has in memory.
        aliases=(
            Rule("layers.{layer}.mlp.router.weight", "layers.{layer}.block_sparse_moe.router.weight"),
            Rule("layers.{layer}.mlp.experts.gate_up_proj", "layers.{layer}.block_sparse_moe.experts.gate_up_proj"),
            Rule("layers.{layer}.mlp.experts.down_proj", "layers.{layer}.block_sparse_moe.experts.down_proj"),
        ),
        heads=("lm_head.weight", "lm_head.bias", "score.weight"),
        ignored=(r".*rotary_emb\.inv_freq",),
    ),
    "m2m_100": KeyMap(rules=(), heads=("lm_head.weight",), ignored=_FAIRSEQ_LEFTOVERS),
    "nllb-moe": KeyMap(
        rules=(
            *_per_expert("encoder.layers.{layer}.ffn", up_proj="fc1", down_proj="fc2"),
            *_per_expert("decoder.layers.{layer}.ffn", up_proj="fc1", down_proj="fc2"),
        ),
        heads=("lm_head.weight",),
        ignored=_FAIRSEQ_LEFTOVERS,
    ),
    "switch_transformers": KeyMap(
        rules=(
            *_t5_experts("encoder.block.{block}.layer.1.mlp"),
            *_t5_experts("decoder.block.{block}.layer.2.mlp"),
        ),
        heads=("lm_head.weight",),
        # Left over from when every first attention had a position bias.
        ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    ),
}
