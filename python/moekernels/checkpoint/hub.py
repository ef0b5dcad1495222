"""Checkpoints by name: a directory of this machine, or a repository of the Hugging Face Hub by way of its local cache.

The optional package huggingface_hub does the work, so that its cache, its environment variables (``HF_HOME``,
``HF_HUB_OFFLINE``, ``HF_TOKEN``, ``HF_ENDPOINT``) and its logins hold here too. Only files of the kinds listed here are
fetched, and none of them is code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from moekernels._version import __version__
from moekernels.checkpoint.errors import CheckpointNotFoundError
from moekernels.checkpoint.saving import finish_saves

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: What each part of a checkpoint consists of, as patterns of file names.
CONFIG_FILES = ("config.json",)
GENERATION_CONFIG_FILES = ("generation_config.json",)
TOKENIZER_FILES = (
    *CONFIG_FILES,  # names the kind of tokenizer where nothing else does
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "merges.txt",
    "*.model",
)

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class HubOptions(TypedDict, total=False):
    """Keywords of every ``from_pretrained`` that say where a checkpoint comes from; see :func:`resolve`."""

    revision: str | None
    cache_dir: str | os.PathLike[str] | None
    token: str | bool | None
    local_files_only: bool
    force_download: bool
    subfolder: str


def take_hub_options(kwargs: dict[str, Any]) -> HubOptions:
    """Remove the keywords of :class:`HubOptions` from `kwargs` and return them."""
    options: Any = {name: kwargs.pop(name) for name in HubOptions.__annotations__ if name in kwargs}
    return options


def resolve(
    name_or_path: str | os.PathLike[str],
    files: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str = "",
) -> Path:
    """Where a checkpoint lies on this machine, after fetching what is missing.

    A path that exists is that path, whatever the Hub has under the name. Otherwise the name is a repository's, such as
    "allenai/OLMoE-1B-7B-0924", and the result a directory of the cache, where files that the repository does not have
    are missing. A save into the directory that was interrupted is completed.

    Args:
        name_or_path: a directory (or a file, where one stands for a checkpoint), or the name of a repository.
        files: patterns of the file names to fetch: those above.
        revision: branch, tag or commit; "main" by default.
        cache_dir: the cache; that of huggingface_hub by default.
        token: for private and gated repositories; the stored one by default.
        local_files_only: never ask the Hub, as with ``HF_HUB_OFFLINE=1``.
        force_download: fetch again what is in the cache.
        subfolder: the checkpoint's directory within `name_or_path`.

    Raises:
        CheckpointNotFoundError: neither a path nor a repository of that name can be had.
        CheckpointError: an interrupted save cannot be completed, as the directory cannot be written.
    """
    path = Path(name_or_path)
    if not path.exists():
        options = {"local_files_only": local_files_only, "force_download": force_download, "token": token}
        path = _fetch(os.fspath(name_or_path), _within(subfolder, files), revision, cache_dir, options)
    if subfolder:
        path = path / subfolder
        if not path.is_dir():
            raise CheckpointNotFoundError(f"{os.fspath(name_or_path)!r} has no folder {subfolder!r}: no {path}")
    finish_saves(path)
    return path


def resolve_weights(
    name_or_path: str | os.PathLike[str],
    use_safetensors: bool | None = None,
    variant: str | None = None,
    **options: Unpack[HubOptions],
) -> Path:
    """:func:`resolve` with the files a model needs: configurations and weights, pickles only without safetensors.

    Args:
        name_or_path: as for :func:`resolve`.
        use_safetensors: True or False fetch that format only.
        variant: an infix in the names of the weight files; without it none that have one are fetched.
        **options: see :func:`resolve`.
    """
    if Path(name_or_path).exists():
        return resolve(name_or_path, (), **options)
    infix = "" if variant is None else f".{variant}"
    configs = (*CONFIG_FILES, *GENERATION_CONFIG_FILES)
    if use_safetensors is not False:
        weights = (f"model{infix}.safetensors", f"model{infix}-*.safetensors", f"model.safetensors.index{infix}.json")
        path = resolve(name_or_path, (*configs, *weights), **options)
        if use_safetensors or any(next(path.glob(pattern), None) for pattern in weights):
            return path
    weights = (f"pytorch_model{infix}.bin", f"pytorch_model{infix}-*.bin", f"pytorch_model.bin.index{infix}.json")
    return resolve(name_or_path, (*configs, *weights), **options)


def _within(subfolder: str, files: Sequence[str]) -> list[str]:
    return [f"{subfolder}/{pattern}" for pattern in files] if subfolder else list(files)


def _fetch(
    name: str, files: list[str], revision: str | None, cache_dir: str | os.PathLike[str] | None, options: dict[str, Any]
) -> Path:
    missing = f"no such checkpoint directory: {name!r} (from {Path.cwd()})"
    if _NAME.fullmatch(name) is None:
        raise CheckpointNotFoundError(f"{missing}; nor is it a name on the Hugging Face Hub, such as 'owner/model'")
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError as error:
        raise CheckpointNotFoundError(
            f"{missing}; to load a model by its name on the Hugging Face Hub: pip install 'moekernels[hub]'"
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                allow_patterns=files,
                library_name="moekernels",
                library_version=__version__,
                **options,
            )
        )
    except errors.HFValidationError:
        reason = "the Hugging Face Hub does not allow such names"
    except errors.GatedRepoError:
        reason = f"access has to be asked for at {constants.ENDPOINT}/{name}, and needs a token"
    except errors.RepositoryNotFoundError:
        reason = f"{constants.ENDPOINT} has no such repository, or it is private and needs a token"
    except errors.RevisionNotFoundError:
        reason = f"{constants.ENDPOINT}/{name} has no revision {revision or 'main'!r}"
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__
        if options["local_files_only"] or constants.HF_HUB_OFFLINE:
            why = "local_files_only=True" if options["local_files_only"] else "HF_HUB_OFFLINE=1"
            asked = f"{constants.ENDPOINT} was not asked ({why})"
        else:
            asked = f"{constants.ENDPOINT} could not be asked" + (f": {cause}" if cause else "")
        cache = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
        reason = f"the cache has no complete revision {revision or 'main'!r} of it (looked in {cache}), and {asked}"
    raise CheckpointNotFoundError(f"{missing}; {reason}")
