"""Gradient accumulation: the parts of a batch add up to the gradients of the whole, for every head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from moekernels.models import PhimoeForSequenceClassification
from tests.models.test_training import CALM, SPARSE, make
from tests.models.tiny import CONFIGS

VOCAB = 61
PROBLEMS: dict[str, tuple[int, Tensor]] = {
    "regression": (1, torch.tensor([[0.5], [-1.0], [2.0], [0.1]])),
    "single_label_classification": (3, torch.tensor([2, 0, -100, 1])),
    "multi_label_classification": (3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])),
}


def rows(count: int = 4) -> dict[str, Tensor]:
    """Rows whose numbers of labels differ, so that a mean of their means is not the mean of all."""
    generator = torch.Generator().manual_seed(7)
    ids, labels = (torch.randint(3, VOCAB, (count, 6), generator=generator) for _ in range(2))
    for row in range(count):
        labels[row, : 2 + row % 3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model: nn.Module, parts: list[dict[str, Any]], **keywords: Any) -> dict[str, Tensor]:
    model.zero_grad()
    for part in parts:
        model(**part, **keywords).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def one_by_one(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: value[i : i + 1] for name, value in batch.items()} for i in range(len(batch["labels"]))]


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_parts_add_up(name: str, as_tensor: bool) -> None:
    # In evaluation: PhiMoE draws its experts in training.
    model = make(
        name, **CALM[name], **({} if name in ("olmoe", "phimoe", "m2m_100") else {"expert_capacity": 64})
    ).eval()
    batch = rows()
    labels = batch["labels"] if CONFIGS[name].is_encoder_decoder else batch["labels"][:, 1:]
    count: Any = int((labels != -100).sum())
    count = torch.tensor(count) if as_tensor else count
    parts = gradients(model, one_by_one(batch), num_items_in_batch=count)
    assert_same(parts, gradients(model, [batch]))


@pytest.mark.parametrize("name", SPARSE)
def test_router_losses_add_up(name: str) -> None:
    """Equal rows have one mean of their routers' losses, which must not count once for every row."""
    model = make(name, **CALM[name], **({} if name in ("olmoe", "phimoe") else {"expert_capacity": 64})).eval()
    for coefficient in ("router_aux_loss_coef", "router_z_loss_coef"):
        if hasattr(model.config, coefficient):
            setattr(model.config, coefficient, 0.5)
    batch = {key: value[:1].expand(4, -1) for key, value in rows().items()}
    labels = batch["labels"] if CONFIGS[name].is_encoder_decoder else batch["labels"][:, 1:]
    whole = gradients(model, [batch], output_router_logits=True)
    parts = gradients(
        model, one_by_one(batch), output_router_logits=True, num_items_in_batch=int((labels != -100).sum())
    )
    assert_same(parts, whole)
    without = gradients(model, [batch])
    assert any(not torch.allclose(whole[key], without[key], atol=1e-4) for key in whole)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_classification(problem: str) -> None:
    num_labels, labels = PROBLEMS[problem]
    config = copy.deepcopy(CONFIGS["phimoe"])
    config.num_labels, config.problem_type = num_labels, problem
    torch.manual_seed(2)
    model = PhimoeForSequenceClassification.from_config(config).eval()
    batch = {"input_ids": rows()["input_ids"], "labels": labels}
    # As Trainer counts them.
    count = (labels != -100).sum()
    assert_same(gradients(model, one_by_one(batch), num_items_in_batch=count), gradients(model, [batch]))


class _Trainer(transformers.Trainer):
    """Keeps the gradients of its only step."""

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        model.eval()  # PhiMoE draws its experts in training
        return super().compute_loss(model, *args, **kwargs)

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return loss


@pytest.mark.filterwarnings("ignore::Warning:transformers", "ignore::Warning:accelerate")
@pytest.mark.parametrize("name", CONFIGS)
def test_trainer(name: str, tmp_path: Path) -> None:
    batch = rows()
    if not CONFIGS[name].is_encoder_decoder:
        batch["labels"][:, 0] = -100  # Trainer counts a first label too, which nothing predicts
    found = []
    for size, steps in ((4, 1), (1, 4)):
        model = make(name, **CALM[name])
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            max_grad_norm=0,
            learning_rate=0.0,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            seed=3,
        )
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=[{key: value[i] for key, value in batch.items()} for i in range(4)],
        )
        trainer.train()
        found.append(trainer.gradients)
    assert_same(found[1], found[0])
