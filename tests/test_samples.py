"""Samples: digests, batches, parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from data_files import IDS, ONE, TWO, X, Y, spec
from hypothesis import given
from hypothesis import strategies as st

from mscompile.errors import DataError, UsageError
from mscompile.intake.data import read
from mscompile.intake.samples import InputSpec, Samples


def test_digest_depends_on_everything() -> None:
    base = {"x": X, "ids": IDS}
    variants: list[tuple[Mapping[str, Any], list[InputSpec]]] = [
        (base, TWO),
        ({**base, "y": Y}, TWO),
        ({**base, "y": Y + 1}, TWO),
        ({**base, "y": Y.astype("i4")}, TWO),
        ({**base, "x": X + 1}, TWO),
        ({**base, "x": X[::-1]}, TWO),
        ({"x": X}, ONE),
        ({"x": X.reshape(3, 5)}, [spec(shape=("N", 5))]),
        ({"x": X.view("i4")}, [spec(dtype="i4")]),
        ({"z": X}, [spec("z")]),
    ]
    assert len({read(arrays, specs).sha256 for arrays, specs in variants}) == len(variants)
    assert read(base, TWO).sha256 == read(base, TWO[::-1]).sha256


def numbered(n: int) -> Samples:
    x = np.arange(n, dtype=np.float32)
    return Samples({"x": np.stack([x, -x], 1), "ids": np.arange(n)}, np.arange(n) * 10, "numbers", ("a note",))


def aligned(samples: Samples) -> list[int]:
    ids: list[int] = samples.inputs["ids"].tolist()
    assert samples.inputs["x"].tolist() == [[i, -i] for i in ids]
    assert samples.labels is not None
    assert samples.labels.tolist() == [10 * i for i in ids]
    return ids


@given(st.integers(1, 40), st.integers(1, 50))
def test_batches_are_complete_and_in_order(n: int, size: int) -> None:
    batches = list(numbered(n).batches(size))
    assert [len(b["x"]) for b in batches[:-1]] == [size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]["x"]) <= size
    assert [i for b in batches for i in b["ids"].tolist()] == list(range(n))
    assert [i for b in batches for i in b["x"][:, 0].tolist()] == list(range(n))


def test_batches_are_views() -> None:
    samples = numbered(4)
    assert np.shares_memory(next(samples.batches(2))["x"], samples.inputs["x"])
    with pytest.raises(UsageError):
        next(samples.batches(0))


@given(st.integers(1, 60), st.lists(st.floats(0.01, 100), min_size=1, max_size=4), st.integers(0, 2**32))
def test_split_puts_every_sample_into_exactly_one_part(n: int, shares: list[float], seed: int) -> None:
    samples = numbered(n)
    exact = [n * share / sum(shares) for share in shares]
    try:
        parts = samples.split(shares, seed)
    except DataError:
        assert min(exact) < 1.5
        return
    ids = [aligned(part) for part in parts]
    assert sorted(i for part in ids for i in part) == list(range(n))
    assert all(part == sorted(part) for part in ids)
    assert all(abs(len(part) - size) <= 1 for part, size in zip(ids, exact, strict=True))
    assert all(len(part) > 0 for part in parts)
    assert [part.sha256 for part in parts] == [part.sha256 for part in samples.split(shares, seed)]


def test_split_depends_on_the_seed_and_keeps_the_source() -> None:
    parts = numbered(100).split((1, 1), 0)
    assert aligned(parts[0]) != aligned(numbered(100).split((1, 1), 1)[0])
    assert aligned(parts[0]) != list(range(50))
    assert {(part.source, part.notes) for part in parts} == {("numbers", ("a note",))}


@pytest.mark.parametrize("shares", [(), (1, 0), (1, -1), (1, float("nan")), (1, float("inf"))])
def test_split_needs_positive_shares(shares: tuple[float, ...]) -> None:
    with pytest.raises(UsageError):
        numbered(10).split(shares, 0)


def test_split_of_too_few() -> None:
    with pytest.raises(DataError, match="leave a part empty"):
        numbered(2).split((1, 1, 1), 0)


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=9))))
def test_take_follows_the_indices(case: tuple[int, list[int]]) -> None:
    n, indices = case
    samples = numbered(n)
    assert aligned(samples.take(indices)) == indices
    assert aligned(samples.take(np.array(indices, np.int64))) == indices
    mask = np.isin(np.arange(n), indices)
    assert aligned(samples.take(mask)) == sorted(set(indices))
    assert len(samples.take(indices)) == len(indices)


def test_take_of_a_slice_is_a_view_of_its_own_digest() -> None:
    samples = numbered(10)
    part = samples.take(slice(2, 5))
    assert aligned(part) == [2, 3, 4]
    assert np.shares_memory(part.inputs["x"], samples.inputs["x"])
    assert part.sha256 == samples.take([2, 3, 4]).sha256 != samples.sha256
    assert aligned(samples.take(slice(None, None, 3))) == [0, 3, 6, 9]
    assert samples.take(slice(None, None, 3)).inputs["x"].flags.c_contiguous
    with pytest.raises(IndexError):
        samples.take([10])
