"""A sample of onnx's own node models; ``tests/benchmarks/backend_models.py`` takes all of them."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from backend_models import node_models, outcomes

EVERY = 15
FEWEST_CUT = 10
"""Of some 20 that can be cut in the middle of a network."""


def test_node_models_are_cut_passed_through_or_refused():
    counts = Counter(found for name, found in outcomes(EVERY))
    assert counts["cut"] >= FEWEST_CUT
    assert counts.total() >= len(node_models()) // EVERY


@pytest.mark.parametrize(
    "name",
    [
        "test_attention_local_window_expanded",  # holds constants that onnxruntime cannot compute
        "test_split_zero_size_splits_opset13",  # no samples
        "test_spacetodepth_crd_mode_example",
        "test_slice_start_out_of_bounds",  # no channels
        "test_ai_onnx_ml_label_encoder_string_int",  # does not import the default domain
    ],
)
def test_node_models_that_once_failed(name: str):
    assert [found for _, found in outcomes(match=f"^{name}$")]
