"""What all pipelines share: where the model runs, and how inputs become batches and results."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from moekernels._devices import resolve_device
from moekernels.pipelines.batching import BATCHES_PER_WINDOW, batches_by_length, stack, windows


class Pipeline:
    """A model and its tokenizer, and the way through both. One class per kind of task; :func:`pipeline` makes them.

    Args:
        model: the model; it is moved to `device`.
        tokenizer: its tokenizer.
        task: the name of the task.
        device: as for :func:`pipeline`; None leaves the model where it is.
        batch_size: inputs that run together.
        **parameters: defaults for the parameters of every call.

    Raises:
        ValueError: the model is of another kind, or a parameter is unknown.
    """

    #: What can load a model for the task by the name of a checkpoint.
    auto_class: ClassVar[Any]
    #: The name of the task.
    default_task: ClassVar[str]
    #: Where rows of unlike length are padded.
    padding_side: ClassVar[str]

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        task: str | None = None,
        device: int | str | torch.device | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        **parameters: Any,
    ) -> None:
        self.task = task or self.default_task
        self._check_model(model)
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = _checked(1 if batch_size is None else batch_size)
        self._parameters = parameters
        placed = resolve_device(device)
        if placed is not None and placed != model.device:
            model.to(placed)

    # What a task defines.

    def _check_model(self, model: Any) -> None:
        """Raises ValueError if the model cannot do the task."""

    def _options(self, parameters: dict[str, Any]) -> Any:
        """The parameters of a call, checked."""
        raise NotImplementedError

    def _encode(self, item: Any, options: Any) -> dict[str, list[int]]:
        """The `input_ids` of an input, and what else the model gets with one entry per token."""
        raise NotImplementedError

    def _forward(self, batch: dict[str, Tensor], options: Any) -> Sequence[Tensor]:
        """What the model makes of each row of a batch."""
        raise NotImplementedError

    def _decode(self, item: Any, encoded: dict[str, list[int]], output: Tensor, options: Any) -> Any:
        """The result for an input, from what the model made of it, on the CPU."""
        raise NotImplementedError

    def _is_single(self, inputs: Any) -> bool:
        """Whether the inputs are one, not several."""
        return isinstance(inputs, (str, dict))

    # The way through.

    def __call__(
        self, inputs: Any, *, batch_size: int | None = None, num_workers: int | None = None, **parameters: Any
    ) -> Any:
        """Results for one input, a list of them, or an iterable, which gives an iterator over the results.

        Inputs of like length run together; results keep the order of the inputs.

        Args:
            inputs: as the task has them.
            batch_size: inputs that run together, instead of the pipeline's.
            num_workers: without effect; tokenizing waits for nothing here.
            **parameters: those of the task, and of `generate` if it generates.
        """
        options = self._options({**self._parameters, **parameters})
        size = self.batch_size if batch_size is None else _checked(batch_size)
        if self._is_single(inputs):
            return self._results([inputs], 1, options)[0]
        if isinstance(inputs, (list, tuple)):
            return self._results(inputs, size, options)
        if not hasattr(inputs, "__iter__") and not hasattr(inputs, "__getitem__"):
            raise TypeError(f"{self.task}: inputs must be text or several, got {type(inputs).__name__}")
        return self._stream(inputs, size, options)

    def _stream(self, inputs: Iterable[Any], batch_size: int, options: Any) -> Iterator[Any]:
        for window in windows(inputs, 1 if batch_size == 1 else batch_size * BATCHES_PER_WINDOW):
            yield from self._results(window, batch_size, options)

    @torch.no_grad()
    def _results(self, items: Sequence[Any], batch_size: int, options: Any) -> list[Any]:
        encoded = [self._encode(item, options) for item in items]
        results: list[Any] = [None] * len(items)
        for chosen in batches_by_length([len(entry["input_ids"]) for entry in encoded], batch_size):
            batch = self._batch([encoded[index] for index in chosen])
            for index, output in zip(chosen, self._forward(batch, options), strict=True):
                results[index] = self._decode(items[index], encoded[index], output.cpu(), options)
        return results

    def _batch(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        fillers = {"input_ids": self._pad_token_id}
        return {
            name: stack([row[name] for row in rows], fillers.get(name, 0), self.padding_side).to(self.device)
            for name in rows[0]
        }

    @property
    def _pad_token_id(self) -> int:
        """What fills up a row; the mask hides it, so that any token serves where none is meant for it."""
        for owner in (self.tokenizer, self.model.config):
            if getattr(owner, "pad_token_id", None) is not None:
                return owner.pad_token_id
        return 0

    # Of the model.

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.model.dtype

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes model and tokenizer to one checkpoint directory."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def _checked(batch_size: int) -> int:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    return batch_size
