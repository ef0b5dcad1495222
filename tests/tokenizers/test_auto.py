"""Which tokenizer a directory gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from moekernels.tokenizers import (
    AutoTokenizer,
    LlamaTokenizer,
    LlamaTokenizerFast,
    M2M100Tokenizer,
    NllbTokenizer,
    NllbTokenizerFast,
    T5Tokenizer,
    T5TokenizerFast,
)
from tests.tokenizers.builders import phimoe
from tests.tokenizers.sentencepiece_builders import TEXTS, llama, m2m_100, nllb, t5


def phimoe_files(directory: Path) -> Path:
    """Both a `tokenizer.json` and a sentencepiece model."""
    return phimoe(llama(directory))


@pytest.mark.parametrize(
    ("write", "fast", "slow", "model_type"),
    [
        (m2m_100, M2M100Tokenizer, M2M100Tokenizer, "m2m_100"),
        (nllb, NllbTokenizerFast, NllbTokenizer, "nllb-moe"),
        (nllb, NllbTokenizerFast, NllbTokenizer, "nllb_moe"),
        (t5, T5TokenizerFast, T5Tokenizer, "switch_transformers"),
        (phimoe_files, LlamaTokenizerFast, LlamaTokenizer, "phimoe"),
    ],
)
def test_classes(write: Callable[..., Path], fast: Any, slow: Any, model_type: str, tmp_path: Path) -> None:
    write(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = dict(theirs(TEXTS))
    assert type(theirs).__name__ == fast.__name__
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is fast
    assert dict(AutoTokenizer.from_pretrained(tmp_path)(TEXTS)) == expected
    assert type(AutoTokenizer.from_pretrained(tmp_path, use_fast=False)) is slow
    # Without a class name the model type decides, even where a tokenizer.json could be read by a class of no kind.
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is fast
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS).input_ids == expected["input_ids"]
    # Only sentencepiece's files are left: by model type, then by what they are.
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is slow
    (tmp_path / "config.json").unlink()
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is slow


def test_nllb_checkpoints_of_the_m2m_architecture(tmp_path: Path) -> None:
    nllb(tmp_path, fast=False)
    (tmp_path / "config.json").write_text('{"model_type": "m2m_100"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, src_lang="ron_Latn")
    assert type(tokenizer) is NllbTokenizer and tokenizer.src_lang == "ron_Latn"


def test_missing_files(tmp_path: Path) -> None:
    m2m_100(tmp_path)
    (tmp_path / "sentencepiece.bpe.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*: there is no vocab\.json with sentencepiece\.bpe"):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(FileNotFoundError, match=r"there is no tokenizer\.json or spiece\.model"):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json or vocab\.json .* or tokenizer\.model"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_the_name_that_transformers_5_gives_additional_tokens(tmp_path: Path) -> None:
    nllb(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    codes = config.pop("additional_special_tokens")[:3]
    path.write_text(json.dumps({**config, "extra_special_tokens": codes, "src_lang": codes[0]}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.additional_special_tokens == codes
    assert set(codes) < set(tokenizer.lang_code_to_id)  # type: ignore[attr-defined]


def test_where_a_tokenizer_comes_from_is_no_setting_of_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    t5(tmp_path / "a", fast=False)
    options = {"revision": "main", "token": None, "local_files_only": True, "trust_remote_code": True}
    for made in (AutoTokenizer, T5Tokenizer):
        tokenizer = made.from_pretrained(tmp_path, subfolder="a", **options)
        assert not {*options, "subfolder"} & set(tokenizer.init_kwargs)
        assert tokenizer(TEXTS).input_ids == T5Tokenizer.from_pretrained(tmp_path / "a")(TEXTS).input_ids


def test_a_name_on_the_hub(tmp_path: Path) -> None:
    home = tmp_path / "models--owner--model"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(snapshot.name)
    expected = T5Tokenizer.from_pretrained(t5(snapshot, fast=False))(TEXTS).input_ids
    for made in (AutoTokenizer, T5Tokenizer):
        assert made.from_pretrained("owner/model", cache_dir=tmp_path)(TEXTS).input_ids == expected
