"""A layered drawing of a graph: rows, an order within each row, and x coordinates. Knows nothing of what is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

Point = str | tuple[str, str, int]
"""A node, or a bend of a long edge (source, target, row)."""

GAP = 7.0
BEND_WIDTH = 6.0
SWEEPS = 16


@dataclass(frozen=True)
class Layout:
    rows: list[list[Point]]
    x: dict[Point, float]
    """Centre of each point; the leftmost box starts at 0."""
    routes: dict[tuple[str, str], list[Point]]
    """Edge -> source, bends, target."""
    row_of: dict[Point, int]
    width: float


def lay_out(widths: Mapping[str, float], edges: Sequence[tuple[str, str]]) -> Layout:
    """Every node in the lowest row that its users allow; few crossings; edges as straight as the boxes let them be."""
    graph = nx.DiGraph(edges)
    graph.add_nodes_from(widths)
    generations = list(nx.topological_generations(graph.reverse()))
    row_of: dict[Point, int] = {node: len(generations) - 1 - i for i, group in enumerate(generations) for node in group}
    routes = {(a, b): [a, *((a, b, row) for row in range(row_of[a] + 1, row_of[b])), b] for a, b in graph.edges}
    bent: nx.Graph = nx.Graph()
    bent.add_nodes_from(widths)
    for route in routes.values():
        row_of.update({point: point[2] for point in route[1:-1]})
        nx.add_path(bent, route)
    rows = _ordered(bent, row_of, len(generations))
    x = _coordinates(bent, rows, widths)
    left = min(x[point] - _width(point, widths) / 2 for point in x)
    x = {point: value - left for point, value in x.items()}
    return Layout(rows, x, routes, row_of, max(x[point] + _width(point, widths) / 2 for point in x))


def _width(point: Point, widths: Mapping[str, float]) -> float:
    return widths[point] if isinstance(point, str) else BEND_WIDTH


def _ordered(bent: nx.Graph, row_of: Mapping[Point, int], num_rows: int) -> list[list[Point]]:
    """Sort each row by where its neighbours in the row beside it stand, down and up; the order with fewest crossings wins."""
    rows: list[list[Point]] = [[] for _ in range(num_rows)]
    for point in nx.dfs_preorder_nodes(bent) if nx.is_connected(bent) else bent:
        rows[row_of[point]].append(point)
    best, fewest = [list(row) for row in rows], num_crossings(bent, rows)
    for sweep in range(SWEEPS):
        step = 1 if sweep % 2 == 0 else -1
        order = range(1, num_rows) if step == 1 else range(num_rows - 2, -1, -1)
        for i in order:
            place = {point: position for position, point in enumerate(rows[i - step])}
            own = {point: position for position, point in enumerate(rows[i])}
            rows[i].sort(key=lambda point, place=place, own=own: _mean([place[n] for n in bent[point] if n in place], own[point]))
        if (crossings := num_crossings(bent, rows)) < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def num_crossings(bent: nx.Graph, rows: Sequence[Sequence[Point]]) -> int:
    total = 0
    for upper, lower in pairwise(rows):
        place = {point: i for i, point in enumerate(lower)}
        ends = [sorted(place[n] for n in bent[point] if n in place) for point in upper]
        flat = [end for group in ends for end in group]
        total += sum(a > b for i, a in enumerate(flat) for b in flat[i + 1 :])
    return total


def _coordinates(bent: nx.Graph, rows: Sequence[Sequence[Point]], widths: Mapping[str, float]) -> dict[Point, float]:
    """Each point as near as may be to the mean of its neighbours."""
    x: dict[Point, float] = {point: 60.0 * i for row in rows for i, point in enumerate(row)}
    pulls = {point: {other: _pull(point, other) for other in bent[point]} for point in bent}
    for sweep in range(6 * SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            weights = [sum(pulls[point].values()) or 1.0 for point in row]
            near = [sum(pull * x[other] for other, pull in pulls[point].items()) for point in row]
            wanted = [
                total / weight if pulls[point] else x[point] for point, total, weight in zip(row, near, weights, strict=True)
            ]
            x.update(zip(row, spread(wanted, weights, [_width(point, widths) / 2 for point in row]), strict=True))
    return x


def _pull(a: Point, b: Point) -> float:
    """Long edges keep straight above all, and do not drag the boxes at their ends out of line."""
    num_bends = isinstance(a, tuple) + isinstance(b, tuple)
    return (1.0, 0.15, 40.0)[num_bends]


def spread(wanted: Sequence[float], weights: Sequence[float], halves: Sequence[float]) -> list[float]:
    """The places nearest to those wanted (weighted squares) that keep the order and a gap between neighbours.

    With the needed distances taken off, this is isotonic regression: neighbours that are out of order share their mean.
    """
    offsets = [0.0]
    for a, b in pairwise(halves):
        offsets.append(offsets[-1] + a + b + GAP)
    pools: list[tuple[float, float, int]] = []
    for place, weight, offset in zip(wanted, weights, offsets, strict=True):
        mean, total, count = place - offset, weight, 1
        while pools and pools[-1][0] > mean:
            other, other_total, other_count = pools.pop()
            mean = (mean * total + other * other_total) / (total + other_total)
            total, count = total + other_total, count + other_count
        pools.append((mean, total, count))
    means = [mean for mean, _, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]
