"""What can be cut: sites, weights, and the reasons where something is left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mscompile.network.scm import Scm, Site, label
from mscompile.operators import Signature
from mscompile.operators.backward import FLOATS
from mscompile.planning.plan import refusal
from mscompile.report import CoverageReport


@dataclass(frozen=True)
class Inspection:
    """What `inspect` shows.

    Attributes
    ----------
    scm
        The graph as a structural causal model.
    left_alone
        Reason by site tensor; None where the site can be cut.
    coverage
        Per weight tensor.
    """

    scm: Scm
    left_alone: Mapping[str, str | None]
    coverage: tuple[CoverageReport, ...]

    @property
    def reachable(self) -> float:
        """Share of the weight elements that can be cut on at least one axis."""
        total = sum(int(np.prod(entry.shape)) for entry in self.coverage)
        cuttable = sum(int(np.prod(entry.shape)) for entry in self.coverage if entry.status != "left alone")
        return cuttable / total if total else 0.0


def inspect_scm(scm: Scm, cut: frozenset[str] = frozenset()) -> Inspection:
    """Look at every site and every weight tensor; `cut` names the sites that a plan narrows."""
    reasons = {site.tensor: refusal(scm, site) for site in scm.sites}
    blocked = {site.group: reasons[site.tensor] for site in scm.sites if reasons[site.tensor] is not None}
    left_alone = {site.tensor: reasons[site.tensor] or blocked.get(site.group) for site in scm.sites}
    status: dict[int, str] = {}
    for site in scm.sites:
        found = "cut" if site.tensor in cut else "left alone" if left_alone[site.tensor] is not None else "whole"
        status.update(dict.fromkeys(site.units.tolist(), found))
    for head, units in scm.heads.items():
        if any(status.get(unit, "left alone") != "left alone" for unit in units):
            status.setdefault(head, "whole")
    return Inspection(scm, left_alone, tuple(_coverage(scm, status, left_alone)))


def _coverage(scm: Scm, status: Mapping[int, str], left_alone: Mapping[str, str | None]) -> Iterator[CoverageReport]:
    why: dict[int, str] = {}
    for site in scm.sites:
        reason = left_alone[site.tensor]
        if reason is not None:
            why.update(dict.fromkeys(site.units.tolist(), reason))
    slots: dict[tuple[ir.Node, int], list[int]] = {}
    for slot in scm.slots:
        if len(slot.units):
            slots.setdefault((slot.node, slot.operand), []).append(int(slot.units.flat[0]))
    reading = {reader.node for site in scm.sites for reader in site.readers}
    seen: set[str] = set()
    for node in scm.model.graph:
        for operand, value in enumerate(node.inputs):
            tensor = None if value is None else value.const_value
            if value is None or tensor is None or len(tensor.shape) < 2 or tensor.dtype not in FLOATS or value.name in seen:
                continue
            seen.add(value.name or "")
            units = slots.get((node, operand), [])
            states = {status.get(unit, "left alone") for unit in units}
            best = next((s for s in ("cut", "whole") if s in states), "left alone")
            tied = [f"goes in whole heads or groups alone: {scm.undivided[u]}" for u in units if u in scm.undivided]
            reason = tied[0] if tied else None
            if best == "left alone":
                blind = _blind(scm, node, operand) if node not in reading else None
                reasons = [blind] if blind else []
                reasons += [str(scm.frozen[u]) if u in scm.frozen else why.get(u, "is read by nothing") for u in units]
                barrier = scm.signatures[node]
                fallback = f"{node.op_type} {label(node)!r} {barrier}" if isinstance(barrier, str) else "carries no units"
                reason = "; ".join(dict.fromkeys(reasons)) or fallback
            yield CoverageReport(
                tensor=value.name or "",
                node=label(node),
                operator=node.op_type,
                shape=[int(d) for d in tensor.shape.numpy()],
                status=best,
                reason=reason,
            )


def _blind(scm: Scm, node: ir.Node, operand: int) -> str | None:
    """Why the columns of a weight meet no units: what it reads comes out of an operator that nothing is known of."""
    found = scm.signatures[node]
    if not isinstance(found, Signature) or found.linear is None or found.linear.weight != operand:
        return None
    data = node.inputs[found.linear.data]
    origin = None if data is None else data.producer()
    barrier = None if origin is None else scm.signatures.get(origin)
    return f"reads {origin.op_type} {label(origin)!r}, which {barrier}" if origin and isinstance(barrier, str) else None


def readers_of(site: Site) -> list[str]:
    """Names of a site's readers."""
    return [label(reader.node) for reader in site.readers]
