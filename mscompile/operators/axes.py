"""The vocabulary of declarations: ports, links, signatures, and a node as a declaration sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mscompile.operators.backward import Reverse

Dim = int | str | None
Shape = tuple[Dim, ...]
Port = tuple[int, int]
"""(operand, axis). Operand ``i`` is input ``i``, operand ``~i`` output ``i``; axes count from 0."""

OUT = ~0
DIALECT = "mscompile"
"""Domain of the compiler's own operators."""
IntArray = npt.NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True)
class Move:
    """An axis whose channels keep their values and change their places: ``target[at[i]] = source[index[i]]``.

    Attributes
    ----------
    index
        [n] channels of the source; or [k, n] where k of them make up one channel of the target and so live and die together.
    at
        [n] channels of the target; all of them, in order, if None.
    """

    source: Port
    target: Port
    index: IntArray
    at: IntArray | None = None


@dataclass(frozen=True)
class Pick:
    """An axis of which one index stays and which then goes: ``target = source[index]``."""

    source: Port
    index: int


@dataclass(frozen=True)
class Regroup:
    """Axes `source` of input 0, together, become axes `target` of the output, elements in the same order."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    source_sizes: tuple[int, ...]
    target_sizes: tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """A number that speaks of the channels at `port` and must follow when some of them go.

    Attributes
    ----------
    holder
        Operand or attribute that holds it.
    position
        Entry of the holder; None for an attribute that is one number, or for all entries.
    port
        Whose channels.
    meaning
        ``width``: how many there are, over `share`; ``bound``: how many stand before some place; ``channels``: all entries
        are channel numbers.
    """

    holder: int | str
    position: int | None
    port: Port
    meaning: Literal["width", "bound", "channels"] = "width"
    share: int = 1


@dataclass(frozen=True)
class Linear:
    """The operator is linear in the data it contracts with a weight, so replacements fold into weight and bias.

    ``Y = gain · (weight ∘ data) + bias_gain · bias``. `bias` is the operand that holds, or may hold, the bias vector over
    the created channels; None if the operator takes none. `border` is true where the response to a constant channel
    depends on the position (zero padding, strided transposed convolution), so that a constant is no mere bias. With `groups`
    the weight [outputs, channels / groups, …] holds one block of rows per block of channels.
    """

    data: int
    weight: int
    bias: int | None
    border: bool = False
    gain: float = 1.0
    bias_gain: float = 1.0
    groups: int = 1


@dataclass(frozen=True)
class Signature:
    """How the axes of one node's operands run in step.

    Attributes
    ----------
    links
        Tuples of ports whose channels are the same, index by index.
    moves, picks, regroups
        Axes whose channels are copied to other places.
    linear
        Set where the contraction of the node folds.
    steady
        Channels that are constant over samples and positions stay so, where those side by side are equal, as are those of a
        block that lives and dies together; their values are found by running the operator.
    centred
        A constant channel comes out as one of zeros does, but for rounding.
    sizes
        Numbers in operands and attributes that speak of channels.
    even
        (port, blocks): the channels there come in blocks that must stay equally large.
    together
        Where set, the blocks at all ports of `even` are equally large, in multiples of it.
    repeated
        (port, blocks, times): each block of channels of a contracted port meets so many of the other operand's, one by one.
    ties
        (port, blocks): the channels of a block live and die together.
    moving
        The node only moves values (any reader behind it reads its input).
    copies
        The outputs hold elements of input 0, repeated or not, and nothing else.
    unseen
        Axes that the node does not look at.
    additive
        The output is the sum, with signs, of the operands.
    scaled
        Operands that the output is proportional to, element by element.
    keys
        Operand to whose contracted channel any number may be added without changing the output, as to keys.
    levels
        Axis along which the output does not change when one number is added to all elements of input 0.
    mixes
        Why the axes in no link are a barrier, for the report.
    """

    links: tuple[tuple[Port, ...], ...] = ()
    moves: tuple[Move, ...] = ()
    picks: tuple[Pick, ...] = ()
    regroups: tuple[Regroup, ...] = ()
    linear: Linear | None = None
    steady: bool = True
    centred: bool = False
    sizes: tuple[Size, ...] = ()
    even: tuple[tuple[Port, int], ...] = ()
    together: int | None = None
    repeated: tuple[tuple[Port, int, int], ...] = ()
    ties: tuple[tuple[Port, int], ...] = ()
    moving: bool = False
    copies: bool = False
    unseen: tuple[Port, ...] = ()
    additive: bool = False
    scaled: tuple[int, ...] = ()
    keys: int | None = None
    levels: int | None = None
    mixes: str = "mixes this axis"


@dataclass(frozen=True)
class NodeView:
    """A node with the shapes of its operands, as a declaration sees it."""

    node: ir.Node
    shapes: Mapping[str, Shape]
    opset: int

    def value(self, operand: int) -> ir.Value | None:
        """Value at an operand; None where an optional operand is absent."""
        values = self.node.inputs if operand >= 0 else self.node.outputs
        position = operand if operand >= 0 else ~operand
        return values[position] if position < len(values) else None

    def shape(self, operand: int) -> Shape | None:
        """Shape of an operand, None where unknown or absent."""
        value = self.value(operand)
        if value is None or value.name is None:
            return None
        return self.shapes.get(value.name)

    def rank(self, operand: int) -> int | None:
        """Rank of an operand, None where unknown or absent."""
        shape = self.shape(operand)
        return None if shape is None else len(shape)

    def constant(self, operand: int) -> npt.NDArray[np.generic] | None:
        """Value of a parameter: an initializer that is neither a graph input nor absent."""
        value = self.value(operand)
        return None if value is None or not is_parameter(value) else value.const_value.numpy()  # type: ignore[union-attr]

    def entries(self, operand: int) -> tuple[int | None, ...] | None:
        """Entries of a vector of integers, None for those that are computed: of a parameter, or a Concat with parameters."""
        given, value = self.constant(operand), self.value(operand)
        node = None if value is None else value.producer()
        if given is not None:
            return tuple(int(entry) for entry in given.ravel().tolist())
        if node is None or node.op_type != "Concat" or node.domain not in ("", "ai.onnx"):
            return None
        view, found = NodeView(node, self.shapes, self.opset), list[int | None]()
        for place in range(len(node.inputs)):
            stored, size = view.constant(place), (view.shape(place) or (None,))[0]
            if stored is None and not isinstance(size, int):
                return None
            found += [None] * int(size or 0) if stored is None else [int(entry) for entry in stored.ravel().tolist()]
        return tuple(found)

    def attribute(self, name: str, default: T) -> T:
        """Value of an attribute, `default` where it is not set."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.value

    @property
    def live(self) -> tuple[int, ...]:
        """Operands of the inputs that are computed: everything but parameters and absent ones."""
        return tuple(i for i, v in enumerate(self.node.inputs) if v is not None and not is_parameter(v))


def is_parameter(value: ir.Value) -> bool:
    """Whether a value is fixed: an initializer that no caller can override."""
    return value.is_initializer() and not value.is_graph_input() and value.const_value is not None


Declaration = Callable[[NodeView], Signature | str]
"""Gives the signature of a node, or the reason why this node is a barrier."""


@dataclass(frozen=True)
class Barrier:
    """Declares nothing about the channels: the operator is a barrier, through which gradients may still find a way.

    Attributes
    ----------
    samples
        Ports of a node that count the samples alike, where these are not on the first axis of everything.
    """

    reason: str | Callable[[NodeView], str] = "has no declaration"
    samples: Callable[[NodeView], tuple[Port, ...]] = lambda _: ()

    def __call__(self, node: NodeView) -> str:
        """Give the reason."""
        return self.reason if isinstance(self.reason, str) else self.reason(node)


@dataclass(frozen=True)
class Operator:
    """One row.

    Attributes
    ----------
    name, domain
        As in the node.
    declare
        Gives the axis signature.
    macs
        Multiply–accumulates of a node whose shapes are numbers; none where it is not set.
    reverse
        Reverse-mode rule; where it is not set, curvature cannot pass the operator.
    like
        Operand whose shape the output has, or equation of an Einsum of the first operands whose shape it has, or nodes whose
        outputs have the shapes of the outputs, for operators that onnx knows no shapes of.
    """

    name: str
    declare: Declaration
    domain: str = ""
    macs: Callable[[NodeView], int] | None = None
    reverse: Reverse | None = None
    like: int | Callable[[ir.Node], int | str | Sequence[ir.Node] | None] | None = None
