from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig as OracleConfig
from transformers import OlmoeConfig

from moekernels.generation import GenerationConfig


def test_defaults_are_those_of_transformers() -> None:
    expected = OracleConfig().to_dict()
    got = GenerationConfig().to_dict()
    # What transformers keeps for itself: where the config came from.
    for name in ("transformers_version", "_from_model_config"):
        expected.pop(name, None)
        got.pop(name, None)
    assert got.pop("compile_config") is None  # transformers leaves it out of the dictionary
    assert got == expected


def test_file_round_trip(tmp_path: Path) -> None:
    config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        eos_token_id=[3, 5],
        pad_token_id=1,
        max_new_tokens=9,
        something_else={"a": [1]},
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "do_sample": True,
        "temperature": 0.7,
        "eos_token_id": [3, 5],
        "pad_token_id": 1,
        "max_new_tokens": 9,
        "something_else": {"a": [1]},
    }
    again = GenerationConfig.from_pretrained(tmp_path)
    assert again == config
    assert again.something_else == {"a": [1]}  # type: ignore[attr-defined]
    assert GenerationConfig.from_pretrained(tmp_path, temperature=0.9).temperature == 0.9
    # transformers reads what we write, and we what it writes.
    oracle = OracleConfig.from_pretrained(tmp_path)
    assert (oracle.temperature, oracle.eos_token_id, oracle.something_else) == (0.7, [3, 5], {"a": [1]})
    oracle.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == config


def test_a_config_with_ignored_parameters_can_be_saved(tmp_path: Path) -> None:
    GenerationConfig(temperature=0.7).save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.7


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no generation_config.json in"):
        GenerationConfig.from_pretrained(tmp_path)
    for text, message in (("{", "not valid JSON"), ("[1]", "must hold a JSON object, got list")):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            GenerationConfig.from_pretrained(tmp_path)


def test_from_model_config() -> None:
    model_config = OlmoeConfig(eos_token_id=7, pad_token_id=1, use_cache=False, output_hidden_states=True)
    got, expected = GenerationConfig.from_model_config(model_config), OracleConfig.from_model_config(model_config)
    for name in ("eos_token_id", "pad_token_id", "bos_token_id", "use_cache", "return_dict_in_generate", "max_length"):
        assert getattr(got, name) == getattr(expected, name), name
    assert not hasattr(got, "hidden_size")


def test_update_returns_what_it_does_not_know() -> None:
    config = GenerationConfig()
    assert config.update(top_k=3, pixel_values=4) == {"pixel_values": 4}
    assert config.top_k == 3 and not hasattr(config, "pixel_values")
    with pytest.raises(ValueError, match="top_p"):
        config.update(top_k=5, top_p=7.0)
    assert config.top_k == 3  # nothing changed


def test_defaults_from_another() -> None:
    own = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=3, custom=1)
    merged = GenerationConfig(temperature=0.9).with_defaults_from(own)
    assert (merged.do_sample, merged.temperature, merged.eos_token_id) == (True, 0.9, 3)
    assert merged.custom == 1  # type: ignore[attr-defined]
    assert GenerationConfig(temperature=0.0).with_defaults_from(own).do_sample is False


def test_ignored_parameters() -> None:
    assert GenerationConfig(temperature=0.0, top_k=50, min_p=0.1).ignored_parameters() == {
        "temperature": 0.0,
        "min_p": 0.1,
    }
    assert GenerationConfig(do_sample=True, temperature=0.5).ignored_parameters() == {}
    assert GenerationConfig(output_scores=True, length_penalty=2.0).ignored_parameters() == {
        "output_scores": True,
        "length_penalty": 2.0,
    }
    assert GenerationConfig(use_cache=False, cache_implementation="static").ignored_parameters() == {
        "cache_implementation": "static"
    }


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be a positive integer, got -1"),
        ({"max_new_tokens": 1.5}, "positive integer"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"top_k": -3}, "top_k must be a non-negative integer"),
        ({"top_p": 1.5}, "top_p must be between 0 and 1"),
        ({"early_stopping": "sometimes"}, "early_stopping"),
        ({"cache_implementation": "magic"}, "one of dynamic, dynamic_full, static, got 'magic'"),
        ({"streamer": object()}, "streamer is an argument of generate"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**kwargs)


def test_saving_never_leaves_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GenerationConfig(max_new_tokens=9).save_pretrained(tmp_path)
    (tmp_path / "other.json").write_text("{}")

    def break_off(self: Path, text: str, **kwargs: object) -> None:
        self.write_bytes(text.encode()[:5])
        raise OSError("no space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr(Path, "write_text", break_off)
        GenerationConfig(max_new_tokens=7).save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).max_new_tokens == 9
    with pytest.raises(TypeError, match="serializable"):
        GenerationConfig(something=object()).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generation_config.json", "other.json"]
    GenerationConfig(max_new_tokens=7).save_pretrained(tmp_path / "new" / "place", "own.json")
    assert GenerationConfig.from_pretrained(tmp_path / "new" / "place", "own.json").max_new_tokens == 7
