"""Results as a table for the terminal, as JSON and as Markdown."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import transformers
from rich.table import Table
from rich.text import Text

from autodeploy.coverage.examine import Kind, Result

COLUMNS = ("model type", "result", "caches", "ops", "error", "judged", "reason")
STYLES = {Kind.OK: "green", Kind.UNSUPPORTED: "yellow", Kind.NOT_COUNTED: "dim"}


def totals(results: Sequence[Result]) -> str:
    """One line: how many of each kind."""
    counts = Counter(result.kind for result in results)
    counted = len(results) - counts[Kind.NOT_COUNTED]
    parts = [f"{counts[kind]} {kind}" for kind in Kind if kind not in (Kind.OK, Kind.NOT_COUNTED)]
    return f"{counts[Kind.OK]} of {counted} decoder-only model types ok; {', '.join(parts)}; {counts[Kind.NOT_COUNTED]} others"


def rich_table(results: Sequence[Result]) -> Table:
    table = Table(*COLUMNS, title="coverage")
    for result in sorted(results, key=lambda result: result.model_type):
        cells = _cells(result)
        table.add_row(cells[0], Text(cells[1], STYLES.get(result.kind, "red")), *(Text(cell) for cell in cells[2:]))
    return table


def as_json(results: Sequence[Result]) -> str:
    return json.dumps([asdict(result) for result in sorted(results, key=lambda result: result.model_type)], indent=1) + "\n"


def markdown(results: Sequence[Result]) -> str:
    """The whole of docs/models.md."""
    counted = sorted((r for r in results if r.kind is not Kind.NOT_COUNTED), key=lambda result: result.model_type)
    others = sorted((r for r in results if r.kind is Kind.NOT_COUNTED), key=lambda result: result.model_type)
    lines = [HEAD.format(version=transformers.__version__, totals=totals(results))]
    lines += [_row(COLUMNS), _row(["---"] * len(COLUMNS)), *(markdown_row(result) for result in counted)]
    lines += ["", "## Not counted", "", _row(["model type", "reason"]), _row(["---"] * 2)]
    lines += [_row([f"`{result.model_type}`", _escaped(result.reason)]) for result in others]
    return "\n".join(lines) + "\n"


def markdown_row(result: Result) -> str:
    """One row of the first table."""
    cells = [_escaped(cell) for cell in _cells(result)]
    return _row([f"`{cells[0]}`", *cells[1:]])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _cells(result: Result) -> list[str]:
    """Numbers are rounded to what is the same on every machine."""
    error = "" if not result.error else f"{10.0 ** math.ceil(math.log10(result.error)):.0e}"
    judged = "" if result.judged is None else f"{math.floor(result.judged * 20) * 5} %"
    return [result.model_type, result.kind, ", ".join(result.caches), ", ".join(result.ops), error, judged, result.reason]


HEAD = """# Models

Written by `autodeploy coverage --markdown docs/models.md` with transformers {version}: {totals}.

Each model type of transformers' mapping for causal language models, as a small model shrunk from its config class's own
defaults with every weight perturbed, compiled and compared with eager in float32. *ok*: logits within 1e-5 relative error
(largest difference over largest logit) alone and with three requests packed in one row, and every judged greedy token of six
requests right under chunked prefill and preemption. A token is judged when eager's lead over its second choice exceeds ten
times the error and eager's own attention variants agree. *unsupported*: refused with that reason; `backend="pytorch"` runs it.
*error* is rounded up to a power of ten, *judged* down to five percent. No code here knows a family.
"""
