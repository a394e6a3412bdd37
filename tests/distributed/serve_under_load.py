"""A process that keeps two ranks busy with streamed requests, and says on stdout what becomes of each.

python -m tests.distributed.serve_under_load FOLDER CACHE TIMEOUT
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from autodeploy import LLM, SamplingParams

NUM_REQUESTS = 12
OPTIONS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "plugins": ["tests.distributed.average:plugin"],
    "max_seq_len": 65536,
    "kv_cache_config": {"max_tokens": NUM_REQUESTS * 65536},
}


def follow(handle: Any) -> None:
    """Read a stream to its end."""
    try:
        for _ in handle:
            pass
        line = f"done {time.time()} \n"
    except Exception as error:
        line = f"error {time.time()} {type(error).__name__}: {error}\n"
    os.write(1, line.encode())


def main() -> None:
    folder, cache, timeout = sys.argv[1:4]
    llm = LLM(folder, skip_tokenizer_init=True, distributed_timeout=float(timeout), program_cache=Path(cache), **OPTIONS)
    long = SamplingParams(max_tokens=60000, ignore_eos=True)
    handles = [llm.generate_async([3 + i, 5, 7], long, streaming=True) for i in range(NUM_REQUESTS)]
    next(iter(handles[0]))
    (worker,) = psutil.Process().children()
    print(f"ready {os.getpid()} {worker.pid}", flush=True)
    threads = [threading.Thread(target=follow, args=(handle,)) for handle in handles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    llm.generate([1, 2, 3], SamplingParams(max_tokens=1))


if __name__ == "__main__":
    main()
