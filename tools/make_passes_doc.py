"""Write docs/passes.md from the docstrings and fields of the passes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path

from autodeploy import Effect, Target, Transform, default_pipeline
from autodeploy.specs import Mesh
from autodeploy.transforms.quantize import QuantizeWeights
from autodeploy.transforms.quantize_cache import QuantizeCache

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "passes.md"
EFFECTS = {
    Effect.REWRITE: "the same function of the same inputs",
    Effect.FUSION: "the same function, rounded elsewhere",
    Effect.INPUTS: "placeholders or outputs change",
    Effect.PARAMETERS: "parameters and their recipes change",
    Effect.SHARDING: "parameters and values become those of ranks, which together compute the same",
    Effect.NUMERICS: "values change, on purpose",
}
HEADER = """# The passes

Written by `python tools/make_passes_doc.py` from the docstrings and fields of the passes; a test fails when it is stale.

`autodeploy.default_pipeline()` runs these, in this order, on a program fresh from torch.export; `quantize` and
`quantize_cache` only where `quantization=` and the `dtype` of the KV cache ask for them, `shard` where several ranks share
layers. What one of them does to a model is shown by `autodeploy inspect MODEL --diff PASS`. The effect is what a pass may
change beside the graph, and is checked each time it runs. Options are set with `pipeline.configure(name, option=value)` or
`--set name.option=value`. How to write a pass of your own: [write-a-pass.md](write-a-pass.md).
"""


def passes_doc() -> str:
    passes = default_pipeline(Target(mesh=Mesh(2)), QuantizeWeights(), QuantizeCache())
    rows = [f"| {i} | [`{item.name}`](#{item.name}) | {item.effect.value} |" for i, item in enumerate(passes, 1)]
    table = "\n".join(["|   | pass | effect |", "|---|---|---|", *rows])
    return "\n".join([HEADER, f"{table}\n", *(line for item in passes for line in section(item))])


def section(item: Transform) -> Iterator[str]:
    kind = type(item)
    path = f"autodeploy/{kind.__module__.split('.', 1)[1].replace('.', '/')}.py"
    yield f"## {item.name}\n"
    yield f"`{kind.__name__}` in [`{path}`](../{path}). Effect: {item.effect.value} ({EFFECTS[item.effect]}).\n"
    prose, _, example = (inspect.getdoc(kind) or "").partition("\n\nbefore:")
    yield f"{prose}\n"
    if example:
        yield f"```text\nbefore:{example.rstrip()}\n```\n"
    options = [f"- `{field.name}: {field.type}`{default(field)}" for field in fields(item)]
    yield "\n".join(["Options:\n", *options]) + "\n" if options else "No options.\n"


def default(field: Field[object]) -> str:
    if field.default_factory is not MISSING:
        return f", by default `{field.default_factory()!r}`"
    return "" if field.default is MISSING else f", by default `{field.default!r}`"


if __name__ == "__main__":
    FILE.write_text(passes_doc(), encoding="utf-8")
    print(f"{FILE.relative_to(ROOT)} written", file=sys.stderr)
