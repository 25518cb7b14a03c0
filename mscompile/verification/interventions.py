"""Interventions on any ONNX model: read units, set them, and run what follows.

Useful by itself, for activation patching in any framework that exports ONNX:

    model = Intervened(onnx.load("model.onnx"), [Patch("relu_1", rank=2, axis=1)])
    clean = model.read(inputs)                                        # outputs, and the tensor at every site
    mask = np.zeros((len(x), 512), dtype=bool); mask[:, 7] = True     # unit 7 of every sample …
    patched = model.run(inputs, {"relu_1": (mask, other["relu_1"])})  # … as it is on another input
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from mscompile.runtime import Arrays, Session
from mscompile.verification.skeletons import Skeleton, weightless
from mscompile.verification.surgery import MASK, SOURCE, Patch, patched, probe

Feed = Mapping[str, npt.NDArray[Any]]
Setting = tuple[npt.NDArray[np.bool_], npt.NDArray[Any]]
"""[samples, channels]: which units are set; and their values: like the tensor, or anything that broadcasts to it.

Where a tensor holds the samples on another axis than the first, or positions on the same one, its `Patch.layout` says so.
"""


class Intervened:
    """A model whose units can be read and set.

    The graphs it runs hold no weights: the sessions share one copy. onnxruntime's own rewrites are off unless `optimise`
    allows them, so that a run in which nothing is set equals the plain one bit for bit.

    Parameters
    ----------
    model
        Any model; it is not changed.
    patches
        The tensors whose units are read or set.
    threads
        Threads per operator; onnxruntime's own choice if None.

    Attributes
    ----------
    digits
        Binary digits of the narrowest 16-bit floats in the model; None where there are none.
    """

    def __init__(
        self,
        model: onnx.ModelProto | Skeleton,
        patches: Sequence[Patch],
        *,
        optimise: bool = False,
        threads: int | None = None,
    ) -> None:
        self.patches = tuple(patches)
        skeleton = weightless(model)
        graph = skeleton.proto.graph
        kinds = {tensor.data_type for tensor in graph.initializer} | {
            value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)
        }
        narrow = {onnx.TensorProto.BFLOAT16: 7, onnx.TensorProto.FLOAT16: 10}
        self.digits = next((digits for kind, digits in narrow.items() if kind in kinds), None)
        tensors = [patch.tensor for patch in patches]
        self.outputs = [output.name for output in graph.output]
        self._plain = Session(probe(skeleton, tensors), optimise=optimise, threads=threads, spin=False)
        self._surgery = patched(skeleton, patches)
        self._open = partial(Session, optimise=optimise, threads=threads, spin=False)
        inputs = self._surgery.proto.graph.input
        self._dtypes = {i.name: onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in inputs}

    @cached_property
    def _patched(self) -> Session:
        return self._open(self._surgery)

    def read(self, inputs: Feed, names: Sequence[str] | None = None) -> Arrays:
        """Outputs and sites of a plain run, or those of them that are named."""
        return self._plain.run(self._cast(inputs), names)

    def run(self, inputs: Feed, settings: Mapping[str, Setting], outputs: Sequence[str] | None = None) -> Arrays:
        """Outputs where the units that `settings` names by tensor are set, and everything behind them is recomputed."""
        return self._patched.run(self.feeds(inputs, settings), outputs if outputs is not None else self.outputs)

    def feeds(self, inputs: Feed, settings: Mapping[str, Setting]) -> Arrays:
        """What the patched graph is given, see `surgery.patched`."""
        feeds: Arrays = dict(self._cast(inputs))
        for patch in self.patches:
            mask_name, source_name = MASK + patch.tensor, SOURCE + patch.tensor
            dtype = self._dtypes[source_name]
            if patch.tensor not in settings:
                feeds[mask_name] = np.zeros((1,) * patch.rank, dtype=np.bool_)
                feeds[source_name] = np.zeros((1,) * patch.rank, dtype=dtype)
                continue
            mask, values = settings[patch.tensor]
            feeds[mask_name] = patch.mask(mask, values.shape[patch.layout.axis])
            feeds[source_name] = values.astype(dtype, copy=False)
        return feeds

    def _cast(self, inputs: Feed) -> Feed:
        """Inputs in the model's own floating-point types: a 16-bit model reads the same data as its dense original."""
        return {
            name: array.astype(self._dtypes[name], copy=False) if array.dtype.kind == "f" else array
            for name, array in inputs.items()
        }
