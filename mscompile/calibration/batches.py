"""Batches: as many samples at a time as the summing graph, with all that it holds, leaves room for.

What it holds is foretold from shapes (`calibration.footprint`), never measured: the same data gives the same batches, and
the same sums to the last bit, wherever there is room for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mscompile.calibration.blocks import WHOLE_BYTES
from mscompile.calibration.footprint import footprint, size_of_tensor
from mscompile.calibration.instrument import Instrument, Measure
from mscompile.calibration.reverse import sample_shapes
from mscompile.calibration.room import room_for_sums
from mscompile.calibration.survey import Survey
from mscompile.calibration.windows import window_of
from mscompile.errors import ResourceError
from mscompile.intake.samples import Samples
from mscompile.machine import free_memory
from mscompile.network.scm import Scm, Site
from mscompile.operators import Shape
from mscompile.options import USUAL
from mscompile.runs.limits import gigabytes
from mscompile.runs.run import ALONE, Run
from mscompile.runtime import Arrays

ROOM_BYTES, SHARE = 8 << 30, 0.5
"""Bytes that a batch may take where no limit is given, and the share of the free memory that those of all workers here may.
On most machines the former counts, so that the same command gives the same bytes on all of them."""
SMALL_BYTES = 1 << 30
"""Bytes below which nobody asks more closely: they fit, and onnxruntime is quicker where it keeps them."""
OVERHEAD = 2.0
"""Times what is foretold: layouts of onnxruntime's own, work space of its operators, pages that lie between."""


def held_by(
    scm: Scm, sites: Sequence[Site], samples: Samples, measure: Measure, batch: int, *, closely: bool = False
) -> int:
    """Bytes that a batch of so many samples takes, weights and sums so far apart; a bound of them where they are few."""
    batch = min(batch, len(samples))
    bound = 0 if closely else _bound(scm, sites, samples, measure, batch)
    return bound if 0 < bound <= SMALL_BYTES else _held(scm, sites, samples, measure, batch)


def is_large(scm: Scm, sites: Sequence[Site], samples: Samples, measure: Measure, batch: int) -> bool:
    """Whether a batch takes so much memory that what runs it had better spare it."""
    return held_by(scm, sites, samples, measure, batch) > SMALL_BYTES


def _bound(scm: Scm, sites: Sequence[Site], samples: Samples, measure: Measure, batch: int) -> int:
    """From above, by the tensors of the network alone: all are kept, and sums need some copies of those of sites."""
    sizes = _line([sample_shapes(scm.model, _part(samples, count)) for count in _counts(scm, samples)], batch)
    seeds = 0 if measure.curvature == "none" else measure.probes + measure.gradient
    network = sum(sizes(value.name or "") for node in scm.model.graph for value in node.outputs)
    found = 2 * (1 + seeds) * network
    opset = scm.model.graph.opset_imports.get("", 1)
    for site in sites:
        found += (6 + 2 * seeds) * sizes(site.tensor)
        seen = [window_of(site, reader, opset) for reader in site.readers] if measure.windows else []
        rows = sizes(site.tensor) // site.size
        found += sum(6 * min(rows * window.features, WHOLE_BYTES) for window in seen if window is not None)
    return found


def _held(scm: Scm, sites: Sequence[Site], samples: Samples, measure: Measure, batch: int) -> int:
    """By the summing graph itself."""
    outputs = measure.outputs if measure.curvature != "none" else {}
    means = {site.tensor: np.ones(site.size, dtype=np.float32) for site in sites}
    near = dict.fromkeys(means, False)  # as if everything had to be centred
    found: list[Mapping[str, Shape]] = []
    for count in _counts(scm, samples):
        part = _part(samples, count)
        shapes = sample_shapes(scm.model, part)
        extents = {output: tuple(int(d or 0) for d in shapes[output][1:]) for output in outputs}
        instrument = Instrument(scm, sites, Survey(count, batch, shapes, extents, means, near), measure, len(samples))
        found.append(instrument.shapes(part, samples.labels))
    return int(OVERHEAD * footprint(instrument.model.graph, _line(found, batch)))


def _counts(scm: Scm, samples: Samples) -> tuple[int, ...]:
    """Numbers of samples from which sizes of batches follow: that which the model is fixed to, or one and two."""
    inputs = (v for v in scm.model.graph.inputs if not v.is_initializer() and v.name not in samples.shared and v.shape)
    # Some exporters write −1 for a size that is free.
    fixed = next((dim for v in inputs if v.shape and isinstance(dim := v.shape[0], int) and dim > 0), None)
    return (1, 2)[: len(samples)] if fixed is None else (fixed,)


def _part(samples: Samples, count: int) -> Arrays:
    return dict(samples.take(slice(count)).inputs)


def _line(found: Sequence[Mapping[str, Shape]], batch: int) -> Callable[[str], int]:
    """Bytes of each tensor in a batch, on a line through those on one and on two samples."""

    def size(name: str) -> int:
        first, *more = (size_of_tensor(shapes.get(name, ())) for shapes in found)
        return first + sum((batch - 1) * max(second - first, 0) for second in more)

    return size


def fitting_batch(
    scm: Scm, sites: Sequence[Site], samples: Samples, measure: Measure, asked: int | None, run: Run = ALONE
) -> int:
    """Samples of a batch: as many as were asked for or, where that is left open, `USUAL`, halved until they fit.

    Raises
    ------
    ResourceError
        What was asked for does not fit, or not one sample does.
    """
    wanted = min(asked or USUAL, len(samples))
    free = min(ROOM_BYTES, int(SHARE * free_memory() / run.sharing))
    refusal: ResourceError | None = None
    for size in (wanted >> halved for halved in range(wanted.bit_length())):
        error = _refusal(scm, sites, samples, measure, size, run.memory, free)
        if error is None and size == wanted:
            return asked or USUAL
        if error is None and asked is None:
            return size
        if error is None and refusal is not None:
            refusal.hint = f"use --batch-size {size}, or {refusal.hint}"
            raise refusal
        refusal = error if asked is None else refusal or error
    assert refusal is not None
    raise refusal


def _refusal(
    scm: Scm, sites: Sequence[Site], samples: Samples, measure: Measure, batch: int, limit: int | None, free: int
) -> ResourceError | None:
    """Why a batch does not fit, if it does not."""
    held = held_by(scm, sites, samples, measure, batch, closely=limit is not None)
    if limit is not None:
        try:
            room_for_sums(limit, scm, sites, samples, measure, held)
        except ResourceError as error:
            return error
        return None
    if held <= free:
        return None
    return ResourceError(
        "calibration takes too much memory",
        where=f"batches of {batch}" if batch > 1 else "one sample at a time",
        why=f"about {gigabytes(held)} are needed for activations, gradients and sums of them, {gigabytes(free)} are there",
        hint="name fewer sites with --only, use --replacement constant, which needs no covariances, or give --memory-limit "
        "if there is more memory than that",
    )
