"""TRL's SFTTrainer, with replaced models, with adapters on their experts, and with our own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from moekernels.integrations.transformers import replace_moe_layers
from tests.integrations.test_trainer import own
from tests.integrations.transformers_models import MAJOR, VOCABULARY, make_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.filterwarnings("ignore")


def tokenizer() -> Any:
    """Words "w3", "w4", …, as TRL asks for one even where the data are ids."""
    names = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    model = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def train(model: nn.Module, directory: Path, resume: bool = False, **options: Any) -> tuple[Any, list[float]]:
    """The trainer, and the losses of 20 steps of two accumulated batches."""
    ids = torch.randint(3, VOCABULARY, (64, 8), generator=torch.Generator().manual_seed(5)).tolist()
    config = trl.SFTConfig(
        output_dir=str(directory), max_steps=20, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=5e-3, logging_steps=1, save_steps=10, report_to=[], use_cpu=True, seed=7, disable_tqdm=True,
        lr_scheduler_type="constant", bf16=False, max_length=8, gradient_checkpointing=False,
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"input_ids": ids})
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer(), **options)
    trainer.train(resume_from_checkpoint=str(directory / "checkpoint-10") if resume else None)
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def replaced() -> nn.Module:
    model = make_model("olmoe")
    replace_moe_layers(model)
    return model


def test_a_replaced_model_takes_the_steps_of_the_stock_model(tmp_path: Path) -> None:
    _, expected = train(make_model("olmoe"), tmp_path / "stock")
    _, losses = train(replaced(), tmp_path / "ours")
    assert len(losses) == 20 and losses[-1] < losses[0]
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("make", [replaced, own])
def test_a_checkpoint_resumes(make: Any, tmp_path: Path) -> None:
    straight, losses = train(make(), tmp_path)
    resumed, again = train(make(), tmp_path, resume=True)
    assert len(losses) == 20 and losses[-1] < losses[0]
    if make is replaced and MAJOR >= 5:  # whose Trainer does not find the stacks that it has saved one by one
        train(make_model("olmoe"), tmp_path / "stock")
        straight, losses = train(make_model("olmoe"), tmp_path / "stock", resume=True)
    torch.testing.assert_close(again[-10:], losses[-10:], rtol=1e-3, atol=1e-3)
    found = resumed.model.state_dict()
    for name, parameter in straight.model.state_dict().items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(MAJOR < 5, reason="transformers 4 has no stacks of experts")
def test_adapters_on_experts(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"], task_type="CAUSAL_LM"
    )
    _, expected = train(make_model("olmoe"), tmp_path / "stock", peft_config=config)
    model = peft.get_peft_model(make_model("olmoe"), config)
    replace_moe_layers(model)
    trainer, losses = train(model, tmp_path / "ours")
    assert len(losses) == 20 and len(expected) == 20
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert losses[-1] < losses[0]
