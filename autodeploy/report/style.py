"""The look of the page. One accent, two themes, system fonts: nothing is fetched."""

LIGHT = """
--page: #f6f7f9; --card: #ffffff; --ink: #1b2330; --soft: #5c6878; --line: #e1e5eb; --accent: #3157d5; --wash: #eef2fd;
--more: #8a4b08; --more-wash: #fdf1e0; --less: #146c43; --less-wash: #e3f5ea; --edge: #a7b1bf;
--linear: #3157d5; --attention: #b3261e; --norm: #1a7f5a; --rope: #7a3fc4; --activation: #b35c00; --arithmetic: #697586;
--movement: #b3bcc8; --inlet: #ffffff;
"""
DARK = """
--page: #10141b; --card: #181e27; --ink: #e4e9f0; --soft: #98a4b5; --line: #2a323e; --accent: #86a5ff; --wash: #1f2a45;
--more: #f0b26a; --more-wash: #35270f; --less: #7ed3a2; --less-wash: #123022; --edge: #566274;
--linear: #86a5ff; --attention: #ff8f86; --norm: #68cfa4; --rope: #c39bff; --activation: #f0ad62; --arithmetic: #98a4b5;
--movement: #566274; --inlet: #181e27;
"""
KINDS = ("linear", "attention", "norm", "rope", "activation", "arithmetic", "movement")

BASE = """
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 14px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue",
  "Liberation Sans", Arial, sans-serif; font-variant-numeric: tabular-nums }
main { max-width: 1200px; margin: 0 auto; padding: 32px 28px 48px }
h1 { font-size: 26px; line-height: 1.2; margin: 0; letter-spacing: -.01em }
h2 { font-size: 17px; margin: 0 0 2px }
h3 { font-size: 13px; margin: 0 0 10px; font-weight: 600 }
h3 small { color: var(--soft); font-weight: 400; font-size: 13px; margin-left: 6px }
p { margin: 0 }
.note { color: var(--soft); margin-bottom: 14px; max-width: 92ch }
.below { margin-top: 12px; max-width: 92ch }
header .note { margin: 4px 0 20px }
code, .mono, svg text { font-family: ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", "Liberation Mono", monospace }
code { font-size: 12.5px }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px 22px; margin-top: 16px }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px }
.pair > section { min-width: 0 }
.tiles { display: grid; grid-template-columns: repeat(5, 1fr); gap: 12px }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 13px 16px }
.tile b { display: block; font-size: 22px; font-weight: 600; letter-spacing: -.01em; white-space: nowrap }
.tile span { color: var(--soft); font-size: 12.5px }
.tile i { font-style: normal; color: var(--soft); font-weight: 400 }
table { border-collapse: collapse; width: 100% }
th { text-align: left; font-weight: 500; font-size: 12px; color: var(--soft); padding: 4px 14px 6px 0;
  border-bottom: 1px solid var(--line); white-space: nowrap }
td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: baseline }
tr:last-child td { border-bottom: 0; padding-bottom: 0 }
th:last-child, td:last-child { padding-right: 0 }
.number { text-align: right; white-space: nowrap }
.chip { display: inline-block; font-size: 11.5px; padding: 0 7px; margin: 1px 4px 1px 0; border-radius: 9px; white-space: nowrap }
.chip.more { color: var(--more); background: var(--more-wash) }
.chip.less { color: var(--less); background: var(--less-wash) }
.chip.none { color: var(--soft); padding: 0 }
.sum td { font-weight: 600 }
"""
PICTURES = """
.layers { display: flex; flex-wrap: wrap; align-items: flex-start; justify-content: space-between; gap: 24px }
.layers > div { max-width: 100%; overflow-x: auto }
.layers > div + div { position: sticky; top: 16px }
svg.layer { display: block }
.edges path { fill: none; stroke: var(--edge); stroke-width: 1.1 }
.op rect { stroke-width: 1.1 }
.op text { text-anchor: middle; fill: var(--ink) }
.op .label { font-size: 10.5px; font-weight: 600 }
.op .shape, .op .reads { font-size: 9px; fill: var(--soft) }
.op .reads { font-style: italic }
.op.inlet rect, .key.inlet { fill: var(--inlet); stroke: var(--edge); stroke-dasharray: 3 2.5; border: 1px dashed var(--edge) }
.op.inlet .label { font-weight: 400 }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; color: var(--soft); font-size: 12.5px; margin-bottom: 18px }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; vertical-align: -1px }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 6px 14px; align-items: center }
.bars .track { background: var(--page); border-radius: 5px; height: 14px }
.bars .bar { background: var(--accent); border-radius: 5px; height: 14px; min-width: 3px; max-width: 100% }
.bars span.pass { color: var(--soft); font-size: 12.5px; padding-left: 14px }
.bars .bar.pass { opacity: .55; height: 8px; position: relative; top: 3px }
.stack { display: flex; height: 18px; border-radius: 6px; overflow: hidden; margin: 2px 0 12px; gap: 2px }
.stack i { display: block; min-width: 3px }
.stack .weights, .key.weights { background: var(--accent) }
.stack .pool, .key.pool { background: var(--norm) }
footer { color: var(--soft); font-size: 12.5px; margin-top: 18px }
@media (max-width: 900px) { .pair { display: block } .tiles { grid-template-columns: 1fr 1fr }
  .layers > div + div { position: static } }
@media print { section { break-inside: avoid } }
"""


def stylesheet() -> str:
    colours = "".join(
        f".op.{kind} rect {{ fill: color-mix(in srgb, var(--{kind}) 14%, var(--card)); stroke: var(--{kind}) }} "
        f".key.{kind} {{ background: var(--{kind}) }}\n"
        for kind in KINDS
    )
    themes = f":root {{ color-scheme: light dark; {LIGHT} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}\n"
    return themes + BASE + PICTURES + colours
