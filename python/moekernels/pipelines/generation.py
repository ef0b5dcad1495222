"""What the pipelines that generate text share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from moekernels.generation import GenerationConfig
from moekernels.pipelines.base import Pipeline


class GenerationPipeline(Pipeline):
    """A pipeline around `generate`.

    Attributes:
        generation_config: the parameters where a call gives none: the pipeline's, and the model's for those that the
            pipeline leaves at their defaults.
        prefix: a text that the model expects before every input.
    """

    #: The pipeline's own generation parameters.
    default_generation: ClassVar[dict[str, Any]]
    #: Whether its models have an encoder.
    encoder_decoder: ClassVar[bool]

    def __init__(self, model: Any, tokenizer: Any, *, task: str | None = None, **kwargs: Any) -> None:
        super().__init__(model, tokenizer, task=task, **kwargs)
        own = model.generation_config
        config = GenerationConfig(**self.default_generation).with_defaults_from(own)
        if own.max_length != GenerationConfig.max_length:
            config.max_new_tokens = own.max_new_tokens
        # What older checkpoints say about some tasks.
        of_tasks = getattr(model.config, "task_specific_params", None) or {}
        of_task = dict(of_tasks.get(self.task) or {})
        self.prefix: str = of_task.pop("prefix", None) or getattr(model.config, "prefix", None) or ""
        config.update(**of_task)
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
        self.generation_config = config

    def _check_model(self, model: Any) -> None:
        if not hasattr(model, "generate") or bool(model.config.is_encoder_decoder) != self.encoder_decoder:
            wanted = "an encoder and a decoder" if self.encoder_decoder else "a decoder and no encoder"
            raise ValueError(
                f"{self.task} needs a model with {wanted} and a language-modelling head, got {type(model).__name__}"
            )

    def _generate(self, batch: dict[str, Tensor], parameters: dict[str, Any]) -> list[Tensor]:
        """The sequences `[num_return_sequences, length]` of every row, without what fills up the batch.

        Parameters of the call win over those of the pipeline, also where two of them exclude each other.
        """
        given, own = dict(parameters), self.generation_config
        config = given.pop("generation_config", None)
        if config is None:
            config = copy.deepcopy(own)
            if given.get("max_length") is not None:
                given.setdefault("max_new_tokens", None)
            if given.get("do_sample") is False and config.temperature == self.default_generation.get("temperature"):
                config.temperature = 1.0
        sequences = self.model.generate(**batch, generation_config=config, tokenizer=self.tokenizer, **given)
        if not isinstance(sequences, Tensor):
            sequences = sequences.sequences
        num_rows, prompt_length = batch["input_ids"].shape
        groups = list(sequences.reshape(num_rows, -1, sequences.shape[-1]).cpu())
        if num_rows == 1:
            return groups
        given = {**own.to_dict(), **{k: v for k, v in config.to_dict().items() if v is not None}, **given}
        ends = given["eos_token_id"]
        # Only where something else than an end token may end a sequence do pad tokens say where it ends.
        pad = given["pad_token_id"] if given["stop_strings"] or given.get("stopping_criteria") else None
        if self.encoder_decoder:
            begin = given["decoder_input_ids"].shape[1] if "decoder_input_ids" in given else 1
            return [group[:, : begin + _longest(group[:, begin:], ends, pad)] for group in groups]
        begins = (prompt_length - batch["attention_mask"].sum(dim=1)).tolist()
        return [
            group[:, begin : prompt_length + _longest(group[:, prompt_length:], ends, pad)]
            for group, begin in zip(groups, begins, strict=True)
        ]

    def _forward(self, batch: dict[str, Tensor], options: Any) -> Sequence[Tensor]:
        return self._generate(batch, options.generation)


def _longest(new: Tensor, ends: int | list[int] | None, pad: int | None) -> int:
    """The number of tokens `[n, length]` up to the last end of a sequence; what follows fills up the batch.

    A sequence ends with its first end token, or, if `pad` is given, before the pad tokens.
    """
    if new.numel() == 0:
        return 0
    positions = torch.arange(1, new.shape[1] + 1)
    used = (new != pad).long() * positions if pad is not None else positions.expand_as(new)
    lengths = used.amax(dim=1)
    if ends is not None:
        ended = torch.isin(new, torch.tensor(ends))
        lengths = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, lengths)
    return int(lengths.max())
