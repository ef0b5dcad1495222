"""Scores of generated tokens, against those transformers computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.generation.adapter import Adapted, AdaptedSeq2Seq, prompts, sources, tiny_m2m100, tiny_olmoe

ENDS = list(range(2, 30))
OPTIONS: dict[str, Any] = {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 12}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "kwargs", [{}, {"num_beams": 4, "num_return_sequences": 3}, {"num_beams": 2}], ids=["greedy", "beams", "best"]
)
def test_like_transformers(kwargs: dict[str, Any], normalize: bool) -> None:
    for ours, theirs, ids in (
        (Adapted(tiny_olmoe()), tiny_olmoe(), prompts(3, 6)),
        (AdaptedSeq2Seq(tiny_m2m100()), tiny_m2m100(), sources(3, 6)),
    ):
        out = ours.generate(ids, eos_token_id=ENDS, **OPTIONS, **kwargs)
        arguments = (out.sequences, out.scores, out.get("beam_indices"), normalize)
        got = ours.compute_transition_scores(*arguments)
        torch.testing.assert_close(got, theirs.compute_transition_scores(*arguments))
        if kwargs:
            lengths = (out.beam_indices >= 0).sum(dim=1)
            assert lengths.min() < lengths.max()
            if not normalize:
                torch.testing.assert_close(got.sum(dim=1) / lengths, out.sequences_scores)
