"""The drawing's geometry: nothing overlaps, edges go down, few cross."""

from itertools import pairwise

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st

from autodeploy.report.layout import BEND_WIDTH, GAP, lay_out, spread

EDGES = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)).filter(lambda edge: edge[0] < edge[1]), max_size=30)


@given(EDGES)
def test_boxes_of_a_row_keep_their_distance_and_edges_go_down(pairs: list[tuple[int, int]]) -> None:
    widths = {str(i): 30.0 + 7 * i for i in range(12)}
    layout = lay_out(widths, [(str(a), str(b)) for a, b in pairs])
    for row in layout.rows:
        halves = [widths[point] / 2 if isinstance(point, str) else BEND_WIDTH / 2 for point in row]
        for (a, half_a), (b, half_b) in pairwise(zip(row, halves, strict=True)):
            assert layout.x[b] - layout.x[a] >= half_a + half_b + GAP - 1e-6
    for route in layout.routes.values():
        assert all(layout.row_of[b] == layout.row_of[a] + 1 for a, b in pairwise(route))
    assert all(0 <= layout.x[name] <= layout.width for name in widths)
    assert {point for row in layout.rows for point in row if isinstance(point, str)} == set(widths)


def test_a_chain_is_a_straight_line() -> None:
    layout = lay_out({"a": 50, "b": 80, "c": 30}, list(nx.path_graph(["a", "b", "c"]).edges))
    assert max(layout.x.values()) - min(layout.x.values()) < 1


def test_places_that_are_too_near_share_the_shift() -> None:
    assert spread([0, 0], [1, 1], [5, 5]) == [-(10 + GAP) / 2, (10 + GAP) / 2]
    assert spread([0, 100], [1, 1], [5, 5]) == [0, 100]
    heavy, light = spread([0, 0], [3, 1], [5, 5])
    assert abs(3 * heavy + light) < 1e-9
