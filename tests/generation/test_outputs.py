from __future__ import annotations

import pytest
import torch

from moekernels.generation import GenerateDecoderOnlyOutput


def test_mapping_tuple_and_attributes() -> None:
    ids, logits = torch.ones(1, 2), (torch.zeros(1, 3),)
    output = GenerateDecoderOnlyOutput(sequences=ids, logits=logits)
    assert output.sequences is ids and output["sequences"] is ids and output[0] is ids
    assert output[1] is logits and output[:2] == (ids, logits) and output.to_tuple() == (ids, logits)
    assert output.keys() == ["sequences", "logits"] and list(output) == ["sequences", "logits"] and len(output) == 2
    assert "scores" not in output and output.scores is None
    assert output.get("scores", 5) == 5 and output.get("logits") is logits
    assert dict(output.items()) == {"sequences": ids, "logits": logits} and output.values()[1] is logits
    with pytest.raises(KeyError, match="scores"):
        output["scores"]
    with pytest.raises(IndexError):
        output[2]
