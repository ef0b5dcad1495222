"""`custom_generate`: the caller's own decoding loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moekernels.generation import LogitsProcessorList, StoppingCriteriaList
from tests.generation.adapter import Adapted, AdaptedSeq2Seq, prompts, sources, tiny_m2m100, tiny_olmoe


def greedy(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    attention_mask: torch.Tensor,
    past_key_values: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """As people write them for transformers."""
    new, position = input_ids, torch.arange(input_ids.shape[1])
    while not stopping_criteria(input_ids, None).all():
        out = model(
            input_ids=new,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1)[:, -new.shape[1] :].clamp(min=0),
            past_key_values=past_key_values,
            use_cache=True,
            cache_position=position,
        )
        new = logits_processor(input_ids, out.logits[:, -1]).argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, new], dim=1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(new)], dim=1)
        position = position[-1:] + 1
    return input_ids


@pytest.mark.parametrize("padded", [False, True])
def test_a_callable_decodes_from_what_is_prepared(padded: bool) -> None:
    ids, kwargs = prompts(3, 6, padded), {"max_new_tokens": 9, "repetition_penalty": 1.4, "eos_token_id": None}
    got = Adapted(tiny_olmoe()).generate(ids, custom_generate=greedy, **kwargs)
    assert torch.equal(got, tiny_olmoe().generate(ids, **kwargs))
    assert torch.equal(got, tiny_olmoe().generate(ids, custom_generate=greedy, **kwargs))


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_a_callable_gets_what_that_of_transformers_gets(encoder_decoder: bool) -> None:
    seen: list[dict[str, Any]] = []

    def look(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> str:
        seen.append({"input_ids": input_ids, **kwargs})
        return "its own result"

    ours: Any = AdaptedSeq2Seq(tiny_m2m100()) if encoder_decoder else Adapted(tiny_olmoe())
    ids = (sources if encoder_decoder else prompts)(2, 5, padded=True)
    for model in (ours, ours.model):
        # A parameter of a search that is not ours is the callable's business.
        assert model.generate(ids, custom_generate=look, num_return_sequences=2, do_sample=True, penalty_alpha=0.5) == (
            "its own result"
        )
    mine, theirs = seen
    assert mine.keys() >= theirs.keys() - {"cache_position", "decoder_input_ids"}
    assert torch.equal(mine["input_ids"], theirs["input_ids"])
    assert isinstance(mine["logits_processor"], LogitsProcessorList)
    assert isinstance(mine["stopping_criteria"], StoppingCriteriaList)
    assert mine["generation_config"].max_length == theirs["generation_config"].max_length
    assert mine["past_key_values"].get_seq_length() == 0 and mine["use_cache"] and mine["synced_gpus"] is False
    if not encoder_decoder:
        assert torch.equal(mine["attention_mask"], theirs["attention_mask"])


CODE = """
from . import other

def generate(model, inputs, **kwargs):
    return other.NAME, inputs, sorted(name for name, value in kwargs.items() if value is not None)
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    folder = tmp_path / "custom_generate"
    folder.mkdir()
    (folder / "generate.py").write_text(CODE)
    (folder / "other.py").write_text("NAME = 'first'")
    return tmp_path


def test_a_directory_that_is_trusted(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, ids = Adapted(tiny_olmoe()), prompts(1, 5)
    for path in (directory, str(directory)):
        name, given, others = model.generate(
            ids, custom_generate=path, trust_remote_code=True, max_new_tokens=3, not_a_parameter=4, seed=1
        )
        assert name == "first" and given is ids and others == ["max_new_tokens", "not_a_parameter", "seed"]
    second = tmp_path_factory.mktemp("second")
    (second / "custom_generate").mkdir()
    (second / "custom_generate" / "generate.py").write_text(CODE)
    (second / "custom_generate" / "other.py").write_text("NAME = 'second'")
    assert model.generate(ids, custom_generate=second, trust_remote_code=True)[0] == "second"


@pytest.mark.parametrize("trust", [None, False])
def test_nothing_is_executed_unasked(directory: Path, trust: bool | None) -> None:
    (directory / "custom_generate" / "generate.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ValueError, match=r"would execute .*custom_generate/generate.py.*trust_remote_code=True"):
        Adapted(tiny_olmoe()).generate(prompts(1, 5), custom_generate=str(directory), trust_remote_code=trust)


def test_directories_without_a_function(directory: Path, tmp_path: Path) -> None:
    model, ids = Adapted(tiny_olmoe()), prompts(1, 5)
    for trust in (None, True):
        with pytest.raises(ValueError, match="'someone/something' is no local directory, and no code is downloaded"):
            model.generate(ids, custom_generate="someone/something", trust_remote_code=trust)
    (directory / "custom_generate" / "generate.py").write_text("generate = 3")
    with pytest.raises(ValueError, match="defines no function generate"):
        model.generate(ids, custom_generate=directory, trust_remote_code=True)
    (directory / "custom_generate" / "generate.py").unlink()
    with pytest.raises(FileNotFoundError, match="custom_generate needs a file"):
        model.generate(ids, custom_generate=directory, trust_remote_code=True)


def test_the_arguments_are_checked_first() -> None:
    with pytest.raises(ValueError, match="a callable or a local directory, got int"):
        Adapted(tiny_olmoe()).generate(prompts(1, 5), custom_generate=3)
    with pytest.raises(ValueError, match="neither generation parameters nor keywords"):
        Picky(tiny_olmoe()).generate(prompts(1, 5), custom_generate=greedy, nonsense=1)


class Picky(Adapted):
    def forward(self, input_ids: torch.Tensor) -> Any:  # type: ignore[override]
        raise AssertionError
