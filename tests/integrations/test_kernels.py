"""The repository for the `kernels` library: its layout always, loading from it where the library is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from moekernels.integrations.kernels import LAYER_NAME, write_repository
from tests.integrations.transformers_models import MAJOR, make_inputs, make_model


def test_layout(tmp_path: Path) -> None:
    root = write_repository(tmp_path / "repository")
    for backend in ("cpu", "cuda"):
        variant = root / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend}
        assert f"class {LAYER_NAME}(torch.nn.Module)" in (variant / "layers.py").read_text()
    assert write_repository(root) == root


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        write_repository(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_layer_computes_the_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = write_repository(tmp_path) / "build"
    monkeypatch.syspath_prepend(variant)
    (variant / "torch-cpu").rename(variant / "torch_cpu")
    monkeypatch.delitem(sys.modules, "torch_cpu", raising=False)
    import torch_cpu  # type: ignore[import-not-found]

    experts = torch.nn.Module()
    experts.gate_up_proj = torch.nn.Parameter(torch.randn(3, 8, 6))
    experts.down_proj = torch.nn.Parameter(torch.randn(3, 6, 4))
    experts.act_fn = torch.nn.SiLU()
    hidden, ids = torch.randn(5, 6), torch.tensor([[0], [2], [1], [1], [0]])
    out = getattr(torch_cpu.layers, LAYER_NAME).forward(experts, hidden, ids, torch.ones(5, 1))
    gate, value = torch.einsum("th,teh->te", hidden, experts.gate_up_proj[ids[:, 0]]).chunk(2, dim=-1)
    expected = torch.einsum("tf,thf->th", torch.nn.functional.silu(gate) * value, experts.down_proj[ids[:, 0]])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(MAJOR < 5, reason="transformers 4 has no fused experts")
def test_kernelize(tmp_path: Path) -> None:
    kernels = pytest.importorskip("kernels", exc_type=ImportError)
    if not hasattr(kernels, "LocalLayerRepository"):
        pytest.skip("this version of kernels has no local repositories")
    model, inputs = make_model("olmoe"), make_inputs("olmoe")
    expected = model(**inputs).logits
    repository = kernels.LocalLayerRepository(write_repository(tmp_path), layer_name=LAYER_NAME)
    experts = type(model.model.layers[0].mlp.experts)
    kernels.replace_kernel_forward_from_hub(experts, LAYER_NAME)
    with kernels.use_kernel_mapping({LAYER_NAME: {"cpu": repository}}):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    assert model.model.layers[0].mlp.experts.forward.__func__.__module__.endswith("layers")
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=2e-5)
