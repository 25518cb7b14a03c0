"""Units that begin or end at a node: rows of weights, sums over channels, and blocks of these that depend on each other."""

from __future__ import annotations

import numpy as np

from mscompile.network.findings import Creator, Meeting, Read, Refusal, Slot, label
from mscompile.network.units import Axes, Block
from mscompile.network.walk import Step
from mscompile.operators import IntArray, Port
from mscompile.operators.backward import FLOATS


class Contraction(Step):
    """What one node begins, sums over and asks of blocks."""

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
