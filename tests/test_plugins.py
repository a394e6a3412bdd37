"""Plugins: found only when named, refused with the reason, checked like every other pass."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import autodeploy
from autodeploy import ConfigError, TransformError, check_transform, default_pipeline
from autodeploy._compile import pipeline_of
from autodeploy.cli import DEMO_MODEL, app
from autodeploy.config import LLMArgs
from autodeploy.plugins import apply_file, apply_plugins, apply_settings, foreign_text
from tests.models.families import make_model

EXAMPLE = Path(__file__).parent / "plugin_example"


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of installed packages with the example in it, on the path while the tests of this file run."""
    source, folder = tmp_path_factory.mktemp("source") / "example", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, source)  # pip builds in place
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", folder, source], check=True, timeout=120)
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def install(folder: Path, package: str, entry_points: str) -> None:
    """What pip leaves of a package that has nothing but entry points."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[autodeploy.plugins]\n{entry_points}\n")


def test_an_installed_plugin_is_not_even_imported_until_it_is_named() -> None:
    assert "my_passes" not in sys.modules
    assert apply_plugins(default_pipeline(), ()) == default_pipeline()
    assert "my_passes" not in sys.modules
    edited = apply_plugins(default_pipeline(), ("my_passes",))
    assert "my_passes" in sys.modules
    assert edited.without("fuse_gated_linear") == default_pipeline()
    assert foreign_text(edited) == "passes from elsewhere: fuse_gated_linear (my_passes)\n"
    assert not foreign_text(default_pipeline())


def test_a_compiled_model_has_the_pass_and_says_where_it_is_from(model: Any) -> None:
    compiled = autodeploy.compile(model, plugins="my_passes")
    ids = torch.randint(0, 256, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), model(ids).logits, rtol=1e-4, atol=1e-4)
    assert "fuse_gated_linear" in [record.name for record in compiled.program.history]
    assert "passes from elsewhere: fuse_gated_linear (my_passes)" in compiled.report()
    compiled.shutdown()


def test_the_pass_is_right(model: Any) -> None:
    from my_passes import FuseGatedLinear, gated_linear  # pyright: ignore[reportMissingImports]

    program = check_transform(model, FuseGatedLinear(), rewrites=2, contains=gated_linear)
    assert program.op_counts()["aten.linear"] == 13 and "autodeploy.gated_activation" not in program.op_counts()


def test_the_wrong_twin_is_stopped_by_its_numbers_alone(model: Any) -> None:
    plugins = ["my_passes:wrong_plugin"]
    with pytest.raises(TransformError, match=r"transform 'fuse_gated_linear_wrongly': .*in float64 its logits differ by"):
        autodeploy.compile(model, plugins=plugins, verify="numeric")
    autodeploy.compile(model, plugins=plugins, verify="structure").shutdown()


def test_what_check_transform_refuses(model: Any) -> None:
    from my_passes import FuseGatedLinear, FuseGatedLinearWrongly  # pyright: ignore[reportMissingImports]

    tiny = make_model("llama", num_hidden_layers=1)
    with pytest.raises(AssertionError, match="fuse_gated_linear made 1 rewrites, not 3"):
        check_transform(tiny, FuseGatedLinear(), rewrites=3)
    with pytest.raises(
        AssertionError, match=r"after fuse_gated_linear there is no call of autodeploy\.layer_norm; there are aten\."
    ):
        check_transform(tiny, FuseGatedLinear(), rewrites=1, contains=autodeploy.ops.layer_norm)
    with pytest.raises(TransformError, match="transform 'fuse_gated_linear_wrongly'"):
        check_transform(tiny, FuseGatedLinearWrongly(), rewrites=1)
    with pytest.raises(ConfigError, match="Did you mean 'match_norm'"):
        check_transform(tiny, FuseGatedLinear(), rewrites=1, after="match_nrm")


def test_a_pass_that_never_ends_is_refused() -> None:
    from my_passes import FuseGatedLinear  # pyright: ignore[reportMissingImports]

    class Restless(FuseGatedLinear):
        name = "restless"

        def apply(self, program: Any, target: Any) -> int:
            return super().apply(program, target) or 1

    with pytest.raises(AssertionError, match="restless, applied once more, made 1 rewrites"):
        check_transform(make_model("llama", num_hidden_layers=1), Restless(), rewrites=1)


def test_the_pass_is_short() -> None:
    tree = ast.parse((EXAMPLE / "my_passes" / "__init__.py").read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "FuseGatedLinear"]
    first = found.decorator_list[0].lineno
    assert (found.end_lineno or 0) - first + 1 <= 30


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_pases", r"no plugin named 'my_pases' is installed\. Did you mean 'my_passes'\? Installed: my_passes"),
        ("no_such:plugin", r"plugin 'no_such:plugin' cannot be imported: ModuleNotFoundError: No module named 'no_such'"),
        ("my_passes:plugn", r"plugin 'my_passes:plugn' cannot be imported: AttributeError: .*no attribute 'plugn'"),
        ("autodeploy:__version__", "plugin 'autodeploy:__version__' is a str, not a function from Pipeline to Pipeline"),
        ("builtins:len", "plugin 'builtins:len' failed: TypeError: object of type 'Pipeline' has no len"),
        ("builtins:repr", "plugin 'builtins:repr' returned a str, but it must return the edited Pipeline"),
        ("builtins:print", "plugin 'builtins:print' returned nothing, but it must return the edited Pipeline"),
    ],
)
def test_refusals_name_the_plugin_and_the_reason(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_plugins(default_pipeline(), (name,))


def test_a_wrong_plugin_is_refused_before_the_model_is_exported(model: Any) -> None:
    with pytest.raises(ConfigError, match="no plugin named 'other'"):
        autodeploy.compile(model, plugins=["other"])
    with pytest.raises(ConfigError, match="plugin 'my_passes' is asked for 2 times"):
        autodeploy.compile(model, plugins=["my_passes", "my_passes"])
    for wrong in (len, [len]):
        with pytest.raises(
            ConfigError, match="plugins are named by text; give a function from Pipeline to Pipeline as pipeline=function"
        ):
            autodeploy.compile(model, plugins=wrong)


def test_a_broken_package_is_refused_with_the_cause(elsewhere: Path) -> None:
    install(elsewhere, "broken-package", "broken = broken_package:plugin")
    (elsewhere / "broken_package.py").write_text("raise RuntimeError('needs a licence')\n")
    with pytest.raises(ConfigError, match="plugin 'broken' cannot be imported: RuntimeError: needs a licence"):
        apply_plugins(default_pipeline(), ("broken",))


def test_two_packages_with_one_name_are_both_named(elsewhere: Path) -> None:
    install(elsewhere, "other-passes", "my_passes = other:plugin")
    with pytest.raises(ConfigError, match=r"several packages have a plugin named 'my_passes': my-passes, other-passes\."):
        apply_plugins(default_pipeline(), ("my_passes",))
    assert apply_plugins(default_pipeline(), ("my_passes:plugin",)) != default_pipeline()


def test_plugins_edit_a_given_pipeline_and_a_function_edits_theirs(model: Any) -> None:
    short = default_pipeline().without("fuse_linears")
    edited = pipeline_of(LLMArgs(model=model, plugins="my_passes", pipeline=short))
    assert "fuse_gated_linear" in edited.names()
    assert edited.without("fuse_gated_linear") == short
    args = LLMArgs(model=model, plugins="my_passes", pipeline=lambda pipeline: pipeline.without("fuse_gated_linear"))
    assert pipeline_of(args) == default_pipeline()


def test_settings_change_options() -> None:
    pipeline = apply_plugins(default_pipeline(), ("my_passes",))
    edited: Any = apply_settings(pipeline, ["fuse_gated_linear.min_width=128"])
    assert edited.passes[edited.index("fuse_gated_linear")].min_width == 128


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("min_width=1", "'min_width=1' is not of the form pass.option=value"),
        ("fuse_gated_liner.min_width=1", "Did you mean 'fuse_gated_linear'"),
        ("fuse_gated_linear.min_widht=1", "has no option 'min_widht'. Did you mean 'min_width'"),
        ("cleanup.name=xx", "pass 'cleanup' has no option 'name'. It has: none"),
        ("fuse_gated_linear.min_width=wide", "pass 'fuse_gated_linear': min_width='wide' is a str, but an int is needed"),
    ],
)
def test_wrong_settings_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_settings(apply_plugins(default_pipeline(), ("my_passes",)), [setting])


def test_a_file_edits_the_pipeline(tmp_path: Path) -> None:
    file = tmp_path / "edits.yaml"
    file.write_text("plugins: [my_passes]\nwithout: [fuse_linears]\nconfigure:\n  fuse_gated_linear: {min_width: 128}\n")
    edited: Any = apply_file(default_pipeline(), file)
    assert "fuse_linears" not in edited.names()
    assert edited.passes[edited.index("fuse_gated_linear")].min_width == 128
    file.write_text("# nothing\n")
    assert apply_file(default_pipeline(), file) == default_pipeline()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is a list, but a mapping with the keys plugins, without, configure is needed"),
        ("withot: [cleanup]", "has a key 'withot'. Did you mean 'without'"),
        ("without: cleanup", r"'without' must be of the form \[name, \.\.\.\]"),
        ("configure: {cleanup: 3}", "'configure' must be of the form pass: {option: value}"),
        ("without: [cleanpu]", "no pass named 'cleanpu' in the pipeline. Did you mean 'cleanup'"),
        ("a: [", r"edits\.yaml cannot be read: ParserError"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "edits.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        apply_file(default_pipeline(), file)


def test_the_report_takes_plugins_settings_and_a_file_too_and_lists_passes_from_elsewhere(tmp_path: Path) -> None:
    file, page = tmp_path / "edits.yaml", tmp_path / "report.html"
    file.write_text("without: [fuse_linears]\n")
    options = ["--plugin", "my_passes", "--pipeline", str(file), "--set", "fuse_gated_linear.min_width=1", "-o", str(page)]
    done = CliRunner().invoke(app, ["report", str(DEMO_MODEL), *options], catch_exceptions=False)
    assert done.exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert "Passes from elsewhere: <code>fuse_gated_linear</code> (my_passes)" in text
    assert "<code>fuse_linears</code>" not in text
    with pytest.raises(ConfigError, match="has no option 'min_widht'"):
        wrong = ["report", str(DEMO_MODEL), "--plugin", "my_passes", "--set", "fuse_gated_linear.min_widht=1"]
        CliRunner().invoke(app, wrong, catch_exceptions=False)


def test_the_command_takes_plugins_and_settings() -> None:
    def inspect(*options: str) -> str:
        done = CliRunner().invoke(app, ["inspect", str(DEMO_MODEL), "--plugin", "my_passes", *options], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    assert "autodeploy.gated_linear(" in inspect("--after", "fuse_gated_linear")
    assert "autodeploy.gated_linear(" not in inspect(
        "--after", "fuse_gated_linear", "--set", "fuse_gated_linear.min_width=100000"
    )
