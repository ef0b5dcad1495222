"""Another decoding loop than ours: the caller's function, or one from a directory that the caller trusts."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from moekernels.generation.loop import Search

_FILE = Path("custom_generate", "generate.py")
_PACKAGE = "moekernels_custom_generate"


def load_custom_generate(directory: str | os.PathLike[str], trust_remote_code: bool | None) -> Callable[..., Any]:
    """Executes `custom_generate/generate.py` of a local directory and returns its function `generate`.

    Nothing else ever executes what lies in a checkpoint, and this only where the caller says so twice. The file may
    import others of its folder (`from . import other`).

    Raises:
        ValueError: `directory` is none, or the code in it is not trusted, or has no such function.
        FileNotFoundError: there is no such file in it.
    """
    if not Path(directory).is_dir():
        raise ValueError(
            f"generate: custom_generate={os.fspath(directory)!r} is no local directory, and no code is downloaded; "
            "pass a callable, or a directory"
        )
    path = Path(directory).absolute() / _FILE
    if not path.is_file():
        raise FileNotFoundError(f"generate: custom_generate needs a file {_FILE} in {os.fspath(directory)!r}")
    if not trust_remote_code:
        raise ValueError(
            f"generate: custom_generate would execute {path}; read it, and pass trust_remote_code=True if it may run"
        )
    for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
        del sys.modules[name]
    package = ModuleType(_PACKAGE)
    package.__path__ = [str(path.parent)]
    sys.modules[_PACKAGE] = package
    importlib.invalidate_caches()
    function = getattr(importlib.import_module(f"{_PACKAGE}.{path.stem}"), "generate", None)
    if not callable(function):
        raise ValueError(f"generate: {path} defines no function generate")
    return function


def call_custom_generate(function: Callable[..., Any], model: Any, search: Search, *, synced: bool) -> Any:
    """Lets `function` decode from what is prepared, which it gets by the names that transformers uses."""
    state = search.state
    given = {**state.model_kwargs, "past_key_values": state.cache, "use_cache": state.use_cache, "logits_to_keep": 1}
    if "encoder_outputs" in given:
        given["decoder_attention_mask"] = state.attention_mask
    else:
        mask = state.attention_mask
        given["attention_mask"] = state.input_ids.new_ones(len(state.input_ids), state.target) if mask is None else mask
        given["inputs_embeds"] = state.inputs_embeds
        given["position_ids"] = state.given_position_ids
    # A function of one's own may pass them on to a model that does not take every keyword.
    given = {name: value for name, value in given.items() if value is not None}
    return function(
        model,
        state.input_ids,
        logits_processor=search.processors,
        stopping_criteria=search.criteria,
        generation_config=search.config,
        synced_gpus=synced,
        streamer=search.streamer,
        **given,
    )
