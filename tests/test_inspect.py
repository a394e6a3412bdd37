"""`autodeploy inspect`: text after a pass, what a pass changed, parameters as formulas."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import autodeploy
from autodeploy.cli import app
from autodeploy.errors import CheckpointError, ConfigError, TransformError

DEMO = str(Path(autodeploy.__file__).parent / "demo_model")
NUM_LAYERS = json.loads((Path(DEMO) / "config.json").read_text())["num_hidden_layers"]


def inspect(*options: str, model: str = DEMO) -> str:
    done = CliRunner().invoke(app, ["inspect", model, *options], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


@pytest.mark.parametrize(
    ("name", "header", "has", "lacks"),
    [
        ("export", "program (exported; passes: none)", "aten.rsqrt(", "autodeploy.rms_norm("),
        (
            "match_norm",
            "program (canonical; passes: cleanup, match_conv, prove_packing, match_norm)",
            "autodeploy.rms_norm(",
            "autodeploy.rope(",
        ),
    ],
)
def test_after_shows_the_program_at_that_moment(name: str, header: str, has: str, lacks: str) -> None:
    shown = inspect("--after", name)
    assert shown.splitlines()[0] == header
    assert has in shown
    assert lacks not in shown


def test_diff_shows_what_one_pass_changed() -> None:
    lines = inspect("--diff", "match_mlp").splitlines()
    assert lines[:2] == ["--- after match_rope", "+++ after match_mlp"]
    assert sum(bool(re.match(r"\+ .*autodeploy\.gated_activation\(", line)) for line in lines) == NUM_LAYERS
    assert sum(bool(re.match(r"- .*aten\.silu\(", line)) for line in lines) == NUM_LAYERS
    assert not [line for line in lines if line.startswith("+") and "gate_proj" in line]


def test_the_first_pass_is_compared_with_the_export() -> None:
    assert inspect("--diff", "cleanup").startswith("--- after export\n+++ after cleanup\n")


def test_weights_are_formulas_and_nothing_else() -> None:
    lines = inspect("--weights").splitlines()
    assert sum("self_attn.o_proj.weight: " in line for line in lines) == NUM_LAYERS
    assert all(re.fullmatch(r"\S+: float32\[[\d, ]+\] = \S.*", line) for line in lines)
    joined = next(line for line in lines if line.startswith("model.layers.0.mlp.gate_proj_up_proj.weight"))
    names = "model.layers.0.mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight"
    assert re.search(rf": float32\[\d+, \d+\] = cat\({re.escape(names)}, dim=0\)$", joined)


FAILING = """
from dataclasses import dataclass
from autodeploy import Transform

@dataclass(frozen=True, kw_only=True)
class Failing(Transform):
    name = "failing"

    def apply(self, program, target):
        raise ArithmeticError("on purpose")

def plugin(pipeline):
    return pipeline.insert_after("match_norm", Failing())
"""


def test_the_passes_after_the_one_that_is_asked_for_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_later.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    options = ("--plugin", "failing_later:plugin")
    assert inspect("--after", "match_norm", *options).startswith("program (canonical; passes: cleanup,")
    assert inspect("--diff", "match_norm", *options).startswith("--- after prove_packing")
    with pytest.raises(TransformError, match="transform 'failing': ArithmeticError: on purpose"):
        inspect("--after", "match_rope", *options)


def test_a_config_alone_will_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((Path(DEMO) / "config.json").read_bytes())
    shown = inspect("--weights", model=str(tmp_path))
    assert shown == inspect("--weights", "--meta")
    joined = next(line for line in shown.splitlines() if line.startswith("model.layers.0.mlp.gate_proj_up_proj.weight"))
    assert joined.endswith(" = cat(model.layers.0.mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight, dim=0)")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds only pickle weights"):
        inspect(model=str(tmp_path))
    assert inspect("--weights", "--meta", model=str(tmp_path)) == shown


@pytest.mark.parametrize("option", ["--after", "--diff"])
def test_an_unknown_pass_is_refused_with_the_nearest_name_before_anything_is_compiled(option: str) -> None:
    with pytest.raises(ConfigError, match=r"no pass named 'match_rop' in the pipeline\. Did you mean 'match_rope'\?"):
        CliRunner().invoke(app, ["inspect", "no folder", option, "match_rop"], catch_exceptions=False)
