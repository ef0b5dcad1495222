"""Checkpoints with an embedding each for encoder, decoder and head, as transformers 5 saves untied models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from moekernels.models import AutoModelForSeq2SeqLM, SwitchTransformersEncoderModel
from tests.models.test_training import CALM
from tests.models.tiny import CONFIGS

SEQ2SEQ = {"m2m_100": "M2M100", "nllb-moe": "NllbMoe", "switch_transformers": "SwitchTransformers"}
SOURCE = torch.tensor([[5, 9, 12, 33, 2], [6, 3, 8, 17, 40]])
TARGET = torch.tensor([[2, 9, 10], [2, 4, 7]])
pytestmark = [pytest.mark.filterwarnings("ignore::Warning:transformers"), pytest.mark.parametrize("name", SEQ2SEQ)]


def untied(name: str, directory: Path) -> Any:
    """A model of transformers 4.56.2, which shares the embedding when it is made, with three, saved whole."""
    fields = {**CONFIGS[name].to_dict(), **CALM[name], "tie_word_embeddings": False}
    config = getattr(transformers, f"{SEQ2SEQ[name]}Config")(**copy.deepcopy(fields))
    torch.manual_seed(3)
    model = getattr(transformers, f"{SEQ2SEQ[name]}ForConditionalGeneration")(config).eval()
    base = getattr(model, "model", model)
    for stack in (base.encoder, base.decoder):
        stack.embed_tokens = copy.deepcopy(base.shared)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file({key: value.clone() for key, value in model.state_dict().items()}, directory / "model.safetensors")
    config.save_pretrained(directory)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=SOURCE, decoder_input_ids=TARGET).logits


def test_every_embedding_is_used(name: str, tmp_path: Path) -> None:
    theirs = untied(name, tmp_path)
    ours: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, progress=False)
    expected = logits(theirs)
    torch.testing.assert_close(logits(ours), expected, atol=2e-5, rtol=1e-5)
    base = ours.base_model
    assert len({id(m.weight) for m in (base.shared, base.encoder.embed_tokens, base.decoder.embed_tokens)}) == 3
    ours.save_pretrained(tmp_path / "b")
    for again in (
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "b", progress=False),
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path, device_map={"": "cpu"}, progress=False),
        AutoModelForSeq2SeqLM.from_pretrained(None, config=ours.config, state_dict=theirs.state_dict(), progress=False),
    ):
        assert torch.equal(logits(again), logits(ours))
    # A vocabulary of another size is that of all of them, and each keeps its rows.
    modules = {"shared": base.shared, "encoder": base.encoder.embed_tokens, "decoder": base.decoder.embed_tokens}
    before = {key: module.weight.detach().clone() for key, module in modules.items()}
    for size in (70, 50):
        ours.resize_token_embeddings(size)
        assert logits(ours).shape[-1] == size
        for key, module in modules.items():
            assert module.weight.shape[0] == module.num_embeddings == size
            assert torch.equal(module.weight[:50], before[key][:50])
    torch.testing.assert_close(logits(ours), expected[..., :50], atol=2e-5, rtol=1e-5)


def test_an_encoder_alone(name: str, tmp_path: Path) -> None:
    theirs = untied(name, tmp_path)
    if name == "switch_transformers":
        ours: Any = SwitchTransformersEncoderModel.from_pretrained(tmp_path, progress=False)
        ours = ours(input_ids=SOURCE)
    else:
        ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, progress=False).get_encoder()(input_ids=SOURCE)
    expected = theirs.get_encoder()(input_ids=SOURCE)
    torch.testing.assert_close(ours.last_hidden_state, expected[0], atol=2e-5, rtol=1e-5)


def test_a_shared_embedding_stays_shared(name: str, tmp_path: Path) -> None:
    """Where weights are tied, or the file has no embedding but the shared one."""
    untied(name, tmp_path)
    tied: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, tie_word_embeddings=True, progress=False)
    assert tied.base_model.encoder.embed_tokens is tied.base_model.shared
    config = copy.deepcopy(CONFIGS[name])
    config.tie_word_embeddings = False
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "b")
    one: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "b", progress=False)
    assert one.base_model.decoder.embed_tokens is one.base_model.shared
    assert one.lm_head.weight is not one.base_model.shared.weight
