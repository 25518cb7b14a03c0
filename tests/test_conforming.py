"""What a model makes of data: types, names, shapes, values, labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import BF16, IDS, ONE, TWO, X, Y, as_npz, as_sets, conforms, refused, spec
from safetensors.numpy import save_file

from mscompile.errors import UnsupportedError, UsageError
from mscompile.intake import conforming, sources
from mscompile.intake.data import read
from mscompile.intake.samples import InputSpec

# --- dtypes ----------------------------------------------------------------------------------------------------------


BIG = 2**24
EXACT = {
    "f2 to f4": (np.array([1.5, -2], "f2"), "f4"),
    "f4 to f8": (np.array([1.1, 3e38], "f4"), "f8"),
    "i1 to i8": (np.array([-128, 127], "i1"), "i8"),
    "u1 to i4": (np.array([0, 255], "u1"), "i4"),
    "i8 to i4": (np.array([-(2**31), 2**31 - 1], "i8"), "i4"),
    "i8 to u1": (np.array([0, 255], "i8"), "u1"),
    "u8 to i8": (np.array([0, 2**63 - 1], "u8"), "i8"),
    "i8 to bool": (np.array([0, 1], "i8"), "?"),
    "bool to i8": (np.array([True, False]), "i8"),
    "bool to f4": (np.array([True, False]), "f4"),
    "u1 to f4": (np.array([0, 255], "u1"), "f4"),
    "i8 to f4": (np.array([-BIG, BIG], "i8"), "f4"),
    "i8 to f8": (np.array([-(2**53), 2**53], "i8"), "f8"),
    "i4 to f2": (np.array([-2048, 2048], "i4"), "f2"),
    "u1 to bf16": (np.array([0, 255], "u1"), BF16),
    "f4 to f2": (np.array([0.5, 65504, np.inf, np.nan], "f4"), "f2"),
    "f8 to f2": (np.array([0.5, -1], "f8"), "f2"),
    "bf16 to f4": (np.array([0.5, -1], BF16), "f4"),
}
LOSSY = {
    "f8 beyond f4": (np.array([1.0, 1e39], "f8"), "f4"),
    "f4 beyond bf16": (np.array([1.0, 3.4028e38], "f4"), BF16),
    "f4 to f2": (np.array([1.0, 0.1], "f4"), "f2"),
    "f4 beyond f2": (np.array([1.0, 1e6], "f4"), "f2"),
    "f4 to i8": (np.array([1.0, 2.5], "f4"), "i8"),
    "whole f4 to i8": (np.array([1.0, 2.0], "f4"), "i8"),
    "f4 to bool": (np.array([1.0, 0.0], "f4"), "?"),
    "i8 beyond i4": (np.array([0, 2**31], "i8"), "i4"),
    "i8 below i4": (np.array([0, -(2**31) - 1], "i8"), "i4"),
    "u8 beyond i8": (np.array([0, 2**63], "u8"), "i8"),
    "i1 below u8": (np.array([0, -1], "i1"), "u8"),
    "i8 beyond bool": (np.array([0, 2], "i8"), "?"),
    "i8 beyond f4": (np.array([0, BIG + 1], "i8"), "f4"),
    "least i8 to f8": (np.array([0, -(2**63)], "i8"), "f8"),
    "i4 beyond f2": (np.array([0, 2049], "i4"), "f2"),
    "i4 beyond bf16": (np.array([0, 257], "i4"), BF16),
}


@pytest.mark.parametrize(("x", "declared"), EXACT.values(), ids=EXACT)
def test_conversions_that_keep_every_value(x: np.ndarray[Any, Any], declared: Any) -> None:
    samples = read({"x": x}, [spec(dtype=declared, shape=("N",))], allow_nan=True)
    assert samples.inputs["x"].dtype == declared
    np.testing.assert_array_equal(samples.inputs["x"].astype("f8"), x.astype("f8"))
    assert f"'x': {x.dtype} converted exactly" in samples.notes[0]
    assert ("not scaled" in samples.notes[0]) is (x.dtype.kind in "iu")


@pytest.mark.parametrize(("x", "declared"), LOSSY.values(), ids=LOSSY)
def test_conversions_that_would_change_a_value(x: np.ndarray[Any, Any], declared: Any) -> None:
    message = refused({"x": x}, [spec(dtype=declared, shape=("N",))])
    assert f".astype({np.dtype(declared).name!r})" in message
    assert f"{x.dtype} value" in message


@pytest.mark.parametrize(("own", "declared"), [("f8", "f4"), ("f8", BF16), ("f4", BF16)])
def test_floats_are_rounded_where_numpy_users_cannot_help_it(own: str, declared: Any) -> None:
    x = np.array([[0.1, 1 / 3, 1e-300 if own == "f8" else 1e-45], [1e30, -7, 0]], own)
    samples = read({"x": x}, [spec(dtype=declared)])
    np.testing.assert_array_equal(samples.inputs["x"], x.astype(declared))
    assert samples.notes == (f"'x': {np.dtype(own)} rounded to {np.dtype(declared)}",)


def test_infinities_are_not_an_overflow() -> None:
    x = np.array([[np.inf, -np.inf, np.nan], [1, 2, 3]])
    assert "not finite" in refused({"x": x})
    np.testing.assert_array_equal(read({"x": x}, ONE, allow_nan=True).inputs["x"], x)


def test_conversion_says_which_sample_is_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conforming, "PIECE", 64)
    x = np.ones((20, 3))
    x[17, 1] = 1e300
    message = refused({"x": x})
    assert "1e+300 of sample 17" in message


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i2", ">i8", ">f2"])
def test_foreign_byte_order_is_swapped(dtype: str, tmp_path: Path) -> None:
    x = np.arange(15).reshape(5, 3).astype(dtype)
    np.save(tmp_path / "a.npy", x)
    samples = read(tmp_path / "a.npy", ONE)
    assert conforms(samples, ONE)
    np.testing.assert_array_equal(samples.inputs["x"], np.arange(15).reshape(5, 3))
    assert "byte order" in samples.notes[0]
    labelled = read({"x": X, "y": x[:, 0]}, ONE)
    assert labelled.labels.dtype.isnative
    assert labelled.labels.tolist() == [0, 3, 6, 9, 12]


def test_bfloat16_comes_back_from_every_format(tmp_path: Path) -> None:
    x, specs = X.astype(BF16), [spec(dtype=BF16)]
    np.savez(tmp_path / "a.npz", x=x)
    save_file({"x": x}, tmp_path / "a.safetensors")
    for src in (tmp_path / "a.npz", tmp_path / "a.safetensors", as_sets(tmp_path / "sets", {"x": x}), {"x": x}):
        samples = read(src, specs)
        assert conforms(samples, specs)
        np.testing.assert_array_equal(samples.inputs["x"].astype("f4"), X)
        assert samples.notes == ()
    assert "NaN" in refused({"x": np.full((2, 3), np.nan, BF16)}, specs)


# --- names, shapes, counts -------------------------------------------------------------------------------------------


def test_names_that_do_not_match_are_tabulated() -> None:
    message = refused({"X": X, "idz": IDS}, TWO)
    assert "'x' float32 (N, 3)" in message
    assert "'X' float32 (5, 3)" in message
    assert "did you mean to rename 'X' to 'x', 'idz' to 'ids'?" in message
    message = refused({"x": X}, TWO)
    assert "'x'" not in message.split("why:")[1]
    assert "'ids' int64 (N, 2)" in message
    message = refused({"x": X, "weights\x1b[2J": X})
    assert "'weights\\x1b[2J'" in message
    assert "label" in message.split("try:")[1]


def test_table_of_names_stays_small() -> None:
    message = refused({f"k{i}{'z' * 900}": X for i in range(100)}, [spec(f"input{i}") for i in range(100)])
    assert "and 92 more" in message
    assert len(message) < 4000


SHAPES = {
    "rank": ((5,), ("N", 3), "declared shape"),
    "dimension": ((5, 4), ("N", 3), "declared 'x' float32 (N, 3), found float32 (5, 4)"),
    "one sample": ((28, 28), (None, 28, 28), "x[None]"),
    "scalar": ((), ("N",), "x[None]"),
    "missing channel": ((5, 28, 28), ("N", 1, 28, 28), "x.reshape(-1, 1, 28, 28)"),
    "flat": ((5, 28, 28), ("N", 784), "x.reshape(-1, 784)"),
    "channels last": ((5, 32, 32, 3), ("N", 3, 32, 32), "np.moveaxis(x, -1, 1)"),
}


@pytest.mark.parametrize(("found", "declared", "said"), SHAPES.values(), ids=SHAPES)
def test_wrong_shapes(found: tuple[int, ...], declared: tuple[Any, ...], said: str) -> None:
    assert said in refused({"x": np.zeros(found, np.float32)}, [spec(shape=declared)])


def test_advice_on_shapes_can_be_followed() -> None:
    x = np.random.default_rng(0).random((5, 4, 6, 3), np.float32)
    assert len(read({"x": np.moveaxis(x, -1, 1)}, [spec(shape=("N", 3, 4, 6))])) == 5
    assert len(read({"x": x.reshape(-1, 72)}, [spec(shape=("N", 72))])) == 5


def test_text_of_the_model_is_escaped() -> None:
    shape = (None, "T", "a\x1b[2J", 7, "d" * 900)
    assert str(spec("x\n", shape=shape)) == f"'x\\n' float32 (?, T, 'a\\x1b[2J', 7, '{'d' * 58}…)"


def test_free_dimensions_take_any_size() -> None:
    assert read({"x": X}, [spec(shape=(None, "T"))]).inputs["x"].shape == (5, 3)


def test_counts_must_agree() -> None:
    assert "5 in 'x', 4 in 'ids'" in refused({"x": X, "ids": IDS[:4]}, TWO)
    assert "5 in 'x', 4 in the labels" in refused({"x": X, "label": Y[:4]})


def test_ragged_chunks_are_refused_and_fixed_ones_joined() -> None:
    free = [spec(shape=("N", "T"))]
    message = refused([{"x": X}, {"x": X[:, :2]}], free)
    assert "float32 (5, 3) before and is float32 (5, 2) here" in message
    assert "batch 1" in message
    assert len(read([{"x": X}, {"x": X[:1]}], free)) == 6


@pytest.mark.parametrize(
    "specs",
    [
        [],
        [spec(shape=())],
        [spec(shape=(0, 3))],
        [spec(shape=(2, 3)), spec("z", shape=(3,))],
    ],
)
def test_models_that_cannot_be_fed(specs: list[InputSpec]) -> None:
    assert "axis 0" in refused({"x": X}, specs)


@pytest.mark.parametrize("dtype", ["O", "U", "c8", "M8[s]"])
def test_models_that_do_not_take_numbers(dtype: str) -> None:
    assert "numbers" in refused({"x": X}, [spec(dtype=dtype)], UnsupportedError)


STATE = np.arange(8, dtype=np.float32).reshape(2, 1, 4)
SHARING = [spec(), spec("h", shape=(2, 1, 4)), spec("rate", np.int64, ())]


def test_inputs_without_a_sample_axis_go_with_every_batch() -> None:
    samples = read({"x": X, "h": STATE, "rate": np.array(16, np.int32), "y": Y}, SHARING)
    assert (len(samples), samples.shared) == (5, {"h", "rate"})
    assert sum("goes with every batch" in note for note in samples.notes) == 2
    for part in (*samples.split((1, 1), 0), samples.take([0, 3]), read(samples, SHARING, limit=4)):
        assert len(part) in (2, 3, 4)
        np.testing.assert_array_equal(part.inputs["h"], STATE)
        assert part.inputs["rate"] == 16
    batches = list(samples.batches(2))
    assert [len(batch["x"]) for batch in batches] == [2, 2, 1]
    assert all(batch["h"].shape == (2, 1, 4) for batch in batches)
    rounds = read(iter([{"x": X, "h": STATE, "rate": np.array(16)}] * 2), SHARING)
    assert (len(rounds), rounds.shared, len(rounds.inputs["h"])) == (10, {"h", "rate"}, 2)


def test_shared_inputs_that_differ_or_count_samples() -> None:
    assert "not the same in all chunks" in refused(
        iter([{"x": X, "h": STATE + i, "rate": np.array(16)} for i in range(2)]), SHARING
    )
    states = np.arange(4 * 4, dtype=np.float32).reshape(4, 1, 4)  # one state for each of four samples
    assert read({"x": X[:4], "h": states, "rate": np.array(1)}, SHARING).shared == {"rate"}
    assert "sample counts differ" in refused({"x": X[:3], "h": states, "rate": np.array(1)}, SHARING)


@pytest.mark.parametrize(("batch", "kept"), [(1, 5), (2, 4), (4, 4), (5, 5)])
def test_fixed_batch_drops_the_tail(batch: int, kept: int) -> None:
    samples = read({"x": X, "ids": IDS, "y": Y}, [spec(shape=(batch, 3)), TWO[1]])
    np.testing.assert_array_equal(samples.inputs["x"], X[:kept])
    assert len(samples.inputs["ids"]) == len(samples.labels) == kept
    assert samples.notes == (
        (f"the last {5 - kept} of 5 samples are left out: the model takes batches of {batch}",) if kept < 5 else ()
    )


def test_fixed_batch_that_is_not_reached() -> None:
    assert "exactly 8, found 5" in refused({"x": X}, [spec(shape=(8, 3))])


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conforming, "PIECE", 48)
    x = np.ones((20, 3), np.float32)
    x[13, 2] = x[13, 0] = x[19, 1] = value
    said = "3 values of 'x' are NaN or infinite, the first in sample 13"
    assert said in refused({"x": x})
    assert said in refused([{"x": x[:10]}, {"x": x[10:]}])
    assert said in read({"x": x}, ONE, allow_nan=True).notes
    assert "the labels" in refused({"x": X, "y": x[9:14, 0]})


def test_weak_data_is_noted() -> None:
    assert "all samples are identical" in read({"x": np.ones((5, 3), np.float32)}, ONE).notes
    assert "all samples are identical" not in read({"x": np.ones((5, 3), np.float32), "ids": IDS}, TWO).notes
    assert read({"x": X[:1]}, ONE).notes == ("there is one sample only",)


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sources.LABEL_NAMES)
def test_labels_are_recognised(name: str, tmp_path: Path) -> None:
    samples = read(as_npz(tmp_path / "a.npz", x=X, **{name: Y}), ONE)
    np.testing.assert_array_equal(samples.labels, Y)
    assert samples.notes == ()
    both = read({"x": X, name: Y[:, None]}, [spec(), spec(name, np.int64, ("N", 1))])
    assert both.labels is None


def test_labels_by_name() -> None:
    arrays = {"x": X, "truth": Y, "label": Y + 1}
    samples = read(arrays, ONE, labels="truth")
    np.testing.assert_array_equal(samples.labels, Y)
    assert samples.notes == ("'label' is left out: the labels are 'truth'",)
    assert "'truth'" in refused(arrays)
    assert "no array 'other'" in refused({"x": X}, labels="other")
    assert "no array 'other'" in refused({"x": X, "y": Y}, labels="other")
    assert "--labels" in refused({"x": X, "label": Y, "target": Y})
    assert "labels" in refused({"x": X}, error=UsageError, labels="x")


def test_labels_keep_their_dtype_and_shape() -> None:
    for y in (Y.astype("i1"), np.eye(5), np.zeros((5, 1), bool)):
        labels = read({"x": X, "y": y}, ONE).labels
        assert labels.dtype == y.dtype
        np.testing.assert_array_equal(labels, y)
    assert "the labels" in refused({"x": X, "y": np.full(5, "cat")})
    assert "sample counts differ" in refused({"x": X, "y": np.int64(3)})


def test_labels_are_on_all_chunks_or_none() -> None:
    assert "only some" in refused([{"x": X, "y": Y}, {"x": X}])
    assert "only some" in refused([{"x": X}, {"x": X, "y": Y}])
    samples = read([{"x": X, "y": Y}, {"x": X, "y": Y + 5}], ONE)
    assert samples.labels.tolist() == [*Y, *(Y + 5)]


def test_samples_are_read_again_as_they_are() -> None:
    first = read({"x": X.astype("f8"), "truth": Y}, ONE, labels="truth")
    for again in (read(first, ONE), read(first, ONE, labels="truth")):
        assert (again.sha256, again.source, again.notes) == (first.sha256, first.source, first.notes)
    assert "'x'" in refused(first, [spec("y")])
