from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from moekernels.tokenizers import AutoTokenizer, BatchEncoding
from tests.tokenizers.builders import olmoe


def test_a_dictionary_with_attributes() -> None:
    encoding = BatchEncoding({"input_ids": [[1, 2], [3, 4]]}, tensor_type="pt")
    assert (
        torch.equal(encoding.input_ids, torch.tensor([[1, 2], [3, 4]])) and encoding.input_ids is encoding["input_ids"]
    )
    assert {**encoding} == dict(encoding) and isinstance(encoding, dict) and not encoding.is_fast
    assert encoding[:1]["input_ids"].tolist() == [[1, 2]]
    assert encoding.to("meta") is encoding and encoding.input_ids.device.type == "meta"
    with pytest.raises(AttributeError, match="no 'labels'; it has input_ids"):
        _ = encoding.labels
    with pytest.raises(KeyError, match="by name, row or slice"):
        encoding[1.5]
    with pytest.raises(ValueError, match="does not know its offsets"):
        encoding[0]


def test_offsets(tmp_path: Path) -> None:
    text = "The quick brown fox"
    encoding = AutoTokenizer.from_pretrained(olmoe(tmp_path))(text)
    assert "".join(encoding.tokens()).replace("\u0120", " ") == text
    token = encoding.char_to_token(0, text.index("brown"))
    first, last = encoding.token_to_chars(0, token)
    assert text[first:last].strip() and first <= text.index("brown") < last
    assert encoding.sequence_ids() == [0] * len(encoding.input_ids)
    assert len(encoding[0].ids) == len(encoding.input_ids) == len(encoding.word_ids())


def test_pickling(tmp_path: Path) -> None:
    encoding = AutoTokenizer.from_pretrained(olmoe(tmp_path))("some text")
    again = pickle.loads(pickle.dumps(encoding))
    assert again == encoding and again.tokens() == encoding.tokens()
