"""The Trainer of transformers, which runs on accelerate, with replaced models and with our own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import moekernels
from moekernels.integrations.transformers import replace_moe_layers
from tests.integrations.transformers_models import MAJOR, VOCABULARY, make_model

pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore")


class Sequences(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.ids = torch.randint(3, VOCABULARY, (64, 8), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def train(model: nn.Module, directory: Path, resume: bool = False, steps: int = 20) -> list[float]:
    """Losses of the logged steps, two batches accumulated in each."""
    arguments = transformers.TrainingArguments(
        output_dir=str(directory), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=5e-3, logging_steps=1, save_steps=10, report_to=[], use_cpu=True, seed=7, disable_tqdm=True,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Sequences())
    trainer.train(resume_from_checkpoint=str(directory / "checkpoint-10") if resume else None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def replaced() -> nn.Module:
    model = make_model("olmoe")
    replace_moe_layers(model)
    return model


def own() -> nn.Module:
    torch.manual_seed(0)
    config = moekernels.OlmoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=3, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return moekernels.OlmoeForCausalLM(config)


def test_a_replaced_model_takes_the_steps_of_the_stock_model(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock, ours = make_model("olmoe"), replaced()
        expected, losses = train(stock, tmp_path / "stock"), train(ours, tmp_path / "ours")
    assert len(losses) == 20 and losses[-1] < losses[0]
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("make", [replaced, own])
def test_a_checkpoint_resumes(make: Any, tmp_path: Path) -> None:
    losses, model = train(straight := make(), tmp_path), make()
    resumed = train(model, tmp_path, resume=True)
    assert len(losses) == 20 and losses[-1] < losses[0]
    if make is replaced and MAJOR >= 5:  # whose Trainer does not find the stacks that it has saved one by one
        train(make_model("olmoe"), tmp_path / "stock")
        losses = train(straight := make_model("olmoe"), tmp_path / "stock", resume=True)
    torch.testing.assert_close(resumed[-10:], losses[-10:], rtol=1e-4, atol=1e-4)
    for name, parameter in straight.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], parameter, rtol=1e-3, atol=1e-4)
