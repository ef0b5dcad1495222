from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moekernels.checkpoint import KEY_MAPS, CheckpointError, checkpoint_tensors
from tests.checkpoint.conftest import EXPERTS, FORMATS, HIDDEN, Base, Small, assert_loaded, load, write_single

GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"


@pytest.mark.parametrize("layout", FORMATS)
def test_every_format(tmp_path: Path, tensors: dict[str, Tensor], layout: str) -> None:
    FORMATS[layout](tmp_path, tensors)
    model = load(tmp_path)
    assert_loaded(model, tensors)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert not any(p.is_meta for p in model.parameters()) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("model", [Small, Base])
def test_prefix_or_none(tmp_path: Path, tensors: dict[str, Tensor], prefixed: bool, model: type) -> None:
    write_single(tmp_path, tensors if prefixed else {n.removeprefix("model."): t for n, t in tensors.items()})
    loaded = load(tmp_path, model)
    holder = loaded
    if model is Base:
        # The head is left in the file.
        holder = torch.nn.Module()
        holder.model = loaded
    assert_loaded(holder, tensors)


def test_fused_names(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_single(tmp_path, tensors)
    fused = {name: p.detach() for name, p in load(tmp_path).named_parameters()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in fused
    write_single(tmp_path, fused)
    assert_loaded(load(tmp_path), tensors)


def test_fused_and_per_expert_in_one_checkpoint(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    fused = torch.randn(EXPERTS, HIDDEN, 2)
    for name in list(tensors):
        if "layers.0" in name and "down_proj" in name:
            del tensors[name]
    write_single(tmp_path, {**tensors, "model.layers.0.mlp.experts.down_proj": fused})
    assert torch.equal(load(tmp_path).model.layers[0].mlp.experts.down_proj, fused)
    write_single(tmp_path, {**tensors, "model.layers.1.mlp.experts.down_proj": fused})
    with pytest.raises(CheckpointError, match="is also part of"):
        load(tmp_path)


@pytest.mark.parametrize("absent", [None, "lm_head.weight", "model.embed_tokens.weight"])
def test_any_name_of_a_tied_weight_will_do(tmp_path: Path, tensors: dict[str, Tensor], absent: str | None) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    expected = dict(tensors)
    tensors.pop(absent or "", None)
    write_single(tmp_path, tensors)
    model = load(tmp_path, arguments={"tied": True})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_loaded(model, expected)
    assert [name for name, _ in checkpoint_tensors(model, KEY_MAPS["olmoe"])].count("lm_head.weight") == 0


def test_dtype_and_what_stays_float32(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_single(tmp_path, {name: tensor.half() for name, tensor in tensors.items()})
    model = load(tmp_path, dtype=torch.bfloat16, keep_float32=lambda name: "lm_head" in name)
    assert model.lm_head.weight.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"].half().float())
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"].half().bfloat16())


def test_what_may_be_absent(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    del tensors["lm_head.weight"]
    write_single(tmp_path, tensors)
    model = load(tmp_path, may_be_absent=lambda name: name == "lm_head.weight")
    assert model.lm_head.weight.shape == (5, HIDDEN) and not model.lm_head.weight.is_meta
    with pytest.raises(CheckpointError, match=r"missing tensor 'lm_head\.weight'"):
        load(tmp_path)


def test_old_buffers_are_ignored(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_single(tmp_path, {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert_loaded(load(tmp_path), tensors)


def test_progress_bar(tmp_path: Path, tensors: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    write_single(tmp_path, tensors)
    load(tmp_path, progress=None)  # not a terminal
    assert capsys.readouterr().err == ""
    load(tmp_path, progress=True)
    assert "Loading weights: 100%" in capsys.readouterr().err


def test_a_file_may_be_replaced_after_loading(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_single(tmp_path, tensors)
    model = load(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\0" * size)
    assert_loaded(model, tensors)


def wrong(tensors: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """A checkpoint with one mistake."""
    extra = torch.zeros(1)
    if what == "missing expert":
        del tensors[GATE]
    elif what == "missing head":
        del tensors["lm_head.weight"]
    elif what == "unexpected":
        tensors["model.layers.0.mlp.shared_expert.weight"] = extra
    elif what == "one expert too many":
        tensors[GATE.replace("experts.2", "experts.3")] = tensors[GATE].clone()
    elif what == "same expert twice":
        tensors[GATE.replace("experts.2", "experts.02")] = tensors[GATE].clone()
    elif what == "same tensor with and without prefix":
        tensors[GATE.removeprefix("model.")] = tensors[GATE].clone()
    elif what == "transposed":
        tensors[GATE] = tensors[GATE].T.contiguous()
    elif what == "integer":
        tensors[GATE] = tensors[GATE].int()
    elif what == "float8":
        tensors[GATE] = tensors[GATE].to(torch.float8_e4m3fn)
    return tensors


@pytest.mark.parametrize("layout", ["safetensors", "sharded-safetensors", "pickle"])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing expert", f"missing tensor '{GATE}'"),
        ("missing head", "missing tensor 'lm_head.weight'"),
        ("unexpected", "unexpected tensor 'model.layers.0.mlp.shared_expert.weight'"),
        ("one expert too many", "'model.layers.1.mlp.experts.3.gate_proj.weight' is of expert 3, expected 3 experts"),
        ("same expert twice", "is the same tensor as 'model.layers.1.mlp.experts."),
        ("same tensor with and without prefix", "is the same tensor as"),
        ("transposed", f"'{GATE}' must have shape [2, 4], got [4, 2]"),
        ("integer", f"'{GATE}' must be a floating-point tensor, got torch.int32"),
    ],
)
def test_wrong_tensors(tmp_path: Path, tensors: dict[str, Tensor], layout: str, what: str, message: str) -> None:
    FORMATS[layout](tmp_path, wrong(tensors, what))
    with pytest.raises(CheckpointError, match=re.escape(message)) as raised:
        load(tmp_path)
    assert str(tmp_path) in str(raised.value) and "Small" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unsupported_dtype(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_single(tmp_path, wrong(tensors, "float8"))
    with pytest.raises(CheckpointError, match="must be a floating-point tensor, got an unsupported dtype"):
        load(tmp_path)


def test_many_problems_are_counted(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_single(tmp_path, {"lm_head.weight": tensors["lm_head.weight"]})
    # The embedding, and 3 projections of 3 experts in 2 layers.
    with pytest.raises(CheckpointError, match=r"missing tensor 'model\.embed_tokens\.weight'.*; and 11 more$"):
        load(tmp_path)


def test_nothing_is_half_loaded(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_single(tmp_path, wrong(tensors, "missing expert"))
    from moekernels.checkpoint import CheckpointReader, load_checkpoint

    with torch.device("meta"):
        model = Small()
    with pytest.raises(CheckpointError):
        load_checkpoint(model, CheckpointReader(tmp_path), KEY_MAPS["olmoe"], dtype=torch.float32, device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
