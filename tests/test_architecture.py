"""The rules of the source tree, read from the syntax trees of `autodeploy/**/*.py`; docs/design.md says why they hold.

A rule is a function from one module to a list of complaints. Every rule also meets a small module that breaks it, so it cannot be
deleted or emptied unnoticed.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "autodeploy"

# Each line: parts of the package <- the parts they may import, besides their own line and all that lies further upstream.
ARROWS = {
    (
        *("errors", "config", "specs", "cache_folder", "cores", "prompts"),
        *("collector", "light_torch", "memory_ahead", "huge_pages"),
    ): (),
    ("formats",): ("errors",),
    ("format_parts",): ("formats",),
    ("custom_ops",): ("config", "specs", "formats"),
    ("recipes",): ("custom_ops",),
    ("weights",): ("recipes",),
    ("checkpoint", "codec", "shards"): ("weights", "format_parts"),
    ("graph_file",): ("codec",),
    ("program",): ("graph_file",),
    ("program_store",): ("cache_folder",),
    ("program_key",): ("checkpoint", "program_store"),
    ("program_cache",): ("program", "program_key"),
    ("transforms",): ("program", "shards"),
    ("capture", "plugins", "report"): ("transforms",),
    ("distributed",): ("program",),
    ("executor",): ("distributed", "shards"),
    ("_lower",): ("capture", "plugins", "report", "executor", "program_cache"),
    ("gptq",): ("formats",),
    ("smooth",): ("transforms",),
    ("quantized_folder",): ("checkpoint",),
    ("calibrate_experts",): ("gptq", "smooth"),
    ("calibrate",): ("capture", "calibrate_experts", "quantized_folder"),
    ("_compile",): ("_lower", "calibrate"),
    ("_llm",): ("_compile",),
    ("testing",): ("capture",),
    ("__init__",): ("_llm", "testing"),
    ("serve", "bench", "coverage", "plan"): ("__init__",),
    ("demo_questions",): (),
    ("harness",): ("__init__",),
    ("eval", "cli"): ("serve", "bench", "plan", "demo_questions", "harness"),
    ("__main__",): ("cli",),
}
TORCH_FREE = {
    "autodeploy.config",
    "autodeploy.errors",
    "autodeploy.specs",
    "autodeploy.cache_folder",
    "autodeploy.collector",
    "autodeploy.memory_ahead",
    "autodeploy.prompts",
    "autodeploy.demo_questions",
    "autodeploy.program_store",
    "autodeploy.executor.request",
    "autodeploy.executor.scheduler",
    "autodeploy.executor.kv_cache",
    "autodeploy.executor.detokenizer",
    "autodeploy.executor.outputs",
    "autodeploy.report.timeline",
}
LATE_IMPORTERS = {"autodeploy", "autodeploy.cli", "autodeploy._compile", "autodeploy._llm"}
CODE_LOADERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "torch.load", "torch.save"}
NOT_A_GRAPH = "torch.fx.node.has_side_effect"  # how an op tells dead-code elimination that it mutates
LONGEST_FUNCTION = 100


@dataclass(frozen=True)
class Import:
    target: str  # "torch.fx", "autodeploy.specs": a module, or a name in one where that is all the syntax tells
    line: int
    late: bool  # inside a function body


@dataclass(frozen=True)
class Module:
    name: str
    tree: ast.Module
    is_package: bool = False
    imports: tuple[Import, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "imports", tuple(find_imports(self)))

    @property
    def part(self) -> str:
        return part_of(self.name)


def parse(name: str, source: str, is_package: bool = False) -> Module:
    return Module(name, ast.parse(source), is_package)


@cache
def package_modules() -> dict[str, Module]:
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules[name] = parse(name, path.read_text(), is_package)
    return modules


def find_imports(module: Module) -> Iterator[Import]:
    functions = [node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    late = {id(child) for function in functions for child in ast.walk(function)}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node)
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (Import(target, node.lineno, id(node) in late) for target in targets)


def absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parents = module.name.split(".")
    base = parents[: len(parents) - node.level + module.is_package]
    return ".".join([*base, node.module] if node.module else base)


def part_of(name: str) -> str:
    """The part of the package a dotted name lies in; "__init__" for the package itself and what it exports."""
    head, _, rest = name.partition(".")
    part = rest.partition(".")[0]
    return part if head == "autodeploy" and any(part in line for line in ARROWS) else "__init__"


def inside(target: str, *names: str) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in names)


def own(module: Module) -> list[Import]:
    return [i for i in module.imports if inside(i.target, "autodeploy")]


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def mentions(module: Module, *names: str) -> list[str]:
    """Imports of a name or of what is in it, and uses of it as an attribute."""
    found = [f"line {i.line}: {i.target}" for i in module.imports if inside(i.target, *names)]
    attributes = [node for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)]
    inner = {id(node.value) for node in attributes}
    whole = [node for node in attributes if id(node) not in inner]
    return found + [f"line {node.lineno}: {dotted(node)}" for node in whole if inside(dotted(node), *names)]


@cache
def may_import(part: str) -> frozenset[str]:
    line = next(line for line in ARROWS if part in line)
    upstream = set(ARROWS[line])
    return frozenset(line).union(upstream, *(may_import(p) for p in upstream))


def follows_the_arrows(module: Module) -> list[str]:
    known = {part for line in ARROWS for part in line}
    if module.name != "autodeploy" and module.name.split(".")[1] not in known:
        return [f"{module.name} has no place in ARROWS"]
    allowed = may_import(module.part)
    return [
        f"line {i.line}: {module.part} imports {i.target}, which is downstream of it"
        for i in own(module)
        if part_of(i.target) not in allowed
    ]


def imports_itself_at_the_top(module: Module) -> list[str]:
    if module.name in LATE_IMPORTERS:
        return []
    return [f"line {i.line}: {i.target} is imported inside a function" for i in own(module) if i.late]


def is_free_of_torch(module: Module) -> list[str]:
    if module.name not in TORCH_FREE:
        return []
    loaders = [f"line {i.line}: {i.target} may load torch" for i in own(module) if owner(i.target) not in TORCH_FREE]
    return loaders + mentions(module, "torch", "transformers")


def owner(target: str) -> str:
    """The module an import reaches: the target itself, or what it is a name in."""
    known = package_modules().keys() | TORCH_FREE
    return target if target in known else target.rpartition(".")[0]


def executor_knows_no_transform(module: Module) -> list[str]:
    return mentions(module, "autodeploy.transforms") if module.part == "executor" else []


def ops_know_no_graph(module: Module) -> list[str]:
    graphs = ("torch.fx", "torch.export", "autodeploy.program", "autodeploy.transforms")
    found = mentions(module, *graphs) if module.part == "custom_ops" else []
    return [text for text in found if not text.endswith(NOT_A_GRAPH)]


def loads_no_code(module: Module) -> list[str]:
    return mentions(module, *CODE_LOADERS)


def sends_no_objects(module: Module) -> list[str]:
    """torch's collectives of objects pickle them, and between ranks so would multiprocessing."""
    names = [
        (node.lineno, getattr(node, "attr", getattr(node, "id", ""))) for node in ast.walk(module.tree) if hasattr(node, "lineno")
    ]
    names += [(i.line, i.target.rpartition(".")[2]) for i in module.imports]
    picklers = mentions(module, "multiprocessing", "torch.multiprocessing") if module.part in ("distributed", "executor") else []
    return picklers + [f"line {line}: {name}" for line, name in names if re.search(r"_object(_list)?$", name)]


def has_short_functions(module: Module) -> list[str]:
    functions = (node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    lengths = {f"{node.name}, line {node.lineno}": (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    return [f"{name}: {length} lines" for name, length in lengths.items() if length > LONGEST_FUNCTION]


RULES: list[Callable[[Module], list[str]]] = [
    follows_the_arrows,
    imports_itself_at_the_top,
    is_free_of_torch,
    executor_knows_no_transform,
    ops_know_no_graph,
    loads_no_code,
    sends_no_objects,
    has_short_functions,
]


def circles(modules: dict[str, Module]) -> list[list[str]]:
    """Modules that import each other, and parts of the package that do, through however many others."""
    between_modules, between_parts = nx.DiGraph(), nx.DiGraph()
    for module in modules.values():
        for i in own(module):
            target = i.target if i.target in modules else i.target.rpartition(".")[0]
            if target in modules and not (i.late and module.name in LATE_IMPORTERS):
                between_modules.add_edge(module.name, target)
                if part_of(target) != module.part:
                    between_parts.add_edge(module.part, part_of(target))
    found = [*nx.strongly_connected_components(between_modules), *nx.strongly_connected_components(between_parts)]
    loops = [[name] for name in nx.nodes_with_selfloops(between_modules)]
    return loops + [sorted(group) for group in found if len(group) > 1]


def test_modules_are_found() -> None:
    assert "autodeploy" in package_modules()
    assert len(package_modules()) > 1


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", package_modules())
def test_module_keeps_rule(name: str, rule: Callable[[Module], list[str]]) -> None:
    complaints = rule(package_modules()[name])
    assert not complaints, f"{name}: " + "; ".join(complaints)


def test_no_circles() -> None:
    assert not circles(package_modules())


LATE = "def f():\n    {}\n"
LONG = "def f():\n" + "    x = 1\n" * LONGEST_FUNCTION
BREAKS = [
    (follows_the_arrows, "specs", "import autodeploy.weights"),
    (follows_the_arrows, "custom_ops.rope", "from autodeploy.weights import WeightPlan"),
    (follows_the_arrows, "program", "from autodeploy import transforms"),
    (follows_the_arrows, "program", "if TYPE_CHECKING:\n    from autodeploy._llm import LLM"),
    (follows_the_arrows, "transforms.base", "from ..capture import export"),
    (follows_the_arrows, "capture.export", "from autodeploy import compile"),
    (follows_the_arrows, "executor.worker", "from autodeploy._compile import CompiledModel"),
    (follows_the_arrows, "distributed.launch", "from autodeploy.transforms import Pipeline"),
    (follows_the_arrows, "_llm", "from autodeploy.demo_questions import check"),
    (follows_the_arrows, "demo_questions", "from autodeploy.errors import ConfigError"),
    (follows_the_arrows, "misc", ""),
    (imports_itself_at_the_top, "weights", LATE.format("from autodeploy.specs import Target")),
    (imports_itself_at_the_top, "serve.app", "async def f():\n    from . import routes"),
    (is_free_of_torch, "config", "import torch"),
    (is_free_of_torch, "specs", "from torch import nn"),
    (is_free_of_torch, "errors", LATE.format("import torch.fx")),
    (is_free_of_torch, "executor.request", "from torch.nn import functional"),
    (is_free_of_torch, "executor.scheduler", "from autodeploy.weights import WeightPlan"),
    (is_free_of_torch, "executor.kv_cache", "from .batch import build"),
    (executor_knows_no_transform, "executor.model_runner", "from autodeploy.transforms.split import split"),
    (executor_knows_no_transform, "executor", "import autodeploy.transforms"),
    (ops_know_no_graph, "custom_ops.norm", "from autodeploy.program import Program"),
    (ops_know_no_graph, "custom_ops.norm", "from torch import fx"),
    (ops_know_no_graph, "custom_ops.norm", "import torch\ndef f(graph: torch.fx.Graph): ..."),
    (loads_no_code, "program", "import pickle"),
    (loads_no_code, "weights", "from marshal import loads"),
    (loads_no_code, "distributed.launch", LATE.format("import cloudpickle")),
    (loads_no_code, "weights", "import torch\nx = torch.load('x')"),
    (loads_no_code, "weights", "from torch import load"),
    (sends_no_objects, "distributed.launch", "import multiprocessing"),
    (sends_no_objects, "distributed.launch", "from torch.multiprocessing import spawn"),
    (sends_no_objects, "distributed.groups", "import torch.distributed as dist\ndist.broadcast_object_list([1])"),
    (sends_no_objects, "executor.worker", "from torch.distributed import all_gather_object"),
    (has_short_functions, "report.text", LONG),
    (has_short_functions, "report.text", "class A:\n    async " + LONG.replace("\n", "\n    ")),
]
KEEPS = [
    ("specs", "from dataclasses import dataclass\nfrom autodeploy.errors import ConfigError"),
    ("custom_ops.rope", "import torch\nfrom autodeploy.specs import Target\nfrom . import op"),
    ("executor.scheduler", "from autodeploy.executor.request import Request\nfrom .kv_cache import KVCacheManager"),
    ("executor.engine", "from autodeploy.program import Program\nfrom autodeploy.custom_ops import SEMANTIC_OPS"),
    ("cli", LATE.format("from autodeploy import LLM, demo_questions")),
    ("serve.app", LATE.format("import fastapi")),
    ("report.text", LONG.replace("    x = 1\n", "", 1)),
]


@pytest.mark.parametrize(("rule", "name", "source"), BREAKS)
def test_rule_catches(rule: Callable[[Module], list[str]], name: str, source: str) -> None:
    assert rule in RULES
    assert rule(parse(f"autodeploy.{name}", source))


def test_every_rule_is_caught_breaking() -> None:
    assert {rule for rule, _, _ in BREAKS} == set(RULES)


@pytest.mark.parametrize(("name", "source"), KEEPS)
def test_rules_let_pass(name: str, source: str) -> None:
    assert not [complaint for rule in RULES for complaint in rule(parse(f"autodeploy.{name}", source))]


@pytest.mark.parametrize(
    "sources",
    [
        {"specs": "import autodeploy.errors", "errors": "from autodeploy import specs"},
        {"executor.a": "from . import b", "executor.b": "from .c import x", "executor.c": LATE.format("from .a import y")},
        {"serve.a": "import autodeploy.bench.a", "bench.a": "", "bench.b": "import autodeploy.serve.b", "serve.b": ""},
    ],
)
def test_circles_are_caught(sources: dict[str, str]) -> None:
    assert circles({f"autodeploy.{name}": parse(f"autodeploy.{name}", source) for name, source in sources.items()})
