"""`pipeline`: the right one for a task."""

from __future__ import annotations

import os
from typing import Any

import torch

from moekernels._devices import default_device, resolve_device
from moekernels.models import AutoConfig, PretrainedConfig
from moekernels.pipelines.base import Pipeline
from moekernels.pipelines.text2text import (
    SummarizationPipeline,
    Text2TextGenerationPipeline,
    TranslationPipeline,
)
from moekernels.pipelines.text_classification import TextClassificationPipeline
from moekernels.pipelines.text_generation import TextGenerationPipeline
from moekernels.tokenizers import AutoTokenizer

TASKS: dict[str, type[Pipeline]] = {
    made.default_task: made
    for made in (
        TextGenerationPipeline,
        Text2TextGenerationPipeline,
        TranslationPipeline,
        SummarizationPipeline,
        TextClassificationPipeline,
    )
}
_ALIASES = {"sentiment-analysis": TextClassificationPipeline}


def pipeline(
    task: str | None = None,
    model: Any = None,
    config: str | os.PathLike[str] | PretrainedConfig | None = None,
    tokenizer: Any = None,
    *,
    revision: str | None = None,
    use_fast: bool = True,
    token: str | bool | None = None,
    device: int | str | torch.device | None = None,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    trust_remote_code: bool | None = None,
    model_kwargs: dict[str, Any] | None = None,
    framework: str | None = None,
    **kwargs: Any,
) -> Pipeline:
    """A model, its tokenizer and the way through both, for a task.

    Args:
        task: "text-generation", "text2text-generation", "translation" (or "translation_en_to_fr"), "summarization" or
            "text-classification".
        model: a checkpoint directory or its name on the hub, or a model.
        config: the configuration, or the checkpoint it comes from, instead of the model's own.
        tokenizer: where it comes from, or a tokenizer; that of the model's checkpoint by default.
        revision, token: for a checkpoint on the hub.
        use_fast: prefer `tokenizer.json`.
        device: where to run: the number of a GPU (the CPU where there is none, with a warning), -1 for the CPU, or a
            name. By default a model stays where it is, and a checkpoint goes to a GPU if there is one.
        device_map: as for `from_pretrained`, instead of `device`.
        dtype: of a model that is loaded; "auto", the default, is the checkpoint's.
        torch_dtype: the older name of `dtype`.
        trust_remote_code: without effect: nothing that comes with a checkpoint is ever run.
        model_kwargs: further keywords for `from_pretrained`.
        framework: "pt".
        **kwargs: `batch_size`, and defaults for the parameters of every call.

    Raises:
        ValueError: an argument is missing, unknown or unusable.
    """
    made = _class_for(task)
    if model is None:
        raise ValueError(f"pipeline: {task} needs a model: a checkpoint directory, its name on the hub, or a model")
    if framework not in (None, "pt"):
        raise ValueError(f"pipeline: framework must be 'pt', got {framework!r}")
    if device is not None and device_map is not None:
        raise ValueError("pipeline: pass device or device_map, not both")
    given: dict[str, Any] = {"revision": revision, "token": token}
    hub = {name: value for name, value in given.items() if value is not None}

    source = model if isinstance(model, (str, os.PathLike)) else None
    if tokenizer is None:
        tokenizer = source or getattr(model.config, "name_or_path", None)
        if not tokenizer:
            raise ValueError("pipeline: a model that was not loaded from a checkpoint needs a tokenizer")
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, use_fast=use_fast, **hub)

    if source is not None:
        loading = {**hub, **(model_kwargs or {})}
        if config is not None and not isinstance(config, PretrainedConfig):
            config = AutoConfig.from_pretrained(config, **hub)
        if config is not None:
            loading["config"] = config
        if device_map is not None:
            loading["device_map"] = device_map
        else:
            loading["device"] = default_device() if device is None else resolve_device(device)
        dtype = dtype if torch_dtype is None else torch_dtype
        model = made.auto_class.from_pretrained(source, **{"dtype": "auto" if dtype is None else dtype, **loading})
        device = None
    return made(model, tokenizer, task=task, device=device, **kwargs)


def _class_for(task: str | None) -> type[Pipeline]:
    if task is not None and task.startswith("translation_") and "_to_" in task:
        return TranslationPipeline
    found = {**TASKS, **_ALIASES}.get(task or "")
    if found is None:
        raise ValueError(f"pipeline: task must be one of {', '.join(TASKS)} (or translation_xx_to_yy), got {task!r}")
    return found
