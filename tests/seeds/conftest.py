"""Checkpoints for the examples of the models' documentation pages: the released files, but small, with random weights.

transformers writes them. Every fixture is a directory, which takes the place of a name on the hub.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.tokenizers.sentencepiece_builders import m2m_100, nllb, t5

TINY: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "init_std": 0.3,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and wait for each other where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def m2m100_418m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = m2m_100(tmp_path_factory.mktemp("m2m100_418M"))
    tokenizer = transformers.M2M100Tokenizer.from_pretrained(directory)
    config = transformers.M2M100Config(**TINY, vocab_size=len(tokenizer) + tokenizer.num_madeup_words)
    model = _random(transformers.M2M100ForConditionalGeneration, config)
    model.generation_config.update(num_beams=5, max_length=24, early_stopping=True)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def nllb_moe_54b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved from the model without its head, as the released one was."""
    return _nllb_moe(tmp_path_factory.mktemp("nllb-moe-54b"), num_experts=4)


@pytest.fixture(scope="session")
def random_nllb_moe_2_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _nllb_moe(tmp_path_factory.mktemp("random-nllb-moe-2-experts"), num_experts=2)


def _nllb_moe(directory: Path, num_experts: int) -> Path:
    nllb(directory)
    vocab_size = len(transformers.NllbTokenizerFast.from_pretrained(directory)) + 2
    steps = {"encoder_sparse_step": 2, "decoder_sparse_step": 2}
    config = transformers.NllbMoeConfig(**TINY, **steps, num_experts=num_experts, vocab_size=vocab_size)
    model = _random(transformers.NllbMoeForConditionalGeneration, config)
    model.model.save_pretrained(directory)
    generation = {"decoder_start_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0}
    generation.update(num_beams=4, max_length=40)
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.fixture(scope="session")
def switch_base_8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a vocabulary padded beyond the tokenizer's, pickled, and the keys that transformers does not know."""
    directory = t5(tmp_path_factory.mktemp("switch-base-8"))
    tokenizer = transformers.T5TokenizerFast.from_pretrained(directory)
    config = transformers.SwitchTransformersConfig(
        **{"vocab_size": len(tokenizer) + 28, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4},
        **{"num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
        **{"router_type": "tokens_masked", "num_selected_experts": 1, "feed_forward_proj": "relu"},
        decoder_start_token_id=0,
    )
    model = _random(transformers.SwitchTransformersForConditionalGeneration, config)
    model.save_pretrained(directory, safe_serialization=False)
    return directory


def _random(made: Any, config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)  # one with which the translations are neither empty nor all the same
        return made(config).eval()
