"""A script that starts a Ray cluster of two nodes on this machine, with room for one rank on each.

python -m tests.distributed.under_ray FOLDER CACHE
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

import autodeploy
from autodeploy import CompiledModel, ConfigError, EngineDeadError, SamplingParams

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


def start(ranks: int, **options: Any) -> CompiledModel:
    return autodeploy.compile(
        Path(sys.argv[1]),
        program_cache=Path(sys.argv[2]),
        plugins=["tests.distributed.average:plugin"],
        tensor_parallel_size=ranks,
        distributed_executor_backend="ray",
        **options,
    )


def tokens(compiled: CompiledModel) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in compiled.generate([[5, 6, 7], [8]], PARAMS)]


def ranks_of_ray() -> list[psutil.Process]:
    everybody = psutil.process_iter(["cmdline"])
    return [process for process in everybody if any("Seat.serve" in word for word in process.info["cmdline"] or ())]


def main() -> None:
    one = start(1)
    expected = tokens(one)
    one.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    compiled = start(2)
    nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    assert tokens(compiled) == expected
    print(f"same tokens on {len(nodes)} nodes", flush=True)
    compiled.shutdown()
    compiled = start(2)
    (rank,) = ranks_of_ray()
    os.kill(rank.pid, signal.SIGKILL)
    try:
        tokens(compiled)
    except EngineDeadError as error:
        print(str(error).partition(":")[0], flush=True)
    compiled.shutdown()
    assert not ranks_of_ray()
    try:
        start(3, distributed_timeout=2)
    except ConfigError as error:
        print(str(error).partition(" s ")[0] + " s", flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
