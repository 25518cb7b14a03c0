"""The forward walk over a graph: which units stand on which axes of every tensor, and where they are read.

Each node's axis signature says where the channels of its inputs go. Labels travel along: an array of units per axis, or per
pair of axes where an axis was split (heads). What a signature does not speak of freezes the units it meets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from mscompile.network.samples import Following
from mscompile.network.units import Axes, Block, Classes
from mscompile.operators import IntArray, Move, NodeView, Port, Regroup, Shape, Signature, signature
from mscompile.operators.backward import FLOATS


@dataclass(frozen=True)
class Refusal:
    """Why something is left alone: the node, its operator, and the reason as a clause after the node's name."""

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator} {self.node!r} {self.reason}" if self.operator else f"{self.node!r} {self.reason}"


@dataclass(frozen=True)
class Slot:
    """A parameter axis that carries units: axis `axis` of operand `operand` of a node; `units[i]` is index i's unit.

    Units [blocks, n] belong to a parameter whose axis 0 falls into as many blocks, each with n units of its own on `axis`.
    """

    node: ir.Node
    operand: int
    axis: int
    units: IntArray


@dataclass(frozen=True)
class Creator:
    """A node at whose output units begin: its weight (and bias) slots and the output axis they label."""

    node: ir.Node
    slots: tuple[Slot, ...]
    axis: int
    units: IntArray


@dataclass(frozen=True)
class Read:
    """A contraction with a weight met on the walk: the units, one by one, along the data's and the weight's axis."""

    node: ir.Node
    signature: Signature
    data_axis: int
    weight_axis: int
    units: IntArray
    plain: bool
    """Whether the units stand on that one axis alone, all of them different tensors' channels."""


@dataclass(frozen=True)
class Meeting:
    """A contraction of two computed tensors, as of queries and keys: units by operand, in step, and the axes they are on."""

    node: ir.Node
    signature: Signature
    units: tuple[IntArray, IntArray]
    contracted: tuple[int, int]
    row: int
    """Units in a row: those of one head."""


@dataclass
class Contribution:
    """What one operand says of an output: units by output axes, and the places they take on the last of these."""

    operand: int
    axes: Axes
    units: IntArray
    at: IntArray | None


def label(node: ir.Node) -> str:
    """A node's name, or that of its first output where it has none."""
    return node.name or next((v.name for v in node.outputs if v.name), "") or "?"


def captured(node: ir.Node) -> Iterator[ir.Value]:
    """Values that the subgraphs of a node take in, from wherever they come; most nodes have none."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs: Sequence[ir.Graph] = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = attribute.as_graphs()
        else:
            continue
        for graph in graphs:
            yield from graph.outputs
            for inner in ir.traversal.RecursiveGraphIterator(graph):
                yield from (v for v in inner.inputs if v is not None)


@dataclass
class Walk:
    """State of the walk.

    Where an axis is split into rows, as into heads, each row gets a number of its own, a *head*, which travels like a unit
    along the axis of the rows, also where the units of the row are gone (attention scores). A head may go where all that it
    holds may.
    """

    shapes: Mapping[str, Shape]
    opset: int
    sets: Classes = field(default_factory=Classes)
    labels: dict[ir.Value, dict[Axes, IntArray]] = field(default_factory=dict)
    heads: dict[ir.Value, dict[Axes, IntArray]] = field(default_factory=dict)
    frozen: dict[int, Refusal] = field(default_factory=dict)
    creators: list[Creator] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    meetings: list[Meeting] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    rows: list[tuple[IntArray, Refusal]] = field(default_factory=list)
    """[rows, units in a row] each: rows without heads that must stay, and why."""
    row_slots: list[Slot] = field(default_factory=list)
    """Parameter axes that run in step with rows: units [rows, units in a row]."""
    refused: dict[ir.Node, Refusal] = field(default_factory=dict)
    """Meetings whose units cannot go one by one, and why; those found in an earlier walk among them."""
    whole: Mapping[ir.Value, Refusal] = field(default_factory=dict)
    """Values whose axes are split into rows that stay or go as one, and why."""
    undivided: list[tuple[IntArray, Refusal]] = field(default_factory=list)
    """[rows] each: the units of such rows."""
    splits: list[tuple[ir.Value, IntArray]] = field(default_factory=list)
    """Values where an axis was split into rows, and the units [rows, units in a row] there."""
    joined: list[tuple[ir.Value, IntArray]] = field(default_factory=list)
    """Values whose units met heads, and these units."""
    apart: Set[ir.Value] = frozenset()
    """Values whose units are tied to all that the heads they meet hold."""
    divided: dict[ir.Value, Refusal] = field(default_factory=dict)
    """Values whose rows would have to be whole, since single units of theirs cannot go: another walk says what can."""
    signatures: dict[ir.Node, Signature | str] = field(default_factory=dict)
    samples: Following = field(init=False)

    def __post_init__(self) -> None:
        """Nothing is known of the samples yet."""
        self.samples = Following(self.shapes)

    def freeze(self, units: IntArray, refusal: Refusal) -> None:
        """Units that must stay; the first reason is kept."""
        for unit in units.ravel().tolist():
            self.frozen.setdefault(unit, refusal)

    def refuse_meeting(self, meeting: Meeting, refusal: Refusal) -> None:
        """What is contracted must stay; or go with all others of its rows, where that is what axes were split into alone."""
        self.refused[meeting.node] = refusal
        met = [{value: rows for value, rows in self.splits if np.isin(rows, units).any()} for units in meeting.units]
        read = any(np.isin(read.units, rows).any() for read in self.reads for found in met for rows in found.values())
        for units, found in zip(meeting.units, met, strict=True):
            if not read and found and np.isin(units, np.concatenate([rows.ravel() for rows in found.values()])).all():
                self.divided |= dict.fromkeys(found, refusal)
            else:
                self.freeze(units, refusal)

    def read_apart(self) -> set[ir.Value]:
        """Values whose units became those of heads though a weight reads them as well, and so cannot go with heads alone."""
        if not self.joined or not self.reads:
            return set()
        root = self.sets.roots()
        read = root[np.concatenate([found.units for found in self.reads])]
        return {value for value, units in self.joined if np.isin(root[units], read).any()}

    def freeze_value(self, value: ir.Value, refusal: Refusal) -> None:
        """All units and heads of a tensor must stay."""
        for units in (*self.labels.get(value, {}).values(), *self.heads.get(value, {}).values()):
            self.freeze(units, refusal)

    def visit(self, node: ir.Node) -> None:
        """Carry labels over one node."""
        view = NodeView(node, self.shapes, self.opset)
        found = signature(view)
        if isinstance(found, Signature) and _says_too_little(node, found):
            found = "has a further output that is used"
        self.signatures[node] = found
        self.samples.visit(view, found)
        for value in captured(node):
            self.freeze_value(value, Refusal(label(node), node.op_type, "uses them inside a subgraph"))
        if isinstance(found, str):
            for operand in view.live:
                self.freeze_value(node.inputs[operand], Refusal(label(node), node.op_type, found))  # type: ignore[arg-type]
            return
        step = _Step(self, view, found)
        for target, value in enumerate(node.outputs):
            step.label(~target, value)
        step.stop_heads()
        step.contract()
        step.create()
        step.constrain()


@dataclass
class _Step:
    """One node: its signature, indexed by port."""

    walk: Walk
    view: NodeView
    found: Signature
    links: dict[Port, tuple[Port, ...]] = field(default_factory=dict)
    moves: dict[Port, list[Move]] = field(default_factory=dict)
    picks: dict[Port, int] = field(default_factory=dict)
    regroups: dict[int, Regroup] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.links = {port: link for link in self.found.links for port in link}
        for move in self.found.moves:
            self.moves.setdefault(move.source, []).append(move)
        self.picks = {pick.source: pick.index for pick in self.found.picks}
        self.regroups = {axis: regroup for regroup in self.found.regroups for axis in regroup.source}

    @property
    def node(self) -> ir.Node:
        return self.view.node

    def refuse(self, units: IntArray, reason: str) -> None:
        self.walk.freeze(units, Refusal(label(self.node), self.node.op_type, reason))

    def keep_rows(self, arrays: Sequence[tuple[IntArray, int]], reason: str) -> None:
        """What lies at one index of an axis of an array must not go as a whole."""
        refusal = Refusal(label(self.node), self.node.op_type, reason)
        self.walk.rows += [(np.moveaxis(u, place, 0).reshape(u.shape[place], -1), refusal) for u, place in arrays]

    def labels(self, operand: int) -> dict[Axes, IntArray]:
        value = self.view.value(operand)
        return {} if value is None else self.walk.labels.get(value, {})

    def heads(self, operand: int) -> dict[Axes, IntArray]:
        value = self.view.value(operand)
        return {} if value is None else self.walk.heads.get(value, {})

    # -- from inputs to an output --

    def label(self, target: int, value: ir.Value) -> None:
        """Label an output by what its operands say of it."""
        said, of_heads = self._said(target, self.labels), self._said(target, self.heads)
        join = [c for c in said if self._joins_heads(c, said, of_heads)]
        self.walk.joined += [(self.node.inputs[c.operand], c.units) for c in join]  # type: ignore[misc]
        labels = self._together(target, [c for c in said if c not in join])
        heads = self._together(target, [*of_heads, *join])
        for pair in [axes for axes in labels if len(axes) == 2 and self.found.regroups]:
            if pair[:1] not in heads:
                heads[pair[:1]] = self.walk.sets.fresh(len(labels[pair]))
            if value in self.walk.whole:
                labels[pair[:1]] = self._as_one(labels.pop(pair), heads[pair[:1]])
                self.walk.undivided.append((labels[pair[:1]], self.walk.whole[value]))
        heads = {axes: units for axes, units in heads.items() if axes not in labels}
        for axes, units in labels.items():
            if len(axes) > 1:
                rows = units.reshape(-1, units.shape[-1])
                none = np.full(len(rows), -1, dtype=np.int64)
                self.walk.blocks.append(Block(rows, heads.get(axes[:1], none) if len(axes) == 2 else none))
                if len(axes) == 2 and self.found.regroups:
                    self.walk.splits.append((value, units))
        for found, everywhere in ((labels, self.walk.labels), (heads, self.walk.heads)):
            if found:
                everywhere[value] = found
                self._follow(target, found)

    def _as_one(self, rows: IntArray, heads: IntArray | None) -> IntArray:
        """Merge all units of each row, and its head with them."""
        units = self.walk.sets.unite_along(rows, 1)
        if heads is not None:
            self.walk.sets.unite(heads, units)
        return units

    def _joins_heads(self, one: Contribution, said: Sequence[Contribution], of_heads: Sequence[Contribution]) -> bool:
        """Whether units on one axis meet an operand that has heads there and no units: they are as much these heads'."""
        if self.node.inputs[one.operand] in self.walk.apart:
            return False
        alone = {c.operand for c in said if c.axes == one.axes}
        return len(one.axes) == 1 and one.at is None and any(c.axes == one.axes and c.operand not in alone for c in of_heads)

    def stop_heads(self) -> None:
        """Heads that are summed over stay, but where the sum is over their units as well."""
        for operand in self.view.live:
            for (axis,), heads in self.heads(operand).items():
                link = self.links.get((operand, axis), ())
                if link and not any(o < 0 for o, _ in link) and not any(axis in axes for axes in self.labels(operand)):
                    self.refuse(heads, "sums over heads")

    def _said(self, target: int, labels: Callable[[int], dict[Axes, IntArray]]) -> list[Contribution]:
        """What the operands say of an output."""
        said: list[Contribution] = []
        for operand in self.view.live:
            for axes, units in labels(operand).items():
                carried = self._carry(operand, axes, units, target)
                if carried is not None:
                    said.append(carried)
        return said

    def _together(self, target: int, said: list[Contribution]) -> dict[Axes, IntArray]:
        """What is said of the same axes put together."""
        found: dict[Axes, IntArray] = {}
        while said:
            group = [said.pop(0)]
            while more := [c for c in said if any({*c.axes} & {*g.axes} for g in group)]:
                group += more
                said = [c for c in said if c not in more]
            joined = self._assemble(target, group) if group[0].at is not None else self._join(target, group)
            if joined is not None and joined[1].size:
                found[joined[0]] = joined[1]
        return found

    def _carry(self, operand: int, axes: Axes, units: IntArray, target: int) -> Contribution | None:
        """Take a label from an input to an output; units that are mixed are frozen, or merged where their rows pass."""
        sets, at = self.walk.sets, None
        found: list[int | None] = []
        axes, units, blocks = self._regroup(operand, axes, units, target)
        for place, axis in enumerate(axes):
            port = (operand, axis)
            if place in blocks:
                found.append(blocks[place])
            elif port in self.links:
                link = self.links[port]
                outs = [a for o, a in link if o == target]
                if not outs:
                    return None  # contracted, or not in this output
                found.append(outs[0])
            elif port in self.moves:
                moves = [m for m in self.moves[port] if m.target[0] == target]
                if not moves:
                    return None
                if len(axes) > 1 and place == len(axes) - 1:
                    sets.onto(units, place)  # so that every row keeps the same ones
                (move, *others) = moves
                if others or (move.at is not None and place < len(axes) - 1):
                    self.refuse(units, "copies them in more ways than one")
                    return None
                units, at = self._moved(units, place, move), move.at
                found.append(move.target[1])
            elif port in self.picks:
                if place == len(axes) - 1:
                    self.refuse(units, "takes one of them")
                    return None
                units = np.take(units, [self.picks[port]], axis=place)
                found.append(None)
            elif port in self.found.unseen:
                return None
            else:
                found.append(None)
                if len(axes) == 2 and place == 1 and not blocks:
                    whole = self._as_one(units, self.heads(operand).get(axes[:1]))
                    self.walk.undivided.append((whole, Refusal(label(self.node), self.node.op_type, self.found.mixes)))
                    units = whole[:, None]
                elif len(axes) > 1:
                    units = np.expand_dims(sets.unite_along(units, place), place)
        gone = tuple(place for place, axis in enumerate(found) if axis is None)
        if len(gone) == len(found):
            self.refuse(units, self.found.mixes)
            return None
        kept = tuple(axis for axis in found if axis is not None)
        return Contribution(operand, kept, units.squeeze(gone) if gone else units, at)

    def _moved(self, units: IntArray, place: int, move: Move) -> IntArray:
        first, *others = np.atleast_2d(move.index)
        moved: IntArray = np.take(units, first, axis=place)
        for other in others:
            self.walk.sets.unite(moved, np.take(units, other, axis=place))
        return moved

    def _regroup(self, operand: int, axes: Axes, units: IntArray, target: int) -> tuple[Axes, IntArray, dict[int, int]]:
        """Split or merge the axes of a label; gives its new axes, and the output axis of each place that was regrouped."""
        if operand != 0 or target != ~0:
            return axes, units, {}
        blocks: dict[int, int] = {}
        for regroup in dict.fromkeys(self.regroups[a] for a in axes if a in self.regroups):
            inside = [a for a in axes if a in regroup.source and axes.index(a) not in blocks]
            order = [a for a in regroup.source if a in inside]
            if len(order) > 1 and order != inside:
                # Elements come in another order than rows: which ones stay must not differ from row to row.
                self.walk.sets.onto(units, axes.index(inside[-1]))
            first = min(axes.index(a) for a in inside)
            rest = [a for a in axes if a not in inside]
            before = [a for a in rest if axes.index(a) < first]
            turned = np.transpose(units, [axes.index(a) for a in (*before, *order, *(a for a in rest if a not in before))])
            shape = [
                *turned.shape[: len(before)],
                *(s if a in order else 1 for a, s in zip(regroup.source, regroup.source_sizes, strict=True)),
            ]
            behind = turned.shape[len(before) + len(order) :]
            full = np.broadcast_to(
                turned.reshape(*shape, *behind), (*turned.shape[: len(before)], *regroup.source_sizes, *behind)
            ).reshape(*turned.shape[: len(before)], *regroup.target_sizes, *behind)
            varying = [
                k
                for k, size in enumerate(regroup.target_sizes)
                if size > 1 and (full != np.take(full, [0], axis=len(before) + k)).any()
            ] or [max(range(len(regroup.target_sizes)), key=lambda k: regroup.target_sizes[k])]
            for k in reversed(range(len(regroup.target_sizes))):
                if k not in varying:
                    full = np.take(full, 0, axis=len(before) + k)
            shift = len(varying) - len(order)
            blocks = {place + (shift if place >= first else 0): axis for place, axis in blocks.items()}
            blocks |= {len(before) + i: regroup.target[k] for i, k in enumerate(varying)}
            # Places of the block are spoken of by `blocks`; any number will do for their input axes.
            axes = (*before, *(-1 - i for i in range(len(varying))), *(a for a in rest if a not in before))
            units = full
        return axes, units, blocks

    def _join(self, target: int, group: Sequence[Contribution]) -> tuple[Axes, IntArray] | None:
        """Merge, unit by unit, what several operands say of the same axes; all that vary along these must say something."""
        axes = max((c.axes for c in group), key=len)
        everything = [c.units for c in group]
        fits = all([a for a in axes if a in c.axes] == [*c.axes] for c in group)
        sized = {a: {c.units.shape[c.axes.index(a)] for c in group if a in c.axes} for a in axes}
        for axis in axes:
            live = {o for o, _ in self.links.get((target, axis), ()) if o in self.view.live}
            if live <= {c.operand for c in group if axis in c.axes}:
                continue
            reason = "joins them with a computed tensor that has no units there"
            if axis == axes[-1]:
                for units in everything:
                    self.refuse(units, reason)
                return None
            # Heads say whether rows go, and so do units that joined these.
            if not all({(a,)} & {*self.heads(o), *self.labels(o)} for o, a in self.links[target, axis] if o in live):
                self.keep_rows([(c.units, c.axes.index(axis)) for c in group if axis in c.axes], reason)
        if not fits or any(len(sizes) > 1 for sizes in sized.values()):
            for units in everything:
                self.refuse(units, "joins tensors whose units do not correspond")
            return None
        shape = [next(iter(sized[a])) for a in axes]
        spread = [
            np.broadcast_to(c.units.reshape([n if a in c.axes else 1 for a, n in zip(axes, shape, strict=True)]), shape)
            for c in group
        ]
        for other in spread[1:]:
            self.walk.sets.unite(spread[0], other)
        return axes, np.ascontiguousarray(spread[0])

    def _assemble(self, target: int, group: Sequence[Contribution]) -> tuple[Axes, IntArray] | None:
        """Put the parts of a concatenation side by side; what has no units gets some that stay."""
        axes = group[0].axes
        shape = self.view.shape(target)
        size = None if shape is None else shape[axes[-1]]
        alike = all(c.axes == axes and c.at is not None and c.units.shape[:-1] == group[0].units.shape[:-1] for c in group)
        covered = np.concatenate([c.at for c in group if c.at is not None])
        if not alike or not isinstance(size, int) or (len(axes) > 1 and len(covered) < size):
            for c in group:
                self.refuse(c.units, "joins them with a computed tensor that has no units there")
            return None
        units = np.empty((*group[0].units.shape[:-1], size), dtype=np.int64)
        for c in group:
            units[..., c.at] = c.units
        away = np.setdiff1d(np.arange(size), covered)
        units[..., away] = strangers = self.walk.sets.fresh(len(away))
        self.refuse(strangers, "joins them with others that cannot be cut")
        return axes, units

    # -- parameters --

    def _follow(self, target: int, labels: Mapping[Axes, IntArray]) -> None:
        """Parameters that run in step with labelled axes are cut with them."""
        for axes, units in labels.items():
            for place, axis in enumerate(axes):
                fixed = [(o, a) for o, a in self.links.get((target, axis), ()) if o >= 0 and o not in self.view.live]
                if fixed and place == len(axes) - 1:
                    along = self.walk.sets.onto(units, place)
                    self.walk.slots += [Slot(self.node, o, a, along) for o, a in fixed]
                elif fixed:
                    rows = np.moveaxis(units, place, 0).reshape(units.shape[place], -1)
                    self.walk.row_slots += [Slot(self.node, o, a, rows) for o, a in fixed]

    def create(self) -> None:
        """Units that begin here: rows of a weight."""
        for link in self.found.links:
            fixed = [(o, a) for o, a in link if o >= 0 and o not in self.view.live]
            outs = [(o, a) for o, a in link if o < 0]
            shape = self.view.shape(fixed[0][0]) if fixed else None
            size = None if shape is None else shape[fixed[0][1]]
            if not outs or len(fixed) + len(outs) < len(link) or not isinstance(size, int) or size == 0:
                continue
            if any(move.target in outs for move in self.found.moves):
                continue  # channels that move in run in step, as with several filters per channel
            units = self.walk.sets.fresh(size)
            slots = tuple(Slot(self.node, o, a, units) for o, a in fixed)
            self.walk.slots += slots
            for out, axis in outs:
                self.walk.labels.setdefault(self.node.outputs[~out], {})[(axis,)] = units
                self.walk.creators.append(Creator(self.node, slots, axis, units))

    # -- contractions --

    def contract(self) -> None:
        """Axes that are summed over."""
        for link in self.found.links:
            live = [(o, a) for o, a in link if o in self.view.live]
            fixed = [(o, a) for o, a in link if o >= 0 and o not in self.view.live]
            if any(o < 0 for o, _ in link):
                continue
            said = [(o, a, axes, units) for o, a in live for axes, units in self.labels(o).items() if a in axes]
            if said and not self._read(live, fixed, said) and not self._meet(live, fixed, said):
                linear = self.found.linear
                reason = "contracts two computed tensors" if len(live) > 1 else "contracts in a way that nothing folds into"
                weight = None if linear is None else self.node.inputs[linear.weight]
                if len(fixed) == 1 and weight is not None and weight.const_value is not None:
                    if weight.const_value.dtype not in FLOATS:
                        reason = f"has a weight of type {weight.const_value.dtype.name}"
                    elif self.node.inputs.count(self.node.inputs[live[0][0]]) > 1:
                        reason = "reads them twice"
                refusal = self.walk.refused.get(self.node, Refusal(label(self.node), self.node.op_type, reason))
                for *_, units in said:
                    self.walk.freeze(units, refusal)

    def _read(self, live: list[Port], fixed: list[Port], said: list[tuple[int, int, Axes, IntArray]]) -> bool:
        linear = self.found.linear
        if linear is None or len(live) != 1 or len(fixed) != 1 or (live[0][0], fixed[0][0]) != (linear.data, linear.weight):
            return False
        weight = self.node.inputs[linear.weight]
        assert weight is not None
        assert weight.const_value is not None
        if weight.const_value.dtype not in FLOATS or self.node.inputs.count(self.node.inputs[linear.data]) > 1:
            return False
        ((_, axis, axes, units),) = said
        along = self.walk.sets.onto(units, axes.index(axis))
        self.walk.reads.append(Read(self.node, self.found, axis, fixed[0][1], along, len(axes) == 1))
        blocked = along if linear.groups == 1 else along.reshape(linear.groups, -1)
        self.walk.slots.append(Slot(self.node, *fixed[0], blocked))
        return True

    def _meet(self, live: list[Port], fixed: list[Port], said: list[tuple[int, int, Axes, IntArray]]) -> bool:
        """Two computed tensors contracted with each other, units in step on the other axes as well."""
        if fixed or len(live) != 2 or len(said) != 2 or self.node.inputs[live[0][0]] is self.node.inputs[live[1][0]]:
            return False
        aligned = [self._aligned(operand, axis, axes, units) for operand, axis, axes, units in said]
        met = [found for found in aligned if found is not None]
        if len(met) < len(aligned):
            return False
        longest = max((key for key, _ in met), key=len)
        if any([a for a in longest if a in key] != [*key] for key, _ in met):
            return False
        sizes: dict[int, int] = {}
        for key, units in met:
            if any(sizes.setdefault(a, n) != n for a, n in zip(key, units.shape, strict=True)):
                return False
        shape = [sizes[a] for a in longest]
        one, other = (
            np.broadcast_to(units.reshape([sizes[a] if a in key else 1 for a in longest]), shape).ravel()
            for key, units in met
        )
        self.walk.sets.unite(one, other)
        if not all((a,) in self.heads(o) for o, _, axes, _ in said for a in axes[:-1]):
            self.keep_rows([(one.reshape(-1, shape[-1]), 0)], "contracts two computed tensors")
        heads = next((count for port, count in self.found.even if port == live[0]), 1)
        contracted = said[0][1], said[1][1]
        self.walk.meetings.append(Meeting(self.node, self.found, (one, other), contracted, shape[-1] // heads))
        return True

    def _aligned(self, operand: int, axis: int, axes: Axes, units: IntArray) -> tuple[tuple[int, ...], IntArray] | None:
        """Units of a contracted operand, along the output axes that its others are on and the contracted one, called −1."""
        if axes[-1] != axis:
            return None
        key: list[int] = []
        for place, other in enumerate(axes[:-1]):
            move = next((m for m in self.moves.get((operand, other), ()) if m.target[0] == ~0 and m.at is None), None)
            out = next((a for o, a in self.links.get((operand, other), ()) if o < 0), None)
            if move is not None and move.index.ndim == 1:
                units, out = np.take(units, move.index, axis=place), move.target[1]
            if out is None:
                return None
            key.append(out)
        for port, blocks, times in self.found.repeated:
            if port == (operand, axis):
                apart = units.reshape(*units.shape[:-1], blocks, -1)
                units = np.repeat(apart, times, axis=-2).reshape(*units.shape[:-1], -1)
        return (*key, -1), units

    def constrain(self) -> None:
        """Blocks of channels that stay equally large, or live and die as one."""
        rows: list[IntArray] = []
        for ports, tied in ((self.found.even, False), (self.found.ties, True)):
            for (operand, axis), count in ports:
                for axes, units in self.labels(operand).items():
                    if axis not in axes:
                        continue
                    along = self.walk.sets.onto(units, axes.index(axis))
                    if len(along) % count:
                        self.refuse(along, "has blocks that its channels do not fill")
                    elif tied:
                        self.walk.sets.unite_along(along.reshape(count, -1), 1)
                    else:
                        rows.append(along.reshape(count, -1))
                        self.keep_rows([(rows[-1], 0)], "needs a channel in each of its blocks")
        multiple = self.found.together
        if multiple is None:
            self.walk.blocks += [Block(row, np.full(len(row), -1, dtype=np.int64)) for row in rows]
        elif len(rows) < len(self.found.even) or any(row.shape[1] != rows[0].shape[1] for row in rows):
            for units in rows:
                self.refuse(units, "needs blocks that are all equally large, some of which cannot be cut")
        else:
            every = np.concatenate(rows)
            self.walk.blocks.append(Block(every, np.full(len(every), -1, dtype=np.int64), multiple))


def _says_too_little(node: ir.Node, found: Signature) -> bool:
    """Whether something uses an output behind the first that the signature does not speak of."""
    spoken_of = {operand for link in found.links for operand, _ in link} | {move.target[0] for move in found.moves}
    return any(
        ~i not in spoken_of and (value.uses() or value.is_graph_output()) for i, value in enumerate(node.outputs) if i > 0
    )
