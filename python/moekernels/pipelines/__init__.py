"""From what a user has (texts, chats) to what a user reads, with a model and its tokenizer in between."""

from moekernels.pipelines.base import Pipeline
from moekernels.pipelines.factory import TASKS, pipeline
from moekernels.pipelines.text2text import (
    SummarizationPipeline,
    Text2TextGenerationPipeline,
    TranslationPipeline,
)
from moekernels.pipelines.text_classification import TextClassificationPipeline
from moekernels.pipelines.text_generation import TextGenerationPipeline

__all__ = [
    "TASKS",
    "Pipeline",
    "SummarizationPipeline",
    "Text2TextGenerationPipeline",
    "TextClassificationPipeline",
    "TextGenerationPipeline",
    "TranslationPipeline",
    "pipeline",
]
