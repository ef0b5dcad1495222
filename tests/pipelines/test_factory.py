"""Which pipeline a task gives, and where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moekernels import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline, pipelines
from moekernels import _devices as devices


def test_loading(olmoe: Path) -> None:
    loaded = pipeline(model=olmoe, task="text-generation", dtype=torch.float16, device="cpu", batch_size=3)
    assert loaded.dtype == torch.float16 and loaded.device == torch.device("cpu") and loaded.batch_size == 3
    assert loaded.task == "text-generation" and loaded.tokenizer.name_or_path == str(olmoe)
    for kwargs in ({"torch_dtype": "float16"}, {"model_kwargs": {"dtype": "float16"}}, {"device_map": "cpu"}):
        loaded = pipeline("text-generation", str(olmoe), **kwargs)
        assert loaded.dtype == (torch.float32 if "device_map" in kwargs else torch.float16)
    config = AutoConfig.from_pretrained(olmoe)
    config.num_experts_per_tok = 1
    loaded = pipeline("text-generation", olmoe, config=config, tokenizer=AutoTokenizer.from_pretrained(olmoe))
    assert loaded.model.config.num_experts_per_tok == 1
    eager = {"attn_implementation": "eager"}
    loaded = pipeline("text-generation", olmoe, config=str(olmoe), trust_remote_code=True, model_kwargs=eager)
    assert loaded.model.config._attn_implementation == "eager"


def test_devices(olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.resolve_device(None) is None
    for given in (-1, "cpu", torch.device("cpu")):
        assert devices.resolve_device(given) == torch.device("cpu")
    assert devices.resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"device must be a number, a name .*, got 'toaster'"):
        devices.resolve_device("toaster")
    monkeypatch.setattr(devices, "build_info", lambda: {"cuda_archs": ["90a"]})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert devices.resolve_device(1) == torch.device("cuda", 1) and devices.default_device() == torch.device("cuda")
    monkeypatch.setattr(devices, "build_info", lambda: {"cuda_archs": [], "cuda_reason": "no nvcc"})
    with pytest.warns(UserWarning, match=r"device 0 is a GPU, but this build has no CUDA kernels \(no nvcc\)"):
        assert devices.resolve_device(0) == torch.device("cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert devices.default_device() == torch.device("cpu")
    with pytest.warns(UserWarning, match="device 0 is a GPU, but PyTorch .* sees none; running on the CPU") as caught:
        assert pipeline("text-generation", olmoe, device=0).device == torch.device("cpu")
    assert caught[0].filename.endswith("test_factory.py")


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("fill-mask", "x"), {}, "task must be one of text-generation, text2text-generation, translation"),
        ((), {"model": "x"}, "or translation_xx_to_yy), got None"),
        (("text-generation",), {}, "text-generation needs a model: a checkpoint directory"),
        (("text-generation", "no/such/place"), {}, "no/such/place"),
        (("text-generation", "x"), {"framework": "tf"}, "framework must be 'pt', got 'tf'"),
        (("text-generation", "x"), {"device": 0, "device_map": "auto"}, "pass device or device_map, not both"),
    ],
)
def test_errors(args: tuple[str, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        pipeline(*args, **kwargs)
    assert message in str(caught.value)


def test_a_model_without_a_checkpoint(olmoe: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(olmoe))
    model.config.name_or_path = ""
    with pytest.raises(ValueError, match="a model that was not loaded from a checkpoint needs a tokenizer"):
        pipeline("text-generation", model)


def test_names() -> None:
    assert pipelines.TASKS["summarization"] is pipelines.SummarizationPipeline
    assert set(pipelines.TASKS) == {
        "text-generation", "text2text-generation", "translation", "summarization", "text-classification",
    }  # fmt: skip
