"""Room: what calibration needs of memory for sums, and what a memory limit leaves for them.

Estimated, not measured: passes over the data are to be the same each time.
"""

from __future__ import annotations

from collections.abc import Sequence

from mscompile import runtime
from mscompile.calibration.instrument import Measure
from mscompile.calibration.windows import window_of
from mscompile.errors import ResourceError
from mscompile.files import weight_bytes
from mscompile.intake.samples import Samples
from mscompile.network.scm import Scm, Site
from mscompile.runs import shelf
from mscompile.runs.limits import gigabytes

BYTES = 24
"""Per entry: in float32 before and after a batch, in float64 on the way and in total."""
MOST_PASSES = 16
"""Passes over the data that a site may take under a memory limit."""
PROGRAM_BYTES, WEIGHT_COPIES = 1 << 28, 4
"""What the program takes by itself; copies of the weights while a graph goes into onnxruntime, none of large ones."""


def entries(site: Site, measure: Measure, opset: int) -> tuple[int, int]:
    """Numbers in the outer products of a site: per channel, and of what its readers see at once."""
    squares = measure.covariance + measure.covariance * measure.shared + measure.second
    seen = [window_of(site, reader, opset) for reader in site.readers] if measure.windows else []
    features = sum(window.features**2 for window in seen if window is not None) * (1 + measure.shared)
    return squares * site.size, features


def bytes_found(sites: Sequence[Site], measure: Measure, opset: int) -> int:
    """Bytes of the matrices that are found."""
    numbers = ((site.size, *entries(site, measure, opset)) for site in sites)
    return sum(8 * (squares * size + features) for size, squares, features in numbers)


def room_for_sums(limit: int, scm: Scm, sites: Sequence[Site], samples: Samples, measure: Measure, held: int) -> int:
    """Bytes that a memory limit leaves for sums in the making, beside what a batch takes.

    Raises
    ------
    ResourceError
        They would not do for the largest site in `MOST_PASSES` passes.
    """
    opset = scm.model.graph.opset_imports.get("", 1)
    found, weights = bytes_found(sites, measure, opset), weight_bytes(scm.model)
    found = 0 if found > shelf.LARGE else found  # put aside
    weights *= WEIGHT_COPIES if weights <= runtime.LARGE else 1
    data = sum(array.nbytes for array in samples.inputs.values())
    numbers = ((site.size, *entries(site, measure, opset)) for site in sites)
    least = max(BYTES * (squares * -(-size // MOST_PASSES) + features) for size, squares, features in numbers)
    if (needed := PROGRAM_BYTES + data + weights + found + held + least) > limit:
        raise ResourceError(
            "the memory limit is too low for calibration",
            where=f"--memory-limit {gigabytes(limit)}",
            why=f"about {gigabytes(needed)} are needed: {gigabytes(weights)} for the model, {gigabytes(data)} for the data, "
            f"{gigabytes(held)} for a batch, {gigabytes(found)} for what is found, "
            f"{gigabytes(PROGRAM_BYTES + least)} to work",
            hint="raise it, name fewer sites with --only, or use --replacement constant, which needs no covariances",
        )
    return limit - needed + least
