"""Operators that are declared only to say what they are: a barrier with a better reason than none."""

from __future__ import annotations

from mscompile.operators.axes import Barrier, NodeView, Operator, Port

ML = "ai.onnx.ml"


def _samples(node: NodeView) -> tuple[Port, ...]:
    """Of a recurrent operator: of what it reads and of its states, those it begins with and leaves."""
    if node.attribute("layout", 0):
        return ((0, 0), (5, 0), (6, 0), (~0, 0), (~1, 0), (~2, 0))
    return ((0, 1), (5, 1), (6, 1), (~0, 2), (~1, 1), (~2, 1))


RECURRENT = Barrier("is recurrent: its state feeds back into every channel", _samples)
CONTROL = Barrier("runs subgraphs, whose insides are left alone")
QUANTISED = Barrier("is quantised: cutting it would need its scales to be fitted again")
PREPROCESSING = Barrier("prepares the data")

ROWS = (
    *(Operator(name, RECURRENT) for name in ("LSTM", "GRU", "RNN")),
    *(Operator(name, CONTROL) for name in ("If", "Loop", "Scan")),
    *(
        Operator(name, QUANTISED)
        for name in (
            "QuantizeLinear",
            "DequantizeLinear",
            "DynamicQuantizeLinear",
            "QLinearConv",
            "QLinearMatMul",
            "ConvInteger",
            "MatMulInteger",
        )
    ),
    *(Operator(name, PREPROCESSING, domain=ML, like=0) for name in ("Scaler", "Imputer", "Normalizer", "Binarizer")),
)
