"""Chunks made to conform to the inputs that a model declares, and joined: no value changes without a note."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import ml_dtypes
import numpy as np

from mscompile.errors import DataError, UnsupportedError, UsageError
from mscompile.intake import room
from mscompile.intake.arrays import UNNAMED
from mscompile.intake.samples import InputSpec
from mscompile.intake.sources import LABEL_NAMES, Chunks, Notes
from mscompile.intake.words import LABELS, Array, brief, form, quoted, titled

BF16, VOID16 = np.dtype(ml_dtypes.bfloat16), np.dtype("V2")  # the second is what .npy files make of the first
PIECE = 1 << 24  # bytes handled at a time when scanning and converting
ROUNDED = {("float64", "float32"), ("float64", "bfloat16"), ("float32", "bfloat16")}  # numpy writes no bfloat16
SIGNIFICANT = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}  # bits, the implied one included


def check_specs(specs: Sequence[InputSpec], labels: str | None) -> None:
    """Refuse what the model declares where no samples can be fed to it."""
    for spec in specs:
        if spec.dtype.kind not in "fiub" and spec.dtype != BF16:
            hint = "make the conversion to numbers part of the preprocessing, outside the model"
            raise UnsupportedError("an input is not made of numbers", where=str(spec), why="samples are", hint=hint)
        if spec.name == labels:
            raise UsageError("labels cannot be an input", where=str(spec), why="labels are compared", hint="rename one")
    fixed = {spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)}
    free = any(spec.shape and not isinstance(spec.shape[0], int) for spec in specs)
    if 0 in fixed or not (free or len(fixed) == 1):
        raise _no_samples(specs)


def _no_samples(specs: Sequence[InputSpec]) -> DataError:
    """The error for inputs that no number of samples fits."""
    why = "axis 0 of every input must count samples, the same number for all inputs, unless all its dimensions are fixed"
    hint = "export the model with a batch axis first in every input"
    return DataError("samples cannot be fed", where=brief(map(str, specs)) or "no input", why=why, hint=hint)


def shared_inputs(arrays: Mapping[str, Array], specs: Sequence[InputSpec]) -> frozenset[str]:
    """Inputs whose array has the fully fixed declared shape, while those of free axis 0 carry another number of samples."""
    counts = {len(arrays[spec.name]) for spec in specs if spec.shape and not isinstance(spec.shape[0], int)}
    return frozenset(
        spec.name
        for spec in specs
        if spec.shape == arrays[spec.name].shape and (not spec.shape or (counts and spec.shape[0] not in counts))
    )


def fixed_batch(specs: Sequence[InputSpec], shared: frozenset[str] = frozenset()) -> int | None:
    """Number of samples that the model takes at a time; None where that is free.

    Raises
    ------
    DataError
        Inputs take different numbers.
    """
    fixed = {spec.shape[0] for spec in specs if spec.name not in shared and spec.shape and isinstance(spec.shape[0], int)}
    if len(fixed) > 1:
        raise _no_samples(specs)
    return next((size for size in fixed if isinstance(size, int)), None)


def collect(chunks: Chunks, specs: Sequence[InputSpec], label: str | None, goal: int, notes: Notes) -> dict[str, Array]:
    """Join conforming chunks until `goal` samples are there; labels are under LABELS."""
    parts: dict[str, list[Array]] = {}
    count = held = 0
    common: frozenset[str] = frozenset()
    free = room.available_memory()
    for i, (where, raw) in enumerate(chunks):
        arrays = _conform(where, raw, specs, label, notes)
        parts = parts or {name: [] for name in arrays}
        if parts.keys() != arrays.keys():
            why = f"{'labels' if LABELS in arrays else 'no labels'} here, unlike before"
            raise DataError("only some of the samples have labels", where=where, why=why, hint="label all or none")
        common = shared_inputs(arrays, specs) if i == 0 else common
        for name, x in arrays.items():
            if name in common:
                if parts[name] and not np.array_equal(x, parts[name][0]):
                    why = f"{titled(name)} has no sample axis and is not the same in all chunks"
                    raise DataError(
                        "a shared input differs", where=where, why=why, hint="give the same array with all samples"
                    )
                parts[name] = [x]
                continue
            if parts[name] and x.shape[1:] != parts[name][0].shape[1:]:
                why = f"{titled(name)} was {form(parts[name][0])} before and is {form(x)} here"
                raise DataError("ragged samples", where=where, why=why, hint="pad all samples to one shape")
            parts[name].append(x)
        count += next(len(arrays[spec.name]) for spec in specs if spec.name not in common)
        held += sum(x.nbytes for x in arrays.values())
        if i and held > free:
            raise room.too_large(held, free, where)
        if count >= goal:
            break
    joined = {}
    while parts:
        name, pieces = parts.popitem()
        if len(pieces) > 1:
            room.check_room(sum(x.nbytes for x in pieces), where)
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        joined[name] = whole if name in common else whole[:goal]
    return joined


def _conform(
    where: str, raw: Mapping[str, Array], specs: Sequence[InputSpec], label: str | None, notes: Notes
) -> dict[str, Array]:
    """Return one array per declared input, of its dtype and shape, and the labels if any under LABELS."""
    found = _match(where, raw, specs, label, notes)
    arrays = {}
    for spec in specs:
        x = found[spec.name]
        x = x.view(BF16) if spec.dtype == BF16 and x.dtype == VOID16 else x
        _check_numbers(x, titled(spec.name), where)
        _check_shape(x, spec, where)
        arrays[spec.name] = _cast(x, spec.dtype, titled(spec.name), where, notes)
    if LABELS in found:
        _check_numbers(found[LABELS], titled(LABELS), where)
        own = found[LABELS].dtype.newbyteorder("=")
        arrays[LABELS] = _cast(found[LABELS], own, titled(LABELS), where, notes)
    shared = shared_inputs(arrays, specs)
    counts = {titled(name): len(x) if x.ndim else 0 for name, x in arrays.items() if name not in shared}
    if len(set(counts.values())) > 1:
        why = brief(f"{count} in {name}" for name, count in counts.items())
        raise DataError("sample counts differ", where=where, why=why, hint="axis 0 counts samples in every array")
    if not any(arrays[spec.name].size for spec in specs):
        why = brief(f"{titled(name)} is {form(x)}" for name, x in arrays.items())
        raise DataError("there are no samples", where=where, why=why, hint="axis 0 counts samples in every array")
    return arrays


def _match(
    where: str, raw: Mapping[str, Array], specs: Sequence[InputSpec], label: str | None, notes: Notes
) -> dict[str, Array]:
    """Return the arrays under the names the model declares, labels under LABELS; every name must be accounted for."""
    names = {spec.name: spec for spec in specs}
    found = dict(raw)
    if len(specs) == 1 and UNNAMED in found and specs[0].name not in found:
        found = {specs[0].name: found.pop(UNNAMED), **found}
    alike = [name for name in LABEL_NAMES if name in found and name not in names]
    if label is None and len(alike) > 1:
        why = f"{' and '.join(alike)} all look like labels"
        raise DataError("labels are ambiguous", where=where, why=why, hint="name the one with --labels")
    key = label or (alike[0] if alike else None)
    missing = [name for name in names if name not in found]
    extra = [name for name in found if name not in names and name not in alike and name != key]
    if missing or extra:
        raise _wrong_names(where, [names[name] for name in missing], {name: found[name] for name in extra})
    if key is not None and key not in found:
        hint = f"labels are one of: {', '.join(alike)}" if alike else "add them under that name, or drop --labels"
        raise DataError("the labels are missing", where=where, why=f"there is no array {quoted(key)}", hint=hint)
    for name in (name for name in alike if name != key):
        notes[f"{quoted(name)} is left out: the labels are {quoted(str(key))}"] = None
    return {name: found[name] for name in names} | ({} if key is None else {LABELS: found[key]})


def _wrong_names(where: str, missing: Sequence[InputSpec], extra: Mapping[str, Array]) -> DataError:
    """Return the error for names that do not match: a table of what differs, and what may have been meant."""
    left = ["expected", *map(str, missing)]
    right = ["found instead", *(f"{quoted(name)} {form(x)}" for name, x in extra.items())]
    width = max(map(len, left[:9]))
    rows = [f"{a:<{width}}  {b}".rstrip() for a, b in zip_longest(left, right, fillvalue="-")]
    rows[9:] = [f"and {len(rows) - 9} more"] if len(rows) > 9 else []
    folded = {name.casefold(): name for name in extra}
    close = [(spec.name, difflib.get_close_matches(spec.name.casefold(), folded, n=1)) for spec in missing[:8]]
    meant = [f"{quoted(folded[match[0]])} to {quoted(name)}" for name, match in close if match]
    if UNNAMED in extra:
        hint = "an array without a name serves models of one input only: np.savez(path, NAME=array, ...)"
    elif meant:
        hint = f"did you mean to rename {', '.join(meant)}?"
    else:
        hint = "name the arrays as the model names its inputs; labels go under 'label' or --labels NAME"
    return DataError("names do not match the inputs of the model", where=where, why="\n         ".join(rows), hint=hint)


def _check_shape(x: Array, spec: InputSpec, where: str) -> None:
    """Compare rank and fixed dimensions, axis 0 aside."""
    sizes = spec.shape[1:]
    fixed = [size for size in sizes if isinstance(size, int)]

    def fits(shape: Sequence[int]) -> bool:
        pairs = zip(sizes, shape, strict=False)
        return len(shape) == len(sizes) and all(a == b or not isinstance(a, int) for a, b in pairs)

    if x.shape == spec.shape == () or (x.ndim and fits(x.shape[1:])):
        return
    hint = "give it the declared shape"
    if fits(x.shape):
        hint = "a single sample needs axis 0, too: x[None]"
    elif x.ndim > 2 and fits((x.shape[-1], *x.shape[1:-1])):
        hint = "channels come first here: np.moveaxis(x, -1, 1)"
    elif fits(fixed) and math.prod(fixed) == math.prod(x.shape[1:]):
        hint = f"x.reshape{(-1, *fixed)} has the declared shape"
    what, why = f"{titled(spec.name)} has the wrong shape", f"declared {spec}, found {form(x)}"
    raise DataError(what, where=where, why=why, hint=hint)


def _check_numbers(x: Array, title: str, where: str) -> None:
    if x.dtype.kind in "fiub" or x.dtype == BF16:
        return
    hints = {"O": "pad ragged samples to one shape: np.stack must accept them", "V": "pass one plain array per input"}
    hint = hints.get(x.dtype.kind, "encode them as real numbers, as in training")
    raise DataError(f"{title} does not hold real numbers", where=where, why=f"found {form(x)}", hint=hint)


def _cast(x: Array, dtype: np.dtype[Any], title: str, where: str, notes: Notes) -> Array:
    """Return `x` as `dtype`, native and contiguous; values must stay, except for rounding as in ROUNDED."""
    if x.ndim == 0:
        return _cast(x.reshape(1), dtype, title, where, notes).reshape(())
    own = x.dtype.newbyteorder("=")
    if own != x.dtype:
        notes[f"{title}: byte order swapped to the native one"] = None
    elif own == dtype:
        return np.ascontiguousarray(x)
    rounded = (own.name, dtype.name) in ROUNDED
    if own != dtype:
        how = "rounded" if rounded else "converted exactly" + (", not scaled," if own.kind in "iu" else "")
        notes[f"{title}: {own} {how} to {dtype}"] = None
    room.check_room(x.size * dtype.itemsize, where)
    out = np.empty(x.shape, dtype)
    for start, piece in _pieces(x):
        new = out[start : start + len(piece)]
        with np.errstate(all="ignore"):
            new[...] = piece
        if not (good := _kept(piece.astype(own, copy=False), new, rounded)).all():
            at = tuple(int(i) for i in np.argwhere(~good)[0])
            why = f"{own} value {piece[at]} of sample {start + at[0]} is not a value of {dtype}"
            hint = f"if this is meant, convert it yourself: x.astype({dtype.name!r})"
            raise DataError(f"{title} cannot be converted without loss", where=where, why=why, hint=hint)
    return out


def _kept(old: Array, new: Array, rounded: bool) -> Array:
    """Return where `new`, converted from `old`, kept the value: exactly, or when `rounded` within the range."""
    if rounded:
        return np.asarray(np.isfinite(new) | ~np.isfinite(old))
    if old.dtype.kind not in "iub":
        same = np.asarray((new.astype(old.dtype) == old) | np.isnan(old))
        return same if new.dtype.kind not in "iub" else np.zeros_like(same)
    if new.dtype.kind == "b":
        low, high = 0, 1
    elif new.dtype.kind in "iu":
        low, high = int(np.iinfo(new.dtype).min), int(np.iinfo(new.dtype).max)
    else:
        high = 2 ** SIGNIFICANT[new.dtype.name]  # up to here every integer is a float
        low = -high
    return np.asarray((old >= low) & (old <= high))


def check_finite(x: Array, title: str, where: str, notes: Notes | None) -> None:
    """Refuse NaN and infinities, or note them."""
    count, first = 0, -1
    for start, piece in _pieces(x) if x.dtype.kind not in "iub" else ():
        if not (good := np.isfinite(piece)).all():
            first = start + int(np.argwhere(~good)[0][0]) if first < 0 else first
            count += int(good.size - np.count_nonzero(good))
    why = f"{count} values of {title} are NaN or infinite, the first in sample {first}"
    if count and notes is None:
        hint = "leave such samples out"
        raise DataError("the samples are not finite", where=where, why=why, hint=hint)
    if count and notes is not None:
        notes[why] = None


def constant(x: Array) -> bool:
    """Whether all samples are the same."""
    return all(bool((piece == x[:1]).all()) for _, piece in _pieces(x))


def _pieces(x: Array) -> Iterator[tuple[int, Array]]:
    """Yield (first sample, samples) of about PIECE bytes, so that scans need little memory."""
    step = max(1, PIECE // max(1, x[:1].nbytes)) if x.ndim else 1
    for start in range(0, len(x) if x.size and x.ndim else 0, step):
        yield start, x[start : start + step]
