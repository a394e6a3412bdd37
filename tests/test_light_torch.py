"""torch without its meta kernels in Python: they come with whatever needs them, and then torch is what it always is."""

import subprocess
import sys

import pytest

from autodeploy.light_torch import LATER, light_torch

LIGHT = "from autodeploy.light_torch import LATER, light_torch\nwith light_torch():\n    import torch\n"
STATE = """
import hashlib, sys, torch._dynamo
ops = {name: torch._C._dispatch_dump_table(name) for name in sorted(torch._C._dispatch_get_all_op_names())}
modules = {name: (module.__spec__.origin, module.__spec__.loader.__class__.__name__)
           for name, module in sorted(sys.modules.items()) if name.startswith("torch.") and getattr(module, "__spec__", None)}
names = sorted(dir(torch)) + sorted(torch.ops._dir) + sorted(dir(torch.ops.prims))
print(*(hashlib.sha256(repr(each).encode()).hexdigest() for each in (ops, modules, names)), len(ops) > 3000)
"""


def output(*lines: str) -> str:
    run = subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def plain() -> str:
    return output("import torch", STATE)


@pytest.mark.parametrize(
    "trigger",
    [
        "import torch._decomp.decompositions",
        "from torch import _refs; torch.ops.prims.abs; _refs.add",
        "assert torch.linalg.eigvals(torch.empty(3, 3, device='meta')).shape == (3,)",
    ],
)
def test_afterwards_nothing_differs(trigger: str, plain: str) -> None:
    """What is registered for each operator, which modules are there and what they say of themselves, the names in torch."""
    none_yet = "import sys\nassert not set(LATER) & set(sys.modules)"
    all_there = "assert all(name in sys.modules for name in LATER)"
    assert output(LIGHT, none_yet, trigger, all_there, STATE) == plain


def test_tracing_sees_no_difference() -> None:
    code = """
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Hardswish())
program = torch.export.export(model, (torch.ones(2, 4),), dynamic_shapes=({0: torch.export.Dim("n", max=9)},))
print(program.graph, [node.meta.get("val") for node in program.graph.nodes])
"""
    assert output(LIGHT, code) == output("import torch", code)


def test_torch_that_is_there_is_left_alone() -> None:
    assert "torch" in sys.modules
    finders, module = list(sys.meta_path), sys.modules[LATER[0]]
    with light_torch():
        pass
    assert sys.meta_path == finders and sys.modules[LATER[0]] is module


def test_an_error_meanwhile_leaves_nothing_behind() -> None:
    code = """
import sys
from autodeploy.light_torch import LATER, light_torch
finders = list(sys.meta_path)
try:
    with light_torch():
        raise KeyError
except KeyError:
    pass
print(sys.meta_path == finders, set(LATER) & set(sys.modules))
"""
    assert output(code) == "True set()\n"
