"""Operators that are declared only to say what they are: a barrier with a better reason than none."""

from __future__ import annotations

from mscompile.operators.axes import Barrier, Operator

ML = "ai.onnx.ml"
RECURRENT = Barrier("is recurrent: its state feeds back into every channel")
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
