"""Batches made for training: `generate(**batch)`, and Hugging Face's Seq2SeqTrainer, which calls it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from moekernels.nn import DynamicCache, StaticCache
from tests.models.tiny import CONFIGS, head_class, inputs

DECODERS = [name for name in CONFIGS if not CONFIGS[name].is_encoder_decoder]
SEQ2SEQ = [name for name in CONFIGS if CONFIGS[name].is_encoder_decoder]
IDS = torch.tensor([[5, 9, 12, 33, 4], [6, 3, 8, 17, 40]])


def model(name: str) -> Any:
    torch.manual_seed(0)
    made = head_class(name).from_config(copy.deepcopy(CONFIGS[name])).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_labels_have_no_effect(name: str) -> None:
    made = model(name)
    batch = {key: value for key, value in inputs(name).items() if key != "decoder_input_ids"}
    expected = made.generate(**batch, max_new_tokens=4)
    training = {"labels": torch.full((2, 3), -100), "num_items_in_batch": 7}
    assert torch.equal(made.generate(**batch, **training, max_new_tokens=4), expected)
    with pytest.raises(ValueError, match=r"nor keywords of the model: label$"):
        made.generate(**batch, label=IDS)


def step_by_step(made: Any, ids: Tensor, positions: Tensor, steps: int, mask: Tensor | None = None) -> Tensor:
    """Greedy decoding with one pass over everything per token, and positions that go on from the last."""
    for _ in range(steps):
        logits = made(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
        positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


@pytest.mark.parametrize("name", DECODERS)
def test_position_ids_go_on(name: str) -> None:
    made = model(name)
    options: dict[str, Any] = {"max_new_tokens": 7, "eos_token_id": None, "pad_token_id": None}
    positions = torch.tensor([[0, 1, 2, 7, 9], [3, 4, 4, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    for given in (positions, positions[:1]):
        expected = step_by_step(made, IDS, given.expand(2, -1), 7)
        assert torch.equal(made.generate(IDS, position_ids=given, **options), expected)
        static = StaticCache(made.config, 2, 11)
        assert torch.equal(made.generate(IDS, position_ids=given, past_key_values=static, **options), expected)
        assert torch.equal(
            made.generate(IDS, position_ids=given, num_return_sequences=1, num_beams=1, **options), expected
        )
    masked = made.generate(IDS, attention_mask=mask, position_ids=positions, **options)
    assert torch.equal(masked, step_by_step(made, IDS, positions, 7, mask))
    scores = {"return_dict_in_generate": True, "output_logits": True, **options, "max_new_tokens": 1}
    with_positions = made.generate(IDS, attention_mask=mask, position_ids=positions, **scores).logits[0]
    assert not torch.allclose(with_positions, made.generate(IDS, attention_mask=mask, **scores).logits[0])
    # Those that a model is given anyway.
    own = (mask.cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(
        made.generate(IDS, attention_mask=mask, position_ids=own, num_beams=2, **options),
        made.generate(IDS, attention_mask=mask, num_beams=2, **options),
    )
    for wrong in (positions[:, 1:], positions.float(), [1, 2, 3, 4, 5]):
        with pytest.raises(ValueError, match=r"position_ids must be an integer tensor \[2, 5\]"):
            made.generate(IDS, position_ids=wrong, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_that_is_too_short(name: str) -> None:
    """The error comes before the first token, from a pass alone too."""
    made = model(name)
    given = {"input_ids": IDS}
    wrapped = (lambda cache: cache) if name in DECODERS else __import__("moekernels").nn.EncoderDecoderCache
    begin = 5 if name in DECODERS else 1
    cache = wrapped(StaticCache(made.config, 2, 8))
    steps: list[int] = []
    made.register_forward_hook(lambda *_: steps.append(1))
    with pytest.raises(ValueError, match=rf"has room for 8 positions, but the prompt .* take {begin + 8}"):
        made.generate(**given, past_key_values=cache, max_new_tokens=9, eos_token_id=None)
    assert not steps
    fits = made.generate(**given, past_key_values=cache, max_new_tokens=9 - begin, eos_token_id=None)
    assert torch.equal(fits, made.generate(**given, max_new_tokens=9 - begin, eos_token_id=None))
    if name in DECODERS:
        with pytest.raises(ValueError, match="StaticCache: has room for 8 positions, got one for position 8"):
            made(IDS[:, :1], past_key_values=cache, cache_position=torch.tensor([8]))
    assert made.generate(**given, past_key_values=None if name in SEQ2SEQ else DynamicCache(), max_new_tokens=3).shape


@pytest.mark.parametrize("name", CONFIGS)
def test_rules_that_cannot_see_embeddings(name: str, recwarn: pytest.WarningsRecorder) -> None:
    made = model(name)
    embeds = made.get_input_embeddings()(IDS)
    rules = {"encoder_repetition_penalty": 1.5} if name in SEQ2SEQ else {"repetition_penalty": 1.5}
    with pytest.warns(UserWarning, match=f"{next(iter(rules))}=1.5: what was given as embeddings has no token ids"):
        made.generate(inputs_embeds=embeds, max_new_tokens=2, **rules)
    recwarn.clear()
    made.generate(IDS, max_new_tokens=2, **rules)
    made.generate(inputs_embeds=embeds, max_new_tokens=2)
    if name in SEQ2SEQ:
        made.generate(inputs_embeds=embeds, max_new_tokens=2, repetition_penalty=1.5)  # of the decoder's tokens
    assert not [warning for warning in recwarn if "embeddings" in str(warning.message)]


@pytest.mark.filterwarnings("ignore::Warning:transformers", "ignore::Warning:accelerate")
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_seq2seq_trainer(name: str, tmp_path: Path) -> None:
    """Predicts with `generate`, saves at the end of training and at the best step, and loads that again."""
    made = model(name)
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones(5).long(), "labels": ids.flip(0)} for ids in IDS.repeat(2, 1)
    ]
    seen: list[Any] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"length": float(prediction.predictions.shape[1])}

    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        predict_with_generate=True,
        generation_max_length=6,
        generation_num_beams=2,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Seq2SeqTrainer(
        model=made, args=arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=compute_metrics
    )
    trainer.train()
    made.eval()
    expected = made.generate(IDS, attention_mask=torch.ones_like(IDS), max_length=6, num_beams=2)
    got = torch.from_numpy(trainer.predict(rows).predictions)[:2]
    assert torch.equal(got[:, : expected.shape[1]], expected)
    assert len(seen) == 3
    trainer.save_model(str(tmp_path / "last"))
    again = type(made).from_pretrained(tmp_path / "last", config=made.config)
    for key, value in made.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, atol=0, rtol=0)
    # Going on from a step, which is another way to load.
    trainer.args.max_steps = 3
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_a_generation_config_of_transformers(name: str) -> None:
    """In a call, and as the model's own, where `Seq2SeqTrainingArguments(generation_config=...)` puts it."""
    made = model(name)
    fields = {"max_new_tokens": 5, "num_beams": 2, "pad_token_id": 1, "eos_token_id": 2}
    if name in SEQ2SEQ:
        fields["decoder_start_token_id"] = made.config.decoder_start_token_id
    expected = made.generate(IDS, **fields)
    config = transformers.GenerationConfig(**fields)
    assert torch.equal(made.generate(IDS, generation_config=config), expected)
    made.generation_config = config
    assert torch.equal(made.generate(IDS), expected)
    assert made.generate(IDS, max_new_tokens=3).shape[1] == expected.shape[1] - 2
    with pytest.raises(TypeError, match="generation_config must be a GenerationConfig, got int"):
        made.generate(IDS, generation_config=3)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_end_token_that_never_comes(name: str) -> None:
    made = model(name)
    options = {"max_new_tokens": 9, "min_new_tokens": 2}
    assert torch.equal(made.generate(IDS, eos_token_id=-1, **options), made.generate(IDS, eos_token_id=None, **options))
