"""What training scripts and data collators do with a tokenizer, against transformers 4.56.2."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moekernels.tokenizers import AutoTokenizer
from tests.tokenizers.sentencepiece_builders import TEXTS, m2m_100, nllb, t5

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")
KINDS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "nllb": (nllb, {"src_lang": "eng_Latn", "tgt_lang": "fra_Latn"}),
    "nllb slow": (nllb, {"src_lang": "eng_Latn", "tgt_lang": "fra_Latn", "use_fast": False}),
    "m2m_100": (m2m_100, {"src_lang": "en", "tgt_lang": "fr"}),
    "t5": (t5, {}),
    "t5 slow": (t5, {"use_fast": False}),
}


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    build, settings = KINDS[request.param]
    build(tmp_path)
    return tuple(made.from_pretrained(tmp_path, **settings) for made in (AutoTokenizer, transformers.AutoTokenizer))


def plain(value: Any) -> Any:
    if hasattr(value, "items"):
        return {name: plain(item) for name, item in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


COLLATORS: dict[str, tuple[Callable[[Any], Any], list[dict[str, Any]]]] = {
    "seq2seq": (
        lambda t: transformers.DataCollatorForSeq2Seq(t, pad_to_multiple_of=4),
        [{"input_ids": [5, 6, 7], "labels": [8, 9]}, {"input_ids": [4], "labels": [5, 6, 7]}],
    ),
    "padding": (
        lambda t: transformers.DataCollatorWithPadding(t, padding="max_length", max_length=9),
        [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}, {"input_ids": [4], "attention_mask": [1]}],
    ),
    "language model": (
        lambda t: transformers.DataCollatorForLanguageModeling(t, mlm=False),
        [{"input_ids": [5, 6, 7]}, {"input_ids": [4, 8]}],
    ),
}


@pytest.mark.parametrize("name", COLLATORS)
def test_collators(pair: tuple[Any, Any], name: str) -> None:
    make, rows = COLLATORS[name]
    got, expected = (plain(make(t)([dict(row) for row in rows])) for t in pair)
    assert got == expected


def test_masked_language_modelling(pair: tuple[Any, Any]) -> None:
    """The collator asks which tokens are special."""
    rows = [{"input_ids": pair[1](text)["input_ids"]} for text in TEXTS[:3]]
    results = []
    for tokenizer in pair:
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
        torch.manual_seed(1)
        results.append(plain(transformers.DataCollatorForLanguageModeling(tokenizer)([dict(row) for row in rows])))
    assert results[0] == results[1]
    got, expected = (t.get_special_tokens_mask(rows[0]["input_ids"], already_has_special_tokens=True) for t in pair)
    assert got == expected


def test_targets_by_a_context(pair: tuple[Any, Any]) -> None:
    """Of this thread alone."""
    ours, theirs = pair
    sources: list[Any] = []
    with ours.as_target_tokenizer(), pytest.warns(UserWarning), theirs.as_target_tokenizer():
        assert dict(ours(TEXTS[:3], padding=True)) == dict(theirs(TEXTS[:3], padding=True))
        thread = threading.Thread(target=lambda: sources.append(dict(ours(TEXTS[:3]))))
        thread.start()
        thread.join()
    assert dict(ours(TEXTS[:3])) == dict(theirs(TEXTS[:3])) == sources[0]


def test_smaller_arguments(pair: tuple[Any, Any], recwarn: pytest.WarningsRecorder) -> None:
    ours, theirs = pair
    for tokenizer in pair:
        tokenizer.add_tokens(["<new>"])
        tokenizer.model_max_length = 5
    ids = theirs(f"{TEXTS[0]} <new> a", verbose=False)["input_ids"]
    assert ours(f"{TEXTS[0]} <new> a", verbose=False).input_ids == ids
    assert not [warning for warning in recwarn if "more than the 5" in str(warning.message)]
    for between in (True, False):
        options = {"skip_special_tokens": False, "spaces_between_special_tokens": between}
        assert ours.decode(ids, **options) == theirs.decode(ids, **options)
        assert ours.batch_decode([ids], **options) == theirs.batch_decode([ids], **options)
    got, expected = (
        {name: str(token) for name, token in t.special_tokens_map_extended.items() if "additional" not in name}
        for t in pair
    )
    assert got == expected


@pytest.mark.parametrize("broken", [None, 3.5, float("nan"), b"bytes"])
def test_a_row_that_is_no_text(pair: tuple[Any, Any], broken: Any) -> None:
    """As data sets with gaps have them; a text with half a surrogate pair is no text either."""
    with pytest.raises(TypeError, match=f"every text must be a string, got {type(broken).__name__}"):
        pair[0]([TEXTS[0], broken])
    with pytest.raises(ValueError, match=r"a text has a lone surrogate, '\\udcff', at 1, .* not UTF-8"):
        pair[0]([TEXTS[0], "a\udcffb"])
