"""Checkpoint directories that transformers reads and wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from moekernels.checkpoint import CheckpointError, checkpoint_tensors
from moekernels.models import (
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from tests.models.encoder_decoder import rewrite
from tests.models.switch_checkpoints import TINY, VOCAB, Pair, assert_close, batch, pair, reloaded

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
def test_transformers_reads_what_we_save(plain: Pair, tmp_path: Path, gated: bool) -> None:
    ours = plain.ours
    if gated:
        torch.manual_seed(0)
        ours = SwitchTransformersForConditionalGeneration(
            SwitchTransformersConfig(**{**TINY, "dense_act_fn": "gated-gelu"})
        ).eval()
    ours.save_pretrained(tmp_path, max_shard_size="20KB")
    saved: dict[str, Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        saved |= load_file(file)
    assert_close(reloaded(tmp_path)(**batch()).logits, ours(**batch()).logits)
    if gated:
        for name in ("wi_0", "wi_1", "wo"):
            assert f"encoder.block.1.layer.1.mlp.experts.expert_4.{name}.weight" in saved
            assert f"decoder.block.0.layer.2.mlp.{name}.weight" in saved
        return
    assert saved.keys() == load_file(plain.directory / "model.safetensors").keys()
    theirs, info = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info
    assert_close(theirs(**batch()).logits, plain.theirs(**batch()).logits)


@torch.no_grad()
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("tied", ["all", "shared.weight", "encoder.embed_tokens.weight", "lm_head.weight"])
def test_layouts_of_the_hub(plain: Pair, tmp_path: Path, tied: str, pickled: bool) -> None:
    tensors = dict(plain.theirs.state_dict())
    for name in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        if tied not in ("all", name):
            del tensors[name]
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(8, 4)
    # Released files are in half precision, but for the routers that ran once.
    half = {n: t if "classifier" in n else t.bfloat16() for n, t in tensors.items()}
    rewrite(plain.directory, tmp_path, half, pickled)
    ours = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16, progress=False)
    router = "encoder.block.1.layer.1.mlp.router.classifier.weight"
    assert torch.equal(ours.get_parameter(router), tensors[router]) and ours.shared.weight.dtype == torch.bfloat16
    rewrite(plain.directory, tmp_path, tensors, pickled)
    assert_close(reloaded(tmp_path)(**batch()).logits, plain.theirs(**batch()).logits)


@torch.no_grad()
def test_sharded_pickles(plain: Pair, tmp_path: Path) -> None:
    plain.theirs.save_pretrained(tmp_path, safe_serialization=False, max_shard_size="30KB")
    assert len(list(tmp_path.glob("pytorch_model-*.bin"))) > 1
    assert_close(reloaded(tmp_path)(**batch()).logits, plain.theirs(**batch()).logits)


def test_incomplete_checkpoints(plain: Pair, tmp_path: Path) -> None:
    tensors = load_file(plain.directory / "model.safetensors")
    name = "encoder.block.1.layer.1.mlp.experts.expert_3.wo.weight"
    del tensors[name]
    rewrite(plain.directory, tmp_path, tensors)
    with pytest.raises(CheckpointError, match=f"missing tensor '{name}'"):
        reloaded(tmp_path)


@torch.no_grad()
def test_resizing_the_vocabulary(tmp_path: Path) -> None:
    theirs, ours, _ = pair(tmp_path)
    embedding = ours.resize_token_embeddings(VOCAB + 7)
    assert embedding is ours.shared is ours.decoder.embed_tokens
    assert ours.lm_head.weight is embedding.weight and ours.config.vocab_size == VOCAB + 7
    assert_close(ours(**batch()).logits[..., :VOCAB], theirs(**batch()).logits)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_new_weights_are_spread_as_in_the_reference(factor: float) -> None:
    fields = {**TINY, "d_model": 96, "d_kv": 16, "d_ff": 128, "initializer_factor": factor}
    fields |= {"tie_word_embeddings": False, "dense_act_fn": "relu"}
    ours = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**fields))
    theirs = transformers.SwitchTransformersForConditionalGeneration(transformers.SwitchTransformersConfig(**fields))
    expected = dict(theirs.named_parameters())
    for name, tensor in checkpoint_tensors(ours, ours.key_map):
        if "norm" in name:
            assert torch.equal(tensor, expected[name])
        else:
            # Few numbers are a poor estimate.
            low, high = (0.85, 1.15) if tensor.numel() > 1000 else (0.5, 2.0)
            assert low < (tensor.std() / expected[name].std()).item() < high, name
