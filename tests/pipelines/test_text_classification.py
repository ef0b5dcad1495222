"""Labels for texts, against transformers' pipeline with the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moekernels import AutoTokenizer, pipeline

TEXTS = ["The quick brown fox", "def route(logits, top_k):", "naïve", "words"]
PAIR = {"text": "The quick", "text_pair": "brown fox"}


def both(directory: Path, **config: Any) -> tuple[Any, Any]:
    """The pipelines ask little of a model, so that one of transformers' serves both."""
    torch.manual_seed(1)
    settings = transformers.LlamaConfig(
        **{"vocab_size": 423, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "initializer_range": 1.0, "pad_token_id": 1, **config},
    )
    model = transformers.LlamaForSequenceClassification(settings).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return (
        pipeline("text-classification", model, tokenizer=AutoTokenizer.from_pretrained(directory)),
        transformers.pipeline("text-classification", model, tokenizer=tokenizer, device="cpu"),
    )


def close(got: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return len(got) == len(expected) and all(close(g, e) for g, e in zip(got, expected, strict=True))
    return got["label"] == expected["label"] and got["score"] == pytest.approx(expected["score"], rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"id2label": {0: "bad", 1: "good", 2: "mixed"}},
        {"num_labels": 1},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"num_labels": 3, "problem_type": "regression"},
    ],
    ids=["labels", "one", "multi", "regression"],
)
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"top_k": None}, {"top_k": 1}, {"top_k": 2}, {"function_to_apply": "none"}, {"function_to_apply": "sigmoid"}],
    ids=lambda kwargs: "-".join(f"{name}-{value}" for name, value in kwargs.items()) or "plain",
)
def test_scores(olmoe: Path, config: dict[str, Any], kwargs: dict[str, Any]) -> None:
    ours, theirs = both(olmoe, **config)
    for inputs in (TEXTS[0], TEXTS, PAIR, [PAIR, PAIR]):
        expected = theirs(inputs, **kwargs)
        assert close(ours(inputs, **kwargs), expected)
    assert close(ours(TEXTS, batch_size=3, **kwargs), theirs(TEXTS, **kwargs))
    assert close(list(ours(iter(TEXTS), **kwargs)), theirs(TEXTS, **kwargs))


@pytest.mark.filterwarnings("ignore:`return_all_scores` is now deprecated")
def test_all_scores(olmoe: Path) -> None:
    ours, theirs = both(olmoe, num_labels=3)
    for inputs in (TEXTS[0], TEXTS):
        assert close(ours(inputs, return_all_scores=True), theirs(inputs, return_all_scores=True))


def test_truncation(olmoe: Path) -> None:
    ours, theirs = both(olmoe, num_labels=3)
    short = {"truncation": True, "max_length": 2}
    assert close(ours(TEXTS, **short), theirs(TEXTS, **short)) and not close(ours(TEXTS, **short), ours(TEXTS))


def test_errors(olmoe: Path) -> None:
    ours, _ = both(olmoe)
    for inputs, kwargs, message in (
        ("a", {"top_k": 0}, "top_k must be a positive integer, or None for all labels, got 0"),
        ("a", {"function_to_apply": "tanh"}, "function_to_apply must be one of sigmoid, softmax, none, got 'tanh'"),
        ([["a", "b"]], {}, "an input must be text, or a dictionary with text and text_pair, got list"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ours(inputs, **kwargs)


@pytest.mark.filterwarnings("ignore::Warning:transformers")
def test_phimoe(olmoe: Path, tmp_path: Path) -> None:
    """A checkpoint of the one model here that classifies."""
    torch.manual_seed(2)
    config = transformers.PhimoeConfig(
        **{"vocab_size": 423, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 1},
        **{"initializer_range": 0.4, "id2label": {0: "bad", 1: "good", 2: "mixed"}, "max_position_embeddings": 128},
    )
    transformers.PhimoeForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(olmoe).save_pretrained(tmp_path)
    ours = pipeline("sentiment-analysis", str(tmp_path), device="cpu")
    theirs = transformers.pipeline("sentiment-analysis", str(tmp_path), device="cpu")
    expected = theirs(TEXTS, top_k=None)
    for batch_size in (1, 3):
        got = ours(TEXTS, top_k=None, batch_size=batch_size)
        for mine, their in zip(got, expected, strict=True):
            scores = {record["label"]: record["score"] for record in their}
            assert {record["label"]: record["score"] for record in mine} == pytest.approx(scores, rel=1e-4)
    assert len({records[0]["label"] for records in got}) > 1
