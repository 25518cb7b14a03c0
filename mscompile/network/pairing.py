"""Queries and keys that meet: the site of their product, and what folds into the weights that make the queries."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mscompile.network.findings import Meeting, Refusal, Slot, label
from mscompile.network.origins import Found, Origins
from mscompile.network.sites import Pairing
from mscompile.operators import OUT, IntArray, Port, Signature, is_parameter

MASKED = -1e4
"""Score at or below which a position counts as masked: exp(−10000) is 0 in every floating-point type."""


class Pairings(Origins):
    """Finds the keys that meet queries."""

    def pairing(self, meeting: Meeting) -> Found | None:
        """The site of a product of queries and keys; None, and its units frozen, where nothing can be removed exactly."""
        reason = "contracts two computed tensors"
        for key in (1, 0):
            free = [
                (link, next(a for o, a in link if o == OUT))
                for link in meeting.signature.links
                if any(o == key for o, _ in link) and any(o == OUT for o, _ in link) and all(o != 1 - key for o, _ in link)
            ]
            levelled = any(self._levelled(meeting.node.outputs[0], axis) for _, axis in free)
            if not (meeting.signature.keys == key or levelled):
                continue
            slots = self._linear_slots(meeting, 1 - key)
            if slots is None:
                reason = "contracts them with a tensor that no weight makes linearly"
                continue
            keys, queries = meeting.units[key], meeting.units[1 - key]
            if len(np.unique(queries)) < len(queries):
                reason = "contracts several of them with one channel"
                continue
            value = meeting.node.inputs[key]
            assert value is not None
            unique = np.array(list(dict.fromkeys(keys.tolist())), dtype=np.int64)
            by_head = keys.reshape(-1, meeting.row)
            tensor, axis, units, entry = self.origin(
                value,
                meeting.contracted[key],
                unique,
                meeting.node,
                lambda node, rows=by_head: self._scales_evenly(node, rows),  # type: ignore[misc]
            )
            if (axis,) not in self.walk.labels.get(tensor, {}):
                reason = "contracts them where they stand on no axis of their own"
                continue
            met = dict(zip(queries.tolist(), keys.tolist(), strict=True))
            place = {int(u): i for i, u in enumerate(units)}
            index = tuple(
                np.array([place[met[u]] if u in met else -1 for u in slot.units.tolist()], dtype=np.int64) for slot in slots
            )
            head_of = {u: i // meeting.row for i, u in enumerate(queries.tolist())}
            heads = tuple(np.array([head_of.get(u, -1) for u in slot.units.tolist()], dtype=np.int64) for slot in slots)
            row_of = {u: i // meeting.row for i, u in reversed([*enumerate(keys.tolist())])}
            rows = np.array([row_of[int(u)] for u in units], dtype=np.int64)
            return Found(tensor, axis, units, None, Pairing(meeting.node, entry, tuple(slots), index, heads), rows)
        self.walk.refuse_meeting(meeting, Refusal(label(meeting.node), meeting.node.op_type, reason))
        return None

    def _levelled(self, value: ir.Value, axis: int) -> bool:
        """Whether a number added to all elements along an axis of a tensor changes nothing further on."""
        uses = list(value.uses())
        if value.is_graph_output() or not uses:
            return False
        for node, operand in uses:
            found = self.walk.signatures.get(node)
            if not isinstance(found, Signature):
                return False
            if operand == 0 and found.levels == axis:
                continue
            target = self._passed_on(node, operand, axis, found)
            if target is None or not self._levelled(node.outputs[0], target):
                return False
        return True

    def _passed_on(self, node: ir.Node, operand: int, axis: int, found: Signature) -> int | None:
        """Output axis along which a number added along an axis of an operand is still one number; None if it is not."""
        if found.moving:
            link: tuple[Port, ...] = next((li for li in found.links if (operand, axis) in li), ())
            return next((a for o, a in link if o == OUT), None)
        shapes = [() if v is None else self.walk.shapes.get(v.name or "") for v in node.inputs]
        out = self.walk.shapes.get(node.outputs[0].name or "")
        if out is None or any(shape is None for shape in shapes):
            return None
        target = axis + len(out) - len(shapes[operand])  # type: ignore[arg-type]
        across = [len(shape) - len(out) + target for shape in shapes]  # type: ignore[arg-type]
        alone = all(i == operand or a < 0 or shapes[i][a] == 1 for i, a in enumerate(across))  # type: ignore[index]
        passes = found.additive or (operand in found.scaled and alone) or self._masks(node, operand)
        return target if passes else None

    def _masks(self, node: ir.Node, operand: int) -> bool:
        """Whether a node only puts the score of masked positions in some places."""
        if node.op_type != "Where" or operand == 0:
            return False
        other = node.inputs[3 - operand]
        fill = other.const_value.numpy() if other is not None and is_parameter(other) else None  # type: ignore[union-attr]
        return fill is not None and bool((fill.astype(np.float64) <= MASKED).all())

    def _scales_evenly(self, node: ir.Node, rows: IntArray) -> bool:
        """Whether a node multiplies all units of a row by one number: [rows, units in a row], as by head."""
        found = self.walk.signatures[node]
        if not isinstance(found, Signature) or not found.scaled:
            return False
        for operand in found.scaled:
            value = node.inputs[operand]
            for axes, on in ({} if value is None else self.walk.labels.get(value, {})).items():
                if np.isin(rows, on).all():
                    links = [next((li for li in found.links if (operand, a) in li), ()) for a in axes]
                    alone = [all(o in (operand, OUT) for o, _ in link) for link in links]
                    return alone[-1] and (all(alone) or _within(rows, on))
        return False

    def _linear_slots(self, meeting: Meeting, operand: int) -> list[Slot] | None:
        """Every parameter of the affine map that makes an operand, if the way there moves, adds and scales evenly only."""
        value = meeting.node.inputs[operand]
        rows = meeting.units[operand].reshape(-1, meeting.row)
        units = np.unique(rows)
        slots: list[Slot] = []
        while value is not None and (node := value.producer()) is not None:
            found = self.walk.signatures[node]
            if not isinstance(found, Signature) or self._used_otherwise(value, units):
                return None
            here = [s for s in self.walk.slots if s.node is node and s.units.ndim == 1 and np.isin(s.units, units).any()]
            if {s.operand for s in here} & {s.operand for s in self.walk.row_slots if s.node is node}:
                return None  # differs from row to row, and so would what is folded into it
            made = [c for c in self.walk.creators if c.node is node and np.isin(units, c.units).all()]
            if made and found.linear is not None:
                linear = found.linear
                given = {o for o, v in enumerate(node.inputs) if v is not None} - {linear.data}
                return slots + here if {s.operand for s in here} == given and linear.groups == 1 else None
            labelled = [v for v in node.inputs if v is not None and self._carries(v, units)]
            if len(labelled) != 1:
                return None
            others = {o for o, v in enumerate(node.inputs) if v is not labelled[0]} - {s.operand for s in here}
            adds = found.additive and all(_is_zero(node.inputs[o]) for o in others)
            if not (found.moving or found.copies or self._scales_evenly(node, rows) or adds):
                return None
            slots += here if adds else []
            value = labelled[0]
        return None

    def _used_otherwise(self, value: ir.Value, units: IntArray) -> bool:
        """Whether more than one node takes these units in."""
        if value.is_graph_output():
            return True
        taking = 0
        for node, _ in value.uses():
            found = self.walk.signatures.get(node)
            copied = isinstance(found, Signature) and found.copies
            labelled = [on for out in node.outputs for on in self.walk.labels.get(out, {}).values()]
            taking += not copied or any(np.isin(on, units).any() for on in labelled)
        return taking > 1

    def _carries(self, value: ir.Value, units: IntArray) -> bool:
        return any(np.isin(units, on).all() for on in self.walk.labels.get(value, {}).values())


def _within(rows: IntArray, on: IntArray) -> bool:
    """Whether the units of each row stand in one row of a label, and in no other."""
    place: dict[int, int] = {}
    for number, row in enumerate(on.reshape(-1, on.shape[-1]).tolist()):
        for unit in row:
            if place.setdefault(unit, number) != number:
                return False
    return all(len({place.get(unit) for unit in row}) == 1 for row in rows.tolist())


def _is_zero(value: ir.Value | None) -> bool:
    return value is None or (is_parameter(value) and not value.const_value.numpy().any())  # type: ignore[union-attr]
