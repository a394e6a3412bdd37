"""The program cache: what is found again and what is not, in one process and in several, with files that are right and wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import autodeploy
from autodeploy import CompiledModel, Program, SamplingParams, Target, Transform, default_pipeline
from autodeploy._compile import compile_observed
from autodeploy.cli import DEMO_MODEL, app
from autodeploy.config import LLMArgs
from autodeploy.program_cache import Lowered, Place, place_of
from autodeploy.program_store import MANIFEST, UNFINISHED, Miss, Store, key_of
from autodeploy.recipes import Convert, Take
from tests.models.families import make_model

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [13]]
ROOT = Path(autodeploy.__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_model("llama").save_pretrained(path)
    return path


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def start(folder: Any, cache: Any, **options: Any) -> CompiledModel:
    return autodeploy.compile(folder, program_cache=cache, max_seq_len=64, **options)


def note(compiled: CompiledModel) -> str:
    return compiled.timeline.notes["program cache"]


def tokens(compiled: CompiledModel) -> list[list[int]]:
    outputs = compiled.generate(PROMPTS, SamplingParams(max_tokens=8, ignore_eos=True))
    compiled.shutdown()
    return [list(output.outputs[0].token_ids) for output in outputs]


def place(folder: Path, cache: Path, **options: Any) -> Place | str:
    args = LLMArgs(model=str(folder), program_cache=cache, **options)
    passes = args.pipeline if args.pipeline is not None else None
    return place_of(args, Target(page_size=args.kv_cache_config.page_size), passes)


def facts(folder: Path, **options: Any) -> dict[str, str]:
    found = place(folder, Path("unused"), **options)
    assert isinstance(found, Place), found
    return dict(found.facts)


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


# Whole starts


def test_a_second_start_runs_the_stored_program_and_says_the_same(folder: Path, tmp_path: Path) -> None:
    first, second = start(folder, tmp_path), start(folder, tmp_path)
    assert note(first) == "miss: no program of this model is stored yet"
    assert note(second) == "hit"
    assert "export" in first.timeline.seconds and "export" not in second.timeline.seconds
    assert "program cache: hit" in second.report()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    assert torch.equal(first(ids), second(ids))
    assert str(second.program) == str(first.program)
    assert second.program.history == first.program.history
    assert second.facts == first.facts
    assert tokens(first) == tokens(second)


def test_a_damaged_entry_is_ignored_built_again_and_then_used(folder: Path, tmp_path: Path) -> None:
    expected = tokens(start(folder, tmp_path))
    (entry,) = Store(tmp_path).entries()
    file = entry.folder / "program.json"
    file.write_text(file.read_text().replace("1e-06", "1e-01"))
    with pytest.warns(RuntimeWarning, match="ignored and built again: program.json is not what was stored"):
        damaged = start(folder, tmp_path)
    assert note(damaged) == "miss: the stored program is damaged"
    assert tokens(damaged) == expected
    again = start(folder, tmp_path)
    assert note(again) == "hit"
    assert tokens(again) == expected


SCRIPT = """
import json, os, sys, time
from autodeploy import LLM, SamplingParams
model, cache, text = sys.argv[1:]
with LLM(model, program_cache=cache, skip_tokenizer_init=not text) as llm:
    output = llm.generate(text or [5, 6, 7], SamplingParams(max_tokens=8, ignore_eos=True))
    tokens = list(output.outputs[0].token_ids)
    note = llm.compiled.timeline.notes["program cache"]
unwanted = ("transformers", "sympy", "torch._dynamo", "torch._refs", "autodeploy.capture", "rich")
modules = [name for name in sys.modules if name.startswith(unwanted)]
print(json.dumps({"tokens": tokens, "note": note, "modules": modules, "seconds": time.process_time()}))
"""


def run(cache: Path, text: str = "") -> dict[str, Any]:
    command = [sys.executable, "-c", SCRIPT, str(DEMO_MODEL), str(cache), text]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=170, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_cached_start_imports_no_modeling_code_and_costs_less(tmp_path: Path) -> None:
    cold, warm = run(tmp_path), run(tmp_path)
    assert (cold["note"], warm["note"]) == ("miss: no program of this model is stored yet", "hit")
    assert warm["tokens"] == cold["tokens"]
    assert any(".modeling_qwen3" in name for name in cold["modules"])
    assert warm["modules"] == []
    assert warm["seconds"] < 0.7 * cold["seconds"]
    with_text = run(tmp_path, "What is 123+456?")
    assert with_text["note"] == "hit"
    assert "transformers" in with_text["modules"]
    models = [name for name in with_text["modules"] if name.startswith("transformers.models.") and ".modeling_" in name]
    assert set(models) <= {"transformers.models.auto.modeling_auto"}, "only the table of names"
    assert "torch._refs" not in with_text["modules"]


@pytest.mark.slow
def test_two_first_starts_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, [tmp_path, tmp_path])
    assert first["tokens"] == second["tokens"]
    assert len(Store(tmp_path).entries()) == 1
    assert not list(tmp_path.glob(f"{UNFINISHED}*"))
    third = run(tmp_path)
    assert (third["note"], third["tokens"]) == ("hit", first["tokens"])


FAMILIES = ["gpt2", "gemma3_text", "mixtral", "deepseek_v3", "bloom", "mamba2", "qwen3_next", "gpt_oss"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_stored_programs_of_many_kinds_compute_the_same(family: str, tmp_path: Path) -> None:
    make_model(family).save_pretrained(tmp_path / "model")
    first, second = (start(tmp_path / "model", tmp_path / "cache") for _ in range(2))
    assert note(second) == "hit", note(first)
    ids = torch.arange(5, 25)[None]
    assert torch.equal(first(ids), second(ids))
    assert tokens(first) == tokens(second)


# What decides a program


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"dtype": "float64"}, {"dtype"}),
        ({"kv_cache_config": {"page_size": 16}}, {"target.page_size"}),
        ({"verify": "off"}, {"verify"}),
        ({"ignore_unexpected_weights": True}, {"ignore_unexpected_weights"}),
        ({"plugins": ("json:loads",)}, {"plugins", "code of json"}),
        ({"pipeline": default_pipeline().without("match_mlp")}, {"passes"}),
        ({"max_seq_len": 32, "max_batch_size": 3, "max_num_tokens": 64, "seed": 5, "skip_tokenizer_init": True}, set()),
        ({"kv_cache_config": {"max_tokens": 640, "free_memory_fraction": 0.1}, "enable_chunked_prefill": False}, set()),
    ],
)
def test_options_that_change_the_program_change_the_key(folder: Path, options: dict[str, Any], parts: set[str]) -> None:
    assert changed(facts(folder), facts(folder, **options)) == parts
    assert (key_of(facts(folder)) == key_of(facts(folder, **options))) == (not parts)


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rename_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["another.name"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def narrow_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda folder: edit_json(folder / "config.json", rms_norm_eps=0.5), {"config.json"}),
        (
            lambda folder: edit_json(folder / "generation_config.json", eos_token_id=[7]),
            {"eos_token_id of generation_config.json"},
        ),
        (lambda folder: edit_json(folder / "generation_config.json", temperature=0.5), set()),
        (rename_a_tensor, {"tensors of the checkpoint"}),
        (narrow_a_tensor, {"tensors of the checkpoint"}),
    ],
)
def test_what_is_in_the_folder_changes_the_key(own_folder: Path, edit: Callable[[Path], None], parts: set[str]) -> None:
    before = facts(own_folder)
    edit(own_folder)
    assert changed(before, facts(own_folder)) == parts


def test_new_numbers_in_the_same_tensors_need_no_new_program(own_folder: Path) -> None:
    before = facts(own_folder)
    tensors = {name: tensor + 1 for name, tensor in load_file(own_folder / "model.safetensors").items()}
    save_file(tensors, own_folder / "model.safetensors", {"format": "pt"})
    assert facts(own_folder) == before


def test_one_changed_line_of_autodeploy_changes_the_key(folder: Path, tmp_path: Path) -> None:
    package = Path(shutil.copytree(ROOT / "autodeploy", tmp_path / "autodeploy"))
    code = (
        "import json, sys\nfrom autodeploy import Target\nfrom autodeploy.config import LLMArgs\n"
        "from autodeploy.program_cache import place_of\n"
        "print(json.dumps(dict(place_of(LLMArgs(model=sys.argv[1], program_cache='x'), Target(), None).facts)))"
    )

    def facts_there() -> dict[str, str]:
        command = [sys.executable, "-c", code, str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True, timeout=120)
        return json.loads(done.stdout)

    same = facts_there()
    with (package / "transforms" / "match_mlp.py").open("a") as file:
        file.write("# another line\n")
    assert changed(same, facts_there()) == {"autodeploy"}


def test_another_version_is_a_miss_that_names_what_changed(folder: Path, tmp_path: Path) -> None:
    now = place(folder, tmp_path)
    assert isinstance(now, Place)
    older = {**now.facts, "transformers": "5.0.0", "torch": "2.11"}
    now.store.write(older, now.model, lambda new: None)
    now.store.write({**older, "dtype": "float64"}, now.model, lambda new: None)
    with pytest.raises(Miss, match=r"^changed: torch, transformers$"):
        now.find()
    with pytest.raises(Miss, match="no program of this model is stored yet"):
        now.store.read(now.facts, "/another/model")


@dataclass(frozen=True, kw_only=True)
class DoesNothing(Transform):
    name: ClassVar[str] = "does_nothing"
    amount: int = 0
    extra: Any = None

    def apply(self, program: Program, target: Target) -> int:
        return 0


def test_a_pass_from_elsewhere_counts_with_its_options_and_its_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(__file__).read_text()
    start_at = source.index("@dataclass(frozen=True, kw_only=True)\nclass DoesNothing")
    body = source[start_at : source.index("\n\n\ndef test_a_pass_from_elsewhere")]
    imports = (
        "from dataclasses import dataclass\nfrom typing import Any, ClassVar\nfrom autodeploy import Program, Target, Transform\n"
    )
    module = tmp_path / "passes_of_a_test.py"
    module.write_text(imports + body)
    monkeypatch.syspath_prepend(tmp_path)
    import passes_of_a_test  # pyright: ignore[reportMissingImports]

    def with_pass(**options: Any) -> dict[str, str]:
        return facts(folder, pipeline=default_pipeline().insert_after("cleanup", passes_of_a_test.DoesNothing(**options)))

    first = with_pass()
    assert changed(facts(folder), first) == {"passes", "code of passes_of_a_test"}
    assert changed(first, with_pass(amount=1)) == {"passes"}
    module.write_text(imports + body + "\n# changed\n")
    assert changed(first, with_pass()) == {"code of passes_of_a_test"}


# What is not stored


def test_what_cannot_be_known_again_is_not_stored(folder: Path, tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Local(DoesNothing):
        name: ClassVar[str] = "local"

    def with_pass(item: Transform) -> Place | str:
        return place(folder, tmp_path, pipeline=default_pipeline().insert_after("cleanup", item))

    assert with_pass(Local()) == "the pass 'local' is defined in a script or inside a function"
    assert "no plain data" in str(with_pass(DoesNothing(extra=object())))
    assert place(folder, tmp_path, verify="numeric") == "verify='numeric' needs the passes"
    assert place_of(LLMArgs(model=str(folder), program_cache=False), Target(), None) == "switched off"
    assert place_of(LLMArgs(model=str(folder)), Target(), None) == "switched off", "as AUTODEPLOY_CACHE_DIR says in these tests"


def test_starts_that_pass_the_cache_by(folder: Path, tmp_path: Path) -> None:
    watched: list[str] = []
    args = LLMArgs(model=str(folder), program_cache=tmp_path)
    compiled = compile_observed(args, lambda program, record: watched.append(record.name))
    assert note(compiled) == "not used: the passes are watched"
    assert watched == ["export", *default_pipeline().names()]
    assert note(start(make_model("llama"), tmp_path)) == "not used: the model is in memory"
    assert not Store(tmp_path).entries()


def test_a_conversion_that_is_code_is_not_stored(folder: Path, tmp_path: Path) -> None:
    here = place(folder, tmp_path)
    assert isinstance(here, Place)
    compiled = start(folder, False)
    code = Convert((("a", (Take("model.norm.weight"),)),), lambda tensors: {"b": tensors["a"][0]}, "b")
    program = compiled.program
    program = replace(program, weights=program.weights.with_recipes({next(iter(program.weights)): code}))
    assert (
        here.keep(Lowered(program, here.source, compiled.facts), {})
        == "its weights need a conversion that is code of transformers"
    )
    assert not Store(tmp_path).entries()


# The folder


FACTS = {"a": "1"}


def write(store: Store, content: bytes = b"content", facts: dict[str, str] = FACTS) -> None:
    store.write(facts, "model", lambda new: [(new / name).write_bytes(content) for name in ("x", "y")])


def test_only_the_owner_may_enter(tmp_path: Path) -> None:
    store = Store(tmp_path / "a" / "programs")
    previous = os.umask(0)
    try:
        write(store)
    finally:
        os.umask(previous)
    (entry,) = store.entries()
    assert [path.stat().st_mode & 0o777 for path in (store.folder, entry.folder)] == [0o700, 0o700]
    assert {path.stat().st_mode & 0o777 for path in entry.folder.iterdir()} == {0o600}
    assert (store.folder / ".lock").stat().st_mode & 0o777 == 0o600


def test_a_folder_that_others_can_write_to_is_not_used(folder: Path, tmp_path: Path) -> None:
    here = place(folder, tmp_path)
    assert isinstance(here, Place)
    write(Store(tmp_path), facts=dict(here.facts))
    tmp_path.chmod(0o777)
    with pytest.raises(Miss, match="can be written by others"):
        here.find()
    with pytest.raises(Miss, match="can be written by others"):
        write(Store(tmp_path))


def damage(entry: Path, how: str) -> None:
    match how:
        case "a changed byte":
            (entry / "x").write_bytes(b"cOntent")
        case "a missing file":
            (entry / "x").unlink()
        case "half a manifest":
            (entry / MANIFEST).write_text((entry / MANIFEST).read_text()[:40])
        case "a manifest of something else":
            (entry / MANIFEST).write_text("[]")
        case "another entry's manifest":
            edit_json(entry / MANIFEST, facts={"a": "2"})


@pytest.mark.parametrize(
    "how", ["a changed byte", "a missing file", "half a manifest", "a manifest of something else", "another entry's manifest"]
)
def test_damage_is_found_told_and_mended(tmp_path: Path, how: str) -> None:
    store = Store(tmp_path)
    write(store)
    assert store.read(FACTS, "model") == {"x": b"content", "y": b"content"}
    damage(store.entries()[0].folder, how)
    with pytest.warns(RuntimeWarning, match="ignored and built again"), pytest.raises(Miss, match="damaged"):
        store.read(FACTS, "model")
    write(store)
    assert store.read(FACTS, "model") == {"x": b"content", "y": b"content"}


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(new: Path) -> None:
        (new / "x").write_bytes(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        Store(tmp_path).write(FACTS, "model", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


WRITER = """
import sys
from pathlib import Path
from autodeploy.program_store import Miss, Store
store, own = Store(Path(sys.argv[1])), sys.argv[2].encode() * 100_000
hits = 0
for i in range(60):
    if i % 3 == 0:
        store.write({"a": "1"}, "model", lambda new: [(new / name).write_bytes(own) for name in ("x", "y")])
    try:
        files = store.read({"a": "1"}, "model")
        assert files["x"] == files["y"] and len(files["x"]) == 100_000 and len(set(files["x"])) == 1
        hits += 1
    except Miss:
        pass
print(hits)
"""


def test_many_processes_write_and_read_one_entry(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, cwd=ROOT, text=True) for name in "abc"]
    hits = [int(writer.communicate(timeout=120)[0] or 0) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert hits == [60, 60, 60]
    assert len(list(tmp_path.iterdir())) == 2, "the entry and the lock"


def test_the_entries_used_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodeploy.program_store.MAX_ENTRIES", 2)
    store = Store(tmp_path)
    for i, age in enumerate((300, 200, 100)):
        write(store, facts={"a": str(i)})
        entry = tmp_path / key_of({"a": str(i)})
        os.utime(entry, (entry.stat().st_atime, entry.stat().st_mtime - age))
        if i == 1:
            store.read({"a": "0"}, "model")  # used just now
    assert {entry.facts["a"] for entry in store.entries()} == {"0", "2"}


def test_commands_list_and_clear(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write(store)
    (tmp_path / "kept.txt").write_text("not ours")
    (tmp_path / f"{UNFINISHED}left").mkdir()
    listed = CliRunner().invoke(app, ["cache", "list", "--folder", str(tmp_path)])
    assert listed.exit_code == 0 and "model" in listed.output and store.entries()[0].folder.name[:12] in listed.output
    cleared = CliRunner().invoke(app, ["cache", "clear", "--folder", str(tmp_path)])
    assert cleared.exit_code == 0 and "1 program deleted" in cleared.output
    assert not store.entries()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "kept.txt"]


def test_the_folder_comes_from_the_environment(tmp_path: Path) -> None:
    code = "from autodeploy.program_store import default_folder; print(default_folder())"

    def folder_of(**variables: str) -> str:
        environment = {
            name: value for name, value in os.environ.items() if name not in ("AUTODEPLOY_CACHE_DIR", "XDG_CACHE_HOME")
        }
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment | variables, check=True
        ).stdout.strip()

    assert folder_of(HOME="/home/x") == "/home/x/.cache/autodeploy/programs"
    assert folder_of(XDG_CACHE_HOME="/caches") == "/caches/autodeploy/programs"
    assert folder_of(AUTODEPLOY_CACHE_DIR=str(tmp_path), XDG_CACHE_HOME="/caches") == f"{tmp_path}/programs"
    assert folder_of(AUTODEPLOY_CACHE_DIR="off") == "None"
