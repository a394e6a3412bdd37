"""The `autodeploy` command. Heavy imports wait until a command runs, so that --help is quick."""

from __future__ import annotations

import json
import platform
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from autodeploy import __version__
from autodeploy.bench.commands import app as bench
from autodeploy.config import SamplingParams
from autodeploy.demo_questions import check, held_out_questions
from autodeploy.errors import AutoDeployError

if TYPE_CHECKING:
    from autodeploy import LLM, Pipeline
    from autodeploy.eval import Score
    from autodeploy.program_store import Store

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Compile an unmodified Hugging Face model and serve it.")
cache_app = typer.Typer(no_args_is_help=True, help="The stored programs of earlier starts.")
app.add_typer(cache_app, name="cache")
app.add_typer(bench, name="bench")
out, err = Console(), Console(stderr=True)

DEMO_MODEL = Path(__file__).parent / "demo_model"
Model = Annotated[str, typer.Argument(help="A checkpoint folder.")]
Backend = Annotated[str, typer.Option(help="autodeploy, or pytorch for the eager reference.")]
Dtype = Annotated[str, typer.Option(help="Element type of weights and activations; auto is the checkpoint's.")]
Attention = Annotated[str, typer.Option("--attention-backend", help="auto, flashinfer, triton, cpp or torch.")]
Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", help="An installed plugin, or module:function; may be given several times.")
]
PipelineFile = Annotated[Path | None, typer.Option("--pipeline", help="A YAML file of edits: plugins, without, configure.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="pass.option=value; may be given several times.")]
CacheFolder = Annotated[Path | None, typer.Option("--folder", help="The folder of programs; absent, that of this user.")]
ProgramCache = Annotated[bool, typer.Option("--program-cache/--no-program-cache", help="Whether to use a stored program.")]
Verify = Annotated[str, typer.Option(help="What is checked after each pass: off, structure or numeric.")]


def main() -> None:
    """Entry point: an error that autodeploy raises on purpose is one line, not a traceback.

    Modules in the current directory can be named, for --plugin and as passes to replay; those that are installed come first.
    """
    sys.path.append(str(Path.cwd()))
    try:
        app()
    except AutoDeployError as error:
        reason = " ".join(str(error).splitlines())
        err.print(Text.assemble((type(error).__name__, "red"), f": {reason}"), soft_wrap=True)
        raise SystemExit(1) from None


@app.command()
def demo(
    questions: Annotated[int, typer.Option(help="How many questions the score is taken over.", min=1)] = 500,
    shown: Annotated[int, typer.Option(help="How many of them are printed.", min=0)] = 10,
    backend: Backend = "autodeploy",
) -> None:
    """Compile the shipped model, ask it questions it was not trained on, and score the answers."""
    from autodeploy import LLM
    from autodeploy.report.tables import pass_table

    asked = held_out_questions(questions)
    talks = [[{"role": "user", "content": question.prompt}] for question in asked]
    with LLM(str(DEMO_MODEL), backend=backend) as llm:
        started = time.perf_counter()
        outputs = llm.chat(talks, SamplingParams(max_tokens=32))
        seconds = time.perf_counter() - started
        assert isinstance(outputs, list)
        answers = [output.outputs[0] for output in outputs]
        table = Table("question", "answer", "", title="questions the model was not trained on")
        for question, answer in list(zip(asked, answers, strict=True))[:shown]:
            verdict = "right" if check(question, answer.text) else f"wrong: {question.answer}"
            table.add_row(question.prompt, Text(answer.text), verdict)
        out.print(table)
        if backend == "autodeploy":
            out.print(pass_table(llm.compiled.program))
        out.print(f"start-up: {llm.compiled.timeline}")
    right = sum(check(question, answer.text) for question, answer in zip(asked, answers, strict=True))
    tokens = sum(answer.length for answer in answers)
    out.print(f"exact match: {right} of {len(asked)} ({100 * right / len(asked):.1f} %)")
    out.print(f"generated {tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="A prompt; may be given several times.")],
    max_tokens: Annotated[int, typer.Option(help="The most tokens to generate for each.", min=0)] = 32,
    temperature: Annotated[float | None, typer.Option(help="Draw tokens at this temperature; greedy when absent.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Probability mass that is kept.")] = None,
    top_k: Annotated[int | None, typer.Option(help="How many of the most likely tokens are kept.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text at which to stop; may be given several times.")] = None,
    chat: Annotated[bool, typer.Option(help="Put each prompt through the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per prompt.")] = False,
    backend: Backend = "autodeploy",
    dtype: Dtype = "auto",
    attention_backend: Attention = "auto",
    plugins: Plugins = None,
    pipeline_file: PipelineFile = None,
    settings: Settings = None,
    verify: Verify = "structure",
    program_cache: ProgramCache = True,
    tokenizer: Annotated[str | None, typer.Option(help="A folder with the tokenizer, when the model's has none.")] = None,
) -> None:
    """Generate for one or several prompts."""
    from autodeploy import LLM

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop)
    passes = {"attention_backend": attention_backend, **_passes(plugins, pipeline_file, settings, verify)}
    with LLM(model, backend=backend, dtype=dtype, tokenizer=tokenizer, program_cache=program_cache, **passes) as llm:
        outputs = _chat(llm, prompt, params) if chat else llm.generate(prompt, params)
    for text, output in zip(prompt, outputs, strict=True):
        answer = output.outputs[0]
        if as_json:
            fields = {"prompt": text, "text": answer.text, "token_ids": answer.token_ids, "finish_reason": answer.finish_reason}
            print(json.dumps({**fields, **({"error": str(output.error)} if output.error else {})}))
        else:
            print(answer.text)
    if (failed := next((output.error for output in outputs if output.error), None)) is not None:
        raise failed


def _passes(
    plugins: list[str] | None, file: Path | None, settings: list[str] | None, verify: str = "structure"
) -> dict[str, Any]:
    """The options of the engine that --plugin, --pipeline and --set (applied in this order) and --verify stand for."""
    if file is None and not settings:
        return {"plugins": plugins, "verify": verify}
    from autodeploy.plugins import apply_file, apply_settings

    def edit(pipeline: Pipeline) -> Pipeline:
        return apply_settings(apply_file(pipeline, file) if file else pipeline, settings or ())

    return {"plugins": plugins, "pipeline": edit, "verify": verify}


def _until(pipeline: Pipeline, *wanted: str | None) -> Pipeline:
    """The passes up to the last of these; none of them for the export."""
    last = max((pipeline.names().index(name) for name in wanted if name in pipeline.names()), default=-1)
    return replace(pipeline, passes=pipeline.passes[: last + 1])


def _chat(llm: LLM, prompts: list[str], params: SamplingParams) -> list[Any]:
    outputs = llm.chat([[{"role": "user", "content": text}] for text in prompts], params)
    assert isinstance(outputs, list)
    return outputs


@app.command(name="quantize")
def quantize_folder(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    scheme: Annotated[str, typer.Option(help="int8, w8a8 or int4.")] = "int4",
    group_size: Annotated[int, typer.Option(help="Columns that share a scale, of int4; 0 is 32.", min=0)] = 0,
    exclude: Annotated[list[str] | None, typer.Option(help="A matrix to leave as it is; * stands for anything.")] = None,
    lm_head: Annotated[bool, typer.Option(help="Whether the output head is quantized too, to 8 bits; a tied one is not.")] = True,
    calibration: Annotated[Path | None, typer.Option(help="A text file to quantize for; absent, to the nearest numbers.")] = None,
    algorithm: Annotated[str, typer.Option(help="What it is used for: gptq, awq or smoothquant.")] = "gptq",
    window: Annotated[int, typer.Option(help="Tokens of each calibration sequence.", min=2)] = 512,
    sequences: Annotated[int, typer.Option(help="The most sequences taken of it.", min=1)] = 64,
) -> None:
    """Write a quantized checkpoint, which autodeploy, transformers and others read (compressed-tensors)."""
    from autodeploy._llm import tokenizer_of
    from autodeploy.calibrate import quantize
    from autodeploy.config import LLMArgs, QuantConfig

    given: dict[str, Any] = {"scheme": scheme, "group_size": group_size, "exclude": exclude, "algorithm": algorithm}
    config, texts = QuantConfig(**given, lm_head=lm_head), None
    if calibration is not None:
        ids = tokenizer_of(LLMArgs(model=model)).encode(calibration.read_text(encoding="utf-8"), verbose=False)
        texts = [ids[start : start + window] for start in range(0, len(ids), window)][:sequences]
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[matrix]}"), console=err, transient=True) as progress:
        bar = progress.add_task("quantizing", total=None, matrix="")
        done = quantize(model, output, config, texts, lambda name: progress.update(bar, advance=1, matrix=name))
    print(f"{output}: {len(done.names)} matrices in {scheme}{f' by {algorithm}' if texts else ''}")
    for line in done.remarks:
        print(line)


@app.command(name="eval")
def evaluate(
    folder: Annotated[str | None, typer.Argument(help="A checkpoint folder; absent, the shipped demo model.")] = None,
    quantization: Annotated[str | None, typer.Option(help="A scheme to quantize to: int8, w8a8, int4, fp8, ...")] = None,
    kv_cache: Annotated[str | None, typer.Option(help="An element type of the KV cache: int8 or fp8.")] = None,
    against: Annotated[str | None, typer.Option(help="A folder to compare with; absent, the same without these two.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text file for perplexity and divergence; absent, the questions.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of the text that are looked at together.", min=2)] = 512,
    questions: Annotated[int, typer.Option(help="How many of the demo model's held-out questions; 0: none.", min=0)] = 500,
    dtype: Dtype = "auto",
    task: Annotated[str | None, typer.Option(help="A task of lm-eval instead: a YAML file, or one of its names.")] = None,
    limit: Annotated[int | None, typer.Option(help="How many questions of the task; absent, all.", min=1)] = None,
    option: Annotated[list[str] | None, typer.Option(help="name=JSON, an option of LLM; may be given several times.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON in place of a table.")] = False,
) -> None:
    """Answers that are right, perplexity, and how far quantization takes a model from what it was; or a task of lm-eval."""
    from autodeploy import LLM
    from autodeploy.bench.shared import parsed
    from autodeploy.eval import answered, score, windows

    model, plain = folder or str(DEMO_MODEL), {"dtype": dtype, **dict(map(parsed, option or ()))}
    fewer: dict[str, Any] = {} if quantization is None else {"quantization": quantization}
    if kv_cache is not None:
        fewer["kv_cache_config"] = {**plain.get("kv_cache_config", {}), "dtype": kv_cache}
    name = " and ".join(filter(None, [quantization, kv_cache and f"{kv_cache} KV cache"])) or Path(model).name
    if task is not None:
        _print_task(model, plain | fewer, task, limit, as_json)
        return
    asked, passage = held_out_questions(questions) if questions else [], text.read_text(encoding="utf-8") if text else None
    with ExitStack() as models:
        llm = models.enter_context(LLM(model, **plain | fewer))
        reference = models.enter_context(LLM(against or model, **plain)) if against is not None or fewer else None
        texts = answered(llm, asked) if passage is None else windows(llm, passage, window)
        scores = [] if reference is None else [score("reference", reference, texts, asked)]
        scores.append(score(name, llm, texts, asked, reference))
    if as_json:
        print(json.dumps([asdict(each) for each in scores], indent=1))
    else:
        out.print(_score_table(scores))


def _print_task(model: str, options: dict[str, Any], task: str, limit: int | None, as_json: bool) -> None:
    """The results of lm-eval."""
    from autodeploy import LLM
    from autodeploy.errors import ConfigError

    try:
        from autodeploy.harness import run_task
    except ImportError as error:
        raise ConfigError("--task needs lm-eval: pip install 'autodeploy[eval]'") from error
    with LLM(model, **options) as llm:
        found = run_task(llm, task, limit)
    if as_json:
        print(json.dumps(found, indent=1, default=float))
        return
    table = Table("task", "metric", "value")
    for name, metrics in found.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                table.add_row(name, metric.partition(",")[0], f"{value:.4f}")
    out.print(table)


def _score_table(scores: list[Score]) -> Table:
    table = Table("", "exact match", "perplexity", "KL to reference", "same top token", title=f"{scores[0].tokens:,} tokens")
    for each in scores:
        share = "" if each.right is None else f"{each.right} of {each.questions} ({100 * each.right / each.questions:.1f} %)"
        shown = (("perplexity", ".4f"), ("divergence", ".2e"), ("agreement", ".2%"))
        cells = ["" if (value := getattr(each, name)) is None else format(value, how) for name, how in shown]
        table.add_row(each.name, share, *cells)
    return table


@app.command()
def inspect(
    model: Model,
    dtype: Dtype = "auto",
    program: Annotated[bool, typer.Option(help="Print the program's text too.")] = True,
    after: Annotated[str | None, typer.Option(help="Only the program's text after this pass, or after export.")] = None,
    diff: Annotated[str | None, typer.Option(help="Only what this pass changes in the program's text.")] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Only the parameters, as formulas over the checkpoint.")] = False,
    plugins: Plugins = None,
    pipeline_file: PipelineFile = None,
    settings: Settings = None,
    verify: Verify = "structure",
    meta: Annotated[bool, typer.Option("--meta", help="Read only config.json; as is done anyway where nothing else is.")] = False,
) -> None:
    """Compile without loading weights; print the pass table, kernels, caches and the program."""
    from autodeploy._compile import pipeline_of, trace
    from autodeploy.checkpoint import has_weights
    from autodeploy.config import LLMArgs
    from autodeploy.plugins import foreign_text
    from autodeploy.report.tables import describe
    from autodeploy.report.texts import EXPORT, TextsAfter, formulas, moment_before
    from autodeploy.report.timeline import Timeline

    timeline, args = Timeline(), LLMArgs(model=model, dtype=dtype, **_passes(plugins, pipeline_file, settings, verify))
    pipeline = pipeline_of(args)
    for name in (after, diff):
        if name is not None and name != EXPORT:
            pipeline.index(name)  # an unknown name is refused before the work starts
    earlier = None if diff in (None, EXPORT) else moment_before(diff, pipeline.names())
    texts = TextsAfter(*filter(None, (after, diff, earlier)))
    if (after or diff) and not weights:
        args = args.model_copy(update={"plugins": (), "pipeline": _until(pipeline, after, diff)})
    lowered = trace(args, timeline, texts, meta=meta or not has_weights(Path(model)))
    if after is not None:
        print(texts.texts[after])
    if diff is not None:
        print(texts.diff(earlier, diff) if earlier else texts.texts[diff])
    if weights:
        print(formulas(lowered))
    if after is None and diff is None and not weights:
        print(describe(lowered, timeline) + foreign_text(pipeline))
        if program:
            print(lowered)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A folder with config.json, or that file; no weights are needed.")],
    gpu: Annotated[str, typer.Option(help="h100, h200, b200, a100-80gb, l40s, l4 or rtx4090.")] = "h200",
    tp: Annotated[int, typer.Option(help="Ranks that share every layer.", min=1)] = 1,
    ep: Annotated[int, typer.Option(help="Groups of these ranks that experts are dealt out to.", min=1)] = 1,
    pp: Annotated[int, typer.Option(help="Stages of layers.", min=1)] = 1,
    context: Annotated[int | None, typer.Option(help="Tokens of a request; absent, 8,192 or the model's most.", min=1)] = None,
    requests: Annotated[list[int] | None, typer.Option(help="Requests of a decode step; absent, 1, 8 and 64.", min=1)] = None,
    max_num_tokens: Annotated[int, typer.Option(help="The most tokens computed in one step.", min=1)] = 2048,
    dtype: Dtype = "auto",
    quantization: Annotated[str | None, typer.Option(help="A scheme to quantize to: int8, w8a8, int4, fp8, ...")] = None,
    kv_cache: Annotated[str | None, typer.Option(help="An element type of the KV cache: int8 or fp8.")] = None,
    plugins: Plugins = None,
    pipeline_file: PipelineFile = None,
    settings: Settings = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="A file for the plan; - prints it.")] = None,
) -> None:
    """What a layout of ranks takes and how fast it can be at most, from config.json alone, without a GPU."""
    from autodeploy.config import LLMArgs
    from autodeploy.plan import tables
    from autodeploy.plan.devices import device_named
    from autodeploy.plan.plan import lower_for, plan_stages, refuse_what_does_not_fit
    from autodeploy.report.timeline import Timeline
    from autodeploy.specs import Mesh

    device, mesh, steps = device_named(gpu), Mesh(tp, ep, pp), sorted(set(requests or (1, 8, 64)))
    folder = Path(model).parent if Path(model).name == "config.json" else Path(model)
    sizes: dict[str, Any] = {"max_num_tokens": max_num_tokens, "max_batch_size": min(steps[-1], max_num_tokens)}
    rounding: dict[str, Any] = {"quantization": quantization, "kv_cache_config": {"dtype": kv_cache or "auto"}}
    args = LLMArgs(model=folder, device="cuda", dtype=dtype, **sizes, **rounding, **_passes(plugins, pipeline_file, settings))
    lowered = lower_for(args, mesh, Timeline())
    found = plan_stages(lowered.program, args, device, mesh, context or min(8192, lowered.facts.max_seq_len), steps)
    refuse_what_does_not_fit(found)
    if json_file == Path("-"):
        print(tables.as_json(found), end="")
        return
    if json_file is not None:
        json_file.write_text(tables.as_json(found), encoding="utf-8")
    for table in (tables.weight_table(found), tables.memory_table(found), tables.step_table(found)):
        out.print(table)
    for line in (tables.collective_text(found), *found.notes):
        out.print(Text(line))


@app.command()
def report(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("report.html"),
    dtype: Dtype = "auto",
    attention_backend: Attention = "auto",
    max_batch_size: Annotated[int | None, typer.Option(help="The most requests running at once.", min=1)] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="The most tokens of one request; absent, the model's.", min=1)] = None,
    plugins: Plugins = None,
    pipeline_file: PipelineFile = None,
    settings: Settings = None,
    verify: Verify = "structure",
) -> None:
    """Compile, and write what happened as one HTML page."""
    from autodeploy._compile import compile_observed, pipeline_of
    from autodeploy.config import LLMArgs
    from autodeploy.plugins import foreign_passes
    from autodeploy.report import html

    given: dict[str, Any] = {"max_batch_size": max_batch_size, "max_seq_len": max_seq_len, "attention_backend": attention_backend}
    sizes = {name: value for name, value in given.items() if value is not None}
    args = LLMArgs(model=model, dtype=dtype, **sizes, **_passes(plugins, pipeline_file, settings, verify))
    before = html.Before()
    compiled = compile_observed(args, before)
    memory = html.Settings(
        page_size=args.kv_cache_config.page_size,
        pools=compiled.pool_units,
        max_batch_size=args.max_batch_size,
        max_num_tokens=args.max_num_tokens,
        max_seq_len=compiled.max_seq_len,
    )
    title, footer = Path(model).resolve().name, f"autodeploy {__version__}"
    foreign = foreign_passes(pipeline_of(args))
    text = html.page(title, compiled.program, before, compiled.timeline, memory, footer, foreign)
    output.write_text(text, encoding="utf-8")
    print(f"{output}: {len(text.encode()) / 1e3:.0f} kB")


@app.command()
def replay(folder: Annotated[Path, typer.Argument(help="The folder that the error of a failed pass names.")]) -> None:
    """Run a failed pass again, on the program as it was before it."""
    from autodeploy.transforms.pipeline import Pipeline
    from autodeploy.transforms.reproducer import read_reproducer

    program, passes, target, verify, error = read_reproducer(folder)
    print(f"failed with: {error}\nrunning again: {', '.join(item.name for item in passes)}")
    Pipeline(passes).run(program, target, verify=verify)
    print("every pass succeeded this time")


@app.command()
def coverage(
    families: Annotated[str | None, typer.Option(help="Model types, separated by commas; absent, all of transformers'.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="A file for the results; - prints them.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="A file for the results as a page.")] = None,
    jobs: Annotated[int, typer.Option(help="How many are examined at once.", min=1)] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds after which a model type counts as failed.", min=1)] = 180.0,
) -> None:
    """Compile a small model of every causal language model of transformers, and compare each with eager."""
    from autodeploy.coverage.run import examine_all
    from autodeploy.coverage.small import chosen_types
    from autodeploy.coverage.tables import as_json, markdown, rich_table, totals

    names, results = chosen_types(families), []
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[latest]}"), console=err, transient=True) as progress:
        task = progress.add_task("examining", total=len(names), latest="")
        for result in examine_all(names, jobs, timeout):
            results.append(result)
            progress.update(task, advance=1, latest=f"{result.model_type}: {result.kind}")
    if json_file == Path("-"):
        print(as_json(results), end="")
        return
    for file, text in ((json_file, as_json), (markdown_file, markdown)):
        if file is not None:
            file.write_text(text(results), encoding="utf-8")
    out.print(rich_table(results))
    out.print(totals(results))


@cache_app.command("list")
def list_cache(folder: CacheFolder = None) -> None:
    """The stored programs, the one used last first."""
    store = _store(folder)
    table = Table("model", "dtype", "used", "kB", "entry", title=str(store.folder))
    for entry in store.entries():
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        dtype = entry.facts.get("dtype", "").strip('"')
        table.add_row(entry.model, dtype, used, f"{entry.num_bytes / 1e3:.0f}", entry.folder.name[:12])
    out.print(table)


@cache_app.command("clear")
def clear_cache(folder: CacheFolder = None) -> None:
    """Delete every stored program."""
    from autodeploy.errors import ConfigError
    from autodeploy.program_store import Miss

    store = _store(folder)
    try:
        count, num_bytes = store.clear()
    except (Miss, OSError) as error:
        raise ConfigError(str(error)) from error
    print(f"{store.folder}: {count} program{'s' if count != 1 else ''} deleted, {num_bytes / 1e3:.0f} kB")


def _store(folder: Path | None) -> Store:
    from autodeploy.errors import ConfigError
    from autodeploy.program_store import Store, default_folder

    if (chosen := folder or default_folder()) is None:
        raise ConfigError("AUTODEPLOY_CACHE_DIR=off: there is no program cache; give its --folder")
    return Store(chosen)


@app.command("version")
def show_version() -> None:
    """Versions of autodeploy and of what it stands on."""
    print(f"autodeploy {__version__}, Python {platform.python_version()}")
    for name in ("torch", "transformers", "safetensors", "triton", "flashinfer-python"):
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            print(f"{name} not installed")


if __name__ == "__main__":
    main()
