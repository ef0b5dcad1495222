from __future__ import annotations

import torch
from torch import Tensor

from moekernels.models.context import LayerOutput, Recorder
from moekernels.models.options import OptionalOutputs


def states(number: int) -> list[Tensor]:
    return [torch.full((1, 2, 3), float(index)) for index in range(number)]


def test_a_recorder_keeps_what_is_wanted() -> None:
    first, second, third, last = states(4)
    probs, logits = torch.rand(1, 2, 2, 2), torch.rand(2, 4)
    record = Recorder(
        OptionalOutputs(attentions=True, hidden_states=True, router_logits=True), has_cross_attention=True
    )
    assert record(first, LayerOutput(second, probs, logits, probs + 1)) is second
    record.passed(second)  # a layer that is left out
    assert record(second, (third, probs * 2)) is third  # type: ignore[arg-type]  # of a hook
    fields = record.fields(last)
    assert list(fields) == ["last_hidden_state", "hidden_states", "attentions", "cross_attentions", "router_logits"]
    assert [state[0, 0, 0].item() for state in fields["hidden_states"]] == [0, 1, 1, 3]
    assert fields["attentions"][1].equal(probs * 2) and fields["cross_attentions"][0].equal(probs + 1)
    assert len(fields["router_logits"]) == 1 and fields["last_hidden_state"] is last


def test_a_recorder_keeps_nothing_unasked() -> None:
    first, second = states(2)
    record = Recorder(OptionalOutputs(False, False, False))
    assert record(first, LayerOutput(second, torch.rand(1), torch.rand(1))) is second
    assert record.fields(second) == {"last_hidden_state": second}
    dense = Recorder(OptionalOutputs(attentions=False, hidden_states=False, router_logits=True))
    dense(first, LayerOutput(second))
    assert "router_logits" not in dense.fields(second)
