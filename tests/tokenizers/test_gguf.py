"""Tokenizers from the metadata of GGUF files, against the files they were written from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer

import moekernels as mk
from moekernels.checkpoint import CheckpointError
from tests.tokenizers import builders


def _write(path: Path, architecture: str, model: str, state: dict[str, Any], **entries: Any) -> None:
    """The metadata that llama.cpp's converter makes of a `tokenizer.json`."""
    vocabulary = dict(state["model"]["vocab"])
    added = {token["content"]: token for token in state["added_tokens"]}
    vocabulary |= {content: token["id"] for content, token in added.items()}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = [3 if token in added and added[token]["special"] else 4 if token in added else 1 for token in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    writer = gguf.GGUFWriter(os.fspath(path), architecture)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if model == "gpt2":
        writer.add_tokenizer_pre(entries.pop("pre", "olmo"))
        writer.add_token_merges(merges)
    else:
        # sentencepiece gives pieces that are joined first the higher scores.
        ranks = {merge.replace(" ", ""): -float(rank) for rank, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([ranks.get(token, -1e6) for token in tokens])
    for name, value in entries.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_uint32("dummy.key", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_byte_level(tmp_path: Path) -> None:
    state = json.loads(builders.neox_json())
    state["normalizer"] = None  # which GGUF does not know
    template = "{{ messages[0]['content'] }}"
    _write(
        tmp_path / "m.gguf", "olmoe", "gpt2", state,
        eos_token_id=0, pad_token_id=1, add_bos_token=False, chat_template=template,
    )  # fmt: skip
    found = mk.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    expected = Tokenizer.from_str(json.dumps(state))
    for text in builders.PROBES:
        ids = expected.encode(text).ids
        assert found(text).input_ids == ids
        assert found.decode(ids) == expected.decode(ids, skip_special_tokens=False)
    assert (found.eos_token, found.pad_token, found.bos_token) == ("<|endoftext|>", "<|padding|>", None)
    assert found.chat_template == template and type(found) is mk.GPTNeoXTokenizerFast
    found.save_pretrained(tmp_path / "saved")
    assert mk.AutoTokenizer.from_pretrained(tmp_path / "saved")("a  b").input_ids == expected.encode("a  b").ids


def test_pieces(tmp_path: Path) -> None:
    state = json.loads(builders.llama_json())
    _write(
        tmp_path / "m.gguf", "phimoe", "llama", state,
        bos_token_id=1, eos_token_id=2, unk_token_id=0, add_bos_token=True,
    )  # fmt: skip
    found = mk.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    expected = Tokenizer.from_str(builders.llama_json())
    for text in builders.PROBES:
        if "<|" not in text:
            assert found(text).input_ids == expected.encode(text).ids, text
            ids = expected.encode(text).ids
            assert found.decode(ids, skip_special_tokens=True) == expected.decode(ids)
    assert (found.bos_token_id, found.eos_token_id) == (1, 2) and type(found) is mk.LlamaTokenizerFast


def test_errors(tmp_path: Path) -> None:
    state = json.loads(builders.neox_json())
    _write(tmp_path / "m.gguf", "olmoe", "gpt2", state, pre="qwen2")
    with pytest.raises(CheckpointError, match=r"m.gguf: tokenizer.ggml.pre must be one of gpt-2, olmo.*, got 'qwen2'"):
        mk.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    _write(tmp_path / "m.gguf", "olmoe", "bert", state)
    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.model must be 'gpt2' or 'llama' .*, got 'bert'"):
        mk.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    _write(tmp_path / "m.gguf", "llama", "gpt2", state)
    with pytest.raises(CheckpointError, match=r"general.architecture must be 'olmoe' or 'phimoe', got 'llama'"):
        mk.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
