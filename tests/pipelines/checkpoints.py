"""Small checkpoints with random weights and tokenizers of their own, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tokenizers import builders
from tests.tokenizers.sentencepiece_builders import m2m_100, t5

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _saved(made: Any, config: Any, directory: Path, seed: int, **generation: Any) -> Path:
    torch.manual_seed(seed)
    model = made(config).eval()
    model.generation_config.update(**generation)
    model.save_pretrained(directory)
    return directory


def olmoe(directory: Path, texts: tuple[str, ...] = builders.TEXTS) -> Path:
    builders.olmoe(directory, texts, chat_template=TEMPLATE)
    config = transformers.OlmoeConfig(
        **{"vocab_size": 423, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.3},
        **{"max_position_embeddings": 256, "pad_token_id": 1, "eos_token_id": 0},
    )
    return _saved(transformers.OlmoeForCausalLM, config, directory, 3)


def m2m100(directory: Path) -> Path:
    m2m_100(directory)
    tokenizer = transformers.M2M100Tokenizer.from_pretrained(directory)
    config = transformers.M2M100Config(
        **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64},
        init_std=0.4,
        vocab_size=len(tokenizer) + tokenizer.num_madeup_words,
    )
    generation = {"num_beams": 5, "max_length": 12}
    return _saved(transformers.M2M100ForConditionalGeneration, config, directory, 1, **generation)


def switch(directory: Path) -> Path:
    t5(directory)
    config = transformers.SwitchTransformersConfig(
        **{"vocab_size": 828, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_experts": 4},
        **{"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        **{"decoder_start_token_id": 0, "initializer_factor": 3.0},
        task_specific_params={"summarization": {"prefix": "summarize: ", "max_length": 9, "num_beams": 2}},
    )
    return _saved(transformers.SwitchTransformersForConditionalGeneration, config, directory, 2)
