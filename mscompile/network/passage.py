"""Units that pass a node: from its inputs to its outputs, joined, moved, regrouped or put side by side on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mscompile.network.findings import Refusal, Slot, label
from mscompile.network.units import Axes, Block
from mscompile.network.walk import Step
from mscompile.operators import IntArray, Move


@dataclass
class Contribution:
    """What one operand says of an output: units by output axes, and the places they take on the last of these."""

    operand: int
    axes: Axes
    units: IntArray
    at: IntArray | None


class Passage(Step):
    """From the inputs of one node to its outputs."""

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
