"""Rotary position embedding (arXiv 2104.09864) and the ways of stretching it to longer contexts.

Pairs are (first half, second half) of a head, the convention of the checkpoints we load. Angles are float32 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}
_ALIASES = {"su": "longrope"}


def rope_type(scaling: Mapping[str, Any] | None) -> str:
    """The kind of scaling a configuration asks for; checkpoints spell the key "rope_type" or "type"."""
    if scaling is None:
        return "default"
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return _ALIASES.get(kind, kind)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def check_rope_scaling(scaling: Mapping[str, Any] | None, head_dim: int) -> None:
    """Raise ValueError unless `scaling` is a complete description of a known kind."""
    if scaling is None:
        return
    if not isinstance(scaling, Mapping):
        raise ValueError(f"rope_scaling must be a dictionary or None, got {scaling!r}")
    kind = rope_type(scaling)
    if kind not in _REQUIRED:
        raise ValueError(f"rope_scaling: unknown type {kind!r}, expected one of {', '.join(_REQUIRED)}")
    for name in _REQUIRED[kind]:
        if name not in scaling:
            raise ValueError(f"rope_scaling of type {kind!r} needs {name!r}, got only {sorted(scaling)}")
        number = scaling[name]
        if name.endswith("_factor") and kind == "longrope":
            if not isinstance(number, list | tuple) or len(number) != head_dim // 2:
                size = len(number) if isinstance(number, list | tuple) else number
                raise ValueError(f"rope_scaling[{name!r}] must list head_dim / 2 = {head_dim // 2} numbers, got {size}")
            for i, entry in enumerate(number):
                if not _is_positive(entry):
                    raise ValueError(f"rope_scaling[{name!r}][{i}] must be a positive number, got {entry!r}")
        elif not _is_positive(number):
            raise ValueError(f"rope_scaling[{name!r}] must be a positive number, got {number!r}")
    if kind == "dynamic" and head_dim <= 2:
        raise ValueError(f"rope_scaling of type 'dynamic' needs heads of more than 2 dimensions, got {head_dim}")
    factor = scaling.get("factor")
    if factor is not None and (not isinstance(factor, int | float) or factor < 1):
        raise ValueError(f"rope_scaling['factor'] must be a number of at least 1, got {factor!r}")


def _periods(head_dim: int, theta: float | Tensor) -> Tensor:
    """``theta^(2i / head_dim)`` for ``i < head_dim / 2``, on the device of `theta`."""
    device = theta.device if isinstance(theta, Tensor) else "cpu"
    return theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim)


def _yarn(head_dim: int, theta: float, scaling: Mapping[str, Any], original_length: int) -> Tensor:
    """Frequencies that turn often within the trained length stay, those that turn rarely are interpolated
    (arXiv 2309.00071, section 3.2)."""

    def dimension_of(rotations: float) -> float:
        return head_dim * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_of(scaling.get("beta_fast") or 32)
    high = dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    interpolated = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    kept = 1 - interpolated
    periods = _periods(head_dim, theta)
    return 1.0 / (scaling["factor"] * periods) * (1 - kept) + 1.0 / periods * kept


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    factor = scaling["factor"]
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)


def _llama3(plain: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are interpolated, short ones stay, those between are blended (Llama 3.1)."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original_length = scaling["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / plain
    blend = (original_length / wavelengths - low) / (high - low)
    blended = (1 - blend) * plain / factor + blend * plain
    stretched = torch.where(wavelengths > original_length / low, plain / factor, blended)
    return torch.where(wavelengths < original_length / high, plain, stretched)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of every position, computed once per forward pass and shared by all layers.

    Args:
        head_dim: size of a head, even.
        theta: the base of the frequencies.
        scaling: None, or a `rope_scaling` dictionary of type default, linear, dynamic, yarn, llama3 or longrope.
        max_position_embeddings: the length the model is configured for.
        original_max_position_embeddings: the length it was trained at, where the scaling tells them apart and does not
            say it itself.

    Raises:
        ValueError: `scaling` is incomplete or of an unknown type.
    """

    inv_freq: Tensor
    long_inv_freq: Tensor | None

    def __init__(
        self,
        head_dim: int,
        theta: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        *,
        max_position_embeddings: int = 4096,
        original_max_position_embeddings: int | None = None,
    ) -> None:
        super().__init__()
        check_rope_scaling(scaling, head_dim)
        self.head_dim = head_dim
        self.theta = float(theta)
        self.kind = rope_type(scaling)
        self.scaling = dict(scaling or {})
        self.max_length = max_position_embeddings
        self.original_length = (
            original_max_position_embeddings
            or self.scaling.get("original_max_position_embeddings")
            or max_position_embeddings
        )
        self.attention_factor, self.long_attention_factor = self._attention_factors()
        self._set_buffers()
        default = torch.get_default_device()
        if default.type != "meta":
            self.to(default)

    def _attention_factors(self) -> tuple[float, float]:
        """What cosines and sines are multiplied by, up to and past the trained length."""
        factor: float | None
        if self.kind == "yarn":
            factor = _yarn_attention_factor(self.scaling)
        elif self.kind == "longrope":
            factor = self.scaling.get("attention_factor")
            if factor is None:
                stretch = self.scaling.get("factor") or self.max_length / self.original_length
                factor = math.sqrt(1 + math.log(stretch) / math.log(self.original_length)) if stretch > 1 else 1.0
        else:
            factor = 1.0
        return self.scaling.get("short_mscale", factor), self.scaling.get("long_mscale", factor)

    def _frequencies(self) -> tuple[Tensor, Tensor | None]:
        """Frequencies up to the trained length, and past it where they differ. On the CPU, also under a meta device."""
        if self.kind == "yarn":
            return _yarn(self.head_dim, self.theta, self.scaling, self.original_length), None
        periods = _periods(self.head_dim, self.theta)
        if self.kind == "longrope":
            short, long = (
                torch.tensor(self.scaling[name], dtype=torch.float32, device="cpu")
                for name in ("short_factor", "long_factor")
            )
            return 1.0 / (short * periods), 1.0 / (long * periods)
        plain = 1.0 / periods
        if self.kind == "linear":
            return plain / self.scaling["factor"], None
        if self.kind == "llama3":
            return _llama3(plain, self.scaling), None
        return plain, None

    def _set_buffers(self) -> None:
        inv_freq, long_inv_freq = self._frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("long_inv_freq", long_inv_freq, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        # Frequencies follow the model to another device, but not into another dtype.
        device = fn(self.inv_freq).device
        self._set_buffers()
        super()._apply(lambda buffer: buffer.to(device), recurse)
        return self

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``position_ids [B, S]`` -> cosines and sines ``[B, S, 1, head_dim]`` in `dtype`, for :func:`apply_rotary`.

        The sines carry the sign of the rotation: minus in the first half. `length`, a scalar, is what longrope compares
        with the trained length; by default one more than the largest position.
        """
        inv_freq: Tensor = self.inv_freq
        attention_factor: float | Tensor = self.attention_factor
        if self.kind == "dynamic":
            inv_freq = self._dynamic_frequencies(position_ids)
        positions = position_ids[..., None, None].float()
        if self.long_inv_freq is not None:
            # One decision for the whole batch, made on the device.
            is_long = (position_ids.max() + 1 if length is None else length) > self.original_length
            inv_freq = torch.where(is_long, self.long_inv_freq, inv_freq)
            if self.long_attention_factor != self.attention_factor:
                attention_factor = torch.where(is_long, self.long_attention_factor, self.attention_factor)
        angles = positions * inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.kind in ("yarn", "longrope"):
            cos, sin = cos * attention_factor, sin * attention_factor
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)

    def _dynamic_frequencies(self, position_ids: Tensor) -> Tensor:
        """The base grows with the longest position, as soon as that passes the configured length."""
        length = (position_ids.max() + 1).clamp(min=self.max_length)
        factor = self.scaling["factor"]
        growth = (factor * length / self.max_length) - (factor - 1)
        return 1.0 / _periods(self.head_dim, self.theta * growth ** (self.head_dim / (self.head_dim - 2)))

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, theta={self.theta}, type={self.kind!r}"


def apply_rotary(hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads of ``hidden [B, S, heads, head_dim]`` by what :class:`RotaryEmbedding` returned."""
    return torch.addcmul(hidden * cos, hidden.roll(hidden.shape[-1] // 2, dims=-1), sin)
