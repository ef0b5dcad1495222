"""Draws data-flow.svg: the way of four tokens through three experts, two choices each.

    python docs/figures/data_flow.py

The arrows are computed from the choices as `ops.plan` sorts them, so that the picture cannot say something else.
"""

from __future__ import annotations

from pathlib import Path

EXPERT_IDS = [[0, 2], [1, 0], [0, 1], [2, 0]]  # [T, K]
COLOURS = ("#4878a8", "#d9822b", "#5a9e5f")
TOP, CELL, GAP = 92, 22, 6
X = {"hidden": 20, "slots": 160, "rows": 330, "up": 455, "inner": 585, "down": 710, "outputs": 840, "out": 1000}


def y_of_token(token: int) -> float:
    return TOP + 18 + token * 2 * (CELL + GAP)


def y_of_slot(slot: int) -> float:
    return TOP + slot * (CELL + GAP)


def y_of_row(row: int, expert: int) -> float:
    return TOP - 18 + row * (CELL + GAP) + expert * 18


class Drawing:
    def __init__(self) -> None:
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, colour: str, text: str, dark: bool = True) -> None:
        self.parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{colour}"/>')
        ink = "#fff" if dark else "#222"
        self.text(x + width / 2, y + height / 2 + 4, text, size=12, fill=ink)

    def text(self, x: float, y: float, text: str, size: int = 13, fill: str = "#222", weight: str = "normal") -> None:
        style = f'font-size="{size}" fill="{fill}" font-weight="{weight}" text-anchor="middle"'
        self.parts.append(f'<text x="{x}" y="{y}" {style}>{text}</text>')

    def arrow(self, x0: float, y0: float, x1: float, y1: float, colour: str) -> None:
        middle = (x0 + x1) / 2
        curve = f"M{x0} {y0}C{middle} {y0} {middle} {y1} {x1} {y1}"
        self.parts.append(f'<path d="{curve}" fill="none" stroke="{colour}" stroke-width="1.6"/>')

    def column(self, x: float, title: str, shape: str) -> None:
        self.text(x, 26, title, size=14, weight="bold")
        self.text(x, 44, shape, size=12, fill="#666")

    def svg(self, width: int, height: int) -> str:
        body = "\n".join(self.parts)
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">'
        return f'{head}\n<rect width="{width}" height="{height}" fill="#fff"/>\n{body}\n</svg>\n'


def draw() -> str:
    drawing = Drawing()
    top_k = len(EXPERT_IDS[0])
    slots = [(token, k, expert) for token, ids in enumerate(EXPERT_IDS) for k, expert in enumerate(ids)]
    rows = sorted(slots, key=lambda slot: slot[2])  # stable: by token and choice within an expert
    half = CELL / 2

    drawing.column(X["hidden"] + 40, "hidden", "[T, H]")
    drawing.column(X["slots"] + 45, "route", "choices [T, K]")
    drawing.column(X["rows"] + 30, "permute", "rows [N, H]")
    drawing.column(X["up"] + 27, "grouped GEMM", "[E, 2F, H]")
    drawing.column(X["inner"] + 25, "activation", "[N, F]")
    drawing.column(X["down"] + 27, "grouped GEMM", "[E, H, F]")
    drawing.column(X["outputs"] + 30, "rows", "[N, H]")
    drawing.column(X["out"] + 30, "un-permute", "[T, H]")

    for token in range(len(EXPERT_IDS)):
        y = y_of_token(token)
        drawing.box(X["hidden"], y, 80, CELL, "#d8d8d8", f"token {token}", dark=False)
        drawing.box(X["out"], y, 60, CELL, "#d8d8d8", f"token {token}", dark=False)
    for token, k, expert in slots:
        y = y_of_slot(token * top_k + k)
        drawing.box(X["slots"], y, 90, CELL, COLOURS[expert], f"expert {expert}")
        drawing.arrow(X["hidden"] + 80, y_of_token(token) + half, X["slots"], y + half, "#999")
    for expert in range(len(COLOURS)):
        places = [y_of_row(index, expert) for index, row in enumerate(rows) if row[2] == expert]
        height = places[-1] + CELL - places[0]
        for name, label in (("up", "up"), ("down", "down")):
            drawing.box(X[name], places[0], 54, height, COLOURS[expert], f"{label} {expert}")
    for index, (token, k, expert) in enumerate(rows):
        y = y_of_row(index, expert)
        colour = COLOURS[expert]
        drawing.arrow(X["slots"] + 90, y_of_slot(token * top_k + k) + half, X["rows"], y + half, colour)
        for name, width in (("rows", 60), ("inner", 50), ("outputs", 60)):
            drawing.box(X[name], y, width, CELL, "#ececec", f"t{token}", dark=False)
        for begin, end in (
            (X["rows"] + 60, X["up"]),
            (X["up"] + 54, X["inner"]),
            (X["inner"] + 50, X["down"]),
            (X["down"] + 54, X["outputs"]),
        ):
            drawing.arrow(begin, y + half, end, y + half, colour)
        drawing.arrow(X["outputs"] + 60, y + half, X["out"], y_of_token(token) + half, colour)

    bottom = y_of_row(len(rows), len(COLOURS)) + 4
    left, right = X["rows"], X["out"] + 60
    drawing.parts.append(
        f'<path d="M{left} {bottom}v8h{right - left}v-8" fill="none" stroke="#666" stroke-width="1.2"/>'
    )
    drawing.text((left + right) / 2, bottom + 28, "sparse_mlp: one op, forward and backward", size=13, fill="#444")
    drawing.text(X["slots"] + 45, bottom + 28, "plan sorts them by expert", size=13, fill="#444")
    return drawing.svg(1085, int(bottom) + 44)


if __name__ == "__main__":
    Path(__file__).with_name("data-flow.svg").write_text(draw(), encoding="utf-8")
