"""`generate` with an encoder, against transformers' on the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from moekernels.generation import BaseStreamer, GenerationConfig
from tests.generation.adapter import EOS, PAD, AdaptedSeq2Seq, sources, tiny_m2m100


def both(ids: torch.Tensor | None, **kwargs: Any) -> tuple[Any, Any]:
    torch.manual_seed(11)
    ours = AdaptedSeq2Seq(tiny_m2m100()).generate(ids, **kwargs)
    torch.manual_seed(11)
    return ours, tiny_m2m100().generate(ids, **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"max_length": 9},
        {"max_new_tokens": 20, "use_cache": False},
        {"max_new_tokens": 20, "forced_bos_token_id": 7},
        {"max_new_tokens": 20, "forced_bos_token_id": 7, "begin_suppress_tokens": [40], "forced_eos_token_id": EOS},
        {"max_new_tokens": 20, "decoder_start_token_id": 5},
        {"max_new_tokens": 20, "eos_token_id": list(range(2, 20)), "min_length": 6},
        {"max_new_tokens": 20, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 20, "encoder_no_repeat_ngram_size": 1},
        {"max_new_tokens": 20, "encoder_no_repeat_ngram_size": 2, "encoder_repetition_penalty": 2.0},
        {"max_new_tokens": 20, "do_sample": True, "top_p": 0.9},
        {"max_new_tokens": 20, "do_sample": True, "num_return_sequences": 3},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "default",
)
def test_tokens_are_those_of_transformers(kwargs: dict[str, Any]) -> None:
    for ids in (sources(1, 6), sources(4, 8, padded=True)):
        ours, theirs = both(ids, **kwargs)
        assert torch.equal(ours, theirs)
        assert (ours[:, 0] == kwargs.get("decoder_start_token_id", EOS)).all()


def test_the_encoder_runs_once_and_every_token_once() -> None:
    model = AdaptedSeq2Seq(tiny_m2m100())
    model.generate(sources(2, 6), max_new_tokens=9, eos_token_id=None, num_beams=3)
    assert model.encoder_runs == 1
    assert [call["decoder_input_ids"].shape for call in model.calls] == [(6, 1)] * 9
    assert [call["cache_position"].tolist() for call in model.calls] == [[n] for n in range(9)]


def test_encoder_outputs_given() -> None:
    ids = sources(3, 7, padded=True)
    mask = (ids != PAD).long()
    encoded = tiny_m2m100().get_encoder()(ids, attention_mask=mask)
    expected = AdaptedSeq2Seq(tiny_m2m100()).generate(ids, num_beams=2)
    for given in (encoded, (encoded[0],), BaseModelOutput(last_hidden_state=encoded[0])):
        for more in ({"attention_mask": mask}, {"input_ids": ids}):
            model = AdaptedSeq2Seq(tiny_m2m100())
            assert torch.equal(model.generate(encoder_outputs=given, num_beams=2, **more), expected)
            assert model.encoder_runs == 0
    # Without a mask the padding counts as source.
    unmasked = AdaptedSeq2Seq(tiny_m2m100()).generate(encoder_outputs=encoded)
    assert torch.equal(unmasked, tiny_m2m100().generate(encoder_outputs=encoded))


def test_source_as_embeddings() -> None:
    ids = sources(2, 6)
    embeds = tiny_m2m100().get_input_embeddings()(ids).detach()
    expected = AdaptedSeq2Seq(tiny_m2m100()).generate(ids, max_new_tokens=9)
    assert torch.equal(AdaptedSeq2Seq(tiny_m2m100()).generate(inputs_embeds=embeds, max_new_tokens=9), expected)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_decoder_input_ids(num_beams: int) -> None:
    ids = sources(2, 6)
    begun = torch.tensor([[11, 12, 13], [14, 15, 16]])
    started = torch.cat([torch.full((2, 1), EOS), begun], dim=1)
    ours, theirs = both(ids, decoder_input_ids=begun, max_new_tokens=8, num_beams=num_beams)
    assert torch.equal(ours, theirs) and torch.equal(ours[:, :4], started)
    model = AdaptedSeq2Seq(tiny_m2m100())
    assert torch.equal(model.generate(ids, decoder_input_ids=started, max_new_tokens=8, num_beams=num_beams), ours)
    chunks = {"prefill_chunk_size": 2, "num_beams": num_beams}
    assert torch.equal(model.generate(ids, decoder_input_ids=started, max_new_tokens=8, **chunks), ours)


def test_decoder_attention_mask() -> None:
    ids = sources(2, 6)
    begun = torch.tensor([[PAD, EOS, 12, 13], [EOS, 14, 15, 16]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    kwargs = {"decoder_input_ids": begun, "decoder_attention_mask": mask, "max_new_tokens": 6}
    ours, theirs = both(ids, **kwargs)
    assert torch.equal(ours, theirs)
    longer = both(ids, **{**kwargs, "decoder_input_ids": begun[:, 2:], "decoder_attention_mask": mask[:, 2:]})
    assert torch.equal(*longer)
    model = AdaptedSeq2Seq(tiny_m2m100())
    assert not torch.equal(model.generate(ids, decoder_input_ids=begun, max_new_tokens=6), ours)


def test_outputs() -> None:
    options = {f"output_{name}": True for name in ("scores", "logits", "hidden_states", "attentions")}
    ours, theirs = both(sources(2, 6, padded=True), max_new_tokens=5, return_dict_in_generate=True, **options)
    assert type(ours).__name__ == type(theirs).__name__ == "GenerateEncoderDecoderOutput"
    assert ours.keys() == list(theirs.keys())
    for field in ours.keys():  # noqa: SIM118
        if field != "past_key_values":
            torch.testing.assert_close(ours[field], theirs[field])
    assert ours.past_key_values.get_seq_length() == ours.sequences.shape[1] - 1


def test_streamer() -> None:
    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.pieces.append(value.tolist())

        def end(self) -> None:
            self.pieces.append("end")

    streamer = Kept()
    out = AdaptedSeq2Seq(tiny_m2m100()).generate(sources(1, 6), max_new_tokens=5, eos_token_id=None, streamer=streamer)
    assert streamer.pieces == [[[EOS]], *([token] for token in out[0, 1:].tolist()), "end"]


def test_the_generation_config_of_the_checkpoint_counts() -> None:
    own = GenerationConfig(num_beams=5, max_length=17, early_stopping=True, decoder_start_token_id=EOS,
                           eos_token_id=[EOS, 30, 31, 32], pad_token_id=PAD)  # fmt: skip
    ids = sources(2, 6)
    expected = tiny_m2m100().generate(
        ids, num_beams=5, max_length=17, early_stopping=True, eos_token_id=[EOS, 30, 31, 32]
    )
    model = AdaptedSeq2Seq(tiny_m2m100(), own)
    assert torch.equal(model.generate(ids), expected)
    # It gives way to what the call says.
    assert torch.equal(model.generate(ids, num_beams=1, early_stopping=False), tiny_m2m100().generate(
        ids, max_length=17, eos_token_id=[EOS, 30, 31, 32]))  # fmt: skip


HIDDEN = torch.zeros(2, 6, 32)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ([], {}, "there is no source"),
        (["text"], {}, r"inputs must be an integer tensor \[batch, length\], got str"),
        ([torch.ones(2, 6)], {}, r"got torch.float32 \[2, 6\]"),
        ([torch.ones(2, 0, dtype=torch.long)], {}, "at least one token per source"),
        ([sources(2, 6)], {"input_ids": sources(2, 6)}, "given twice, as inputs and as input_ids"),
        ([sources(2, 6)], {"inputs_embeds": HIDDEN}, "given twice, as inputs and as inputs_embeds"),
        ([], {"inputs_embeds": HIDDEN[0]}, r"inputs_embeds must be \[batch, length, hidden\]"),
        ([sources(2, 6)], {"attention_mask": torch.ones(2, 5)}, r"attention_mask must be \[2, 6\] like the source"),
        ([], {"encoder_outputs": (HIDDEN,), "attention_mask": torch.ones(3, 6)}, r"attention_mask must be \[2, 6\]"),
        ([sources(3, 6)], {"encoder_outputs": (HIDDEN,)}, r"\[2, 6, 32\] and the source \[3, 6\] differ"),
        ([sources(2, 5)], {"encoder_outputs": (HIDDEN,)}, "differ in batch or length"),
        ([], {"encoder_outputs": HIDDEN}, "must be what the encoder returns.*got Tensor"),
        ([], {"encoder_outputs": (HIDDEN[0],)}, r"got tuple of \[6, 32\]"),
        ([sources(2, 6)], {"decoder_input_ids": torch.ones(3, 2, dtype=torch.long)}, r"integer tensor \[2, length\]"),
        ([sources(2, 6)], {"decoder_input_ids": torch.ones(2, 2)}, r"got torch.float32 \[2, 2\]"),
        ([sources(2, 6)], {"decoder_attention_mask": torch.ones(2, 2)}, "goes with decoder_input_ids"),
        (
            [sources(2, 6)],
            {"decoder_input_ids": torch.full((2, 2), EOS), "decoder_attention_mask": torch.ones(2, 3)},
            r"decoder_attention_mask must be \[2, 2\]",
        ),
        ([sources(2, 6)], {"max_length": 1}, "prompt has 1 tokens"),
        ([sources(2, 6)], {"decoder_start_token_id": None, "bos_token_id": None}, "needs decoder_start_token_id"),
    ],
)
def test_errors_name_the_argument(args: list[Any], kwargs: dict[str, Any], message: str) -> None:
    model = AdaptedSeq2Seq(tiny_m2m100())
    with pytest.raises(ValueError, match=message):
        model.generate(*args, **kwargs)
    assert not model.calls
