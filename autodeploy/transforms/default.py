"""The compiler, read top to bottom."""

from __future__ import annotations

from autodeploy.specs import Target
from autodeploy.transforms.absorb_latent import AbsorbLatent
from autodeploy.transforms.cleanup import Cleanup
from autodeploy.transforms.fuse_add_norm import FuseAddNorm
from autodeploy.transforms.fuse_linears import FuseLinears
from autodeploy.transforms.fuse_rope_append import FuseRopeAppend
from autodeploy.transforms.gather_logits import GatherLogits
from autodeploy.transforms.insert_paged_attention import InsertPagedAttention
from autodeploy.transforms.insert_states import InsertStates
from autodeploy.transforms.match_conv import MatchConv
from autodeploy.transforms.match_mlp import MatchMLP
from autodeploy.transforms.match_norm import MatchNorm
from autodeploy.transforms.match_rope import MatchRope
from autodeploy.transforms.pipeline import Pipeline
from autodeploy.transforms.prove_packing import ProvePacking
from autodeploy.transforms.quantize import QuantizeWeights
from autodeploy.transforms.quantize_cache import QuantizeCache
from autodeploy.transforms.select_kernels import SelectKernels
from autodeploy.transforms.shard import ShardModel
from autodeploy.transforms.transpose_experts import TransposeExperts


def default_pipeline(
    target: Target | None = None, quantize: QuantizeWeights | None = None, quantize_cache: QuantizeCache | None = None
) -> Pipeline:
    """All passes, in order. target: what to compile for; None is this machine. The others: how, where that is asked for."""
    return Pipeline(
        (
            # exported -> canonical: what the model says, in semantic ops
            Cleanup(),
            MatchConv(),
            ProvePacking(),
            MatchNorm(),
            MatchRope(),
            MatchMLP(),
            # canonical: fewer bits; shared layers; smaller caches; fewer, larger ops
            *([] if quantize is None else [quantize]),
            TransposeExperts(),
            *([] if target is None or target.mesh.tp == 1 else [ShardModel()]),
            AbsorbLatent(),
            FuseLinears(),
            FuseAddNorm(),
            # canonical -> lowered: caches, the rows that are sampled, kernels
            InsertPagedAttention(),
            *([] if quantize_cache is None else [quantize_cache]),
            InsertStates(),
            GatherLogits(),
            FuseRopeAppend(),
            SelectKernels(),
        )
    )
