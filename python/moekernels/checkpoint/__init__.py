"""Checkpoints in the Hugging Face format: directories of safetensors (or older pickles), read and written."""

from moekernels.checkpoint.errors import CheckpointError, CheckpointNotFoundError
from moekernels.checkpoint.files import read_json
from moekernels.checkpoint.hub import TOKENIZER_FILES, HubOptions, resolve, resolve_weights, take_hub_options
from moekernels.checkpoint.keymap import KEY_MAPS, KeyMap, Rule
from moekernels.checkpoint.loader import LoadReport, checkpoint_tensors, load_checkpoint
from moekernels.checkpoint.reader import CheckpointReader, StateDictReader, TensorInfo
from moekernels.checkpoint.writer import OBSOLETE_WEIGHTS, parse_size, replace_files, write_weights

__all__ = [
    "KEY_MAPS",
    "OBSOLETE_WEIGHTS",
    "TOKENIZER_FILES",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CheckpointReader",
    "HubOptions",
    "KeyMap",
    "LoadReport",
    "Rule",
    "StateDictReader",
    "TensorInfo",
    "checkpoint_tensors",
    "load_checkpoint",
    "parse_size",
    "read_json",
    "replace_files",
    "resolve",
    "resolve_weights",
    "take_hub_options",
    "write_weights",
]
