"""The tally: sums over samples as outputs of a graph that take up what was summed before.

Rows of numbers, one per sample, are laid side by side and summed by one product with ones; nodes of their own for every site
and quantity would cost more than their work.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mscompile.calibration.blocks import loop
from mscompile.calibration.statistics import Array
from mscompile.network.scm import Site
from mscompile.operators.backward import PREFIX, Builder

SUMS, EXTREMES = f"{PREFIX}sums", f"{PREFIX}extremes"
"""Names of the outputs that hold the sums and the largest entries of all rows."""
EXTREME: Mapping[str, float] = {"high": 1.0, "low": -1.0}
"""Rows of which the largest entries are returned, and what gives the quantity from them."""
PRODUCTS: Mapping[str, Mapping[str, str]] = {"s1": {"s11": "s1", "s12": "s2"}, "s2": {"s22": "s2"}}
"""Rows of which not the sums are returned but those of products: by name, with which other rows."""


@dataclass(frozen=True)
class Start:
    """What an output holds before any data: zeros of float32, or of int64 where `whole`; -∞ for the `largest`."""

    shape: tuple[int, ...]
    whole: bool = False
    largest: bool = False

    @property
    def array(self) -> npt.NDArray[np.generic]:
        """The numbers."""
        return np.full(self.shape, -np.inf if self.largest else 0, dtype=np.int64 if self.whole else np.float32)


@dataclass(frozen=True)
class Rows:
    """Numbers per sample, and what their sum over samples is called.

    Attributes
    ----------
    value
        [samples · seeds, size], or [samples · seeds, size, 1, 1] from pooling.
    seeds
        Rows per sample; None if that is not known.
    factor
        What the numbers are multiplied by when their sum is read.
    """

    site: Site
    quantity: str
    value: ir.Value
    seeds: int | None
    pooled: bool
    factor: float = 1.0

    @property
    def kind(self) -> Hashable:
        """Rows of the same kind have the same number of rows and can stand side by side."""
        return (self.seeds, self.pooled) if self.seeds is not None else self.site.tensor


class Tally:
    """The sums that leave a graph."""

    def __init__(self, graph: ir.Graph, build: Builder) -> None:
        self._graph, self._build = graph, build
        self.starts: dict[str, Start] = {}
        """Where each output's sums begin."""
        self._rows: list[Rows] = []
        self._packed: dict[str, list[tuple[str, int, float]]] = {}
        self._ones: dict[int, ir.Value] = {}
        self._places: dict[str, int] = {}

    def add(self, rows: Rows) -> None:
        """Sum the rows, or what else is done with their quantity."""
        self._rows.append(rows)

    def add_steady(self, tensor: str, places: int) -> None:
        """Count the observations of a site outside the graph: so many per sample."""
        self._places[tensor] = places

    def _so_far(self, name: str, start: Start) -> ir.Value:
        """The input that holds what a quantity has come to before."""
        dtype = ir.DataType.INT64 if start.whole else ir.DataType.FLOAT
        so_far = ir.Value(name=before(name), shape=ir.Shape(start.shape), type=ir.TensorType(dtype))
        self._graph.inputs.append(so_far)
        return so_far

    def add_sum(self, name: str, value: ir.Value, start: Start) -> None:
        """Return a quantity combined with what was found before: a sum, or the largest."""
        so_far = self._so_far(name, start)
        combine = "Max" if start.largest else "Add"
        after = ir.Value(name=name, shape=so_far.shape, type=so_far.type)
        self._graph.append(ir.node(combine, [so_far, value], outputs=[after], name=name))
        self._graph.outputs.append(after)
        self.starts[name] = start

    def add_over_blocks(
        self, starts: Mapping[str, Start], blocks: ir.Value, piece: Callable[[Builder, ir.Value], Sequence[ir.Value]]
    ) -> None:
        """Return sums over blocks of positions, one block after the other.

        Parameters
        ----------
        starts
            What is summed, by name of output.
        blocks
            How many there are, an int64 of the running graph.
        piece
            Appends the nodes that find what one block adds, from its number, [1] int64.
        """
        so_far = {name: self._so_far(name, start) for name, start in starts.items()}
        node = loop(self._build, so_far, blocks, piece)
        self._graph.append(node)
        self._graph.outputs.extend(node.outputs)
        self.starts.update(starts)

    def pack(self) -> None:
        """Return all sums of rows as one: nodes of their own for each site and quantity would cost more than their work."""
        build = self._build
        found: dict[str, list[ir.Value]] = {SUMS: [], EXTREMES: []}
        groups: dict[tuple[str, Hashable], list[Rows]] = {}
        for rows in self._rows:
            groups.setdefault((rows.quantity, rows.kind), []).append(rows)
        joined = {key: self._side_by_side(group) for key, group in groups.items()}
        for (quantity, kind), value in joined.items():
            first, *_ = group = groups[quantity, kind]
            if quantity in EXTREME:
                found[EXTREMES].append(build.reduce("ReduceMax", value, [0]))
                self._note(EXTREMES, group, quantity, EXTREME[quantity])
            elif quantity in PRODUCTS:
                for product, other in PRODUCTS[quantity].items():
                    both = build.op("Mul", value, joined[other, kind])
                    found[SUMS].append(build.op("MatMul", self._row_of_ones(both, first.seeds), both))
                    self._note(SUMS, group, product, power=2)
            else:
                found[SUMS].append(build.op("MatMul", self._row_of_ones(value, first.seeds), value))
                self._note(SUMS, group, quantity)
        for name in (SUMS, EXTREMES):
            if parts := self._packed.get(name):
                everything = build.op("Concat", *found[name], axis=1)
                shape = 1, sum(size for _, size, _ in parts)
                self.add_sum(name, everything, Start(shape, largest=name == EXTREMES))

    def _note(self, name: str, group: Sequence[Rows], quantity: str, factor: float = 1.0, power: int = 1) -> None:
        """Keep in mind what lies next in a packed output."""
        found = ((name_of(rows.site, quantity), rows.site.size, factor * rows.factor**power) for rows in group)
        self._packed.setdefault(name, []).extend(found)

    def _side_by_side(self, group: Sequence[Rows]) -> ir.Value:
        """[samples · seeds, all channels of a group of sites]."""
        build, values = self._build, [rows.value for rows in group]
        joined = build.op("Concat", *values, axis=1) if len(values) > 1 else values[0]
        if not group[0].pooled:
            return joined
        return build.op("Reshape", joined, build.integers([-1, sum(rows.site.size for rows in group)]))

    def _row_of_ones(self, rows: ir.Value, seeds: int | None) -> ir.Value:
        """[1, rows]: summing down the rows of a matrix is fastest as a product."""
        build = self._build
        if seeds is None:
            length = build.extents(rows, [0])
            shape = build.op("Concat", build.integers([1]), length, axis=0)
            return build.op("Expand", build.constant(np.ones((1, 1)), np.float32), shape)
        if seeds not in self._ones:
            name, kind = ones_of(seeds), ir.TensorType(ir.DataType.FLOAT)
            self._ones[seeds] = ir.Value(name=name, shape=ir.Shape([1, None]), type=kind)
            self._graph.inputs.append(self._ones[seeds])
        return self._ones[seeds]

    @property
    def ones(self) -> tuple[int, ...]:
        """Rows per sample of the matrices that are summed down."""
        return tuple(self._ones)

    def read(self, totals: Mapping[str, Array], samples: int) -> dict[str, Array]:
        """The sums over a number of samples, by quantity."""
        found = dict(totals)
        for packed, entries in self._packed.items():
            parts = np.split(found.pop(packed)[0], np.cumsum([size for _, size, _ in entries])[:-1])
            found |= {name: factor * part for (name, _, factor), part in zip(entries, parts, strict=True)}
        counts = {quantity_of(tensor, "count"): np.array(places * samples) for tensor, places in self._places.items()}
        return {**found, **counts}


def name_of(site: Site, quantity: str) -> str:
    """Name of the output that holds a quantity of a site."""
    return quantity_of(site.tensor, quantity)


def quantity_of(name: str, quantity: str) -> str:
    """Name of the output that holds a quantity of a tensor."""
    return f"{PREFIX}{quantity}:{name}"


def ones_of(seeds: int) -> str:
    """Name of the input that holds a row of ones for so many rows per sample."""
    return f"{PREFIX}ones.{seeds}"


def before(name: str) -> str:
    """Name of the input that holds what an output has summed up so far."""
    return f"{name}:before"
