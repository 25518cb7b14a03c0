"""Calibration and audit data: every source is read into one noun, `Samples`.

A source is turned into chunks (`sources.py`, `arrays.py`), a chunk is made to conform to the inputs that the model
declares, and the conforming chunks are joined (`conforming.py`). Nothing is ever unpickled, no value changes without a
note, and whatever cannot be used is a `DataError`: onnxruntime itself would read some of it as garbage without a word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mscompile.errors import DataError, ResourceError, UsageError
from mscompile.intake.conforming import BF16, check_finite, check_specs, collect, constant, fixed_batch, shared_inputs
from mscompile.intake.samples import InputSpec, Samples, Source, identity
from mscompile.intake.sources import Notes, files_of, open_source, test_sets
from mscompile.intake.words import LABELS, quoted, titled


def read(
    src: Source,
    specs: Sequence[InputSpec],
    *,
    labels: str | None = None,
    limit: int | None = None,
    allow_nan: bool = False,
) -> Samples:
    """Read samples for a model from whatever holds them.

    Parameters
    ----------
    src
        `.npz`, `.npy` (one-input models) or `.safetensors` file; folder of those, chunk by chunk, or with one `.npy`
        per input; ONNX `test_data_set_*` folder or its parent; `script.py[:load_data]`, a function that yields dicts;
        a mapping name → array, an iterable of such mappings, an onnxruntime CalibrationDataReader, or `Samples`.
        Iterables are copied; arrays of a mapping are shared where they already conform.
    specs
        The inputs the model declares, in graph order.
    labels
        Name of the labels; by default `label`, `labels`, `y` or `target`, whichever is there and not an input.
    limit
        Keep the first `limit` samples. Iterables and scripts are read no further; without it, to 100 000.
    allow_nan
        Accept NaN and infinities, with a note.

    Raises
    ------
    UsageError
        `src` does not exist, or an option makes no sense.
    DataError
        Anything inside cannot be used as it is.
    ResourceError
        It does not fit into memory.
    UnsupportedError
        The model declares an input that is not made of numbers.
    """
    if limit is not None and limit < 1:
        raise UsageError("the number of samples must be positive", where="limit", why=f"got {limit}", hint="use 1+")
    check_specs(specs, labels)
    notes: Notes = {}
    source, chunks, bound = open_source(src, [spec.name for spec in specs], labels, notes)
    files = {path: identity(path) for path in files_of(src)}
    try:
        with contextlib.closing(chunks):
            arrays = collect(chunks, specs, labels, bound if limit is None else limit, notes)
        if not arrays:
            hint = "a reader or generator may be used up: rewind it or make it again"
            raise DataError("there are no samples", where=source, why="the source ended at once", hint=hint)
        shared = shared_inputs(arrays, specs)
        batch = fixed_batch(specs, shared) or 1
        count = next(len(arrays[spec.name]) for spec in specs if spec.name not in shared)
        for name in sorted(shared):
            notes[f"{titled(name)} {arrays[name].shape} has no sample axis: the same array goes with every batch"] = None
        if limit is None and count >= bound:
            notes[f"reading stopped at {bound} samples, the bound where no number of samples is given"] = None
        if tail := count % batch:
            if tail == count:
                why = f"the model takes batches of exactly {batch}, found {count}"
                raise DataError("too few samples", where=source, why=why, hint=f"supply a multiple of {batch}")
            arrays = {name: x if name in shared else x[:-tail] for name, x in arrays.items()}
            notes[f"the last {tail} of {count} samples are left out: the model takes batches of {batch}"] = None
        for name, x in arrays.items():
            check_finite(np.atleast_1d(x), titled(name), source, notes if allow_nan else None)
        inputs = {spec.name: arrays[spec.name] for spec in specs}
        if all(constant(x) for name, x in inputs.items() if name not in shared):
            notes["all samples are identical" if count > 1 else "there is one sample only"] = None
        samples = Samples(inputs, arrays.get(LABELS), source, tuple(notes), shared, files)
        _ = samples.sha256  # of the data as read, not of a mapped file as it may be later
    except MemoryError as exc:
        raise ResourceError(
            "out of memory", where=source, why=str(exc) or "MemoryError", hint="supply fewer samples"
        ) from exc
    samples.check_unchanged()
    return samples


def find_beside(model: Path) -> Path | None:
    """Return the data beside `model`: MODEL.calib.npz, MODEL.calib.safetensors or `test_data_set_*`, in that order.

    Several test data sets are returned as the folder that holds them, which `read` joins.
    """
    for suffix in (".npz", ".safetensors"):
        if (path := model.parent / f"{model.stem}.calib{suffix}").is_file():
            return path
    sets = test_sets(model.parent)
    return sets[0] if len(sets) == 1 else model.parent if sets else None


def recipe(specs: Sequence[InputSpec], model_path: str | Path) -> str:
    """Return what to print when there is no data: the inputs expected, and five lines that write them for `read`."""
    target = quoted(str(Path(model_path).with_name(f"{Path(model_path).stem}.calib.npz")), width=4096)
    listing = "\n".join(f"  {spec}" for spec in specs)
    declared = {spec.name: "float32" if spec.dtype == BF16 else spec.dtype.name for spec in specs}
    return f"""\
The model expects real, preprocessed samples along axis 0 of:
{listing}

To write them where they are found by themselves, beside the model:

import numpy as np
samples = load_my_samples()  # yours: a list with one dict {{input name: array without axis 0}} per sample
declared = {declared!r}
arrays = {{name: np.stack([s[name] for s in samples]).astype(dtype) for name, dtype in declared.items()}}
np.savez({target}, **arrays)  # with label=[...] accuracies are reported too
"""
