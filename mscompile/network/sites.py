"""Sites: the tensors at which units are replaced, and what reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mscompile.network.findings import Refusal, Slot
from mscompile.network.layout import ROWS, Layout
from mscompile.operators import IntArray, Signature


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
