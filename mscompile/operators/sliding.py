"""Windows that slide along spatial axes: what convolutions and pooling have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mscompile.operators.axes import NodeView
from mscompile.operators.backward import Backward


@dataclass(frozen=True)
class Slide:
    """How a window slides along one spatial axis; `low` and `high` count the padding before and behind it."""

    kernel: int
    stride: int
    dilation: int
    low: int
    high: int

    @property
    def extent(self) -> int:
        """Elements from the first to the last that the window sees."""
        return self.dilation * (self.kernel - 1) + 1

    def padded(self, total: int, mode: str) -> Slide:
        """The same with `total` elements of padding, the odd one at the end that `mode` names."""
        low = total // 2 if mode == "SAME_UPPER" else total - total // 2
        return replace(self, low=low, high=total - low)


def pads_to_size(view: NodeView) -> str:
    """``SAME_UPPER`` or ``SAME_LOWER`` where the padding follows from the sizes, else an empty string."""
    mode = str(view.attribute("auto_pad", "NOTSET"))
    return mode if mode.startswith("SAME") else ""


def slides(b: Backward, kernel: Sequence[int]) -> list[Slide]:
    """Windows of a convolution or pooling."""
    found, mode = _stated(b.view, kernel), pads_to_size(b.view)
    if not mode:
        return found
    last = [(b.sizes(0, [a])[0] - 1) % s.stride + 1 if s.stride > 1 else 1 for a, s in enumerate(found, start=2)]
    return [s.padded(max(s.extent - rest, 0), mode) for s, rest in zip(found, last, strict=True)]


def transposed_slides(b: Backward, kernel: Sequence[int]) -> list[Slide]:
    """Windows of a transposed convolution, where padding takes away what the output has too much."""
    found, mode = _stated(b.view, kernel), pads_to_size(b.view)
    shape, rank = b.view.attribute("output_shape", ()), len(kernel)
    if not mode and not shape:
        return found
    sizes = b.sizes(0, range(2, 2 + rank)) if shape else [1] * rank
    kept = shape[-rank:] if shape else [s.stride for s in found]
    more = b.view.attribute("output_padding", [0] * rank)
    full = [s.stride * (size - 1) + m + s.extent for s, size, m in zip(found, sizes, more, strict=True)]
    return [s.padded(f - k, mode) for s, f, k in zip(found, full, kept, strict=True)]


def _stated(view: NodeView, kernel: Sequence[int]) -> list[Slide]:
    rank = len(kernel)
    ones, pads = [1] * rank, view.attribute("pads", [0] * 2 * rank)
    strides, dilations = view.attribute("strides", ones), view.attribute("dilations", ones)
    return [Slide(*numbers) for numbers in zip(kernel, strides, dilations, pads[:rank], pads[rank:], strict=True)]
