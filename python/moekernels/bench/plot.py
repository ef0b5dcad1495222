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
from moekernels.bench.table import BOUND, Row

# Distinguishable with any kind of colour vision (Okabe and Ito).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
_LINES = ("-", "--", ":")
_FILLS: Any = ("full", "none", "left")
# Baselines that are slower than this by so many times are named, not drawn: they would press the others together.
_FAR = 5.0
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
    "svg.hashsalt": "moekernels",  # the same figures make the same file
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def draw(rows: Sequence[Row], roofs: Roofs, about: dict[str, object], layer: str, kind: str = "png") -> bytes:
    """A picture: where each kernel stands below the roofs, and how much faster than others the layer is, per dtype.

    Args:
        rows: of one layer; `layer` is what their names begin with.
        kind: "png" or "svg".
    """
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    with matplotlib.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.08, wspace=0.03)
        height = 5.8 + 2.0 * max(0, len(dtypes) - 2)
        figure = Figure(figsize=(13, height), dpi=150, facecolor="white", layout=layout)
        left, right = figure.subfigures(1, 2, squeeze=False)[0]
        _roofline(left.subplots(), [row for row in rows if row.flops], roofs, layer)
        _speedups(right, rows, dtypes, layer)
        figure.suptitle(f"{layer} on {about['device']}", fontsize=14, fontweight="bold")
        shown = ("date", "threads", "cpu_isa", "moekernels", "torch", "clock")
        caption = "  ·  ".join(f"{key} {about[key]}" for key in shown if key in about)
        figure.supxlabel(caption, fontsize=8.5, color=_FAINT)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
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
    end = min(corners) / 1.15
    axes.text(
        end, end * slope * 1.12, f"memory, {slope:,.1f} GB/s", fontsize=9, color=_FAINT, ha="right", va="bottom",
        rotation=math.degrees(math.atan(slope)), rotation_mode="anchor", transform_rotates_text=True,
    )  # fmt: skip

    kernels = list(dict.fromkeys(_kernel(row, layer) for row in rows))
    tokens = sorted({row.tokens for row in rows})
    color = dict(zip(kernels, cycle(_COLORS), strict=False))
    marker = dict(zip(tokens, cycle(_MARKERS), strict=False))
    fill = dict(zip(dict.fromkeys(row.dtype for row in rows), cycle(_FILLS), strict=False))
    for row, intensity, rate in zip(rows, intensities, rates, strict=True):
        # Kernels that read the same weights have the same intensity: set side by side, all are seen.
        kernel = _kernel(row, layer)
        beside = 1.09 ** (kernels.index(kernel) - (len(kernels) - 1) / 2)
        axes.plot(
            intensity * beside, rate, marker[row.tokens], color=color[kernel], fillstyle=fill[row.dtype],
            markerfacecoloralt="white", zorder=3,
        )  # fmt: skip
    handles = [Line2D([], [], color=color[kernel], linewidth=5, label=kernel) for kernel in kernels]
    handles += [Line2D([], [], color=_FAINT, marker=marker[n], linestyle="", label=_tokens(n)) for n in tokens]
    if len(fill) > 1:
        looks: Any = {"color": _FAINT, "marker": "o", "linestyle": "", "markerfacecoloralt": "white"}
        handles += [Line2D([], [], fillstyle=style, label=dtype, **looks) for dtype, style in fill.items()]
    axes.legend(handles=handles, loc="best")


def _speedups(figure: Any, rows: Sequence[Row], dtypes: Sequence[str], layer: str) -> None:
    """Of the layer against each baseline; of each kernel against the fastest where no layer was measured.

    One below the other for each dtype, with a legend for all.
    """
    layers = [row for row in rows if _kernel(row, layer).startswith("layer") and row.baselines]
    # dtype -> what is compared, which way -> tokens and times faster
    lines: dict[str, dict[tuple[str, str], list[tuple[int, float]]]] = {dtype: {} for dtype in dtypes}
    routings = {row.routing for row in rows}
    for row in layers or rows:
        ways = [_kernel(row, layer).removeprefix("layer").strip() if layers else ""]
        ways += [row.routing] if len(routings) > 1 else []
        way = ", ".join(filter(None, ways))
        if layers:
            for name, seconds in row.baselines.items():
                lines[row.dtype].setdefault((name, way), []).append((row.tokens, seconds / row.seconds))
        elif row.speedup is not None:
            lines[row.dtype].setdefault((_kernel(row, layer), way), []).append((row.tokens, row.speedup))
    whose, than = ("The whole layer", "than") if layers else ("Each kernel", "than the best other")
    keys = list(dict.fromkeys(key for of_dtype in lines.values() for key in of_dtype))
    if not keys:
        axes = figure.subplots()
        axes.set(title=f"{whose}, times faster {than}", xlabel="tokens at a time")
        _nothing(axes, "nothing to compare with")
        return

    values = {key: [value for of_dtype in lines.values() for _, value in of_dtype.get(key, ())] for key in keys}
    nearest = min(min(found) for found in values.values())
    near = [key for key in keys if min(values[key]) <= max(_FAR, nearest)]
    drawn = [value for key in near for value in values[key]]
    low, high = min(*drawn, 1.0) / 1.15, max(*drawn, 1.0) * 1.15
    color = dict(zip(dict.fromkeys(name for name, _ in near), cycle(_COLORS), strict=False))
    style = dict(zip(dict.fromkeys(way for _, way in near), cycle(_LINES), strict=False))
    marker = dict(zip(color, cycle(_MARKERS), strict=False))
    tokens = sorted({row.tokens for row in rows})
    panels = figure.subplots(len(dtypes), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (dtype, of_dtype) in zip(panels, lines.items(), strict=True):
        axes.set(title=f"{whose} in {dtype}, times faster {than}", xscale="log", yscale="log", ylim=(low, high))
        axes.set_xticks(tokens, [str(n) for n in tokens])
        axes.set_xticks([], minor=True)
        _number(axes.yaxis, low, high, "×")
        axes.grid(True, axis="y")
        axes.axhline(1.0, color=_FAINT, linewidth=1.2, zorder=1)
        for (name, way), points in of_dtype.items():
            if (name, way) in near:
                xs, ys = zip(*sorted(points), strict=True)
                axes.plot(xs, ys, style[way], color=color[name], marker=marker[name], linewidth=2)
    panels[-1].set_xlabel("tokens at a time")

    handles = []
    for name, way in near:
        look: Any = {"color": color[name], "marker": marker[name], "linestyle": style[way], "linewidth": 2}
        handles.append(Line2D([], [], label=_named(name, way), **look))
    for key in keys:
        if key not in near:
            extent = f"{min(values[key]):.0f}× to {max(values[key]):.0f}×"
            handles.append(Line2D([], [], linestyle="", label=f"{_named(*key)}: {extent}, not drawn"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2, fontsize=8.5, handlelength=1.6, handletextpad=0.5,
        columnspacing=1.0,
    )  # fmt: skip


def _named(name: str, way: str) -> str:
    return ", ".join(filter(None, (name, "a bound" if name == BOUND else "", way)))


def _number(axis: Any, low: float, high: float, unit: str = "") -> None:
    """Plain numbers at a handful of round places."""
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,)):
        ticks = [step * 10.0**power for power in range(-9, 10) for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) <= 9:
            break
    axis.set_ticks(ticks, [f"{tick:,.10g}{unit}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _kernel(row: Row, layer: str) -> str:
    """What was measured of the layer; rows of the layer as such may bear its name alone."""
    return row.shape.removeprefix(layer).strip() or "layer"


def _tokens(number: int) -> str:
    return f"{number:,} token{'s' if number > 1 else ''}"


def _nothing(axes: Any, why: str) -> None:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=_FAINT)
