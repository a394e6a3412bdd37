"""A bar chart as SVG: groups of bars, a line above each for what it could be at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autodeploy.report.markup import Html, tag

COLOURS = ("#3157d5", "#b35c00", "#1a7f5a", "#7a3fc4", "#b3261e", "#697586")
BAR, GAP, HEIGHT, TOP, LEFT = 34, 30, 240, 56, 20
LETTER = 6.5
"""Width of one in a label."""
FONT = "12px system-ui, 'Liberation Sans', Arial, sans-serif"


@dataclass(frozen=True)
class Bars:
    """One group: a value for each series (None draws nothing) and the limit that is drawn as a line."""

    label: str
    values: tuple[float | None, ...]
    limit: float | None = None


def bar_chart(title: str, series: Sequence[str], groups: Sequence[Bars], limit: str = "ceiling of this machine") -> str:
    """The file's text. title: says the unit too. series: what the bars of a group are, in order. limit: what the lines are."""
    largest = max([value for group in groups for value in (*group.values, group.limit) if value is not None] or [1.0])
    scale, wide = HEIGHT / largest, len(series) * BAR
    column = GAP + max([wide, *(LETTER * len(group.label) for group in groups)])
    parts: list[Html] = [
        _text(title, LEFT, 20, anchor="start", weight="600"),
        *_legend(series, limit if any(group.limit for group in groups) else ""),
    ]
    for i, group in enumerate(groups):
        left = LEFT + i * column + (column - GAP - wide) / 2
        parts += _bars(group, left, scale)
        parts.append(_text(group.label, left + wide / 2, TOP + HEIGHT + 18))
        if group.limit is not None:
            parts.append(_limit(group.limit, left, wide, scale))
    width = max(LEFT + len(groups) * column, 260 + 110 * len(series))
    box = {"viewBox": f"0 0 {width} {TOP + HEIGHT + 30}", "width": width, "height": TOP + HEIGHT + 30}
    back = tag("rect", width="100%", height="100%", fill="#ffffff")
    return tag("svg", back, *parts, xmlns="http://www.w3.org/2000/svg", style=f"font: {FONT}", **box) + "\n"


def _bars(group: Bars, left: float, scale: float) -> list[Html]:
    parts = []
    for i, value in enumerate(group.values):
        if value is not None:
            x, tall = left + i * BAR, max(value * scale, 1.0)
            place = {"x": x + 2, "y": f"{TOP + HEIGHT - tall:.1f}", "width": BAR - 4, "height": f"{tall:.1f}"}
            parts.append(tag("rect", fill=COLOURS[i % len(COLOURS)], **place))
            parts.append(_text(f"{value:.0f}" if value >= 100 else f"{value:.3g}", x + BAR / 2, TOP + HEIGHT - tall - 4))
    return parts


def _limit(limit: float, left: float, wide: float, scale: float) -> Html:
    y = f"{TOP + HEIGHT - limit * scale:.1f}"
    return tag("line", x1=left - 4, x2=left + wide + 4, y1=y, y2=y, stroke="#1b2330", stroke_dasharray="4 3")


def _legend(series: Sequence[str], limit: str) -> list[Html]:
    keys: list[Html] = []
    for i, name in enumerate(series):
        x = LEFT + 110 * i
        keys += [tag("rect", x=x, y=30, width=10, height=10, fill=COLOURS[i % len(COLOURS)]), _text(name, x + 15, 39, "start")]
    if not limit:
        return keys
    x = LEFT + 110 * len(series)
    line = tag("line", x1=x, x2=x + 20, y1=35, y2=35, stroke="#1b2330", stroke_dasharray="4 3")
    return [*keys, line, _text(limit, x + 26, 39, "start")]


def _text(text: str, x: float, y: float, anchor: str = "middle", weight: str | None = None) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, font_weight=weight, fill="#1b2330")
