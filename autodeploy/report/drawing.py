"""A layer as inline SVG: boxes in rows, curved edges, the full statement of each op as its tooltip."""

from __future__ import annotations

from itertools import pairwise

from autodeploy.report.layer import Box, LayerView
from autodeploy.report.layout import Layout, Point, lay_out
from autodeploy.report.markup import Html, join, tag

LABEL, SMALL = 6.3, 5.4  # widths of one character
HEIGHT, TALL, INLET = 30.0, 42.0, 30.0
ROW_GAP, MARGIN = 13.0, 4.0
MOST_BOXES = 400
LONGEST = 34

LEGEND = {
    "linear": "projection",
    "attention": "attention and cache",
    "norm": "norm",
    "rope": "rotary embedding",
    "activation": "activation",
    "arithmetic": "arithmetic",
    "movement": "shape, cast, split",
    "inlet": "comes into the layer",
}


def draw(view: LayerView) -> Html:
    """The layer, top to bottom."""
    if len(view.boxes) > MOST_BOXES:
        return tag("p", f"{len(view.boxes)} ops are too many to draw; `autodeploy inspect` shows them as text.", class_="note")
    layout = lay_out({name: width(box) for name, box in view.boxes.items()}, view.edges)
    tops = _tops(view, layout)
    edges = join(_edge(view, layout, tops, route) for route in layout.routes.values())
    boxes = join(_draw_box(box, layout.x[name], tops[layout.row_of[name]]) for name, box in view.boxes.items())
    w, h = layout.width + 2 * MARGIN, tops[-1] + MARGIN
    size = {"width": f"{w:.0f}", "height": f"{h:.0f}", "viewBox": f"{-MARGIN} {-MARGIN} {w:.1f} {h + MARGIN:.1f}"}
    return tag("svg", tag("g", edges, class_="edges"), boxes, class_="layer", role="img", **size)


def legend() -> Html:
    keys = (tag("span", tag("i", class_=f"key {kind}"), text) for kind, text in LEGEND.items())
    return tag("p", *keys, class_="legend")


def width(box: Box) -> float:
    small = max(len(box.shape), len(shortened(box.reads)))
    return max(40.0, LABEL * len(box.label) + 12, SMALL * small + 12)


def height(box: Box) -> float:
    if not box.shape and not box.reads:
        return 22.0
    return TALL if box.reads and box.shape else HEIGHT


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _tops(view: LayerView, layout: Layout) -> list[float]:
    """Top of every row, and the bottom of the last."""
    tops = [0.0]
    for row in layout.rows:
        tallest = max((height(view.boxes[point]) for point in row if isinstance(point, str)), default=0.0)
        tops.append(tops[-1] + tallest + ROW_GAP)
    return tops


def _edge(view: LayerView, layout: Layout, tops: list[float], route: list[Point]) -> Html:
    """From the bottom of one box to the top of another, upright at every bend."""

    def span(point: Point) -> tuple[float, float, float]:
        top = tops[layout.row_of[point]]
        tall = height(view.boxes[point]) if isinstance(point, str) else tops[layout.row_of[point] + 1] - top - ROW_GAP
        return layout.x[point], top, top + tall

    path = ""
    for a, b in pairwise(map(span, route)):
        middle = (a[2] + b[1]) / 2
        path += (
            f"{'L' if path else 'M'}{a[0]:.1f} {a[2]:.1f}C{a[0]:.1f} {middle:.1f} {b[0]:.1f} {middle:.1f} {b[0]:.1f} {b[1]:.1f}"
        )
    return tag("path", d=path)


def _draw_box(box: Box, x: float, top: float) -> Html:
    wide, tall = width(box), height(box)
    lines = [("label", box.label), ("shape", box.shape), ("reads", shortened(box.reads))]
    texts = join(
        tag("text", text, x=f"{x:.1f}", y=f"{top + 13.5 + 11.5 * i:.1f}", class_=kind)
        for i, (kind, text) in enumerate((kind, text) for kind, text in lines if text)
    )
    place = {"x": f"{x - wide / 2:.1f}", "y": f"{top:.1f}", "width": f"{wide:.1f}", "height": f"{tall:.1f}"}
    frame = tag("rect", rx=12 if box.kind == "inlet" else 5, **place)
    return tag("g", tag("title", box.statement or box.label), frame, texts, class_=f"op {box.kind}")
