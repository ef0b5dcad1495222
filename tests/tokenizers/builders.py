"""Tokenizers trained on the spot, of the kinds the models use."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = (
    "The quick brown fox jumps over the lazy dog, doesn't it?\n\n  Indented, with 12345 numbers and CamelCase words.",
    "def route(logits, top_k):\n\treturn logits.softmax(-1).topk(top_k)  # scores [T, K]",
    "Модель выбирает экспертов для каждого слова.",
    "模型為每個詞選擇專家。日本語の文章もあります。",
    "النموذج يختار الخبراء",
    "โมเดลเลือกผู้เชี่ยวชาญ",
    "naïve café 👩\u200d🚀 🇫🇷 é e\u0301",
)
# Harder than what was trained on: only white space, nothing, special tokens in the text, unseen scripts.
PROBES = (
    *TEXTS,
    "",
    " ",
    "\n\n\n   \t",
    "a<|endoftext|> b <|padding|>",
    " leading and trailing ",
    "\u0f56\u0f7c\u0f51 \u13a3\u13b3",
    "x" * 300,
)  # fmt: skip


@cache
def neox_json(texts: tuple[str, ...] = TEXTS) -> str:
    """Byte-level BPE like OLMoE's: two special tokens first, runs of spaces as added tokens last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    return tokenizer.to_str()


@cache
def llama_json() -> str:
    """Pieces with a metaspace and byte fallback, and a template that adds the beginning of text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in pieces[:3]]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens([AddedToken("<|user|>", rstrip=True, normalized=False, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer.to_str()


def write(directory: Path, tokenizer_json: str, config: dict[str, Any] | None, **files: str) -> Path:
    """A checkpoint directory with a tokenizer in it."""
    (directory / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return directory


def olmoe(directory: Path, texts: tuple[str, ...] = TEXTS, **changes: Any) -> Path:
    """As the OLMoE checkpoints have it."""
    config = {
        "tokenizer_class": "GPTNeoXTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|padding|>",
        "unk_token": None,
        "model_max_length": 1000000000000000019884624838656,
        "added_tokens_decoder": {
            str(token["id"]): {name: token[name] for name in token if name != "id"}
            for token in json.loads(neox_json(texts))["added_tokens"]
        },
        "clean_up_tokenization_spaces": True,
        **changes,
    }
    return write(directory, neox_json(texts), config)


def phimoe(directory: Path, **changes: Any) -> Path:
    """As Phi-3.5-MoE has it, with the beginning of text on."""
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "legacy": False,
        "pad_token": "</s>",
        **changes,
    }
    return write(directory, llama_json(), config)
