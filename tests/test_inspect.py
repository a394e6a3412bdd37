"""`autodeploy inspect`: text after a pass, what a pass changed, parameters as formulas."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import autodeploy
from autodeploy.cli import app
from autodeploy.errors import ConfigError

DEMO = str(Path(autodeploy.__file__).parent / "demo_model")
NUM_LAYERS = json.loads((Path(DEMO) / "config.json").read_text())["num_hidden_layers"]


def inspect(*options: str) -> str:
    done = CliRunner().invoke(app, ["inspect", DEMO, *options], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


@pytest.mark.parametrize(
    ("name", "header", "has", "lacks"),
    [
        ("export", "program (exported; passes: none)", "aten.rsqrt(", "autodeploy.rms_norm("),
        (
            "match_norm",
            "program (canonical; passes: cleanup, prove_packing, match_norm)",
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


@pytest.mark.parametrize("option", ["--after", "--diff"])
def test_an_unknown_pass_is_refused_with_the_nearest_name_before_anything_is_compiled(option: str) -> None:
    with pytest.raises(ConfigError, match=r"no pass named 'match_rop' in the pipeline\. Did you mean 'match_rope'\?"):
        CliRunner().invoke(app, ["inspect", "no folder", option, "match_rop"], catch_exceptions=False)
