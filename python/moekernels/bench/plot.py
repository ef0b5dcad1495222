"""The roofline and the speed-ups as a picture. Needs matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from moekernels.bench.roofs import Roofs
from moekernels.bench.table import Row

# Distinguishable with any kind of colour vision (Okabe and Ito).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
_LINES = ("-", "--", ":")
_INK, _FAINT = "#222222", "#777777"
_STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": _INK,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "grid.color": "#e4e4e4",
    "legend.fontsize": 9,
    "legend.edgecolor": "#dddddd",
    "legend.framealpha": 0.95,
    "lines.markersize": 8,
    "lines.markeredgecolor": "white",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def draw(rows: Sequence[Row], roofs: Roofs, about: dict[str, object], layer: str) -> bytes:
    """A PNG: where each kernel stands below the roofs, and how much faster than others the layer is.

    Args:
        rows: of one layer; `layer` is what their names begin with.
    """
    with matplotlib.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.08, wspace=0.03)
        figure = Figure(figsize=(13, 5.8), dpi=150, facecolor="white", layout=layout)
        left, right = figure.subplots(1, 2)
        _roofline(left, [row for row in rows if row.flops], roofs, layer)
        _speedups(right, rows, layer)
        figure.suptitle(f"{layer} on {about['device']}", fontsize=14, fontweight="bold")
        shown = ("date", "threads", "cpu_isa", "moekernels", "torch", "clock")
        caption = "  ·  ".join(f"{key} {about[key]}" for key in shown if key in about)
        figure.supxlabel(caption, fontsize=8.5, color=_FAINT)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _roofline(axes: Any, rows: Sequence[Row], roofs: Roofs, layer: str) -> None:
    axes.set(title="Roofline", xlabel="FLOP per byte that must be moved", ylabel="GFLOP/s")
    if not rows:
        _nothing(axes, "none of these kernels multiplies matrices")
        return
    slope = roofs.bandwidth / 1e9
    peaks = {dtype: peak / 1e9 for dtype, peak in roofs.matmul.items()}
    intensities = [row.flops / row.bytes for row in rows]
    rates = [row.flops / row.seconds / 1e9 for row in rows]
    corners = [peak / slope for peak in peaks.values()]
    first, last = min(*intensities, *corners) / 2.5, max(*intensities, *corners) * 2.5
    lowest, highest = min(*rates, first * slope) / 1.5, max(*rates, *peaks.values()) * 1.7
    axes.set(xscale="log", yscale="log", xlim=(first, last), ylim=(lowest, highest))
    _number(axes.xaxis, first, last)
    _number(axes.yaxis, lowest, highest)
    axes.grid(True)

    for style, (dtype, peak) in zip(cycle(_LINES), peaks.items(), strict=False):
        corner = peak / slope
        axes.plot([first, corner, last], [first * slope, peak, peak], style, color=_FAINT, linewidth=1.8, zorder=2)
        axes.annotate(
            f"{dtype} matmul, {peak:,.0f} GFLOP/s", (last, peak), xytext=(-4, 4), textcoords="offset points",
            ha="right", va="bottom", fontsize=9, color=_FAINT,
        )  # fmt: skip
    axes.text(
        first * 1.15, first * 1.15 * slope * 1.12, f"memory, {slope:,.1f} GB/s", fontsize=9, color=_FAINT,
        ha="left", va="bottom", rotation=math.degrees(math.atan(slope)), rotation_mode="anchor",
        transform_rotates_text=True,
    )  # fmt: skip

    kernels = list(dict.fromkeys(_kernel(row, layer) for row in rows))
    tokens = sorted({row.tokens for row in rows})
    color = dict(zip(kernels, cycle(_COLORS), strict=False))
    marker = dict(zip(tokens, cycle(_MARKERS), strict=False))
    for row, intensity, rate in zip(rows, intensities, rates, strict=True):
        # Kernels that read the same weights have the same intensity: set side by side, all are seen.
        kernel = _kernel(row, layer)
        beside = 1.09 ** (kernels.index(kernel) - (len(kernels) - 1) / 2)
        axes.plot(intensity * beside, rate, marker[row.tokens], color=color[kernel], zorder=3)
    handles = [Line2D([], [], color=color[kernel], linewidth=5, label=kernel) for kernel in kernels]
    handles += [Line2D([], [], color=_FAINT, marker=marker[n], linestyle="", label=_tokens(n)) for n in tokens]
    axes.legend(handles=handles, loc="lower right")


def _speedups(axes: Any, rows: Sequence[Row], layer: str) -> None:
    """Of the layer against each baseline; of each kernel against the fastest where no layer was measured."""
    layers = [row for row in rows if _kernel(row, layer).startswith("layer") and row.baselines]
    lines: dict[str, list[tuple[int, float]]] = {}
    settings = {(row.dtype, row.routing) for row in rows}
    for row in layers or rows:
        setting = f", {row.dtype}, {row.routing}" if len(settings) > 1 else ""
        if layers:
            what = "" if _kernel(row, layer) == "layer" else ", with routing"
            for name, seconds in row.baselines.items():
                lines.setdefault(name + what + setting, []).append((row.tokens, seconds / row.seconds))
        elif row.speedup is not None:
            lines.setdefault(_kernel(row, layer) + setting, []).append((row.tokens, row.speedup))
    whose = "The whole layer, times faster than" if layers else "Each kernel, times faster than the best other"
    axes.set(title=whose, xlabel="tokens at a time")
    if not lines:
        _nothing(axes, "nothing to compare with")
        return
    tokens = sorted({row.tokens for row in rows})
    values = [value for points in lines.values() for _, value in points]
    low, high = min(*values, 1.0) / 1.2, max(*values, 1.0) * 1.7
    axes.set(xscale="log", yscale="log", ylim=(low, high))
    axes.set_xticks(tokens, [str(n) for n in tokens])
    axes.set_xticks([], minor=True)
    _number(axes.yaxis, low, high, "×")
    axes.grid(True, axis="y")
    axes.axhline(1.0, color=_FAINT, linewidth=1.2, zorder=1)
    axes.annotate("as fast as moekernels", (1, 1.0), xycoords=axes.get_yaxis_transform(), xytext=(-2, -4),
                  textcoords="offset points", ha="right", va="top", fontsize=9, color=_FAINT)  # fmt: skip
    looks = zip(cycle(_COLORS), cycle(_MARKERS), strict=False)
    for (name, points), (color, marker) in zip(lines.items(), looks, strict=False):
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, color=color, marker=marker, linewidth=2, label=name)
    axes.legend(loc="best")


def _number(axis: Any, low: float, high: float, unit: str = "") -> None:
    """Plain numbers at a handful of round places."""
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,)):
        ticks = [step * 10.0**power for power in range(-9, 10) for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) <= 9:
            break
    axis.set_ticks(ticks, [f"{tick:,.10g}{unit}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _kernel(row: Row, layer: str) -> str:
    return row.shape.removeprefix(layer).strip()


def _tokens(number: int) -> str:
    return f"{number:,} token{'s' if number > 1 else ''}"


def _nothing(axes: Any, why: str) -> None:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=_FAINT)
