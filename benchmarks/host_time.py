"""What the host needs for a decode step: that of a model as deep as Qwen3-0.6B with a hidden size of 64, beside the real one's.

    python benchmarks/host_time.py [FOLDER]

Hardly anything is computed in the small one: its step is what scheduling, building the batch, calling kernels and sampling take.
FOLDER: a checkpoint of Qwen3-0.6B; without one, random weights are written to a temporary folder.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from autodeploy.bench.measure import Task, measure
from autodeploy.bench.results import EngineResult
from autodeploy.bench.worker import Worker
from autodeploy.bench.workload import Cell
from autodeploy.cores import available_cores

SHAPE = "qwen3-0.6b"
SMALL = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
CELLS = [Cell(many, 128, 128, many) for many in (1, 8, 32)]
REPEATS = 3


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        real = sys.argv[1] if len(sys.argv) > 1 else written(SHAPE, Path(temporary) / "real")
        config = json.loads((Path(real) / "config.json").read_text()) | SMALL | {"vocab_size": 256}
        (folder := Path(temporary) / "config").mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        host, whole = (steps(model) for model in (written(str(folder), Path(temporary) / "small"), real))
    for cell in CELLS:
        host_step, step = (1000 * cell.concurrency / (each.decode_rate(cell) or 0) for each in (host, whole))
        noise = " (others were busy)" if host.is_noisy(cell) or whole.is_noisy(cell) else ""
        print(f"{cell.name}: {host_step:.2f} of {step:.1f} ms, {100 * host_step / step:.1f} %{noise}")


def written(config: str, folder: Path) -> str:
    with Worker("model") as worker:
        worker.ask("write", config=config, folder=str(folder))
    return str(folder)


def steps(model: str) -> EngineResult:
    return measure(Task(model, CELLS, available_cores(), REPEATS, say=print, warn=print)).ours


if __name__ == "__main__":
    main()
