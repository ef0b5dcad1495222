"""What all models share: creation, loading and saving, placement, the choice of attention."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from moekernels.checkpoint import (
    KEY_MAPS,
    OBSOLETE_WEIGHTS,
    CheckpointError,
    HubOptions,
    KeyMap,
    checkpoint_tensors,
    load_checkpoint,
    replace_files,
    resolve,
    resolve_weights,
    take_hub_options,
    write_weights,
)
from moekernels.checkpoint.hub import GENERATION_CONFIG_FILES
from moekernels.generation import GenerationConfig, GenerationMixin
from moekernels.models.configuration import PretrainedConfig, parse_dtype
from moekernels.models.embeddings import TokenEmbeddingsMixin
from moekernels.models.gradient_checkpointing import GradientCheckpointingMixin
from moekernels.models.loading import (
    WITHOUT_EFFECT,
    initialise,
    open_weights,
    overridden,
    stored_dtype,
    warn_of_new_weights,
)
from moekernels.models.outputs import ModelOutput
from moekernels.models.parameters import ParametersMixin
from moekernels.models.placement import Device, DeviceMap, Unit, follow, plan_placement, units
from moekernels.models.quantization import BitsAndBytesConfig, requested_bits, warn_of_whole_weights
from moekernels.nn import GroupedExperts, RMSNorm, TopKRouter
from moekernels.nn.attention import FLASH_ATTENTION, require_flash_attention

_GENERATION_CONFIG = "generation_config.json"

_Model = TypeVar("_Model", bound="PreTrainedModel")


class PreTrainedModel(TokenEmbeddingsMixin, ParametersMixin, GradientCheckpointingMixin):
    """The base of all models.

    A subclass sets the class attributes, builds its modules in ``__init__`` and ends that with :meth:`post_init`.
    """

    config_class: ClassVar[type[PretrainedConfig]]
    main_input_name: ClassVar[str] = "input_ids"
    #: Names in :data:`moekernels.nn.ATTENTION_FUNCTIONS`; the first is the default.
    attention_implementations: ClassVar[tuple[str, ...]] = ("sdpa", "eager", FLASH_ATTENTION)
    #: Parts of the names of parameters that a checkpoint may lack: heads that training starts from scratch.
    new_heads: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__}: config must be a {self.config_class.__name__}, got {type(config).__name__}"
            )
        self.config: Any = config
        self.set_attn_implementation(config._attn_implementation or self.attention_implementations[0])
        self.generation_config = (
            GenerationConfig.from_model_config(config) if isinstance(self, GenerationMixin) else None
        )

    def post_init(self) -> None:
        """The end of every constructor."""
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise the weights and tie those that are shared."""
        if not any(parameter.is_meta for parameter in self.parameters()):
            self.apply(self._init_weights)
        self.tie_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights, zero biases, norms of one; the embedding of the padding token is zero."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()
        elif isinstance(module, TopKRouter | GroupedExperts):
            module.reset_parameters(std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    # Creation.

    @classmethod
    def from_config(
        cls: type[_Model],
        config: PretrainedConfig,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool | None = None,
    ) -> _Model:
        """A model with new weights.

        Args:
            config: its configuration.
            dtype: a torch dtype or its name; "auto" takes the configuration's; None is PyTorch's default.
            torch_dtype: the older name of `dtype`.
            device: where the weights are made.
            attn_implementation: "sdpa", "eager" or "flash_attention_2".
            trust_remote_code: changes nothing; no code of a checkpoint is executed.
        """
        dtype = torch_dtype if dtype is None else dtype
        final = (config.dtype if dtype == "auto" else parse_dtype(dtype)) or torch.get_default_dtype()
        model = cls._build(config, attn_implementation, device or "cpu")
        for name, parameter in model.named_parameters():
            if not model._keeps_float32(name):
                parameter.data = parameter.data.to(final)
        model.config.dtype = final
        return model

    @classmethod
    def _build(
        cls: type[_Model], config: PretrainedConfig, attn_implementation: str | None, device: torch.device | str
    ) -> _Model:
        config = copy.deepcopy(config)
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        with torch.device(device):
            return cls(config)

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        directory: str | os.PathLike[str] | None,
        *,
        config: PretrainedConfig | str | os.PathLike[str] | None = None,
        dtype: torch.dtype | str | None = "auto",
        torch_dtype: torch.dtype | str | None = None,
        device: Device | None = None,
        device_map: DeviceMap | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        attn_implementation: str | None = None,
        use_safetensors: bool | None = None,
        variant: str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        generation_config: GenerationConfig | None = None,
        quantization_config: BitsAndBytesConfig | dict[str, Any] | None = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        progress: bool | None = None,
        **kwargs: Any,
    ) -> _Model:
        """Load a model in evaluation mode from a checkpoint directory, or by its name on the Hugging Face Hub.

        The weights are read shard by shard from memory-mapped files, each straight to its final place. Nothing of a
        checkpoint is executed.

        Args:
            directory: holds ``config.json`` and safetensors or PyTorch weights, sharded or not; or the name of a
                repository, see :func:`moekernels.checkpoint.resolve`.
            config: used instead of ``config.json``; or where to read it.
            dtype: a torch dtype or its name; "auto" (or None) takes the configuration's, else that of the checkpoint.
            torch_dtype: the older name of `dtype`.
            device: where the model goes; the CPU by default.
            device_map: the same; or "auto", the GPUs there are; or module names and their devices. See
                :func:`moekernels.models.placement.plan_placement`.
            max_memory: for ``device_map="auto"``, what the weights may take of each device.
            attn_implementation: "sdpa", "eager" or "flash_attention_2".
            use_safetensors: True or False look for that format only.
            variant: an infix in the names of the weight files, such as "fp16".
            state_dict: weights to use instead of those in `directory`, which may be None if there is a `config`.
            ignore_mismatched_sizes: initialise weights whose shape in the checkpoint is another, and warn; otherwise
                that is an error.
            output_loading_info: also return a dictionary of the names that were missing, left out or mismatched.
            generation_config: used instead of ``generation_config.json``.
            quantization_config, load_in_8bit, load_in_4bit: accepted, but weights are not quantised; a warning says so.
            progress: show a progress bar; None does so on a terminal.
            **kwargs: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download` and `subfolder` for
                :func:`moekernels.checkpoint.resolve`; fields of the configuration to override; and arguments of
                transformers that change nothing here, such as `trust_remote_code` and `low_cpu_mem_usage`.

        Raises:
            CheckpointError: there is no such checkpoint, or it is incomplete, damaged, or of another architecture.
                Nothing is half-loaded.
            ValueError: an argument is unknown or unusable.
        """
        hub = take_hub_options(kwargs)
        fields = {name: value for name, value in kwargs.items() if name not in WITHOUT_EFFECT}
        config = overridden(cls._config_from(directory if config is None else config, hub), fields)
        asked = parse_dtype(dtype if torch_dtype is None else torch_dtype) or config.dtype
        bits = requested_bits(config, quantization_config, load_in_8bit, load_in_4bit)
        if device is not None and device_map is not None:
            raise ValueError("from_pretrained: pass device or device_map, not both")
        # Whatever can be wrong without the weights is said before they are fetched.
        model = cls._build(config, attn_implementation, "meta")
        parts = model._units(asked or torch.float32)
        placement = plan_placement(parts, device if device_map is None else device_map, max_memory)

        local = None if directory is None else _local(directory, use_safetensors, variant, state_dict, hub)
        reader = open_weights(local, state_dict, use_safetensors, variant)
        final = asked or stored_dtype(reader)
        warn_of_whole_weights(bits, final)
        report = load_checkpoint(
            model,
            reader,
            model.key_map,
            dtype=final,
            device=placement.device_of,
            keep_float32=model._keeps_float32,
            may_be_absent=lambda name: any(part in name for part in cls.new_heads),
            ignore_mismatched=ignore_mismatched_sizes,
            progress=progress,
        )
        initialise(model, [*report.absent, *(name for name, *_ in report.mismatched)], model._init_weights)
        warn_of_new_weights(cls.__name__, report.absent, report.mismatched)
        if placement.is_split:
            follow(model, _CONTAINERS, placement)
        model.config.dtype = final
        if isinstance(model, GenerationMixin):
            model.generation_config = generation_config or _stored_generation_config(local) or model.generation_config
        model.eval()
        if output_loading_info:
            return model, report.as_loading_info()  # type: ignore[return-value]
        return model

    @classmethod
    def _config_from(
        cls, source: PretrainedConfig | str | os.PathLike[str] | None, hub: HubOptions
    ) -> PretrainedConfig:
        if source is None:
            raise ValueError("from_pretrained: without a checkpoint there must be a config")
        if isinstance(source, PretrainedConfig):
            return source
        return cls.config_class.from_pretrained(source, **hub)

    # Saving.

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

        All files take their place together once they are on disk; until then a checkpoint that is already there stays.

        Args:
            directory: created if need be; other files in it stay.
            is_main_process: False writes nothing; of many processes that hold the same model, one is to write.
            state_dict: weights to write instead of the model's own, under the names the model has for them (such as
                those gathered from many processes).
            max_shard_size: bytes, or a string such as "5GB".
            safe_serialization: True. Pickles are read, but not written.

        Raises:
            ValueError: `safe_serialization` is False, or `state_dict` lacks a weight of the model.
        """
        if not safe_serialization:
            raise ValueError(
                "save_pretrained: safe_serialization must be True, as weights are only written as safetensors"
            )
        own = [name for name, _ in self.named_parameters()]
        weights = dict(self.named_parameters()) if state_dict is None else state_dict
        missing = [name for name in own if name not in weights]
        if missing:
            raise ValueError(f"save_pretrained: state_dict lacks {', '.join(missing[:8])}")
        if not is_main_process:
            return
        self.config.architectures = [type(self).__name__]
        self.config.dtype = self.dtype
        tensors = checkpoint_tensors({name: weights[name] for name in own}, self.key_map)
        with replace_files(directory, OBSOLETE_WEIGHTS) as stage:
            write_weights(stage, tensors, max_shard_size)
            if self.generation_config is not None:
                self.generation_config.save_pretrained(stage)
            self.config.save_pretrained(stage)

    @property
    def key_map(self) -> KeyMap:
        """How checkpoints name the weights of this architecture."""
        return KEY_MAPS[type(self.config).model_type]

    # Where the weights are.

    def _units(self, dtype: torch.dtype) -> list[Unit]:
        """The parts that lie on one device each, with their size in a dtype."""

        def size(name: str, parameter: Tensor) -> int:
            return parameter.numel() * (torch.float32 if self._keeps_float32(name) else dtype).itemsize

        return units(self, _CONTAINERS, size)

    @property
    def hf_device_map(self) -> dict[str, torch.device]:
        """The parts of the model and where they are; those without weights are where their inputs are."""
        modules = {unit.names[0]: self.get_submodule(unit.names[0]) for unit in self._units(self.dtype)}
        weights = {name: next(module.parameters(), None) for name, module in modules.items()}
        return {name: weight.device for name, weight in weights.items() if weight is not None}

    # About the model.

    @property
    def name_or_path(self) -> str:
        """Where the model was loaded from, as it was called then."""
        return self.config.name_or_path

    @classmethod
    def can_generate(cls) -> bool:
        """Whether there is a `generate`."""
        return issubclass(cls, GenerationMixin)

    def get_decoder(self) -> Any:
        """The decoder of a model with two stacks; otherwise the model without its head."""
        return self.base_model

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Some tokens to run the model with."""
        input_ids = torch.tensor([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]], device=self.device)
        names = ("input_ids", "decoder_input_ids") if self.config.is_encoder_decoder else ("input_ids",)
        return dict.fromkeys(names, input_ids)

    def set_attn_implementation(self, name: str) -> None:
        """Choose the attention function: "sdpa", "eager" or "flash_attention_2".

        Raises:
            ValueError: the model has no such implementation.
            ImportError: it needs the flash-attn package, which is not installed.
        """
        if name not in self.attention_implementations:
            hint = ' ("sdpa" uses flash attention where PyTorch has it)' if name.startswith("flash_attention") else ""
            raise ValueError(
                f"attn_implementation must be one of {', '.join(self.attention_implementations)}, got {name!r}{hint}"
            )
        if name == FLASH_ATTENTION:
            require_flash_attention()
        # One configuration is shared by all parts of a model, which read it in every forward pass.
        self.config._attn_implementation = name

    def _returned(self, output: ModelOutput, return_dict: bool | None) -> Any:
        """What `forward` returns: the output, or its tuple if the call or else the configuration asks for that."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


_CONTAINERS: tuple[type[nn.Module], ...] = (PreTrainedModel, nn.ModuleList)


def _local(
    directory: str | os.PathLike[str],
    use_safetensors: bool | None,
    variant: str | None,
    state_dict: Mapping[str, Tensor] | None,
    hub: HubOptions,
) -> Path:
    """The checkpoint on this machine; of one on the hub only the small files, if there are other weights."""
    if state_dict is not None:
        return resolve(directory, GENERATION_CONFIG_FILES, **hub)
    return resolve_weights(directory, use_safetensors, variant, **hub)


def _stored_generation_config(directory: Path | None) -> GenerationConfig | None:
    if directory is None or not (directory / _GENERATION_CONFIG).is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(directory)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
