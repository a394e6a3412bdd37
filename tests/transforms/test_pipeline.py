"""A pass that fails leaves the program as it was, says what and where, and can be run again from a folder."""

from __future__ import annotations

import operator
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

from autodeploy import Pipeline, Program, Target, Transform, TransformError, default_pipeline
from autodeploy import custom_ops as ops
from autodeploy.errors import ConfigError, ProgramFileError
from autodeploy.recipes import Take
from autodeploy.transforms.base import Effect
from autodeploy.transforms.cleanup import Cleanup
from autodeploy.transforms.match_mlp import MatchMLP
from autodeploy.transforms.pipeline import _changes
from autodeploy.transforms.reproducer import read_reproducer
from autodeploy.transforms.rewrite import calls, insert_call, replace_call, val
from tests.transforms.helpers import family_program

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Breaks(Transform):
    """Does some of its work, then the damage named by `how`."""

    name: ClassVar[str] = "breaks"
    how: str

    def apply(self, program: Program, target: Target) -> int:
        node = calls(program, aten.silu.default)[0]
        node.replace_all_uses_with(insert_call(program, node, aten.relu.default, node.args[0]))
        DAMAGE[self.how](program)
        return 1


def raise_error(program: Program) -> None:
    node = calls(program, aten.linear.default)[1]
    raise IndexError(f"at work on {node.op}")


def undefined_node(program: Program) -> None:
    graph = program.graph.graph
    output = graph.output_node()
    output.args = (fx.Graph().placeholder("elsewhere"),)


def unplanned_parameter(program: Program) -> None:
    program.weights = program.weights.without({"lm_head.weight"})


def other_input(program: Program) -> None:
    program.inputs.pop("position_ids")


def missing_value(program: Program) -> None:
    first_linear(program).meta.pop("val")


def stale_dtype(program: Program) -> None:
    first_linear(program).meta["val"] = val(first_linear(program)).to(torch.bfloat16)


def stale_shape(program: Program) -> None:
    first_linear(program).meta["val"] = val(first_linear(program))[..., :3]


def other_output_dtype(program: Program) -> None:
    head = last_linear(program)
    replaced = insert_call(program, program.graph.graph.output_node(), aten.to.dtype, head, torch.bfloat16)
    head.replace_all_uses_with(replaced, delete_user_cb=lambda user: user.op == "output")


def narrower_output(program: Program) -> None:
    head = last_linear(program)
    replaced = insert_call(program, program.graph.graph.output_node(), aten.slice.Tensor, head, 2, 0, 9)
    head.replace_all_uses_with(replaced, delete_user_cb=lambda user: user.op == "output")


def drifting_dtype(program: Program) -> None:
    """A cast in front of a linear makes its old value wrong further down."""
    node = calls(program, aten.linear.default)[2]
    cast = insert_call(program, node, aten.to.dtype, node.args[0], torch.float64)
    node.args = (cast, *node.args[1:])


def swapped_operands(program: Program) -> None:
    node = calls(program, aten.linear.default)[0]
    node.args = (node.args[1], node.args[0])


def changed_recipe(program: Program) -> None:
    program.weights = program.weights.with_recipes({"lm_head.weight": Take("model.embed_tokens.weight")})


def foreign_function(program: Program) -> None:
    node = last_linear(program)
    node.target = operator.mul


def in_place_op(program: Program) -> None:
    insert_call(program, program.graph.graph.output_node(), aten.relu_.default, last_linear(program))


def paged_op_too_early(program: Program) -> None:
    graph = program.graph.graph
    q, k, v = calls(program, ops.attention)[0].args[:3]
    with graph.inserting_before(graph.output_node()):
        node = graph.call_function(ops.kv_append.overload, (k, v, q, q))
    node.meta["val"] = None


def first_linear(program: Program) -> fx.Node:
    return calls(program, aten.linear.default)[0]


def last_linear(program: Program) -> fx.Node:
    return calls(program, aten.linear.default)[-1]


DAMAGE: dict[str, Any] = {
    function.__name__.replace("_", " "): function
    for function in (
        raise_error,
        undefined_node,
        unplanned_parameter,
        other_input,
        missing_value,
        stale_dtype,
        stale_shape,
        other_output_dtype,
        narrower_output,
        drifting_dtype,
        swapped_operands,
        changed_recipe,
        foreign_function,
        in_place_op,
        paged_op_too_early,
    )
}


@pytest.fixture(scope="module")
def pristine() -> Program:
    program, _ = family_program("qwen3", num_hidden_layers=1)
    return Pipeline((Cleanup(),)).run(program, Target())


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_of_every_kind_is_refused_and_undone(how: str, pristine: Program) -> None:
    program = pristine.snapshot().as_program()
    before = str(program), dict(program.weights.recipes), dict(program.inputs), list(program.history)
    with pytest.raises(TransformError, match=r"transform 'breaks': .*Passes before it: cleanup.*autodeploy replay") as caught:
        Pipeline((Breaks(how=how),)).run(program, Target())
    assert caught.value.transform == "breaks"
    assert (str(program), dict(program.weights.recipes), dict(program.inputs), list(program.history)) == before
    program.check()
    assert Pipeline((MatchMLP(),)).run(program, Target()).history[-1].rewrites == 1


def test_the_error_names_the_node(pristine: Program) -> None:
    for how, node in (("raise error", r"at node linear_1\b"), ("stale dtype", "linear: its value is noted as bfloat16")):
        with pytest.raises(TransformError, match=node):
            Pipeline((Breaks(how=how),)).run(pristine.snapshot().as_program(), Target())


def test_the_reproducer_fails_again_in_the_same_way(pristine: Program) -> None:
    with pytest.raises(TransformError) as caught:
        Pipeline((Breaks(how="stale shape"), MatchMLP())).run(pristine.snapshot().as_program(), Target())
    folder = Path(re.search(r"replay (\S+)", str(caught.value))[1])  # pyright: ignore
    assert {path.name for path in folder.iterdir()} == {"program.json", "reproducer.json"}
    program, passes, target, verify, error = read_reproducer(folder)
    assert [item.name for item in passes] == ["breaks", "match_mlp"] and passes[0] == Breaks(how="stale shape")
    assert str(program) == str(pristine)
    with pytest.raises(TransformError) as again:
        Pipeline(passes).run(program, target, verify=verify)
    assert error.split(": ", 1)[1] in str(caught.value) and error.split(": ", 1)[1] in str(again.value)


def test_verification_can_be_left_out(pristine: Program) -> None:
    program = pristine.snapshot().as_program()
    Pipeline((Breaks(how="changed recipe"),)).run(program, Target(), verify="off")
    assert program.weights["lm_head.weight"] == Take("model.embed_tokens.weight")


class CountsDown(Exception):
    pass


MUTATIONS = (
    (fx.Graph, "create_node"),
    (fx.Graph, "erase_node"),
    (fx.Node, "replace_all_uses_with"),
    (fx.Node, "replace_input_with"),
)


@pytest.mark.parametrize("item", default_pipeline(), ids=lambda item: item.name)
def test_an_error_at_any_mutation_of_a_pass_leaves_the_program_as_it_was(item: Transform, monkeypatch, tmp_path: Path) -> None:
    """The k-th node made, erased or redirected raises, for every k up to 50."""
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    program, _ = family_program("granite_swa", **layers)
    Pipeline(default_pipeline().passes[: default_pipeline().names().index(item.name)]).run(program, Target())
    before, recipes = program.snapshot(), dict(program.weights.recipes)
    text, failures = str(program), 0
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for k in range(1, 51):
        program = before.as_program()
        with monkeypatch.context() as patch:
            raise_at(k, patch)
            try:
                Pipeline((item,)).run(program, Target())
            except TransformError:
                failures += 1
            else:
                break
        assert str(program) == text and dict(program.weights.recipes) == recipes
    assert failures == k - (k < 50) or item.name in ("prove_packing", "select_kernels")  # these make, erase and redirect nothing


def raise_at(k: int, patch: pytest.MonkeyPatch) -> None:
    remaining = [k]

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            remaining[0] -= 1
            if remaining[0] == 0:
                raise ArithmeticError("injected")
            return original(*args, **kwargs)

        return call

    for owner, name in MUTATIONS:
        patch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("name", ["qwen3", "llama_dynamic", "youtu", "granite_swa", "gpt2"])
def test_a_program_is_the_same_after_saving_and_loading_at_every_level(name: str, tmp_path: Path) -> None:
    program, _ = family_program(name)
    for item in default_pipeline():
        Pipeline((item,)).run(program, Target())
        program.save(tmp_path / "first")
        loaded = Program.load(tmp_path / "first")
        loaded.save(tmp_path / "second")
        first, second = ((tmp_path / folder / "program.json").read_bytes() for folder in ("first", "second"))
        assert first == second and str(loaded) == str(program)


def test_passes_go_on_from_a_loaded_program(pristine: Program, tmp_path: Path) -> None:
    pristine.save(tmp_path)
    loaded, original = Program.load(tmp_path), pristine.snapshot().as_program()
    rest = Pipeline(default_pipeline().passes[1:])
    assert str(rest.run(loaded, Target())) == str(rest.run(original, Target()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[:-40], "cannot be read"),
        (lambda text: text.replace('"version": 4', '"version": 7'), "not a program of format 4"),
        (lambda text: text.replace("aten.silu.default", "aten.sum.default"), "was saved as.*but aten.sum.default gives"),
    ],
)
def test_a_spoiled_program_file_is_refused(spoil: Any, message: str, pristine: Program, tmp_path: Path) -> None:
    pristine.save(tmp_path)
    path = tmp_path / "program.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ProgramFileError, match=message):
        Program.load(tmp_path)


def test_a_snapshot_costs_less_than_ten_milliseconds_per_thousand_nodes() -> None:
    program, _ = family_program("qwen3", num_hidden_layers=8)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        program.snapshot()
        seconds.append(time.perf_counter() - started)
    assert min(seconds) <= 0.010 * len(program.graph.graph.nodes) / 1000


def test_finding_nothing_changed_costs_less_than_ten_milliseconds_per_thousand_nodes() -> None:
    program, _ = family_program("qwen3", num_hidden_layers=8)
    snapshot, seconds = program.snapshot(), []
    for _ in range(20):
        started = time.perf_counter()
        assert _changes(snapshot, program) == ""
        seconds.append(time.perf_counter() - started)
    assert min(seconds) <= 0.010 * len(program.graph.graph.nodes) / 1000


@dataclass(frozen=True, kw_only=True)
class Silent(Transform):
    """Does the damage of that name, if any, and says that it made `returned` rewrites."""

    name: ClassVar[str] = "silent"
    change: str = ""
    returned: Any = 0

    def apply(self, program: Program, target: Target) -> int:
        SILENT[self.change](program)
        return self.returned


def other_activation(program: Program) -> None:
    node = calls(program, aten.silu.default)[0]
    replace_call(program, node, aten.relu.default, node.args[0])


def other_meta_tensor(program: Program) -> None:
    program.graph.get_submodule("lm_head").weight = torch.nn.Parameter(torch.empty(3, device="meta"))


SILENT: dict[str, Any] = {
    "": lambda program: None,
    "calls": other_activation,
    "arguments": swapped_operands,
    "recipe": changed_recipe,
    "inputs": other_input,
    "parameters": other_meta_tensor,
}


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ("calls", "+1 aten.relu, -1 aten.silu"),
        ("arguments", "arguments or order of calls"),
        ("recipe", "weights"),
        ("inputs", "inputs"),
        ("parameters", "parameters"),
    ],
)
def test_a_pass_that_counts_nothing_may_change_nothing(change: str, shown: str, pristine: Program) -> None:
    program = pristine.snapshot().as_program()
    before = str(program)
    with pytest.raises(TransformError, match=rf"returned 0 but changed the program \({re.escape(shown)}\); return the number"):
        Pipeline((Silent(change=change),)).run(program, Target(), verify="off")
    assert str(program) == before
    program.check()


@pytest.mark.parametrize("returned", [None, True, "1", 1.0, -1])
def test_a_pass_returns_a_count(returned: Any, pristine: Program) -> None:
    program = pristine.snapshot().as_program()
    message = re.escape(f"transform 'silent': VerificationError: apply returned {returned!r}; it must return how many")
    with pytest.raises(TransformError, match=message):
        Pipeline((Silent(returned=returned, change="calls"),)).run(program, Target())
    assert str(program) == str(pristine)


def test_a_pass_that_finds_nothing_goes_through(pristine: Program) -> None:
    program = pristine.snapshot().as_program()
    assert Pipeline((Silent(),)).run(program, Target()).history[-1].rewrites == 0


def test_a_pass_in_a_function_is_not_promised_a_replay(pristine: Program) -> None:
    class Local(Silent):
        name = "local"

    with pytest.raises(TransformError, match=r"first move .*Local to a module that can be imported") as caught:
        Pipeline((Local(returned=None),)).run(pristine.snapshot().as_program(), Target())
    folder = Path(re.search(r"replay (\S+)", str(caught.value))[1])  # pyright: ignore
    with pytest.raises(ProgramFileError, match="Local was defined in a script or inside a function"):
        read_reproducer(folder)
    text = (folder / "reproducer.json").read_text()
    (folder / "reproducer.json").write_text(
        re.sub(r'"module": "[^"]*",\s*"class": "[^"]*"', '"module": "__main__", "class": "A"', text)
    )
    with pytest.raises(ProgramFileError, match=r"__main__\.A was defined in a script"):
        read_reproducer(folder)


def test_a_name_stands_once_in_a_pipeline() -> None:
    for edit in (
        lambda: default_pipeline().insert_after("cleanup", MatchMLP()),
        lambda: default_pipeline().replace("cleanup", MatchMLP()),
    ):
        with pytest.raises(ConfigError, match="'match_mlp' is already in the pipeline; give the second one another name"):
            edit()
    assert default_pipeline().replace("match_mlp", MatchMLP()) == default_pipeline()


@pytest.mark.parametrize(
    ("item", "shown"), [(MatchMLP, r"the class MatchMLP; write MatchMLP\(\)"), (len, "<built-in function len>")]
)
def test_a_pipeline_holds_passes(item: Any, shown: str) -> None:
    with pytest.raises(ConfigError, match=f"a pipeline holds instances of Transform, not {shown}"):
        default_pipeline().insert_after("cleanup", item)


def test_a_pass_without_a_name_is_refused_where_it_is_defined() -> None:
    with pytest.raises(TypeError, match="the pass Nameless needs a name"):

        class Nameless(Transform):
            def apply(self, program: Program, target: Target) -> int:
                return 0


@pytest.mark.parametrize("option", ["name", "effect", "foo"])
def test_only_fields_are_options(option: str) -> None:
    with pytest.raises(ConfigError, match=f"pass 'cleanup' has no option '{option}'. It has: none"):
        default_pipeline().configure("cleanup", **{option: 1})


def test_effects_are_declared() -> None:
    declared = {item.name: item.effect for item in default_pipeline()}
    assert declared["fuse_linears"] is Effect.PARAMETERS
    assert {name for name, effect in declared.items() if effect is Effect.INPUTS} == {
        "insert_paged_attention",
        "insert_states",
        "gather_logits",
    }
