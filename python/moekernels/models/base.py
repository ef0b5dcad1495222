"""What all models share: creation, loading and saving, embeddings, dtype, gradient checkpointing."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moekernels.checkpoint import (
    KEY_MAPS,
    OBSOLETE_WEIGHTS,
    CheckpointError,
    CheckpointReader,
    KeyMap,
    checkpoint_tensors,
    load_checkpoint,
    replace_files,
    write_weights,
)
from moekernels.generation import GenerationConfig, GenerationMixin
from moekernels.models.configuration import PretrainedConfig, parse_dtype
from moekernels.models.outputs import ModelOutput
from moekernels.nn import GroupedExperts, RMSNorm, TopKRouter
from moekernels.nn.attention import FLASH_ATTENTION, require_flash_attention

_GENERATION_CONFIG = "generation_config.json"
#: Keywords of other libraries' `from_pretrained` that have nothing to say about a local directory.
_WITHOUT_EFFECT = frozenset(
    ("cache_dir", "force_download", "local_files_only", "low_cpu_mem_usage", "revision", "token", "trust_remote_code")
)

_Model = TypeVar("_Model", bound="PreTrainedModel")


class PreTrainedModel(nn.Module):
    """The base of all models.

    A subclass sets the class attributes, builds its modules in ``__init__`` and ends that with :meth:`post_init`.
    """

    config_class: ClassVar[type[PretrainedConfig]]
    #: The attribute that holds the base model in a model with a head.
    base_model_prefix: ClassVar[str] = "model"
    main_input_name: ClassVar[str] = "input_ids"
    supports_gradient_checkpointing: ClassVar[bool] = True
    #: Names in :data:`moekernels.nn.ATTENTION_FUNCTIONS`; the first is the default.
    attention_implementations: ClassVar[tuple[str, ...]] = ("sdpa", "eager", FLASH_ATTENTION)
    #: Parts of the names of parameters that stay float32 whatever the dtype of the model.
    keep_in_float32: ClassVar[tuple[str, ...]] = ()
    #: Parts of the names of parameters that a checkpoint may lack: heads that training starts from scratch.
    new_heads: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__}: config must be a {self.config_class.__name__}, got {type(config).__name__}"
            )
        self.config: Any = config
        self.gradient_checkpointing = False
        self._checkpoint_call: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
        self.set_attn_implementation(config._attn_implementation or self.attention_implementations[0])
        self.generation_config = (
            GenerationConfig.from_model_config(config) if isinstance(self, GenerationMixin) else None
        )

    def post_init(self) -> None:
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
    ) -> _Model:
        """A model with new weights.

        Args:
            config: its configuration.
            dtype: a torch dtype or its name; "auto" takes the configuration's; None is PyTorch's default.
            torch_dtype: the older name of `dtype`.
            device: where the weights are made.
            attn_implementation: "sdpa", "eager" or "flash_attention_2".
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
        directory: str | os.PathLike[str],
        *,
        config: PretrainedConfig | None = None,
        dtype: torch.dtype | str | None = "auto",
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: torch.device | str | int | dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        use_safetensors: bool | None = None,
        progress: bool | None = None,
        **kwargs: Any,
    ) -> _Model:
        """Load a model from a checkpoint directory, in evaluation mode.

        The weights are read shard by shard from memory-mapped files, each straight to its final place.

        Args:
            directory: holds ``config.json`` and safetensors or PyTorch weights, sharded or not.
            config: used instead of ``config.json``.
            dtype: a torch dtype or its name; "auto" (or None) takes the configuration's, else that of the checkpoint.
            torch_dtype: the older name of `dtype`.
            device: where the model goes; the CPU by default.
            device_map: "auto" is the GPU if there is one; otherwise the same as `device`. A model is on one device.
            attn_implementation: "sdpa", "eager" or "flash_attention_2".
            use_safetensors: True or False look for that format only.
            progress: show a progress bar; None does so on a terminal.
            **kwargs: fields of the configuration to override.

        Raises:
            CheckpointError: the checkpoint is incomplete, damaged, or of another architecture. Nothing is half-loaded.
            ValueError: an argument is unknown or unusable.
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in _WITHOUT_EFFECT}
        config = cls._override(config or cls.config_class.from_pretrained(directory), kwargs)
        reader = CheckpointReader(directory, use_safetensors)
        final = parse_dtype(dtype if torch_dtype is None else torch_dtype) or config.dtype or _stored_dtype(reader)
        placed = _device(device, device_map)

        model = cls._build(config, attn_implementation, "meta")
        absent = load_checkpoint(
            model,
            reader,
            model.key_map,
            dtype=final,
            device=placed,
            keep_float32=model._keeps_float32,
            may_be_absent=lambda name: any(part in name for part in cls.new_heads),
            progress=progress,
        )
        if absent:
            for module_name, module in model.named_modules():
                if any(name.rpartition(".")[0] == module_name for name in absent):
                    model._init_weights(module)
            warnings.warn(
                f"{cls.__name__}: the checkpoint has no {', '.join(absent)}; initialised, to be trained", stacklevel=2
            )
        model.config.dtype = final
        if isinstance(model, GenerationMixin) and (Path(directory) / _GENERATION_CONFIG).is_file():
            try:
                model.generation_config = GenerationConfig.from_pretrained(directory)
            except ValueError as error:
                raise CheckpointError(str(error)) from error
        return model.eval()

    @staticmethod
    def _override(config: PretrainedConfig, fields: dict[str, Any]) -> PretrainedConfig:
        unknown = sorted(name for name, value in fields.items() if value is not None and not hasattr(config, name))
        if unknown:
            raise ValueError(
                f"from_pretrained: neither arguments nor fields of the configuration: {', '.join(unknown)}"
            )
        config = copy.deepcopy(config)
        for name, value in fields.items():
            if hasattr(config, name):
                setattr(config, name, value)
        config.validate()
        return config

    # Saving.

    def save_pretrained(self, directory: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Write configuration and weights, as safetensors in the layout of the hub, which transformers reads.

        All files take their place together once they are on disk; until then a checkpoint that is already there stays.

        Args:
            directory: created if need be; other files in it stay.
            max_shard_size: bytes, or a string such as "5GB".
        """
        self.config.architectures = [type(self).__name__]
        self.config.dtype = self.dtype
        with replace_files(directory, OBSOLETE_WEIGHTS) as stage:
            write_weights(stage, checkpoint_tensors(self, self.key_map), max_shard_size)
            if self.generation_config is not None:
                self.generation_config.save_pretrained(stage)
            self.config.save_pretrained(stage)

    @property
    def key_map(self) -> KeyMap:
        """How checkpoints name the weights of this architecture."""
        return KEY_MAPS[type(self.config).model_type]

    # Where the weights are, and what they are.

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; of most of them where some stay float32."""
        for name, parameter in self.named_parameters():
            if parameter.is_floating_point() and not self._keeps_float32(name):
                return parameter.dtype
        return torch.get_default_dtype()

    def _keeps_float32(self, name: str) -> bool:
        return any(part in name for part in self.keep_in_float32)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of weights, tied ones counted once."""
        embeddings = (
            {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else set()
        )
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable) and id(parameter) not in embeddings
        )

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

    # Embeddings.

    @property
    def base_model(self) -> PreTrainedModel:
        """The model without its head."""
        return getattr(self, self.base_model_prefix, self)

    def get_input_embeddings(self) -> nn.Embedding:
        embeddings: Any = self.base_model.embed_tokens
        return embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear | None:
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def tie_weights(self) -> None:
        """Make the head share the input embedding, if the configuration says so."""
        head = self.get_output_embeddings()
        if head is not None and self.config.tie_word_embeddings:
            head.weight = self.get_input_embeddings().weight

    @torch.no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Change the size of the vocabulary. Rows both have stay; new rows get the initialisation of new weights.

        Returns:
            The input embedding.
        """
        old = self.get_input_embeddings()
        size = old.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size < 1:
            raise ValueError(f"resize_token_embeddings: the vocabulary must have at least one token, got {size}")
        if size == old.num_embeddings:
            return old
        padding_idx = old.padding_idx if old.padding_idx is not None and old.padding_idx < size else None
        new = nn.Embedding(size, old.embedding_dim, padding_idx, device=old.weight.device, dtype=old.weight.dtype)
        new.weight = self._resized(old.weight, size)
        self.set_input_embeddings(new)
        head = self.get_output_embeddings()
        if head is not None and not self.config.tie_word_embeddings:
            head.weight = self._resized(head.weight, size)
            if head.bias is not None:
                bias = head.bias.new_zeros(size)
                kept = min(size, head.bias.shape[0])
                bias[:kept] = head.bias[:kept]
                head.bias = nn.Parameter(bias, requires_grad=head.bias.requires_grad)
        if head is not None:
            head.out_features = size
        self.config.vocab_size = size
        self.tie_weights()
        return self.get_input_embeddings()

    @property
    def _new_token_std(self) -> float:
        """Standard deviation of the embeddings of tokens that are added."""
        return self.config.initializer_range

    def _resized(self, weight: Tensor, size: int) -> nn.Parameter:
        resized = weight.new_empty(size, weight.shape[1])
        kept = min(size, weight.shape[0])
        resized[:kept] = weight[:kept]
        resized[kept:].normal_(std=self._new_token_std)
        return nn.Parameter(resized, requires_grad=weight.requires_grad)

    # Training.

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute the layers' activations in the backward pass instead of keeping them.

        Args:
            gradient_checkpointing_kwargs: passed to :func:`torch.utils.checkpoint.checkpoint`.
        """
        if not self.supports_gradient_checkpointing:
            raise ValueError(f"{type(self).__name__} does not support gradient checkpointing")
        call = partial(checkpoint, **{"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.gradient_checkpointing = True
                module._checkpoint_call = call

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(m.gradient_checkpointing for m in self.modules() if isinstance(m, PreTrainedModel))


def _stored_dtype(reader: CheckpointReader) -> torch.dtype:
    """The dtype of the first floating-point tensor."""
    for info in reader.tensors.values():
        if info.dtype is not None and info.dtype.is_floating_point:
            return info.dtype
    return torch.get_default_dtype()


def _device(
    device: torch.device | str | None, device_map: torch.device | str | int | dict[str, Any] | None
) -> torch.device:
    if device is not None and device_map is not None:
        raise ValueError("from_pretrained: pass device or device_map, not both")
    place: Any = device_map if device is None else device
    if isinstance(place, dict):
        if set(place) != {""}:
            raise ValueError(f'device_map must put the whole model on one device ({{"": device}}), got {place!r}')
        place = place[""]
    if place == "auto":
        place = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device("cpu" if place is None else place)
    except RuntimeError as error:
        raise ValueError(f"from_pretrained: not a device: {place!r}") from error
