"""Markup from values: whatever is not `Html` already is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def escaped(value: object) -> Html:
    return value if isinstance(value, Html) else Html(escape(str(value)))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """One element. class_ becomes class and text_anchor text-anchor; an attribute that is None is left out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items() if value is not None
    )
    return Html(f"<{name}{shown}>{join(children)}</{name}>")


def join(parts: Iterable[object], separator: str = "") -> Html:
    return Html(separator.join(map(escaped, parts)))


def table(headers: Iterable[str], rows: Iterable[Iterable[object]]) -> Html:
    """A header that ends in # belongs to a column of numbers; no row of headers is drawn when all are empty."""
    heads = list(headers)
    kinds = ["number" if head.endswith("#") else None for head in heads]
    cells = join(tag("th", text.rstrip("#"), class_=kind) for text, kind in zip(heads, kinds, strict=True))
    body = join(tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True))) for row in rows)
    head = tag("thead", tag("tr", cells)) if any(text.rstrip("#") for text in heads) else ""
    return tag("table", head, tag("tbody", body))


def signed(count: int) -> str:
    return f"{count:+d}".replace("-", MINUS) if count else "0"


def num_bytes(count: int) -> str:
    """1,536 -> 1.5 KiB."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if size >= 100 or units[0] == "B" else f"{size:.1f} {units[0]}"
