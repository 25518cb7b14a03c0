"""The law of channel flow: around every example of the operator table, dead units are cut and nothing changes; and graphs of
the kinds that networks are made of compute, once compiled, what the dense ones do under the plan.

A model is built around the node: units begin at a matrix product on one axis of a live operand (and of the operands that
run in step with it there), or at the node itself, and every output is read by another. The weights that meet a random half
of the units are zeroed; then the units go, wherever the signature says that channels pass, and the outputs stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attentions import ATTENTIONS
from golden import KINDS, canonical, inputs, model, plan_for, run
from graphs import GRAPHS
from onnx import helper, numpy_helper
from test_operators import EXAMPLES, MICROSOFT, ROUNDING, Example, outputs_of

from mscompile.intake.samples import Samples
from mscompile.network.scm import Scm, read_scm
from mscompile.network.units import even
from mscompile.operators import OUT, Port
from mscompile.passes import RemoveDeadUnits
from mscompile.passes.readers import owned
from mscompile.rewrite import rewrite
from mscompile.verification.verify import FOLD_TOLERANCE, fold_error, make_pair

FEATURES = 5
"""Inputs of the products at which units begin."""
FLOAT = ("float32",)


@dataclass(frozen=True)
class Case:
    """Where the units of a model around an example begin: on axes of its operands, or at the node itself if on none."""

    example: Example
    begin: tuple[Port, ...]
    reading: str

    def __str__(self) -> str:
        where = ",".join(f"{operand}[{axis}]" for operand, axis in self.begin) or "here"
        return f"{self.example}:{where}:{self.reading}"


def beside(example: Example, port: Port) -> tuple[Port, ...]:
    """Live operands' axes that run in step with one, or go to places beside its channels."""
    found, ports = example.signature, {port}
    ties: list[set[Port]] = [set(link) for link in found.links] + [{m.source, m.target} for m in found.moves]
    ties += [{p for p, _ in found.even}] if found.together is not None else []
    while more := set().union(*(tie for tie in ties if tie & ports)) - ports:
        ports |= more
    return tuple(sorted((o, a) for o, a in ports if o >= 0 and example.operands[o].live))


def cases() -> Iterator[Case]:
    for example in EXAMPLES:
        seen = set()
        for operand, given in enumerate(example.operands):
            for axis, size in enumerate(given.shape if given is not None and given.live else ()):
                begin = beside(example, (operand, axis))
                if size > 1 and begin not in seen and all(a > 0 and example.operands[o].dtype in FLOAT for o, a in begin):
                    seen.add(begin)
                    yield from (Case(example, begin, reading) for reading in ("product", "flat"))
        if any(
            outputs_of(li) and not any(o >= 0 and example.operands[o].live for o, _ in li) for li in example.signature.links
        ):
            yield Case(example, (), "product")


CASES = list(cases())


@dataclass
class Around:
    """A model around a node."""

    example: Example
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    entering: list[onnx.ValueInfoProto] = field(default_factory=list)
    stored: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, op: str, *operands: str, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(operands), [name], **attributes))
        return name

    def store(self, array: np.ndarray[Any, Any], name: str = "") -> str:
        self.stored.append(numpy_helper.from_array(array, name or f"p{len(self.stored)}"))
        return self.stored[-1].name

    def enter(self, name: str, dtype: str, shape: Sequence[int]) -> str:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.entering.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def begin(self, operand: int, axis: int, rng: np.random.Generator) -> str:
        """Units on one axis of an operand, in the range its values are to be from."""
        given = self.example.operands[operand]
        rest = [d for a, d in enumerate(given.shape) if a != axis]
        weight = rng.standard_normal((FEATURES, given.shape[axis])).astype(np.float32)
        made = self.add("MatMul", self.enter(f"x{operand}", "float32", [*rest, FEATURES]), self.store(weight))
        order = [a for a in range(len(given.shape)) if a != axis] + [axis]
        moved = self.add("Transpose", made, perm=np.argsort(order).tolist())
        if (given.low, given.high) == (-2.0, 2.0):
            return moved
        scale, shift = (self.store(np.float32(v).reshape(())) for v in (given.high - given.low, given.low))
        return self.add("Add", self.add("Mul", self.add("Sigmoid", moved), scale), shift)

    def read(self, value: str, shape: Sequence[int], axis: int | None, rng: np.random.Generator) -> str:
        """A product over one axis, or over all but the first."""
        if axis is None:
            value, size = self.add("Flatten", value, axis=1), int(np.prod(shape[1:]))
        else:
            order, size = [a for a in range(len(shape)) if a != axis] + [axis], shape[axis]
            value = self.add("Transpose", value, perm=order)
        return self.add("MatMul", value, self.store(rng.standard_normal((size, 3)).astype(np.float32)))


def model_around(case: Case) -> onnx.ModelProto:
    """The model; axes to read are those that the signature says the units go to."""
    example, rng = case.example, np.random.default_rng(0)
    around = Around(example)
    begin = dict(case.begin)
    names = []
    for i, (operand, value) in enumerate(zip(example.operands, example.draw(0), strict=True)):
        if operand is None:
            names.append("")
        elif not operand.live:
            names.append(around.store(value, f"w{i}"))
        elif i in begin:
            names.append(around.begin(i, begin[i], rng))
        elif operand.given is not None:
            names.append(around.store(value, f"g{i}"))
        else:
            names.append(around.enter(f"i{i}", operand.dtype, operand.shape))
    outs = [f"o{i}" for i in range(example.outputs)]
    around.nodes.append(
        helper.make_node(example.op, names, outs, name="node", domain=example.domain, **dict(example.attributes))
    )
    ends = []
    for i, name in enumerate(outs):
        shape = example.view().shape(~i)
        assert shape is not None
        axes = [a for o, a in reached(case) if o == ~i]
        kind, end = dict(example.attributes).get("to", onnx.TensorProto.FLOAT), name
        if kind != onnx.TensorProto.FLOAT:
            end = around.add("Cast", name, to=onnx.TensorProto.FLOAT)
        if case.reading == "flat" and len(shape) > 1:
            end = around.read(end, shape, None, rng)
        elif case.reading == "product" and axes:
            end = around.read(end, shape, axes[0], rng)
        rank = 2 if case.reading == "flat" and len(shape) > 1 else len(shape)
        ends.append(helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, [None] * rank))
    graph = helper.make_graph(around.nodes, "around", around.entering, ends, around.stored)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", example.opset), helper.make_opsetid(MICROSOFT, 1)], ir_version=10
    )


def reached(case: Case) -> list[Port]:
    """Output axes that the units stand on, as far as links and moves tell."""
    found = case.example.signature
    ports = [p for li in found.links if any(b in li for b in case.begin) for p in outputs_of(li)]
    ports += [m.target for m in found.moves if m.source in case.begin]
    live = {i for i, o in enumerate(case.example.operands) if o is not None and o.live}
    fed = {m.target for m in found.moves}
    ports += [p for li in found.links if not any(o in live for o, _ in li) for p in outputs_of(li) if p not in fed]
    return list(dict.fromkeys(ports))


def unread(scm: Scm, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """A random half of the units that may go, such that as many stay wherever rows must be equal; else all but one a row."""
    every = np.unique(np.concatenate([site.units for site in scm.sites] or [np.zeros(0, dtype=np.int64)]))
    free = rng.permutation(np.setdiff1d(every, list(scm.frozen)))
    stay = np.setdiff1d(every, free)
    half, least = (np.concatenate([kept, stay]) for kept in (free[: (len(free) + 1) // 2], free[:0]))
    gone = np.setdiff1d(free, even(half, scm.blocks, free))
    return gone if len(gone) else np.setdiff1d(free, even(least, scm.blocks, free))


def silence(source: ir.Model, scm: Scm, units: np.ndarray[Any, Any]) -> None:
    """Zero what meets these units, wherever they are read."""
    for site in scm.sites:
        for reader in site.readers:
            rows = np.array(reader.rows(reader.weight.const_value.numpy()))
            rows[np.isin(reader.units, units)] = 0
            owned(source.graph, reader.node, reader.signature.linear.weight, reader.from_rows(rows))
        for pairing in site.pairings:
            for slot in pairing.slots:
                array = np.array(slot.node.inputs[slot.operand].const_value.numpy())
                np.moveaxis(array, slot.axis, 0)[np.isin(slot.units, units)] = 0
                owned(source.graph, slot.node, slot.operand, array)


@cache
def cut(case: Case) -> frozenset[str]:
    """Sites from which something went, after the outputs have been found unchanged."""
    source = canonical(model_around(case))
    scm = read_scm(source)
    silence(source, scm, unread(scm, np.random.default_rng(1)))
    feed = inputs(source, seed=2)
    for i, operand in enumerate(case.example.operands):
        if operand is not None and f"i{i}" in feed:
            feed[f"i{i}"] = operand.draw(np.random.default_rng(i))
    before = run(source, feed)
    step = RemoveDeadUnits()
    step(source)
    onnx.checker.check_model(ir.to_proto(source), full_check=True)
    after = run(source, feed)
    for name, wanted in before.items():
        np.testing.assert_allclose(after[name], wanted, **ROUNDING)
    return frozenset(step.alignment)


FEWEST = 1495
"""Cases in which channels pass, of the examples as they are: what keeps declarations from saying less than they did."""


def test_channels_pass_most_nodes():
    assert sum(map(promised, CASES)) >= FEWEST


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dead_units_go_wherever_channels_pass(case: Case):
    assert cut(case) or not promised(case)


def promised(case: Case) -> bool:
    """Whether the signature says that channels pass from where units begin to where they are read, or are read at once."""
    found, ends = case.example.signature, reached(case)
    if any(b in link for b in case.begin for link in found.links if not outputs_of(link)):
        return found.linear is not None and not case.example.operands[found.linear.weight].live
    shape = case.example.view().shape(OUT)
    if any(o == OUT and shape is not None and shape[a] == 1 for o, a in ends):
        return False  # a single unit stays
    whole = [r for r in found.regroups if 1 in (len(r.source), len(r.target)) and all(axis > 0 for axis in r.target)]
    if case.reading == "flat" and any(axis in r.source for r in whole for _, axis in case.begin):
        return True
    if case.reading == "flat":  # several axes of units, read as one, cannot be cut apart
        return len({o for o, _ in ends}) == len(ends) > 0 and all(axis > 0 for _, axis in ends)
    return bool(ends)


# --- architectures ----------------------------------------------------------------------------------------------------

SHARES = {"constant": 0.5, "affine": 0.75, "parents": 0.3, "windows": 0.6}


UNCUT = {
    "a product of a tensor with itself",
    "a residual addition with channels padded",  # no carrier for the padding of the map
    "normalisation by group before a channel shuffle",  # all channels live and die together
    "rotary positions",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", GRAPHS)
def test_a_compiled_architecture_is_the_dense_one_under_the_plan(case: str, kind: str):
    text, _ = GRAPHS[case]
    dense = model(text, opset=21)
    plan = plan_for(dense, kind, np.random.default_rng(0), lambda size: max(1, round(SHARES[kind] * size)))
    compiled = rewrite(dense, plan)
    onnx.checker.check_model(ir.to_proto(compiled.model), full_check=True)
    assert plan.sites or SHARES[kind] > 0.5 or case in UNCUT
    if not plan.sites:
        return
    pair = make_pair(read_scm(dense), compiled.model, plan, compiled.alignment)
    assert fold_error(pair, plan, Samples(dict(inputs(dense, samples=5)), None, "generated"), 5) <= FOLD_TOLERANCE
    before = ir.to_proto(compiled.model).SerializeToString(deterministic=True)
    RemoveDeadUnits()(compiled.model)
    assert ir.to_proto(compiled.model).SerializeToString(deterministic=True) == before, "something dead was left"


STAYING = {
    "attention whose heads are summed",
    "attention whose scores are a model output",
    "attention whose queries are read elsewhere",
    "attention whose heads are gated by what is read elsewhere",
    "attention in which all heads share a key",
}


@pytest.mark.parametrize("case", ATTENTIONS)
def test_a_head_that_nothing_reads_goes_with_all_that_makes_it(case: str):
    dense = model(ATTENTIONS[case][0], opset=21)
    scm = read_scm(dense)
    read = {unit for site in scm.sites if site.readers for unit in site.units.tolist()}
    heads = {head: units for head, units in scm.heads.items() if units & read}
    if case in STAYING:
        assert not heads
        return
    head, units = heads.popitem()
    assert heads, "one head stays"
    going = np.array([head, *units])
    silence(dense, scm, going)
    feed = inputs(dense, samples=5)
    before = run(dense, feed)
    wide = {(slot.node, slot.operand): slot.node.inputs[slot.operand].const_value.size for slot in scm.slots}
    gone = {(slot.node, slot.operand) for slot in scm.slots if slot.units.ndim == 1 and np.isin(slot.units, going).any()}
    RemoveDeadUnits()(dense)
    onnx.checker.check_model(ir.to_proto(dense), full_check=True)
    for node, operand in gone:
        assert node.inputs[operand].const_value.size < wide[node, operand]
    for name, array in run(dense, feed).items():
        np.testing.assert_allclose(array, before[name], **ROUNDING)
