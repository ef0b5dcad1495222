"""PhiMoE that classifies sequences, against transformers 4.56.2."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from moekernels.checkpoint import CheckpointError, checkpoint_tensors
from moekernels.models import AutoModelForSequenceClassification, PhimoeForCausalLM, PhimoeForSequenceClassification
from tests.models.conftest import TINY_PHIMOE

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")

PAD = TINY_PHIMOE["pad_token_id"]
#: Fields of the configuration, and labels for three sequences.
PROBLEMS: dict[str, tuple[dict[str, Any], Tensor]] = {
    "regression": ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0])),
    "single_label_classification": ({"num_labels": 4}, torch.tensor([3, 0, 1])),
    "multi_label_classification": ({"num_labels": 4}, torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]])),
}


def load(directory: Path, **kwargs: Any) -> PhimoeForSequenceClassification:
    return PhimoeForSequenceClassification.from_pretrained(directory, progress=False, **kwargs)


def inputs(padding: str | None, length: int = 9) -> dict[str, Tensor]:
    ids = torch.randint(3, TINY_PHIMOE["vocab_size"], (3, length), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    if padding is not None:
        mask[1, slice(0, 4) if padding == "left" else slice(-4, None)] = 0
        mask[2, slice(0, 1) if padding == "left" else slice(-1, None)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_logits_and_loss(saved_phimoe_classifier: Callable[..., Any], problem: str, padding: str | None) -> None:
    fields, labels = PROBLEMS[problem]
    theirs, directory = saved_phimoe_classifier(**fields)
    ours = load(directory)
    batch = inputs(padding)
    theirs.config.problem_type = None
    with torch.no_grad():
        expected = theirs(**batch, labels=labels, output_hidden_states=True)
        actual = ours(**batch, labels=labels, output_hidden_states=True)
        without = ours(**batch)
    assert actual.logits.shape == (3, fields["num_labels"]) and without.loss is None
    assert_close(actual.logits, expected.logits)
    assert_close(actual.loss, expected.loss)
    assert ours.config.problem_type == theirs.config.problem_type == problem
    assert torch.equal(without.logits, actual.logits)
    for mine, other in zip(actual.hidden_states, expected.hidden_states, strict=True):
        # What stands at padding on the left is nobody's business.
        kept = batch["attention_mask"].bool()
        assert_close(mine[kept], other[kept])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_gradients(saved_phimoe_classifier: Callable[..., Any], problem: str) -> None:
    fields, labels = PROBLEMS[problem]
    theirs, directory = saved_phimoe_classifier(**fields)
    ours = load(directory)
    theirs.config.problem_type = None
    theirs.zero_grad()
    for model in (theirs, ours):
        model(**inputs("right"), labels=labels).loss.backward()
    assert_close(ours.score.weight.grad, theirs.score.weight.grad)
    assert_close(ours.model.embed_tokens.weight.grad, theirs.model.embed_tokens.weight.grad)
    theirs.zero_grad()


def test_several_numbers_and_labels_of_other_shapes(saved_phimoe_classifier: Callable[..., Any]) -> None:
    theirs, directory = saved_phimoe_classifier(num_labels=4)
    ours = load(directory, problem_type="regression")
    labels = torch.randn(3, 4)
    theirs.config.problem_type = "regression"
    with torch.no_grad():
        assert_close(ours(**inputs(None), labels=labels).loss, theirs(**inputs(None), labels=labels).loss)
        ours.config.problem_type = None
        expected = ours(**inputs(None), labels=torch.tensor([3, 0, 1])).loss
        assert torch.equal(ours(**inputs(None), labels=torch.tensor([[3], [0], [1]])).loss, expected)
        # Zeros and ones may be whole numbers where the configuration says what they are.
        ours.config.problem_type = "multi_label_classification"
        _, floats = PROBLEMS["multi_label_classification"]
        expected = ours(**inputs(None), labels=floats).loss
        assert torch.equal(ours(**inputs(None), labels=floats.long()).loss, expected)


def test_half_precision_loss_is_float32(saved_phimoe_classifier: Callable[..., Any]) -> None:
    _, directory = saved_phimoe_classifier(num_labels=4)
    ours = load(directory, dtype=torch.bfloat16)
    with torch.no_grad():
        out = ours(**inputs(None), labels=torch.tensor([3, 0, 1]))
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(out.logits.float(), torch.tensor([3, 0, 1]))
    assert torch.equal(out.loss, expected)


@pytest.mark.parametrize(
    ("problem", "labels", "message"),
    [
        (None, torch.tensor([4, 0, 1]), "labels must be from 0 to 3.*got 4"),
        (None, torch.tensor([0, 1]), r"labels of single_label_classification must have shape \[3\], got \[2\]"),
        (None, torch.zeros(3), r"labels of multi_label_classification must have shape \[3, 4\], got \[3\]"),
        ("regression", torch.zeros(3), r"labels of regression must have shape \[3, 4\], got \[3\]"),
        ("ranking", torch.zeros(3), "problem_type must be 'regression', .*, got 'ranking'"),
    ],
)
def test_wrong_labels(
    saved_phimoe_classifier: Callable[..., Any], problem: str | None, labels: Tensor, message: str
) -> None:
    _, directory = saved_phimoe_classifier(num_labels=4)
    ours = load(directory)
    ours.config.problem_type = problem
    with pytest.raises(ValueError, match=message):
        ours(**inputs(None), labels=labels)


def test_without_a_pad_token(saved_phimoe_classifier: Callable[..., Any]) -> None:
    theirs, directory = saved_phimoe_classifier(pad_token_id=None)
    ours = load(directory)
    ids = inputs(None)["input_ids"]
    with torch.no_grad():
        assert_close(ours(ids[:1]).logits, theirs(ids[:1]).logits)
    for batch in ({"input_ids": ids}, {"inputs_embeds": torch.randn(3, 5, 32)}):
        with pytest.raises(ValueError, match=r"3 sequences need config\.pad_token_id to find their last tokens"):
            ours(**batch)


def test_embeddings_tuples_and_cache(saved_phimoe_classifier: Callable[..., Any]) -> None:
    theirs, directory = saved_phimoe_classifier(num_labels=4)
    ours = load(directory)
    embeds = torch.randn(3, 6, 32)
    with torch.no_grad():
        assert_close(ours(inputs_embeds=embeds).logits, theirs(inputs_embeds=embeds).logits)
        logits, cache = ours(inputs_embeds=embeds, return_dict=False)
        assert len(cache) == 3 and torch.equal(logits, ours(inputs_embeds=embeds, use_cache=False)[0])
        only_padding = torch.full((2, 4), PAD)
        assert_close(ours(only_padding).logits, theirs(only_padding).logits)


def test_round_trip(saved_phimoe_classifier: Callable[..., Any], tmp_path: Path) -> None:
    names = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
    theirs, directory = saved_phimoe_classifier(**names)
    ours = AutoModelForSequenceClassification.from_pretrained(directory, progress=False)
    assert isinstance(ours, PhimoeForSequenceClassification)
    ours(**inputs(None), labels=torch.tensor([0, 1, 2]))
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert isinstance(again, transformers.PhimoeForSequenceClassification)
    assert again.config.id2label == names["id2label"] and again.config.problem_type == "single_label_classification"
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    assert load(tmp_path).config.id2label == names["id2label"]


def test_from_a_language_model_and_back(saved_phimoe: Callable[..., Any], tmp_path: Path) -> None:
    _, directory = saved_phimoe()
    with pytest.warns(UserWarning, match=r"the checkpoint has no score\.weight; initialised, to be trained"):
        ours = load(directory, num_labels=5)
    assert ours.score.weight.shape == (5, 32) and ours.score.weight.std() > 0.1
    base = PhimoeForCausalLM.from_pretrained(directory, progress=False).model
    for name, tensor in checkpoint_tensors(base, base.key_map):
        assert torch.equal(tensor, dict(checkpoint_tensors(ours.model, base.key_map))[name]), name
    ours.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not fit PhimoeForCausalLM: missing tensor 'lm_head\.weight'"):
        PhimoeForCausalLM.from_pretrained(tmp_path)


def test_another_number_of_labels_is_one_error(saved_phimoe_classifier: Callable[..., Any]) -> None:
    _, directory = saved_phimoe_classifier(num_labels=4)
    with pytest.raises(
        CheckpointError,
        match=r"fit PhimoeFor.*: .*'score\.weight' must have shape \[7, 32\], got \[4, 32\] \(ignore_mism[^;]*$",
    ):
        load(directory, num_labels=7)
