"""The state of the walk over a graph, and one node of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from mscompile.network.findings import Creator, Meeting, Read, Refusal, Slot, label
from mscompile.network.samples import Following
from mscompile.network.units import Axes, Block, Classes
from mscompile.operators import IntArray, Move, NodeView, Port, Regroup, Shape, Signature


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


@dataclass
class Step:
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
        """The node."""
        return self.view.node

    def refuse(self, units: IntArray, reason: str) -> None:
        """Units that must stay because of the node."""
        self.walk.freeze(units, Refusal(label(self.node), self.node.op_type, reason))

    def keep_rows(self, arrays: Sequence[tuple[IntArray, int]], reason: str) -> None:
        """What lies at one index of an axis of an array must not go as a whole."""
        refusal = Refusal(label(self.node), self.node.op_type, reason)
        self.walk.rows += [(np.moveaxis(u, place, 0).reshape(u.shape[place], -1), refusal) for u, place in arrays]

    def labels(self, operand: int) -> dict[Axes, IntArray]:
        """Units of an operand."""
        value = self.view.value(operand)
        return {} if value is None else self.walk.labels.get(value, {})

    def heads(self, operand: int) -> dict[Axes, IntArray]:
        """Heads of an operand."""
        value = self.view.value(operand)
        return {} if value is None else self.walk.heads.get(value, {})
