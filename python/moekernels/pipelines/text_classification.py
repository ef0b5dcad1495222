"""Labels for texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from moekernels.models import AutoModelForSequenceClassification
from moekernels.pipelines.base import Pipeline

_FUNCTIONS = ("sigmoid", "softmax", "none")


@dataclass
class _Options:
    function: str
    top_k: int | None = 1
    bare: bool = True  # the best label by itself, not in a list
    encoding: dict[str, Any] = field(default_factory=dict)


class TextClassificationPipeline(Pipeline):
    """Gives each text its label, or the likeliest of them.

    Inputs are texts, or dictionaries with `text` and `text_pair`. Parameters of a call, besides those of the tokenizer:

    * `top_k`: the labels to return, the likeliest first; None for all.
    * `function_to_apply`: "sigmoid", "softmax" or "none", from logits to scores. The default is the model's
      `problem_type`, or else the softmax, and the sigmoid of a single label.

    A text gives `[{"label": ..., "score": ...}]`, a list of texts a list of such dictionaries; with `top_k` every text
    has a list of them.
    """

    auto_class: ClassVar[Any] = AutoModelForSequenceClassification
    default_task: ClassVar[str] = "text-classification"
    padding_side: ClassVar[str] = "right"

    def __call__(self, inputs: Any, **parameters: Any) -> Any:
        result = super().__call__(inputs, **parameters)
        return [result] if isinstance(inputs, str) and "top_k" not in parameters else result

    def _options(self, parameters: dict[str, Any]) -> _Options:
        given = dict(parameters)
        function = str(given.pop("function_to_apply", None) or self._default_function()).lower()
        if function not in _FUNCTIONS:
            raise ValueError(f"function_to_apply must be one of {', '.join(_FUNCTIONS)}, got {function!r}")
        all_scores = given.pop("return_all_scores", None)
        bare = "top_k" not in given
        top_k = given.pop("top_k", None if all_scores else 1)
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k must be a positive integer, or None for all labels, got {top_k!r}")
        return _Options(function, top_k, bare, given)

    def _default_function(self) -> str:
        config = self.model.config
        if config.problem_type == "regression":
            return "none"
        single = config.problem_type == "multi_label_classification" or config.num_labels == 1
        return "sigmoid" if single else "softmax"

    def _encode(self, item: Any, options: _Options) -> dict[str, list[int]]:
        if not isinstance(item, (str, dict)):
            raise TypeError(
                f"text-classification: an input must be text, or a dictionary with text and text_pair, "
                f"got {type(item).__name__}"
            )
        texts = {"text": item} if isinstance(item, str) else item
        inputs = self.tokenizer(**texts, **options.encoding)
        return {"input_ids": inputs["input_ids"], "attention_mask": [1] * len(inputs["input_ids"])}

    def _forward(self, batch: dict[str, Tensor], options: _Options) -> Sequence[Tensor]:
        return list(self.model(**batch, use_cache=False).logits.float())

    def _decode(self, item: Any, encoded: dict[str, list[int]], output: Tensor, options: _Options) -> Any:
        if options.function == "softmax":
            output = output.softmax(-1)
        elif options.function == "sigmoid":
            output = output.sigmoid()
        labels = self.model.config.id2label
        order = torch.argsort(output, descending=True, stable=True).tolist()
        if options.bare and options.top_k is None:
            order = sorted(order)
        records = [{"label": labels[index], "score": output[index].item()} for index in order[: options.top_k]]
        return records[0] if options.bare and options.top_k == 1 else records
