"""What all models share: creation, loading, placement, the choice of attention."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from moekernels._devices import Device
from moekernels._memory import trim_heap
from moekernels.checkpoint import (
    KEY_MAPS,
    CheckpointError,
    HubOptions,
    Packing,
    Reader,
    check_sizes,
    load_checkpoint,
    resolve,
    resolve_weights,
    take_hub_options,
)
from moekernels.checkpoint.hub import GENERATION_CONFIG_FILES
from moekernels.checkpoint.quantized import check_method
from moekernels.expert_memory import (
    ExpertMemory,
    find_experts,
    is_streamed,
    parse_expert_memory,
    stream_experts,
)
from moekernels.generation import GenerationConfig, GenerationMixin
from moekernels.models.configuration import PretrainedConfig, parse_dtype
from moekernels.models.embeddings import TokenEmbeddingsMixin
from moekernels.models.gguf import gguf_config, open_gguf
from moekernels.models.gradient_checkpointing import GradientCheckpointingMixin
from moekernels.models.loading import (
    WITHOUT_EFFECT,
    Unfilled,
    held_experts,
    initialise,
    on_every_rank,
    open_weights,
    overridden,
    stored_dtype,
    warn_of_new_weights,
)
from moekernels.models.outputs import ModelOutput
from moekernels.models.placement import DeviceMap, Placement, Unit, follow, plan_placement, units
from moekernels.models.quantization import AnyConfig, requested, stored_compute_dtype
from moekernels.models.quantized import packing_of, stored_size
from moekernels.models.saving import GENERATION_CONFIG, SavingMixin
from moekernels.nn import GroupedExperts, RMSNorm, TopKRouter
from moekernels.nn.attention import FLASH_ATTENTION, require_flash_attention
from moekernels.nn.batch import LOCAL, Batch
from moekernels.quantization import Format

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: What a decoder may begin with, which the embedding has to have.
_FIRST_TOKENS = ("decoder_start_token_id", "bos_token_id")

_Model = TypeVar("_Model", bound="PreTrainedModel")


class PreTrainedModel(TokenEmbeddingsMixin, SavingMixin, GradientCheckpointingMixin):
    """The base of all models.

    A subclass sets the class attributes, builds its modules in ``__init__`` and ends that with :meth:`post_init`.
    """

    config_class: ClassVar[type[PretrainedConfig]]
    main_input_name: ClassVar[str] = "input_ids"
    #: Names in :data:`moekernels.nn.ATTENTION_FUNCTIONS`; the first is the default.
    attention_implementations: ClassVar[tuple[str, ...]] = ("sdpa", "eager", FLASH_ATTENTION)
    #: Parts of the names of parameters that a checkpoint may lack: heads that training starts from scratch.
    new_heads: ClassVar[tuple[str, ...]] = ()
    #: What auxiliary losses are counted over.
    batch: Batch = LOCAL
    #: For a model card: see :meth:`add_model_tags`.
    model_tags: Sequence[str] = ()
    _given_device_map: dict[str, Any] | None = None

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
        with torch.device(device), Unfilled():
            return cls(config)

    @classmethod
    @on_every_rank
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
        quantization_config: AnyConfig | dict[str, Any] | None = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        gguf_file: str | None = None,
        mesh: DeviceMesh | None = None,
        expert_memory: ExpertMemory | None = None,
        progress: bool | None = None,
        **kwargs: Any,
    ) -> _Model:
        """Load a model in evaluation mode from a checkpoint directory, or by its name on the Hugging Face Hub.

        The weights are read shard by shard from memory-mapped files, each straight to its final place, and quantised on
        the way if they are to be. Nothing of a checkpoint is executed.

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
            quantization_config: how to quantise weights: a :class:`BitsAndBytesConfig`, a :class:`QuantizationConfig`,
                or the fields of one in a dictionary, such as ``{"format": "int4", "group_size": 32}``. The weights of
                Linears and experts are quantised; embeddings, routers and norms never, and the head only if its
                `skip_modules` leaves it out. A checkpoint that is quantised already is loaded as it is.
            load_in_8bit, load_in_4bit: short for a :class:`BitsAndBytesConfig` with that field.
            gguf_file: the name of a GGUF file of OLMoE or PhiMoE in `directory`, whose weights stay packed; without a
                ``config.json`` beside it its metadata is the configuration. Needs ``moekernels[gguf]``.
            mesh: a mesh of one dimension whose ranks hold the experts together: each reads its own, and everything
                else, see :func:`moekernels.distributed.expert_parallel`, of which `dispatch`, `sums` and
                `rows_per_rank` are options here too.
            expert_memory: bytes that experts may take in memory, as a number, a string such as "8GiB", or "auto", what
                the machine has free. They stay in the files and are read when tokens are routed to them;
                `model.expert_cache.stats()` says how that goes. For inference, with everything on one device.
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
        gguf = None if gguf_file is None else open_gguf(directory, gguf_file, hub)
        if config is None and gguf is not None:
            config = gguf_config(gguf, cls.config_class)
        config = overridden(cls._config_from(directory if config is None else config, hub), fields)
        asked = parse_dtype(dtype if torch_dtype is None else torch_dtype) or config.dtype
        wanted = requested(config, quantization_config, load_in_8bit, load_in_4bit)
        stored_quantization = getattr(config, "quantization_config", None)
        if stored_quantization:
            check_method(stored_quantization, config.name_or_path or "the checkpoint")
        if device is not None and device_map is not None:
            raise ValueError("from_pretrained: pass device or device_map, not both")
        key_map = KEY_MAPS[cls.config_class.model_type] if gguf is None else gguf.key_map
        if mesh is not None:
            if device_map is not None:
                raise ValueError("from_pretrained: pass mesh or device_map, not both")
            if expert_memory is not None:
                raise ValueError("from_pretrained: pass mesh or expert_memory, not both")
            if wanted is not None or stored_quantization or gguf is not None:
                raise ValueError("from_pretrained: mesh is for weights that are not quantised")
            device = mesh.device_type if device is None else device
        if expert_memory is not None:
            parse_expert_memory(expert_memory)
            if gguf is not None:
                raise ValueError("from_pretrained: experts of a GGUF file cannot be read one by one (expert_memory)")
            if wanted is not None:
                raise ValueError(
                    "from_pretrained: experts are not quantised as they are read (expert_memory); quantise the "
                    "checkpoint first, with moekernels quantize"
                )

        def opened() -> tuple[Path | None, Reader]:
            if gguf is not None:
                check_sizes(config, gguf, key_map, ignore_mismatched_sizes)
                return gguf.directory.parent, gguf
            local = None if directory is None else _local(directory, use_safetensors, variant, state_dict, hub)
            reader = open_weights(local, state_dict, use_safetensors, variant, stored_quantization)
            check_sizes(config, reader, key_map, ignore_mismatched_sizes)
            return local, reader

        # What is here is looked at before a model is built; what is not, fetched when nothing else can be wrong.
        is_here = state_dict is not None or (directory is not None and Path(directory).exists())
        weights = opened() if is_here else None
        model = cls._build(config, attn_implementation, "meta")
        if gguf is None:
            key_map = model.key_map  # a part of a model leaves out what the rest of it has

        def placed() -> tuple[Packing, Placement]:
            found = None if wanted is None else wanted.quantization()
            packing = packing_of(model, model.key_map, found, stored_compute_dtype(stored_quantization))
            parts = model._units(asked or torch.float32, packing.format)
            return packing, plan_placement(parts, device if device_map is None else device_map, max_memory)

        packing, placement = placed()
        local, reader = weights or opened()
        if model._fit({key_map.canonical(name) for name in reader.tensors}):
            packing, placement = placed()
        final = asked or stored_dtype(reader)
        experts = None if expert_memory is None else find_experts(model, reader, model.key_map, placement.is_split)
        report = load_checkpoint(
            model,
            reader,
            key_map,
            dtype=final,
            device=placement.device_of,
            keep_float32=model._keeps_float32,
            may_be_absent=lambda name: any(part in name for part in cls.new_heads),
            left_out=(lambda name: False) if expert_memory is None else is_streamed(model),
            ignore_mismatched=ignore_mismatched_sizes,
            packing=packing,
            held=held_experts(model, mesh),
            progress=progress,
        )
        trim_heap()  # before the budget of experts is worked out
        initialise(model, [*report.absent, *(name for name, *_ in report.mismatched)], model._init_weights)
        warn_of_new_weights(cls.__name__, report.absent, report.mismatched)
        if placement.is_split:
            follow(model, _CONTAINERS, placement)
        if experts is not None and expert_memory is not None:
            model.expert_cache = stream_experts(
                model,
                experts,
                report.left_out,
                expert_memory,
                dtype_of=lambda name: torch.float32 if model._keeps_float32(name) else final,
                compute_dtype=packing.compute_dtype,
                device=placement.device_of(""),
            )
        model.config.dtype = final
        if wanted is not None:
            model.config.quantization_config = wanted.to_dict()
        if isinstance(model, GenerationMixin):
            stored = _stored_generation_config(local, model.config)
            model.generation_config = generation_config or stored or model.generation_config
        model.eval()
        if output_loading_info:
            return model, report.as_loading_info()  # type: ignore[return-value]
        return model

    def _fit(self, names: Collection[str]) -> bool:
        """Changes the modules of a model without memory to those that a checkpoint has weights for.

        Args:
            names: of the checkpoint's tensors, without the base model's prefix.

        Returns:
            Whether there was anything to change.
        """
        return False

    @classmethod
    def _config_from(
        cls, source: PretrainedConfig | str | os.PathLike[str] | None, hub: HubOptions
    ) -> PretrainedConfig:
        if source is None:
            raise ValueError("from_pretrained: without a checkpoint there must be a config")
        if isinstance(source, PretrainedConfig):
            return source
        return cls.config_class.from_pretrained(source, **hub)

    # Where the weights are.

    def _units(self, dtype: torch.dtype, format: Callable[[str], Format | None] = lambda name: None) -> list[Unit]:
        """The parts that lie on one device each, with their size in a dtype, or in the format that a name gets."""

        def size(name: str, parameter: Tensor) -> int:
            return stored_size(parameter, format(name), torch.float32 if self._keeps_float32(name) else dtype)

        return units(self, _CONTAINERS, size)

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """The parts of the model and where they are; those without weights are where their inputs are. What accelerate
        has set, if it places the weights."""
        if self._given_device_map is not None:
            return self._given_device_map
        modules = {unit.names[0]: self.get_submodule(unit.names[0]) for unit in self._units(self.dtype)}
        weights = {name: next(module.parameters(), None) for name, module in modules.items()}
        return {name: weight.device for name, weight in weights.items() if weight is not None}

    @hf_device_map.setter
    def hf_device_map(self, device_map: dict[str, Any]) -> None:
        self._given_device_map = device_map

    # About the model.

    def add_model_tags(self, tags: Sequence[str] | str) -> None:
        """Remember tags for a model card, in `model_tags`; TRL's trainers call it."""
        self.model_tags = list(dict.fromkeys([*self.model_tags, *([tags] if isinstance(tags, str) else tags)]))

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


def _stored_generation_config(directory: Path | None, config: Any) -> GenerationConfig | None:
    if directory is None or not (directory / GENERATION_CONFIG).is_file():
        return None
    found = GenerationConfig.from_pretrained(directory)
    for name in _FIRST_TOKENS:
        value = getattr(found, name)
        if isinstance(value, int | float) and not 0 <= value < config.vocab_size:
            raise CheckpointError(
                f"{directory / GENERATION_CONFIG}: {name} must be a token id below vocab_size = {config.vocab_size}, "
                f"got {value!r}"
            )
    return found
