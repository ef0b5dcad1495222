"""A configuration whose sizes are not those of the weights is refused before anything is built from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moekernels.checkpoint import CheckpointError
from moekernels.models import AutoConfig, AutoModel, PreTrainedModel
from tests.models import tiny

_DECODER = ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size")
_TRANSLATION = ("encoder_layers", "decoder_layers", "vocab_size", "d_model", "encoder_ffn_dim", "decoder_ffn_dim")
FIELDS = {
    "olmoe": (*_DECODER, "num_experts"),
    "phimoe": (*_DECODER, "num_local_experts"),
    "m2m_100": _TRANSLATION,
    "nllb-moe": (*_TRANSLATION, "num_experts"),
    "switch_transformers": ("num_layers", "num_decoder_layers", "vocab_size", "d_model", "d_ff", "num_experts",
                            "num_heads"),
}  # fmt: skip
CASES = [(name, field) for name, fields in FIELDS.items() for field in fields]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, config in tiny.CONFIGS.items():
        found[name] = tmp_path_factory.mktemp(name)
        tiny.head_class(name)(config).save_pretrained(found[name])
    return found


def rewrite(directory: Path, target: Path, **fields: Any) -> Path:
    """The checkpoint with other fields in its configuration."""
    for path in directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **fields}))
    return target


@pytest.fixture
def _nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(*args: Any) -> None:
        raise AssertionError("a model is built")

    monkeypatch.setattr(PreTrainedModel, "_build", classmethod(built))


@pytest.mark.usefixtures("_nothing_is_built")
@pytest.mark.parametrize(("name", "field"), CASES)
def test_a_size_that_is_not_the_weights(saved: dict[str, Path], tmp_path: Path, name: str, field: str) -> None:
    true = getattr(tiny.CONFIGS[name], field)
    directory = rewrite(saved[name], tmp_path, **{field: 2 * true})
    # Twice is a size that the configuration itself allows: the heads still divide it.
    with pytest.raises(CheckpointError, match=rf"{directory}: {field} .* must be {true}, .*weights.*, got {2 * true}"):
        AutoModel.from_pretrained(directory)


@pytest.mark.usefixtures("_nothing_is_built")
@pytest.mark.parametrize("size", [2**31, 2**63, 10**30])
@pytest.mark.parametrize(("name", "field"), CASES)
def test_absurd_sizes(saved: dict[str, Path], tmp_path: Path, name: str, field: str, size: int) -> None:
    directory = rewrite(saved[name], tmp_path, **{field: size})
    with pytest.raises(CheckpointError, match=rf"{directory}/config.json: \w+: {field} must be .*, got {size}"):
        AutoModel.from_pretrained(directory)


@pytest.mark.parametrize("name", FIELDS)
def test_absurd_configurations(name: str) -> None:
    """Without weights to compare with there are limits: 4096 layers, 2^31 of anything, 2^40 weights in a tensor."""
    config = tiny.CONFIGS[name].to_dict()
    kind = type(tiny.CONFIGS[name])
    layers = FIELDS[name][0]
    with pytest.raises(ValueError, match=f"{layers} must be at most 4096, got 4097"):
        kind.from_dict({**config, layers: 4097})
    with pytest.raises(ValueError, match=r"vocab_size \(2147483647\) \* \w+ \(65536\) must be at most 1099511627776"):
        width = "hidden_size" if "hidden_size" in FIELDS[name] else "d_model"
        kind.from_dict({**config, "vocab_size": 2**31 - 1, width: 65536})
    with pytest.raises(ValueError, match="num_labels must be a number up to 1048576, got 9223372036854775808"):
        kind.from_dict({**config, "num_labels": 2**63})


def test_other_sizes_that_are_asked_for(saved: dict[str, Path]) -> None:
    model = AutoModel.from_pretrained(saved["m2m_100"])
    assert model.config.encoder_layers == 2
    with pytest.warns(UserWarning, match="does not fit"):
        wide = AutoModel.from_pretrained(saved["m2m_100"], vocab_size=70, ignore_mismatched_sizes=True)
    assert wide.get_input_embeddings().num_embeddings == 70
    with pytest.raises(CheckpointError, match=r"encoder_layers .* must be 2, .* got 3$"):
        AutoModel.from_pretrained(saved["m2m_100"], encoder_layers=3, ignore_mismatched_sizes=True)


def test_a_long_table_of_positions_is_not_made_at_once(saved: dict[str, Path], tmp_path: Path) -> None:
    directory = rewrite(saved["m2m_100"], tmp_path, max_position_embeddings=2**31 - 1)
    model, whole = AutoModel.from_pretrained(directory), AutoModel.from_pretrained(saved["m2m_100"])
    inputs = tiny.inputs("m2m_100")
    assert torch.equal(model(**inputs).last_hidden_state, whole(**inputs).last_hidden_state)


@pytest.mark.parametrize("key", ["validate", "to_dict", "__class__", "from_pretrained"])
def test_a_field_cannot_replace_a_method(saved: dict[str, Path], tmp_path: Path, key: str) -> None:
    directory = rewrite(saved["olmoe"], tmp_path, **{key: 1})
    with pytest.raises(CheckpointError, match=rf"{directory}/config.json: .*'{key}' cannot be a field"):
        AutoConfig.from_pretrained(directory)
