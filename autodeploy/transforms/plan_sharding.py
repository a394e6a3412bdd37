"""plan_sharding: which rank has what of each parameter, found in the graph of a model and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.errors import ConfigError, did_you_mean
from autodeploy.program import Program
from autodeploy.recipes import Ranges
from autodeploy.specs import Mesh
from autodeploy.transforms.layouts import WHOLE, Demand, Layout, Site, Unshardable, extent, plain, without_whole
from autodeploy.transforms.ranges import Unaligned, clipped, even, followed_by, is_partition, once, shifted
from autodeploy.transforms.rewrite import arguments, aten, is_named, val
from autodeploy.transforms.shard_layers import Experts, Headed
from autodeploy.transforms.shard_plan import ShardPlan
from autodeploy.transforms.shard_rules import Linear, Pointwise, RMSNorm, is_core, rule_of
from autodeploy.transforms.spine import ends_a_layer, head_of, inputs_of, is_parameter, reads_ids, spine_of

Owners = frozenset[fx.Node]
"""Cores and closing linears on whose account a value is shared."""
NOBODY: Owners = frozenset()


def plan_sharding(program: Program, mesh: Mesh, rules: Mapping[str, str] = MappingProxyType({})) -> ShardPlan:
    """Share every layer among `mesh.tp` ranks.

    Heads belong to attention and recurrent calls ("cores"); a linear that what they give flows into, or that ends an MLP, has its
    columns dealt out (its results are terms of a sum), and from there it is followed back which rows of which linears make
    exactly those columns. Then all is derived once more from the parameters on; what does not fit is shared by nobody, and
    named in the plan.

    rules: pattern of parameter names (* stands for anything) -> the kind of share that it must get (`Share.kind`); with
    "replicate", nothing is shared that the parameter would have to be shared for. Raises ConfigError for one that cannot be met.
    """
    refused, unwanted = dict[fx.Node, str](), frozenset[fx.Node]()
    while True:
        planner = Planner(program, mesh, frozenset(refused) | unwanted)
        try:
            plan = planner.plan({node.name: reason for node, reason in refused.items()})
        except _Conflict as conflict:
            assert conflict.owners - planner.refused, f"{conflict.node}: {conflict.reason}"
            refused |= dict.fromkeys(conflict.owners - planner.refused, f"at {conflict.node}: {conflict.reason}")
            continue
        told = [name for name, kind in _told(plan, rules) if kind == "replicate"]
        more = [planner.owners[name] for name in told if plan.parameters[name].layout.dims]
        if not more:
            _refuse_other_kinds(plan, rules)
            return plan
        unwanted = unwanted.union(*more)


def _told(plan: ShardPlan, rules: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(parameter, the kind of the first rule for it), where there is one. Raises ConfigError for a rule that is for none."""
    for pattern in rules:
        if not any(is_named(name, pattern) for name in plan.parameters):
            near = did_you_mean(pattern, list(plan.parameters))
            raise ConfigError(f"shard_plan: no parameter is called '{pattern}'.{near} `autodeploy plan` shows their names.")
    for name in plan.parameters:
        if (kind := next((kind for pattern, kind in rules.items() if is_named(name, pattern)), None)) is not None:
            yield name, kind


def _refuse_other_kinds(plan: ShardPlan, rules: Mapping[str, str]) -> None:
    for name, kind in _told(plan, rules):
        share = plan.parameters[name]
        if share.kind != kind:
            raise ConfigError(
                f"shard_plan says {kind} of '{name}', but the graph says {share.kind} ({share.layout}); "
                "leave it out, or say replicate"
            )


class _Conflict(Exception):
    def __init__(self, node: fx.Node, reason: str, owners: Owners) -> None:
        super().__init__(reason)
        self.node, self.reason, self.owners = node, reason, owners


@dataclass
class Planner:
    program: Program
    mesh: Mesh
    refused: frozenset[fx.Node]
    parameters: dict[str, Layout] = field(default_factory=dict)
    owners: dict[Any, Owners] = field(default_factory=dict)
    """Node, or name of a parameter -> on whose account it is shared."""
    demands: dict[fx.Node, list[Demand]] = field(default_factory=dict)
    wanted: dict[fx.Node, Layout] = field(default_factory=dict)

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.program.graph.graph.nodes)

    def plan(self, refused: Mapping[str, str]) -> ShardPlan:
        self._share_experts()
        for linear, columns, owners in self._closing_linears():
            self._close(linear, columns, owners)
        self._follow_back()
        self._share_vocabulary()
        return Derivation(self).run(refused)

    # What is dealt out

    def _share_vocabulary(self) -> None:
        """Rows of the embedding table, and of the linear that makes the logits."""
        head = head_of(self.program)
        tables = [node for node in self.nodes if node.target is aten.embedding.default and reads_ids(node)]
        for node in [*([] if head is None else [head]), *tables]:
            given = arguments(node)
            weight, bias = given["weight"], given.get("bias")
            if node in self.refused or not is_parameter(weight) or (str(weight.target) in self.parameters and node is not head):
                continue
            rows = even(val(weight).shape[0], self.mesh.tp)
            self._assign(weight, Layout({0: rows}), frozenset({node}))
            if bias is not None:
                self._assign(bias, Layout({0: rows}), frozenset({node}))

    def _share_experts(self) -> None:
        rule = Experts()
        for node in self.nodes:
            if node.target is not ops.moe.overload or node in self.refused:
                continue
            site = self.site(node, {})
            experts, columns = rule.parts(site, self.mesh.ep, self._unit(site.args["down"]))
            for argument, layout in rule.layouts(site, experts, columns).items():
                if isinstance(source := site.args[argument], fx.Node):
                    for dim, ranges in layout.dims.items():
                        self._ask(Demand.all_of(source, dim, ranges), frozenset({node}))

    def _assign(self, parameter: fx.Node, layout: Layout, owners: Owners) -> None:
        name = str(parameter.target)
        if parameter.op != "get_attr":
            raise _Conflict(parameter, "it is computed, so no part of it can be read", owners)
        known = self.parameters.setdefault(name, layout)
        self.owners[name] = self.owners.get(name, NOBODY) | owners
        if known.dims != layout.dims:
            raise _Conflict(parameter, f"ranks would have {known} of it here and {layout} there", self.owners[name])

    def _unit(self, weight: fx.Node) -> int:
        """Columns of a weight that are only to be had together."""
        form = self.program.weights.format_of(str(weight.target)) if is_parameter(weight) else None
        return 1 if form is None else max(form.block[1], 1)

    # Linears whose columns are dealt out

    def _closing_linears(self) -> Iterator[tuple[fx.Node, Ranges, Owners]]:
        """(linear, its columns, on whose account): those that heads flow into, then those that end an MLP."""
        flowing = dict[fx.Node, tuple[Mapping[int, Ranges], Owners]]()
        reached = dict[fx.Node, None]()
        for node in self.nodes:
            if node.op != "call_function" or node in self.refused:
                continue
            rule = rule_of(node.target)
            if is_core(node.target):
                assert isinstance(rule, Headed)
                flowing[node] = rule.seed(self.site(node, {})).dims, frozenset({node})
                self.wanted[node] = Layout(flowing[node][0])
                for demand in rule.backward(self.site(node, {}), flowing[node][0]):
                    self._ask(demand, frozenset({node}))
            elif sources := [source for source in node.all_input_nodes if source in flowing]:
                owners = NOBODY.union(*(flowing[source][1] for source in sources))
                if isinstance(rule, Linear):
                    source = rule.parts(arguments(node))[0]
                    if source in flowing and (last := val(source).dim() - 1) in flowing[source][0]:
                        reached[node] = None
                        yield node, flowing[source][0][last], owners
                elif (dims := self._carried(node, flowing)) is not None:
                    flowing[node] = dims, owners
        spine = spine_of(self.program)
        for node in self.nodes:
            if (
                isinstance(rule_of(node.target), Linear)
                and node not in reached
                and node not in self.refused
                and ends_a_layer(node, spine)
            ):
                columns, weight = inputs_of(node)
                yield node, even(columns, self.mesh.tp, self._unit(weight)), frozenset({node})

    def _carried(self, node: fx.Node, flowing: Mapping[fx.Node, Any]) -> Mapping[int, Ranges] | None:
        """What ranks have of a call's result, if whatever else it reads is shared accordingly; None when that is not known."""
        rule, layouts = rule_of(node.target), {source: Layout(dims) for source, (dims, _) in flowing.items()}
        site = self.site(node, layouts)
        try:
            if isinstance(rule, Pointwise):
                rank = site.out.dim()
                return {
                    dim + rank - len(site.shape(source)): ranges
                    for source in site.tensors
                    for dim, ranges in site.layout(source).dims.items()
                }
            if isinstance(rule, RMSNorm):
                return site.layout(site.args["x"]).dims
            found = rule.forward(site)
        except (Unshardable, Unaligned):
            return None
        return found.dims if isinstance(found, Layout) else None

    def _close(self, linear: fx.Node, columns: Ranges, owners: Owners) -> None:
        rule = rule_of(linear.target)
        assert isinstance(rule, Linear)
        x, weight, bias = rule.parts(arguments(linear))
        self.close(rule, weight, bias, columns, owners)
        self._ask(Demand.all_of(x, val(x).dim() - 1, columns), owners)

    def close(self, rule: Linear, weight: fx.Node, bias: fx.Node | None, columns: Ranges, owners: Owners) -> None:
        """Deal out what a linear reads: these columns of its weight, and its bias to the first rank."""
        self._assign(weight, Layout({rule.inputs: columns}), owners)
        if bias is not None:
            self._assign(bias, Layout({0: once(val(bias).shape[0], self.mesh.tp)}), owners)

    # Back from there

    def _ask(self, demand: Demand, owners: Owners) -> None:
        self.demands.setdefault(demand.node, []).append(demand)
        self.owners[demand.node] = self.owners.get(demand.node, NOBODY) | owners

    def _follow_back(self) -> None:
        for node in reversed(self.nodes):
            if node not in self.demands:
                continue
            owners = self.owners[node]
            try:
                dims = self._asked(node)
                if not dims:
                    continue
                if node in self.wanted:
                    if dims != self.wanted[node].dims:
                        raise Unaligned("ranks would have parts of heads")
                    continue
                if node.op == "get_attr":
                    self._assign(node, Layout(dims), owners)
                    continue
                if node.op != "call_function":
                    raise Unshardable("every rank has all of it")
                self.wanted[node] = Layout(dims)
                for demand in list(rule_of(node.target).backward(self.site(node, {}), dims)):
                    self._ask(demand, owners)
            except (Unshardable, Unaligned) as error:
                raise _Conflict(node, str(error), owners) from error

    def _asked(self, node: fx.Node) -> dict[int, Ranges]:
        """What is asked of a value by all its readers, together."""
        dims = dict[int, Ranges]()
        for dim in {demand.dim for demand in self.demands[node]}:
            pieces = {(demand.start, demand.stop): demand.ranges for demand in self.demands[node] if demand.dim == dim}
            if any(pieces[d.start, d.stop] != d.ranges for d in self.demands[node] if d.dim == dim):
                raise Unaligned("its readers need different parts of it")
            size = extent(val(node).shape[dim])
            whole = pieces.pop((0, size), None)
            joined, offset = None, 0
            for (start, stop), ranges in [*sorted(pieces.items()), ((size, size), None)] if pieces else []:
                if start < offset:
                    raise Unaligned(f"more than one says how ranks share dim {dim} from {start} on")
                if start > offset:  # nobody asks for part of that
                    gap: Ranges = (((offset, start),),) * self.mesh.tp
                    joined = gap if joined is None else followed_by(joined, gap)
                if ranges is not None:
                    joined = shifted(ranges, start) if joined is None else followed_by(joined, shifted(ranges, start))
                offset = stop
            if whole is not None and any(clipped(whole, *bounds)[0] != ranges for bounds, ranges in pieces.items()):
                raise Unaligned("its readers need different parts of it")
            dims[dim] = whole or joined  # pyright: ignore[reportArgumentType]
        return without_whole(dims, val(node).shape)

    def site(self, node: fx.Node, layouts: Mapping[fx.Node, Any]) -> Site:
        return Site(node.target, arguments(node), val(node), layouts, val, self.mesh.tp, self.wanted.get(node))


@dataclass
class Derivation:
    """From the parameters on: what ranks have of every value, and where they must add up or gather."""

    planner: Planner
    layouts: dict[fx.Node, Any] = field(default_factory=dict)
    owners: dict[fx.Node, Owners] = field(default_factory=dict)
    reduced: dict[str, list[str]] = field(default_factory=dict)
    """Node whose terms are added up -> those that read the sum."""
    gathered: dict[str, int] = field(default_factory=dict)
    """Node that is gathered -> its dim."""

    def run(self, refused: Mapping[str, str]) -> ShardPlan:
        planner = self.planner
        for node in planner.nodes:
            if node.op == "get_attr":
                self.layouts[node] = planner.parameters.get(str(node.target), WHOLE)
                self.owners[node] = planner.owners.get(str(node.target), NOBODY)
            elif node.op == "output":
                self._put_out(node)
            elif node.op == "call_function":
                self._derive(node)
        layouts = {node.name: layout for node, layout in self.layouts.items() if node.op == "call_function" and layout != WHOLE}
        return ShardPlan.of(planner.program, planner.mesh, planner.parameters, layouts, self.reduced, self.gathered, refused)

    def _derive(self, node: fx.Node) -> None:
        held = {source: self.layouts[source] for source in node.all_input_nodes if self.layouts.get(source, WHOLE) != WHOLE}
        if not held and node not in self.planner.wanted:
            return
        self.owners[node] = NOBODY.union(*(self.owners.get(source, NOBODY) for source in held))
        rule, layouts = rule_of(node.target), dict(held)
        if isinstance(rule, Experts):
            index: Any = arguments(node)["expert_index"]
            down: Any = arguments(node)["down"]
            if (experts := held.get(down, WHOLE).dims.get(0)) is not None:
                layouts[index] = Layout(counted=experts)  # as it will be
        if isinstance(rule, Linear):
            self._deal_out_inputs(node, rule, layouts)
        while True:
            try:
                self.layouts[node] = plain(rule.forward(self.planner.site(node, layouts)), val(node))
                return
            except Unaligned as error:
                raise self._conflict(node, error) from error
            except Unshardable as error:
                layout = layouts.get(error.argument)
                if not isinstance(layout, Layout) or not layout.is_term:
                    raise self._conflict(node, error) from error
                layouts[error.argument] = WHOLE
                self.reduced.setdefault(error.argument.name, []).append(node.name)

    def _deal_out_inputs(self, node: fx.Node, rule: Linear, layouts: dict[fx.Node, Any]) -> None:
        """A linear of what ranks share, inside of a layer: its weight, which nobody has spoken for, is dealt out likewise."""
        x, weight, bias = rule.parts(arguments(node))
        last = val(x).dim() - 1
        columns = layouts.get(x, WHOLE).dims.get(last)
        if columns is None or weight in layouts or not is_parameter(weight) or not is_partition(columns, val(x).shape[last]):
            return
        self.planner.close(rule, weight, bias, columns, self.owners[node])
        for parameter in (weight, bias):
            if parameter is not None:
                self.layouts[parameter] = layouts[parameter] = self.planner.parameters[str(parameter.target)]

    def _put_out(self, node: fx.Node) -> None:
        """The result is needed whole on every rank."""
        for source in node.all_input_nodes:
            layout = self.layouts.get(source, WHOLE)
            if layout.is_term:
                self.reduced.setdefault(source.name, []).append(node.name)
            if len(layout.dims) == 1:
                self.gathered[source.name] = next(iter(layout.dims))
            elif layout.dims:
                raise self._conflict(node, Unshardable("ranks share several dims of the result"))

    def _conflict(self, node: fx.Node, error: Exception) -> _Conflict:
        owners = self.owners.get(node, NOBODY) | self.planner.owners.get(node, NOBODY)
        return _Conflict(node, str(error), owners)
