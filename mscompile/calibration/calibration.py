"""Calibration: one streaming pass of onnxruntime that leaves with sums, never with activations.

Nodes appended to a copy of the graph reduce each site's activations a, and the gradients λ = Jᵀv of the outputs for random
or unit seeds v, to sums over samples (`calibration.instrument`); those are accumulated in float64
(`calibration.summation`) and read here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import onnxruntime as ort

from mscompile.calibration.batches import SMALL_BYTES, held_by
from mscompile.calibration.instrument import Instrument, Measure
from mscompile.calibration.recording import Recording, cut, recordable
from mscompile.calibration.room import BYTES, bytes_found, entries, room_for_sums
from mscompile.calibration.statistics import Array, Curvature, Moments, Statistics, WindowMoments
from mscompile.calibration.summation import Shards, Summation
from mscompile.calibration.survey import Survey, survey
from mscompile.calibration.tally import name_of, quantity_of
from mscompile.calibration.totals import total
from mscompile.calibration.windows import window_name
from mscompile.errors import UsageError
from mscompile.intake.samples import Samples
from mscompile.network.scm import Scm, Site
from mscompile.runs import shelf
from mscompile.runs.run import ALONE, Run
from mscompile.runtime import Progress, no_progress

GROUP_BYTES = 1 << 30
"""Bytes of channel-by-channel sums in the making; sites beyond it wait for another pass over the data."""
RECORDED_BYTES = 1 << 28
"""The same where sites are recorded."""


def calibrate(
    scm: Scm,
    sites: Sequence[Site],
    samples: Samples,
    *,
    batch_size: int,
    measure: Measure,
    memory: int = GROUP_BYTES,
    run: Run = ALONE,
    progress: Progress = no_progress,
) -> Statistics:
    """Collect the statistics of `sites` over `samples`.

    One pass over the data, or as many as it takes for sums in the making to hold at most `memory` bytes; a site whose own
    are larger is summed in blocks of channels, a pass for each. The network is run for each of them, or once for many where
    what they sum is recorded (`calibration.recording`). Memory grows neither with the number of samples nor, where they are
    large, of sites; what is found of a site of C channels with covariance takes C² float64.

    Raises
    ------
    DataError
        Labels are needed and missing.
    """
    opset = scm.model.graph.opset_imports.get("", 1)
    held = held_by(scm, sites, samples, measure, batch_size, closely=run.memory is not None)
    if run.memory is not None:
        memory = min(memory, room_for_sums(run.memory, scm, sites, samples, measure, held))
    whole: Statistics | None = None
    stage = run.work.stage(
        "calibrate",
        data=samples.sha256,
        sites=[(site.tensor, site.axis, [window_name(reader) for reader in site.readers]) for site in sites],
        batch_size=batch_size,
        measure=vars(measure),
        memory=memory,
    )
    board = run.work.shelf(bytes_found(sites, measure, opset))
    outputs = measure.outputs if measure.curvature != "none" else {}
    first = survey(scm, sites, next(samples.batches(batch_size)), min(batch_size, len(samples)), outputs)
    passes, together = _passes(scm, sites, samples, batch_size, measure, memory, first)
    recording: Recording | None = None
    for number, (group, blocks) in enumerate(passes):
        if number in together:
            own = [site for other in together[number] for site in passes[other][0]]
            recording = Recording(
                scm, own, samples, batch_size, measure, first, shelf.Shelf(run.work.root), progress, held > SMALL_BYTES
            )
        elif not any(number in others for others in together.values()):
            recording = None
        parts = [
            # What is no outer product is the same in every pass.
            _pass(
                scm,
                group,
                samples,
                batch_size,
                replace(measure, block=block, windows=measure.windows and not i),
                first,
                recording,
                held > SMALL_BYTES,
                partial(total, stage=stage, name=f"pass-{number}-{i}", run=run, progress=progress),
            )
            for i, block in enumerate(blocks)
        ]
        part = _symmetric(_stacked(parts) if len(parts) > 1 else parts[0]).on(board)
        whole = part if whole is None else _side_by_side(whole, part)
    if whole is None:
        raise UsageError("there is no site to calibrate", where="sites", why="the list is empty", hint="name a site")
    return whole


def _groups(
    sites: Sequence[Site], measure: Measure, opset: int, memory: int
) -> Iterator[tuple[list[Site], list[slice | None]]]:
    """Sites that are summed together, and the blocks of channels that the outer products of a large one are summed in."""
    group: list[Site] = []
    used = 0
    for site in sites:
        squares, features = entries(site, measure, opset)
        size = BYTES * (squares * site.size + features)
        if group and used + size > memory:
            yield group, [None]
            group, used = [], 0
        rows = -(-site.size // -(-size // memory)) if size else site.size
        if rows < site.size and squares:
            yield [site], [slice(start, min(start + rows, site.size)) for start in range(0, site.size, rows)]
            continue
        group.append(site)
        used += size
    if group:
        yield group, [None]


def _passes(
    scm: Scm, sites: Sequence[Site], samples: Samples, batch_size: int, measure: Measure, memory: int, first: Survey
) -> tuple[list[tuple[list[Site], list[slice | None]]], dict[int, list[int]]]:
    """What `_groups` gives, and the numbers of those recorded together, by the first one's.

    Where all sites are recorded a pass more costs little, and none holds more than it takes for the largest site.
    """
    opset = scm.model.graph.opset_imports.get("", 1)
    groups = list(_groups(sites, measure, opset, memory))
    if sum(len(blocks) for _, blocks in groups) < 2:
        return groups, {}
    sizes = recordable(scm, sites, samples, first, measure)
    if sizes.keys() == {site.tensor for site in sites}:
        found = [(site.size, *entries(site, measure, opset)) for site in sites]
        largest = max(BYTES * (squares * size + features) for size, squares, features in found)
        groups = list(_groups(sites, measure, opset, min(memory, max(largest, RECORDED_BYTES))))
    together = cut([group for group, _ in groups], sizes, len(samples), batch_size)
    return groups, {block[0]: block for block in together if sum(len(groups[number][1]) for number in block) > 1}


def _stacked(parts: Sequence[Statistics]) -> Statistics:
    """Passes over blocks of channels of one site as one."""
    first = parts[0]
    (tensor,) = first.moments
    moments = [part.moments[tensor] for part in parts]
    curvature = [part.curvature[tensor] for part in parts if tensor in part.curvature]
    whole = replace(
        moments[0],
        squares=np.sum([m.squares for m in moments], axis=0),
        scatter=_rows([m.scatter for m in moments]),
        shared=_rows([m.shared for m in moments]),
    )
    curved = {tensor: replace(curvature[0], second=_rows([c.second for c in curvature]))} if curvature else {}
    return replace(first, moments={tensor: whole}, curvature=curved)


def _rows(blocks: Sequence[Array | None]) -> Array | None:
    found = [block for block in blocks if block is not None]
    return np.concatenate(found) if found else None


def _symmetric(found: Statistics) -> Statistics:
    """What samples share was summed with one sample on each side: either may be the first."""
    moments = dict(found.moments)
    for tensor, m in moments.items():
        if m.shared is not None:
            moments[tensor] = replace(m, shared=0.5 * (m.shared + m.shared.T))
    return replace(found, moments=moments)


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
    scm: Scm,
    sites: Sequence[Site],
    samples: Samples,
    batch_size: int,
    measure: Measure,
    first: Survey,
    recording: Recording | None,
    lean: bool,
    total: Callable[[Summation, Callable[[], Shards]], dict[str, Array]],
) -> Statistics:
    trip = None if recording is None else recording.trip(sites)
    given = [] if trip is None else [v.name or "" for v in trip.model.graph.inputs if not v.is_initializer()]
    instrument = Instrument(scm, sites, first, measure, len(samples), trip)

    def shards() -> Shards:
        return Shards(samples if recording is None else recording.samples_of(given), batch_size)

    totals = instrument.tally.read(total(replace(instrument.summation, lean=lean), shards), len(samples))
    centres = {site.tensor: instrument.centres[site.tensor].astype(np.float64) for site in sites}
    return Statistics(
        {site.tensor: _moments(site, totals, centres[site.tensor], measure.block) for site in sites},
        {
            site.tensor: _curvature(site, totals, centres[site.tensor], len(samples), instrument.share)
            for site in sites
            if site.tensor in instrument.differentiated
        },
        instrument.refused,
        {
            name: WindowMoments(
                window,
                centres[site.tensor],
                int(totals[quantity_of(name, "windows")]),
                totals[quantity_of(name, "window")],
                totals.get(quantity_of(name, "between")),
            )
            for name, (site, window, _) in instrument.windows.items()
        },
        len(samples),
        (samples.sha256,),
        ort.__version__,
        measure.curvature,
        dict(measure.outputs) if measure.curvature != "none" else {},
    )


def _moments(site: Site, found: Mapping[str, Array], centre: Array, block: slice | None) -> Moments:
    """Undo the centring. Of a block of channels, outer products are there for its rows alone."""
    count = int(found[name_of(site, "count")])
    offset = found[name_of(site, "sum")] / count
    own = np.arange(site.size)[block or slice(None)]
    products = found.get(name_of(site, "products"))
    scatter = None if products is None else _less(products, count, offset[own], offset)
    squares = np.zeros(site.size)
    if scatter is None:
        squares = np.maximum(found[name_of(site, "squares")] - count * offset**2, 0.0)
    else:
        squares[own] = scatter[np.arange(len(own)), own]
    unknown = np.full(site.size, np.inf)
    low, high = found.get(name_of(site, "low"), -unknown), found.get(name_of(site, "high"), unknown)
    between = found.get(name_of(site, "shared"))
    shared = None if between is None else _less(between, count, offset[own], offset)
    return Moments(count, centre + offset, squares, scatter, shared, low, high)


def _less(products: Array, count: int, a: Array, b: Array) -> Array:
    """Sums of products less count · a bᵀ, in their place: fresh memory for large matrices takes longer than the sums."""
    means = np.outer(a, b)
    means *= count
    return np.subtract(products, means, out=products if products.flags.writeable else None)


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
        None if second is None else np.multiply(second, share, out=second if second.flags.writeable else None),
    )
