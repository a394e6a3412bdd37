"""The report of one compile as text."""

from __future__ import annotations

from io import StringIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autodeploy.formats import told
from autodeploy.program import Program
from autodeploy.report.markup import num_bytes
from autodeploy.report.timeline import Timeline
from autodeploy.specs import bytes_per_request, bytes_per_token


def pass_table(program: Program) -> Table:
    """Pass, rewrites, seconds, what changed in op counts."""
    table = Table("pass", "rewrites", "seconds", "ops", title="passes")
    for record in program.history:
        delta = ", ".join(f"{count:+d} {name}" for name, count in record.op_delta.items())
        table.add_row(record.name, str(record.rewrites), f"{record.seconds:.3f}", delta)
    return table


def provider_table(program: Program) -> Table:
    """Op, provider, the providers preferred to it with the reasons against them; a row for each choice, the op on the first."""
    table = Table("op", "provider", "not chosen, and why", title="kernels")
    for op, choices in program.providers.items():
        for i, choice in enumerate(choices):
            refused = "\n".join(f"{name}: {', '.join(reasons)}" for name, reasons in choice.against.items())
            table.add_row("" if i else op, Text(choice.provider), Text(refused))
    return table


def remark_texts(program: Program) -> list[str]:
    """A sentence for each reason for which parameters are dense that were to be, or are stored, in a format, and the like."""
    found: dict[str, list[str]] = {}
    for name, reason in {**program.remarks, **_cut_formats(program)}.items():
        found.setdefault(reason, []).append(name)
    few = {reason: ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])]) for reason, names in found.items()}
    return [f"{reason}: {len(found[reason])} ({names})" for reason, names in few.items()]


def _cut_formats(program: Program) -> dict[str, str]:
    """Parameters whose parts are stored in formats, but which no kernel could be given in one -> why."""
    found: dict[str, str] = {}
    for name in program.weights:
        forms = program.weights.formats_in(name)
        if forms <= {None} or program.weights.format_of(name) is not None:
            continue
        if len(forms) > 1:
            found[name] = f"dense, since its parts are stored in several formats ({told(forms)})"
        else:
            (form,) = forms
            cut = f"not all of a matrix in {form} is read, or not as it is stored"
            found[name] = f"dense, since {'its columns are in any order' if form and 'order' in form.parts else cut}"
    return found


def twin_text(program: Program) -> str:
    """One sentence when the numbers were verified on a twin; else empty."""
    if (twin := program.twin) is None:
        return ""
    layers = f"{twin.num_layers} layer{'s' if twin.num_layers != 1 else ''}"
    return (
        f"verified numerically on a twin of {layers} ({num_bytes(twin.num_bytes)} in float64), because this model's own weights "
        f"would take {num_bytes(twin.model_bytes)} in float64, more than the limit of {num_bytes(twin.max_bytes)}; "
        "the model itself is verified in structure"
    )


def describe(program: Program, timeline: Timeline) -> str:
    """Passes, what they were verified on if not on this program, kernels, caches, weights and start-up seconds."""
    console = Console(width=160, file=StringIO())
    specs = program.caches.values()
    state_bytes = f", {bytes_per_request(specs)} bytes per request" if bytes_per_request(specs) else ""
    console.print(pass_table(program))
    if program.twin:
        console.print(twin_text(program), soft_wrap=True)
    console.print(provider_table(program))
    console.print(f"caches: {len(program.caches)}, {bytes_per_token(specs)} bytes per token{state_bytes}")
    console.print(f"weights: {len(program.weights)} parameters, {program.weight_bytes / 1e6:.1f} MB when dense")
    for text in remark_texts(program):
        console.print(text, soft_wrap=True)
    console.print(f"start-up: {timeline}")
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
