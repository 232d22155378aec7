"""Bars of speed-up as SVG: rectangles and text alone, so that a picture is the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple


class Bar(NamedTuple):
    """How many times as fast something is."""

    label: str
    value: float
    ours: bool


class Colours(NamedTuple):
    """Of a picture."""

    ground: str
    ink: str
    line: str
    ours: str
    theirs: str


LIGHT = Colours("#ffffff", "#1f2328", "#d1d9e0", "#0969da", "#9aa4af")
DARK = Colours("#0d1117", "#e6edf3", "#3d444d", "#58a6ff", "#6e7681")
Groups = Sequence[tuple[str, Sequence[Bar]]]
_WIDTH, _LEFT, _STEP = 820, 270, 18


def bars(panels: Sequence[tuple[str, Groups]], colours: Colours = LIGHT, name: str = "Speed-up") -> str:
    """Panels below each other, each with a title and groups of bars, and a line where nothing is gained.

    ``panels``: (title, groups), a group (its name, or "" for none; its bars).
    """
    parts: list[str] = []
    y = 8

    def text(x: float, at: float, what: str, anchor: str = "start", weight: str = "normal") -> None:
        parts.append(f'<text x="{x:g}" y="{at:g}" text-anchor="{anchor}" font-weight="{weight}">{escape(what)}</text>')

    for title, groups in panels:
        most = max(bar.value for _, shown in groups for bar in shown)
        scale = (_WIDTH - _LEFT - 70) / max(most, 1.0)
        text(10, y + 14, title, weight="bold")
        y += 30
        begin, first = y, len(parts)
        for group, shown in groups:
            if group:
                text(10, y + 13, group)
                y += _STEP
            for bar in shown:
                text(_LEFT - 8, y + 13, bar.label, "end")
                fill = colours.ours if bar.ours else colours.theirs
                size = f'width="{bar.value * scale:.1f}" height="{_STEP - 5}"'
                parts.append(f'<rect x="{_LEFT}" y="{y + 2}" {size} fill="{fill}"/>')
                text(_LEFT + bar.value * scale + 6, y + 13, f"{bar.value:.2f}×")
                y += _STEP
            y += 6
        line = f'<path d="M{_LEFT + scale:.1f} {begin}V{y}" stroke="{colours.line}" stroke-dasharray="4 3"/>'
        parts.insert(first, line)
        y += 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" width="{_WIDTH}" height="{y}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{colours.ink}">\n<title>{escape(name)}</title>\n'
        f'<rect width="{_WIDTH}" height="{y}" fill="{colours.ground}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
