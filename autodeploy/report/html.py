"""The report of one compile as a page in one file: no script, and nothing that is fetched from elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from autodeploy.program import Choice, PassRecord, Program
from autodeploy.report.drawing import draw, legend
from autodeploy.report.layer import LayerView, semantic_name, view_layer
from autodeploy.report.markup import TIMES, Html, join, num_bytes, signed, table, tag
from autodeploy.report.style import stylesheet
from autodeploy.report.tables import remark_texts, twin_text
from autodeploy.report.texts import EXPORT
from autodeploy.report.timeline import Timeline
from autodeploy.specs import STATES, CacheSpec, SlidingWindowKV, bytes_per_token, window_of_pool


class Before:
    """An observer that keeps what the page shows of the program as exported."""

    def __init__(self) -> None:
        self.layer: LayerView | None = None
        self.num_ops = 0

    def __call__(self, program: Program, record: PassRecord) -> None:
        if record.name == EXPORT:
            self.layer, self.num_ops = view_layer(program), program.op_counts().total()


@dataclass(frozen=True)
class Settings:
    """What the memory plan is made for."""

    page_size: int
    pools: Mapping[str, int]
    """Pages (or state slots) of each pool, the scratch one included."""
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int


def page(
    title: str,
    program: Program,
    before: Before,
    timeline: Timeline,
    settings: Settings,
    footer: str = "",
    foreign: Sequence[tuple[str, str]] = (),
) -> str:
    """The whole page. foreign: the passes that are not autodeploy's own, each with its module."""
    body = [
        _header(title, program, before, timeline, settings),
        _section(
            "Pipeline",
            "What each pass did, in order; ops are counted before and after it.",
            _passes(program),
            _twin(program),
            _foreign(foreign),
        ),
        _layers(program, before),
        _section(
            "Kernels", "The implementation chosen for each semantic op, and what spoke against the others.", _kernels(program)
        ),
        tag(
            "div",
            _section("Caches", "What attention calls remember, grouped by kind.", _caches(program)),
            _section("Weights by format", "Parameters as they lie in memory.", _weights(program)),
            class_="pair",
        ),
        tag(
            "div",
            _section("Memory plan", "Weights and the KV pool, for the settings below.", _memory(program, settings)),
            _section("Start-up", "Phases and passes, one after the other.", _timeline(program, timeline), _notes(timeline)),
            class_="pair",
        ),
        tag("footer", footer),
    ]
    head = join([Html('<meta charset="utf-8">'), tag("title", f"{title}: compile report"), tag("style", Html(stylesheet()))])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{tag("main", *body)}</body></html>\n'


def _section(heading: str, note: str, *content: object) -> Html:
    return tag("section", tag("h2", heading), tag("p", note, class_="note"), *content)


def _header(title: str, program: Program, before: Before, timeline: Timeline, settings: Settings) -> Html:
    ops = program.op_counts().total()
    change = tag("i", before.num_ops, " → ") if before.num_ops else ""
    tiles = [
        (join([change, ops]), "ops in the graph"),
        (sum(record.rewrites for record in program.history), f"rewrites by {len(program.history)} passes"),
        (num_bytes(program.weight_bytes), f"weights, {len(program.weights)} parameters"),
        (num_bytes(bytes_per_token(program.caches.values())), "of cache per token"),
        (f"{sum(timeline.seconds.values()):.1f} s", "start-up"),
    ]
    shown = (tag("div", tag("b", value), tag("span", text), class_="tile") for value, text in tiles)
    formats = ", ".join(_dtypes(program))
    note = f"Compile report. The program is {program.level.value}, with {len(program.caches)} caches; weights are {formats}."
    return join([tag("header", tag("h1", title), tag("p", note, class_="note")), tag("div", *shown, class_="tiles")])


def _passes(program: Program) -> Html:
    records = program.history
    rows = (
        (
            i,
            tag("code", record.name),
            record.rewrites,
            f"{record.seconds:.3f}",
            signed(sum(record.op_delta.values())),
            _delta(record),
        )
        for i, record in enumerate(records, 1)
    )
    return table(["#", "pass", "rewrites#", "seconds#", "ops#", "change of op counts"], rows)


def _delta(record: PassRecord) -> Html:
    if not record.op_delta:
        return tag("span", "none", class_="chip none")
    changes = sorted(record.op_delta.items(), key=lambda item: -abs(item[1]))
    return join(
        tag("span", f"{signed(count)} {name}", class_=f"chip mono {'more' if count > 0 else 'less'}") for name, count in changes
    )


def _twin(program: Program) -> Html:
    text = twin_text(program)
    return tag("p", f"{text[0].upper()}{text[1:]}.", class_="below") if text else Html()


def _foreign(passes: Sequence[tuple[str, str]]) -> Html:
    named = join((join([tag("code", name), f" ({module})"]) for name, module in passes), ", ")
    return tag("p", "Passes from elsewhere: ", named, class_="below") if passes else Html()


def _layers(program: Program, before: Before) -> Html:
    after = view_layer(program)
    views = [("as exported", before.layer), ("as served", after)]
    columns = (
        tag("div", tag("h3", text, tag("small", f"{view.num_ops} ops")), draw(view)) for text, view in views if view is not None
    )
    note = (
        f"Layer {after.index + 1} of {after.num_layers}, with everything that computes it. Each box is one op, the shape of its "
        "result, and the parameters and batch inputs it reads; point at it to see the statement."
    )
    return _section("One layer, before and after", note, legend(), tag("div", *columns, class_="layers"))


def _kernels(program: Program) -> Html:
    if not program.providers:
        return tag("p", "No kernels have been selected.", class_="note")
    calls = Counter(semantic_name(node) for node in program.graph.graph.nodes)
    rows = (
        (*((tag("code", op), calls[op]) if i == 0 else ("", "")), *_choice(choice))
        for op, choices in program.providers.items()
        for i, choice in enumerate(choices)
    )
    return table(["op", "calls#", "provider", "not chosen, and why"], rows)


def _choice(choice: Choice) -> Iterator[object]:
    """The provider, and those preferred to it with the reasons, as two cells."""
    yield tag("code", choice.provider)
    refused = (tag("div", tag("code", name), f": {', '.join(reasons)}") for name, reasons in choice.against.items())
    yield join(refused) or tag("span", "none is preferred to it", class_="chip none")


def _caches(program: Program) -> Html:
    groups = Counter(program.caches.values())
    rows = [(*_describe_cache(spec), count, num_bytes(spec.bytes_per_unit(1) * count)) for spec, count in groups.items()]
    return table(["kind", "shape", "dtype", "caches#", "bytes per token or request#"], rows)


def _describe_cache(spec: CacheSpec) -> Iterator[object]:
    kind = type(spec).__name__
    yield tag("code", f"{kind}, window {spec.window}" if isinstance(spec, SlidingWindowKV) else kind)
    yield f" {TIMES} ".join(map(str, spec.shape(1, 1)[1:]))
    yield spec.dtype


def _dtypes(program: Program) -> dict[str, list[int]]:
    """dtype -> bytes of each parameter."""
    sizes: dict[str, list[int]] = {}
    for tensor in map(program.parameter, program.weights):
        sizes.setdefault(str(tensor.dtype).removeprefix("torch."), []).append(tensor.nbytes)
    return sizes


def _weights(program: Program) -> Html:
    formats = _dtypes(program).items()
    rows = ((tag("code", dtype), len(sizes), f"{sum(sizes):,}", num_bytes(sum(sizes))) for dtype, sizes in formats)
    shown = table(["format", "parameters#", "bytes#", "#"], rows)
    return join([shown, *(tag("p", f"{text[0].upper()}{text[1:]}.", class_="below") for text in remark_texts(program))])


def _memory(program: Program, settings: Settings) -> Html:
    weights = program.weight_bytes
    pools = {pool: _pool_bytes(program, settings, pool) for pool in settings.pools}
    cached = sum(pools.values())
    total = max(weights + cached, 1)
    parts = (("weights", weights), ("pool", cached))
    shares = (tag("i", class_=kind, style=f"width: {100 * part / total:.2f}%") for kind, part in parts)
    rows: list[tuple[object, object]] = [
        (join([tag("i", class_="key weights"), "weights"]), num_bytes(weights)),
        *((join([tag("i", class_="key pool"), _describe_pool(settings, pool)]), num_bytes(pools[pool])) for pool in pools),
        (tag("b", "together"), tag("b", num_bytes(weights + cached))),
        ("requests at once (max_batch_size)", f"{settings.max_batch_size:,}"),
        ("tokens in one step (max_num_tokens)", f"{settings.max_num_tokens:,}"),
        ("longest request (max_seq_len)", f"{settings.max_seq_len:,}"),
    ]
    return join([tag("div", *shares, class_="stack"), table(["", "#"], rows)])


def _pool_bytes(program: Program, settings: Settings, pool: str) -> int:
    specs = [spec for spec in program.caches.values() if spec.pool == pool]
    return settings.pools[pool] * sum(spec.bytes_per_unit(settings.page_size) for spec in specs)


def _describe_pool(settings: Settings, pool: str) -> str:
    units = f"{settings.pools[pool]:,}"
    if pool == STATES:
        return f"states: {units} slots, one of them scratch"
    window = f", for windows of {window_of_pool(pool):,}" if window_of_pool(pool) else ""
    return f"keys and values: {units} pages of {settings.page_size} tokens, one of them scratch{window}"


def _timeline(program: Program, timeline: Timeline) -> Html:
    """One bar per phase, each starting where the one before it ended; the passes once more by themselves."""
    total, started, rows = sum(timeline.seconds.values()) or 1.0, 0.0, list[Html]()
    for name, seconds in timeline.seconds.items():
        rows.append(_bar(name, started / total, seconds / total, seconds, "phase"))
        if name == "passes":
            begun = started
            for record in program.history:
                rows.append(_bar(record.name, begun / total, record.seconds / total, record.seconds, "pass"))
                begun += record.seconds
        started += seconds
    return tag("div", *rows, class_="bars")


def _notes(timeline: Timeline) -> Html:
    return join(tag("p", f"{name[0].upper()}{name[1:]}: {note}.", class_="below") for name, note in timeline.notes.items())


def _bar(name: str, start: float, share: float, seconds: float, kind: str) -> Html:
    bar = tag("div", class_=f"bar {kind}", style=f"margin-left: {100 * start:.2f}%; width: {100 * share:.2f}%")
    shown = f"{seconds:.2f} s" if kind == "phase" else f"{seconds:.3f} s"
    return join([tag("span", name, class_=kind), tag("div", bar, class_="track"), tag("span", shown, class_=f"number {kind}")])
