"""A script as torchrun runs it on every rank: torchrun --nproc-per-node 2 -m tests.distributed.under_torchrun FOLDER CACHE"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from autodeploy import LLM, SamplingParams

if __name__ == "__main__":
    with LLM(sys.argv[1], tensor_parallel_size=2, skip_tokenizer_init=True, program_cache=Path(sys.argv[2])) as llm:
        outputs = llm.generate([[5, 6, 7], [8]], SamplingParams(max_tokens=8, ignore_eos=True))
        print(json.dumps([os.environ["RANK"], *(output.outputs[0].token_ids for output in outputs)]), flush=True)
    print("after the engine, on rank", os.environ["RANK"], flush=True)
