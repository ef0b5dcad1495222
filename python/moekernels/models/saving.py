"""Writing a model as a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moekernels._files import write_file
from moekernels.checkpoint import KEY_MAPS, OBSOLETE_WEIGHTS, KeyMap, replace_files, write_weights
from moekernels.checkpoint.quantized import quantized_tensors, weight_of
from moekernels.models.configuration import CONFIG_NAME
from moekernels.models.loading import held_by_ranks
from moekernels.models.parameters import ParametersMixin
from moekernels.models.quantized import describe_quantization, quantized_formats

GENERATION_CONFIG = "generation_config.json"


class SavingMixin(ParametersMixin):
    """Gives a model `save_pretrained`."""

    config: Any
    generation_config: Any

    @property
    def key_map(self) -> KeyMap:
        """How checkpoints name the weights of this architecture."""
        return KEY_MAPS[type(self.config).model_type]

    @property
    def name_or_path(self) -> str:
        """Where the model was loaded from, as it was called then."""
        return self.config.name_or_path

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write configuration and weights, as safetensors in the layout of the hub, which transformers reads.

        All files take their place together once they are on disk; until then a checkpoint that is already there stays,
        also if the process is killed.

        Args:
            directory: created if need be; other files in it stay.
            is_main_process: False writes nothing; of many processes that hold the same model, one is to write. Those
                that hold a model together (DTensors) all call this, whatever they say here, and rank 0 writes.
            state_dict: weights to write instead of the model's own, under the names the model has for them (such as
                those gathered from many processes).
            max_shard_size: bytes, or a string such as "5GB".
            safe_serialization: True. Pickles are read, but not written.

        Raises:
            ValueError: `safe_serialization` is False, `state_dict` lacks a weight of the model, or experts are not in
                memory.
        """
        if not safe_serialization:
            raise ValueError(
                "save_pretrained: safe_serialization must be True, as weights are only written as safetensors"
            )
        if state_dict is None and held_by_ranks(self):
            return self._save_together(directory, max_shard_size)
        if self.expert_cache is not None:
            raise ValueError(
                "save_pretrained: the experts of this model are in files (expert_memory), not in memory; copy the "
                f"checkpoint instead: {self.name_or_path}"
            )
        own = [name for name, _ in self.named_parameters()]
        weights = dict(self.named_parameters()) if state_dict is None else state_dict
        missing = [name for name in own if name not in weights]
        if missing:
            raise ValueError(f"save_pretrained: state_dict lacks {', '.join(missing[:8])}")
        if not is_main_process:
            return
        weights = {name: weights[name] for name in own}
        self.config.architectures = [type(self).__name__]
        self.config.dtype = self.dtype
        storage = describe_quantization(self, quantized_formats(weights))
        tensors = quantized_tensors(weights, self.key_map, storage, self.dtype)
        with replace_files(directory, OBSOLETE_WEIGHTS) as stage:
            write_weights(stage, tensors, max_shard_size, beside=Path(directory), together=weight_of)
            if self.generation_config is not None:
                write_file(stage / GENERATION_CONFIG, self.generation_config.to_json_string())
            self.config.to_json_file(stage / CONFIG_NAME)

    def _save_together(self, directory: str | os.PathLike[str], max_shard_size: int | str) -> None:
        """Of a model that processes hold together: rank 0 gathers its weights and writes them, the others wait."""
        from moekernels.distributed import is_main_rank, together, whole_weights

        weights = whole_weights(self)
        with together("save_pretrained"):
            if is_main_rank():
                self.save_pretrained(directory, state_dict=weights, max_shard_size=max_shard_size)
