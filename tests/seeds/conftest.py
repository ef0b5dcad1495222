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

from tests.pipelines.checkpoints import olmoe
from tests.tokenizers.builders import phimoe
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


@pytest.fixture(scope="session")
def olmoe_1b_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, as released, and with a tokenizer that knows the words of the page."""
    texts = ("Hey, are you conscious? Can you talk to me?", "Bitcoin is", "Dionysus is the god of")
    directory = olmoe(tmp_path_factory.mktemp("OLMoE-1B-7B"), texts * 3)
    model = transformers.OlmoeForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    return directory


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
    model.generation_config.max_length = 40
    model.save_pretrained(directory, safe_serialization=False)
    return directory


@pytest.fixture(scope="session")
def phi_3_5_moe_instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the fields of the released configuration, a chat template, and code that must not run."""
    template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    directory = phimoe(tmp_path_factory.mktemp("Phi-3.5-MoE-instruct"), chat_template=template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    scaling = {**factors, "short_mscale": 1.243163121016122, "long_mscale": 1.243163121016122}
    config = transformers.PhimoeConfig(
        **{"vocab_size": len(tokenizer) + 11, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "initializer_range": 0.3},
        **{"attention_bias": True, "lm_head_bias": True, "rope_theta": 10000.0, "sliding_window": 131072},
        **{"input_jitter_noise": 0.01, "router_aux_loss_coef": 0.0},
        rope_scaling={"type": "longrope", **scaling, "original_max_position_embeddings": 64},
    )
    model = _random(transformers.PhimoeForCausalLM, config)
    model.to(torch.bfloat16).save_pretrained(directory)
    names = {"configuration_phimoe": ("AutoConfig", "PhiMoEConfig"), "modeling_phimoe": ("AutoModel", "PhiMoEModel")}
    for name in names:
        (directory / f"{name}.py").write_text("raise SystemExit('code of a checkpoint ran')")
    fields = json.loads((directory / "config.json").read_text())
    fields["architectures"] = ["PhiMoEForCausalLM"]
    fields["auto_map"] = {auto: f"{name}.{kind}" for name, (auto, kind) in names.items()}
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def _random(made: Any, config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)  # one with which the translations are neither empty nor all the same
        return made(config).eval()
