"""One model on several ranks: each loads its share of the weights, and every step is done by all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from safetensors.torch import save
from torch import Tensor

from autodeploy.checkpoint import CheckpointSource
from autodeploy.cores import available_cores
from autodeploy.custom_ops import PROVIDED
from autodeploy.custom_ops.attention_backend import backend_named
from autodeploy.distributed.groups import join, leave, refuse_second_group
from autodeploy.distributed.launch import Launch, local_device
from autodeploy.distributed.messages import Allocate, Capture, Forward, Join, Start, digest_of
from autodeploy.distributed.ranks import Ranks
from autodeploy.errors import ConfigError, EngineDeadError
from autodeploy.executor.batch import WantedRows
from autodeploy.executor.cuda_graphs import GraphOptions
from autodeploy.executor.memory import free_memory
from autodeploy.executor.model_runner import ModelRunner
from autodeploy.executor.request import Request
from autodeploy.executor.staged_steps import Forward as StepForward
from autodeploy.executor.staged_steps import LogitsKind, forward_of
from autodeploy.program import Program
from autodeploy.recipes import Initial, Leaf
from autodeploy.shards import plan_of_rank
from autodeploy.specs import BatchMetadata, CacheSpec, Mesh


@dataclass(frozen=True)
class Stage:
    """The program of the ranks that share some layers. text: as it is saved."""

    program: Program
    text: bytes


@dataclass(frozen=True)
class RankOptions:
    """What all ranks need to know beside their program. device: cpu or cuda."""

    mesh: Mesh
    device: str
    timeout: float
    graphs: GraphOptions


class DistributedRunner:
    """Rank 0's share of a model, and what the other ranks are told. Made by `start_ranks`."""

    can_chunk, reads_entries = True, False

    def __init__(
        self,
        local: ModelRunner,
        forward: StepForward,
        ranks: Ranks,
        launch: Launch,
        num_threads: int,
        stage_caches: Sequence[Collection[CacheSpec]],
    ) -> None:
        """forward: how this rank does a step. num_threads: of torch, to be had again at the end."""
        self.local, self.ranks, self._launch, self._num_threads = local, ranks, launch, num_threads
        self._forward, self.stage_caches = forward, stage_caches
        self.rope_thresholds = local.rope_thresholds
        self._is_open = True

    @property
    def free_bytes(self) -> int:
        """What the rank with the least room may still allocate."""
        own = free_memory(self.local.device) // (self._launch.place.num_local if self.local.device == "cpu" else 1)
        return min([own, *(ready.free_bytes for ready in self.ranks.ready.values())])

    def allocate(self, num_units: Mapping[str, int], page_size: int) -> None:
        self.ranks.send(Allocate(dict(num_units), page_size))
        self.local.allocate(num_units, page_size)

    def capture_all(self, num_pages: int, advance: Callable[..., None]) -> None:
        """The CUDA graphs of all shapes, on all ranks."""
        assert self.local.graphs is not None
        self.ranks.send(Capture(num_pages))
        self.local.graphs.capture_all(num_pages, advance)

    def forward(self, batch: BatchMetadata, rows: list[WantedRows]) -> Tensor:
        """One step of all ranks. Raises EngineDeadError when it fails: the others may be in the middle of it."""
        with self.ranks.step():
            self.ranks.send(Forward.of(batch))
            return self._forward(batch, rows)

    def forget(self, request: Request) -> None:
        self.local.forget(request)

    def shutdown(self) -> None:
        """End the other ranks. No harm when called again."""
        if self._is_open:
            self._is_open = False
            self.ranks.shutdown()
            leave()
            self._launch.close()
            torch.set_num_threads(self._num_threads)


def start_ranks(
    stages: Sequence[Stage],
    source: CheckpointSource,
    launch: Launch,
    options: RankOptions,
    on_parameter: Callable[[str], None] = lambda name: None,
) -> DistributedRunner:
    """Start the other ranks and load every rank's share. Raises EngineDeadError when one of them fails."""
    refuse_second_group()
    num_threads = torch.get_num_threads()
    mesh, device = options.mesh, local_device(options.device, launch.place)
    starts = [_start_of(stage, source, launch, options) for stage in stages]
    ranks = Ranks(launch.start, options.timeout)
    try:
        for peer in ranks.peers:
            ranks.send(starts[mesh.stage(peer.rank)], [peer])
        share_cores(launch.place.num_local)
        local = load_rank(stages[0].program, source, mesh, 0, device, options.graphs, on_parameter)
        ranks.wait_ready()
        for rank, ready in ranks.ready.items():
            if ready.digest != starts[mesh.stage(rank)].digest:
                ranks.die(f"rank {rank} has another program than the one it was sent")
                raise EngineDeadError(ranks.death)
        ranks.send(Join())
        ends = join(mesh, 0, device, launch.rendezvous, options.timeout)
    except BaseException:
        ranks.shutdown()
        leave()
        launch.close()
        torch.set_num_threads(num_threads)
        raise
    forward = forward_of(local, mesh, 0, ends, _logits_of(stages[-1].program) if mesh.pp > 1 else None)
    return DistributedRunner(local, forward, ranks, launch, num_threads, [stage.program.caches.values() for stage in stages])


def _logits_of(program: Program) -> LogitsKind:
    (output,) = program.graph.graph.output_node().all_input_nodes
    return LogitsKind(output.meta["val"].shape[-1], output.meta["val"].dtype)


def load_rank(
    program: Program,
    source: CheckpointSource,
    mesh: Mesh,
    rank: int,
    device: str,
    graphs: GraphOptions,
    on_parameter: Callable[[str], None] = lambda name: None,
) -> ModelRunner:
    """A program with one rank's share of its weights, which is all that is read."""

    def describe(leaf: Leaf) -> Tensor:
        return source.initial[leaf.name] if isinstance(leaf, Initial) else source.describe_leaf(leaf)

    own = replace(program, weights=plan_of_rank(program.weights, mesh.index(rank), describe))
    return ModelRunner(own, source, device, on_parameter, graphs)


def share_cores(num_ranks: int) -> None:
    """Use this rank's part of the cores: threads of two ranks on one core wait for each other."""
    torch.set_num_threads(max(1, available_cores() // num_ranks))


def _start_of(stage: Stage, source: CheckpointSource, launch: Launch, options: RankOptions) -> Start:
    mesh = options.mesh
    read = {
        leaf.name for recipe in stage.program.weights.recipes.values() for leaf in recipe.leaves() if isinstance(leaf, Initial)
    }
    return Start(
        mesh=(mesh.tp, mesh.ep, mesh.pp),
        device=options.device,
        folder=str(source.folder.resolve()),
        program=stage.text,
        digest=digest_of(stage.text),
        initial=save({name: source.initial[name].detach().clone().contiguous() for name in sorted(read)}),
        modules=foreign_modules(stage.program),
        rendezvous=launch.rendezvous,
        timeout=options.timeout,
        graph_size=options.graphs.max_batch_size,
    )


def foreign_modules(program: Program) -> list[str]:
    """Modules beside autodeploy's that have what a program calls. Raises ConfigError for what other processes cannot import."""
    functions = [PROVIDED[node.target][1].function for node in program.graph.graph.nodes if node.target in PROVIDED]
    modules = {function.__module__ for function in functions}
    modules |= {type(backend_named(choice.provider)).__module__ for choice in program.providers.get("attention", ())}
    modules |= {node.target.__module__ for node in program.graph.graph.nodes if node.target in PROVIDED}
    found = sorted(name for name in modules if name.partition(".")[0] not in ("autodeploy", "torch"))
    if "__main__" in found:
        raise ConfigError(
            "a provider or attention backend is defined in the script that runs, where other ranks cannot find it; "
            "put it into a module"
        )
    return [name for name in found if name in sys.modules]
