"""Sites: the tensors at which units are replaced, and what reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mscompile.network.flow import Meeting, Read, Refusal, Slot, Walk, label
from mscompile.network.layout import ROWS, Layout
from mscompile.network.units import components
from mscompile.operators import DIALECT, OUT, IntArray, Port, Signature, is_parameter

MASKED = -1e4
"""Score at or below which a position counts as masked: exp(−10000) is 0 in every floating-point type."""


@dataclass(frozen=True)
class Reader:
    """A node that contracts a site with a weight.

    Attributes
    ----------
    node
        The node.
    signature
        Its axis signature; `signature.linear` says how a replacement folds.
    entry
        The node through which the site's tensor enters on its way here: the reader itself, or movement before it.
    data_axis, axis
        Contracted axes of the data and of the weight operand.
    index
        ``index[i]`` is the site's channel that weight column i meets; a channel read at m places occurs m times.
    units
        ``units[i]`` is the unit that weight column i meets.
    layout
        Where the data operand holds the samples; None where that is not known.
    """

    node: ir.Node
    signature: Signature
    entry: ir.Node
    data_axis: int
    axis: int
    index: IntArray
    units: IntArray
    layout: Layout | None = ROWS

    @property
    def weight(self) -> ir.Value:
        """The weight operand."""
        value = self.node.inputs[self.signature.linear.weight]  # type: ignore[union-attr]
        assert value is not None
        return value

    @property
    def data(self) -> str:
        """Name of the tensor it contracts."""
        value = self.node.inputs[self.signature.linear.data]  # type: ignore[union-attr]
        assert value is not None
        return value.name or ""

    @property
    def groups(self) -> int:
        """Blocks of channels that each meet rows of their own."""
        return self.signature.linear.groups  # type: ignore[union-attr]

    def rows(self, weight: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """[columns, rest]: a weight by the channel it meets, one row per entry of `index`."""
        blocks = self._blocks(weight)[:, : len(self.index) // self.groups]
        return blocks.reshape(-1, *blocks.shape[2:])

    def ones(self, weight: npt.NDArray[np.generic]) -> npt.NDArray[np.generic] | None:
        """[groups, rest]: the weight on the channels of ones that a Carry node brings; None where there is none."""
        blocks = self._blocks(weight)[:, len(self.index) // self.groups :]
        return blocks[:, 0] if blocks.shape[1] else None

    def _blocks(self, weight: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """[groups, channels of a group, rest]."""
        if self.groups == 1:
            return np.moveaxis(weight, self.axis, 0)[None]
        return np.moveaxis(weight.reshape(self.groups, -1, *weight.shape[1:]), self.axis + 1, 1)

    def from_rows(
        self, rows: npt.NDArray[np.generic], ones: npt.NDArray[np.generic] | None = None
    ) -> npt.NDArray[np.generic]:
        """The weight again, of `rows` and `ones`."""
        blocks = rows.reshape(self.groups, -1, *rows.shape[1:])
        if ones is not None:
            blocks = np.concatenate([blocks, ones[:, None]], axis=1)
        if self.groups == 1:
            return np.moveaxis(blocks[0], 0, self.axis)
        blocked = np.moveaxis(blocks, 1, self.axis + 1)
        return blocked.reshape(-1, *blocked.shape[2:])

    @property
    def met(self) -> tuple[IntArray, ...]:
        """Channels of the site that each group meets."""
        return tuple(np.unique(part) for part in self.index.reshape(self.groups, -1))

    def columns(self, size: int) -> npt.NDArray[np.float64]:
        """[channels, places, rest]: the weight in float64, in the order of a site's `size` channels."""
        tensor = self.weight.const_value
        assert tensor is not None
        rows = self.rows(tensor.numpy().astype(np.float64))
        return rows[np.argsort(self.index, kind="stable")].reshape(size, -1, *rows.shape[1:])  # type: ignore[return-value]

    @property
    def border(self) -> bool:
        """Whether a constant channel is more than a bias to this reader."""
        return self.signature.linear.border  # type: ignore[union-attr]


@dataclass(frozen=True)
class Pairing:
    """Keys that meet queries under a softmax: the score of a key is Σ_j q_j k_j.

    ``k_j := c`` adds q_j c to the scores of all keys alike, which the softmax ignores, and ``k_j := Σ_i B_ji k_i`` is
    ``q_i += B_ji q_j``: both fold into the weights that make the queries, and pair j goes.

    Attributes
    ----------
    node
        The product of queries and keys.
    entry
        The node through which the keys' tensor enters on its way there.
    slots, index, heads
        Parameters that make the queries; row i of slot s meets key channel ``index[s][i]``, −1 if none, in head
        ``heads[s][i]``.
    """

    node: ir.Node
    entry: ir.Node
    slots: tuple[Slot, ...]
    index: tuple[IntArray, ...]
    heads: tuple[IntArray, ...]


@dataclass(frozen=True)
class Site:
    """A tensor and channel axis where one set of units is read.

    Attributes
    ----------
    fixed
        [channels]: which of them must stay.
    rows
        [channels]: a replaced channel may be a function of channels of its own row only, as of one head or group; None
        where of all.
    refusal
        Set where the units cannot be removed exactly; such a site is left alone.
    layout
        Where the tensor holds the samples.
    """

    tensor: str
    axis: int
    units: IntArray
    readers: tuple[Reader, ...]
    group: int
    refusal: Refusal | None
    pairings: tuple[Pairing, ...] = ()
    fixed: npt.NDArray[np.bool_] | None = None
    rows: IntArray | None = None
    layout: Layout = ROWS

    @property
    def size(self) -> int:
        """Number of channels of the tensor on the channel axis."""
        return len(self.units)

    @property
    def border(self) -> bool:
        """Whether some reader needs carrier channels for constants: one for each group of it."""
        return any(reader.border for reader in self.readers)

    @property
    def entries(self) -> frozenset[ir.Node]:
        """Nodes through which the tensor enters on its way to what reads it."""
        return frozenset([r.entry for r in self.readers] + [p.entry for p in self.pairings])

    @property
    def free(self) -> npt.NDArray[np.bool_]:
        """[channels]: which of them may go."""
        return np.ones(self.size, dtype=np.bool_) if self.fixed is None else ~self.fixed


@dataclass(frozen=True)
class _Found:
    """A reading traced back to the tensor where it begins: raw units of that tensor, and the channel each column meets."""

    tensor: ir.Value
    axis: int
    units: IntArray
    reader: Callable[[IntArray], Reader] | None
    pairing: Pairing | None
    rows: IntArray | None


def sites_of(walk: Walk) -> Callable[[IntArray, Mapping[int, Refusal], Sequence[IntArray]], Iterator[Site]]:
    """Trace every reading back to its tensor; gives the sites once units are settled."""
    trace = _Trace(walk)
    found = [trace.reader(read) for read in walk.reads]
    found += [pairing for meeting in walk.meetings if (pairing := trace.pairing(meeting)) is not None]

    def settle(root: IntArray, frozen: Mapping[int, Refusal], every: Sequence[IntArray]) -> Iterator[Site]:
        groups = components(every, len(root))
        order = {node: i for i, node in enumerate(walk.signatures)}
        by_place: dict[tuple[ir.Value, int], list[_Found]] = {}
        for one in found:
            by_place.setdefault((one.tensor, one.axis), []).append(one)
        axes: dict[ir.Value, list[int]] = {}
        for tensor, axis in by_place:
            axes.setdefault(tensor, []).append(axis)
        staying = np.fromiter(frozen, dtype=np.int64)
        for (tensor, axis), ones in sorted(by_place.items(), key=lambda kv: order[kv[0][0].producer()]):  # type: ignore[index]
            units = root[ones[0].units]
            stays = np.isin(units, staying)
            refusal = frozen[int(units[stays][0])] if stays.all() else None
            reason = _irregular(walk, tensor, axis, axes[tensor])
            if refusal is None and reason is not None:
                refusal = Refusal(tensor.name or "?", "", reason)
            yield Site(
                tensor.name or "?",
                axis,
                units,
                tuple(one.reader(root) for one in ones if one.reader is not None),
                int(groups[units[0]]),
                refusal,
                tuple(one.pairing for one in ones if one.pairing is not None),
                stays if stays.any() else None,
                _rows(ones),
                walk.samples.of(tensor) or ROWS,
            )

    return settle


def _rows(ones: Sequence[_Found]) -> IntArray | None:
    """The coarsest rows that keep apart what any reader keeps apart."""
    told = [one.rows for one in ones if one.rows is not None]
    if not told:
        return None
    rows: IntArray = np.unique(np.stack(told), axis=1, return_inverse=True)[1].ravel().astype(np.int64)
    return rows


def _irregular(walk: Walk, tensor: ir.Value, axis: int, axes: Sequence[int]) -> str | None:
    """Why units cannot be replaced at a tensor, if so."""
    if axis == 0:
        return "holds units on axis 0, which is taken for the samples"
    if len(axes) > 1:
        return "is read on several of its axes"
    if tensor.name not in walk.shapes:
        return "has no known rank"
    layout = walk.samples.of(tensor)
    if layout is None:
        return "holds the samples where they cannot be followed"
    return "holds units and samples on one axis" if layout.axis == axis else None


@dataclass(frozen=True)
class _Trace:
    """Finds where readings begin."""

    walk: Walk

    def reader(self, read: Read) -> _Found:
        linear = read.signature.linear
        assert linear is not None
        value, entry = read.node.inputs[linear.data], read.node
        assert value is not None
        if (node := value.producer()) is not None and node.domain == DIALECT and node.op_type == "Carry":
            value, entry = node.inputs[0], node
            assert value is not None
        tensor, axis, units = value, read.data_axis, read.units
        if read.plain:
            origin = self._origin(value, axis, units, entry)
            times = np.bincount(_positions(origin[2], units))
            if (times == times[0]).all() and (
                linear.groups == 1 or times[0] == 1
            ):  # else a channel may be in several groups
                tensor, axis, units, entry = origin
        index = _positions(units, read.units) if tensor is not value else np.arange(len(units), dtype=np.int64)
        layout = self.walk.samples.of(value)

        def settled(root: IntArray) -> Reader:
            units = root[read.units]
            return Reader(read.node, read.signature, entry, read.data_axis, read.weight_axis, index, units, layout)

        rows = None
        if linear.groups > 1:
            rows = np.empty(len(units), dtype=np.int64)
            rows[index] = np.repeat(np.arange(linear.groups), len(index) // linear.groups)
        return _Found(tensor, axis, units, settled, None, rows)

    def _origin(
        self, value: ir.Value, axis: int, units: IntArray, reader: ir.Node, through: Callable[[ir.Node], bool] | None = None
    ) -> tuple[ir.Value, int, IntArray, ir.Node]:
        """The tensor furthest up from which only movement leads to `value`, with all `units` on one axis, each once.

        `through` admits nodes besides movement. Returns tensor, axis, its units and the node that takes it in.
        """
        found = value, axis, units, reader
        passes = through if through is not None else lambda _: False
        while (node := value.producer()) is not None:
            signature = self.walk.signatures[node]
            if not isinstance(signature, Signature) or not (signature.moving or signature.copies or passes(node)):
                break
            if not self._only_read(value, passes):
                break
            labelled = [v for v in node.inputs if v is not None and self.walk.labels.get(v)]
            carrying = [(v, a, u) for v in labelled for a, u in self.walk.labels[v].items() if np.isin(units, u).all()]
            if len(carrying) != 1:
                break
            ((value, axes, above),) = carrying
            if len(axes) == 1 and len(np.unique(above)) == above.size and np.isin(above, units).all():
                found = value, axes[0], above, node
        return found

    def _only_read(self, value: ir.Value, passes: Callable[[ir.Node], bool]) -> bool:
        """Whether movement and contraction are all that happens to a value."""
        if value.is_graph_output():
            return False
        for node, operand in value.uses():
            found = self.walk.signatures.get(node)
            if any(read.node is node and read.signature.linear.data == operand for read in self.walk.reads):  # type: ignore[union-attr]
                continue
            if any(meeting.node is node for meeting in self.walk.meetings):
                continue
            moving = isinstance(found, Signature) and (found.moving or found.copies or passes(node))
            if not (moving and all(self._only_read(out, passes) for out in node.outputs)):
                return False
        return True

    # -- queries and keys --

    def pairing(self, meeting: Meeting) -> _Found | None:
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
            tensor, axis, units, entry = self._origin(
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
            return _Found(tensor, axis, units, None, Pairing(meeting.node, entry, tuple(slots), index, heads), rows)
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


def _positions(units: IntArray, wanted: IntArray) -> IntArray:
    """Place of each wanted unit among `units`, all different."""
    order = np.argsort(units)
    return order[np.searchsorted(units, wanted, sorter=order)]
