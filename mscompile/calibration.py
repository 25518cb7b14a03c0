"""Calibration: one streaming pass of onnxruntime that leaves with sums, never with activations.

Nodes appended to a copy of the graph reduce each site's activations a, and the gradients λ = Jᵀv of the outputs for random
or unit seeds v, to sums over samples (`mscompile.instrument`); those are accumulated here in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnxruntime as ort

from mscompile.data import Samples
from mscompile.errors import UsageError
from mscompile.instrument import Instrument, Measure
from mscompile.runtime import Progress, Session, no_progress
from mscompile.scm import Scm, Site
from mscompile.statistics import Array, Curvature, Moments, Statistics, WindowMoments
from mscompile.survey import survey
from mscompile.tally import before, name_of, quantity_of

HELD_BATCHES = 16
"""Batches summed up in float32 inside onnxruntime before the sums are added to the float64 totals outside."""
GROUP_BYTES = 1 << 30
"""Channel-by-channel sums held at a time; sites beyond it wait for another pass over the data."""


def calibrate(
    scm: Scm,
    sites: Sequence[Site],
    samples: Samples,
    *,
    batch_size: int,
    measure: Measure,
    progress: Progress = no_progress,
) -> Statistics:
    """Collect the statistics of `sites` over `samples`.

    One pass over the data, or as many as it takes to hold at most `GROUP_BYTES` of sums at a time. Memory does not grow
    with the number of samples; a site of C channels takes C² float64.

    Raises
    ------
    DataError
        Labels are needed and missing.
    """
    total: Statistics | None = None
    for group in _groups(sites, measure):
        part = _pass(scm, group, samples, batch_size, measure, progress)
        total = part if total is None else _side_by_side(total, part)
    if total is None:
        raise UsageError("there is no site to calibrate", where="sites", why="the list is empty", hint="name a site")
    return total


def _groups(sites: Sequence[Site], measure: Measure) -> Iterator[list[Site]]:
    square = 8 * (measure.covariance + measure.second)
    group: list[Site] = []
    used = 0
    for site in sites:
        size = square * site.size**2
        if group and used + size > GROUP_BYTES:
            yield group
            group, used = [], 0
        group.append(site)
        used += size
    if group:
        yield group


def _side_by_side(a: Statistics, b: Statistics) -> Statistics:
    return Statistics(
        {**a.moments, **b.moments},
        {**a.curvature, **b.curvature},
        {**a.refused, **b.refused},
        {**a.windows, **b.windows},
        a.samples,
        a.data_sha256,
        a.onnxruntime,
        a.metric,
        a.outputs,
    )


def _pass(
    scm: Scm, sites: Sequence[Site], samples: Samples, batch_size: int, measure: Measure, progress: Progress
) -> Statistics:
    outputs = measure.outputs if measure.curvature != "none" else {}
    first = survey(scm, sites, next(samples.batches(batch_size)), min(batch_size, len(samples)), outputs)
    instrument = Instrument(scm, sites, first, measure, len(samples))
    session = Session(instrument.model)
    moments: dict[str, Moments] = {}
    curvature: dict[str, Curvature] = {}
    windows: dict[str, WindowMoments] = {}

    def collect(state: Mapping[str, ort.OrtValue], count: int) -> None:
        found = instrument.tally.read(state, count)
        for site in sites:
            tensor, centre = site.tensor, instrument.centres[site.tensor].astype(np.float64)
            new = _moments(site, found, centre)
            moments[tensor] = moments[tensor] + new if tensor in moments else new
            if tensor in instrument.differentiated:
                more = _curvature(site, found, centre, count, instrument.share)
                curvature[tensor] = curvature[tensor] + more if tensor in curvature else more
        for name, (site, window, _) in instrument.windows.items():
            seen, products = (found[quantity_of(name, quantity)] for quantity in ("windows", "window"))
            centre = instrument.centres[site.tensor].astype(np.float64)
            between = found.get(quantity_of(name, "between"))
            wider = WindowMoments(window, centre, int(seen), products, between)
            windows[name] = windows[name] + wider if name in windows else wider

    state, start, held = instrument.tally.empty(), 0, 0
    batches = math.ceil(len(samples) / batch_size)
    for number, batch in enumerate(progress(samples.batches(batch_size), "calibrate", batches), start=1):
        count = min(batch_size, len(samples) - start)
        totals = session.step({**batch, **instrument.feed(number, start, count, samples)}, state)
        state = {before(name): value for name, value in totals.items()}
        start, held = start + count, held + count
        if number % HELD_BATCHES == 0 or number == batches:
            collect(totals, held)
            state, held = instrument.tally.empty(), 0
    return Statistics(
        moments,
        curvature,
        instrument.refused,
        windows,
        len(samples),
        (samples.sha256,),
        ort.__version__,
        measure.curvature,
        dict(outputs),
    )


def _moments(site: Site, found: Mapping[str, Array], centre: Array) -> Moments:
    count = int(found[name_of(site, "count")])
    offset = found[name_of(site, "sum")] / count
    products = found.get(name_of(site, "products"))
    scatter = None if products is None else products - count * np.outer(offset, offset)
    if scatter is None:
        squares = np.maximum(found[name_of(site, "squares")] - count * offset**2, 0.0)
    else:
        squares = np.diagonal(scatter).copy()
    unknown = np.full(site.size, np.inf)
    low, high = found.get(name_of(site, "low"), -unknown), found.get(name_of(site, "high"), unknown)
    between = found.get(name_of(site, "shared"))
    shared = None if between is None else between - count * np.outer(offset, offset)
    if shared is not None:
        shared = 0.5 * (shared + shared.T)
    return Moments(count, centre + offset, squares, scatter, shared, low, high)


def _curvature(site: Site, found: Mapping[str, Array], centre: Array, samples: int, share: float) -> Curvature:
    """Undo the centring: the graph summed λ (a − centre). `share` is the weight of one seed."""
    s11, s12, s22 = (share * found[name_of(site, quantity)] for quantity in ("s11", "s12", "s22"))
    g1, g2 = (found.get(name_of(site, quantity), np.zeros(site.size)) for quantity in ("g1", "g2"))
    second = found.get(name_of(site, "second"))
    return Curvature(
        samples,
        s11,
        s12 + centre * s11,
        s22 + 2 * centre * s12 + centre**2 * s11,
        g1,
        g2 + centre * g1,
        None if second is None else share * second,
    )
