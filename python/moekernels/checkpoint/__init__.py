"""Checkpoints in the Hugging Face format: directories of safetensors (or older pickles), read and written."""

from moekernels.checkpoint.errors import CheckpointError, CheckpointNotFoundError
from moekernels.checkpoint.files import read_json
from moekernels.checkpoint.hub import TOKENIZER_FILES, HubOptions, resolve, resolve_weights, take_hub_options
from moekernels.checkpoint.keymap import KEY_MAPS, KeyMap, Rule
from moekernels.checkpoint.loader import LoadReport, Packing, checkpoint_tensors, load_checkpoint
from moekernels.checkpoint.offsets import tensor_offsets
from moekernels.checkpoint.reader import CheckpointReader, Reader, StateDictReader, TensorInfo
from moekernels.checkpoint.repack import repack
from moekernels.checkpoint.saving import replace_files
from moekernels.checkpoint.sizes import check_sizes
from moekernels.checkpoint.writer import OBSOLETE_WEIGHTS, WeightsWriter, parse_size, write_weights

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
    "Packing",
    "Reader",
    "Rule",
    "StateDictReader",
    "TensorInfo",
    "WeightsWriter",
    "check_sizes",
    "checkpoint_tensors",
    "load_checkpoint",
    "parse_size",
    "read_json",
    "repack",
    "replace_files",
    "resolve",
    "resolve_weights",
    "take_hub_options",
    "tensor_offsets",
    "write_weights",
]
