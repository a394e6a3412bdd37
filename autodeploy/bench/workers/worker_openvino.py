"""OpenVINO GenAI's continuous batching, stepped by hand. The model is exported once, beside the checkpoint."""

import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

pipeline: Any = None
genai: Any = None


def load(model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
    ov: Any = import_module("openvino")
    globals()["genai"] = import_module("openvino_genai")
    folder = folder_of(model, options["bits"])
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = max(1, -(-options["pool_bytes"] // 2**30))
    scheduler.max_num_seqs = options["max_batch_size"]
    scheduler.enable_prefix_caching = False
    settings = {"INFERENCE_NUM_THREADS": threads}
    globals()["pipeline"] = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", settings)
    return {"versions": {"openvino": ov.__version__, "openvino_genai": genai.__version__}}


def folder_of(model: str, bits: int) -> Path:
    return Path(model) / ("openvino" if bits == 16 else f"openvino-int{bits}")


def prepare(model: str, bits: int) -> dict[str, Any]:
    """Export, unless it was done; 4 bits in groups of 128, as it does by itself."""
    folder = folder_of(model, bits)
    if not (folder / "openvino_model.xml").exists():
        optimum = Path(sys.executable).with_name("optimum-cli")
        task = ["--task", "text-generation-with-past", "--weight-format", "fp16" if bits == 16 else f"int{bits}"]
        command = [str(optimum), "export", "openvino", "--model", model, *task, str(folder)]
        subprocess.run(command, check=True, capture_output=True, text=True)
    return {}


def run(prompts: list[list[int]], output_len: int, concurrency: int) -> dict[str, Any]:
    ov: Any = import_module("openvino")
    numpy: Any = import_module("numpy")
    config = genai.GenerationConfig(max_new_tokens=output_len, ignore_eos=True, do_sample=False)
    times: dict[int, dict[str, Any]] = {}
    handles: dict[int, Any] = {}
    waiting = list(enumerate(prompts))
    while waiting or handles:
        while waiting and len(handles) < concurrency:
            number, prompt = waiting.pop(0)
            times[number] = {"submitted": time.perf_counter(), "tokens": []}
            handles[number] = pipeline.add_request(number, ov.Tensor(numpy.array([prompt], dtype=numpy.int64)), config)
        pipeline.step()
        now = time.perf_counter()
        for number, handle in list(handles.items()):
            while handle.can_read():
                for output in handle.read().values():
                    times[number]["tokens"] += [now] * len(output.generated_ids)
            if len(times[number]["tokens"]) >= output_len:
                del handles[number]
    return {"requests": list(times.values())}
