"""Statistics files: what calibration found, as safetensors with a header that a person can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mscompile.calibration.statistics import Array, Curvature, Moments, Scale, Statistics, Window, WindowMoments
from mscompile.errors import UsageError
from mscompile.files import staged
from mscompile.intake.documents import parse

SCHEMA_VERSION = 2
_MOMENTS = ("mean", "squares", "scatter", "shared", "low", "high")
_CURVATURE = ("s11", "s12", "s22", "g1", "g2", "second")
_WINDOW = ("centre", "products", "shared")
_SQUARE = ("scatter", "shared", "second", "products")
_OPTIONAL = ("scatter", "shared", "second")


def save_statistics(statistics: Statistics, path: Path, *, model_sha256: str) -> None:
    """Write statistics atomically, bound to the model by its digest."""
    arrays: dict[str, Array] = {}

    def store(kind: str, name: str, holder: object, quantities: tuple[str, ...]) -> None:
        for quantity in quantities:
            array = getattr(holder, quantity)
            if array is not None:
                arrays[f"{kind}/{quantity}/{name}"] = np.ascontiguousarray(array)

    for name, moments in statistics.moments.items():
        store("moments", name, moments, _MOMENTS)
    for name, curvature in statistics.curvature.items():
        store("curvature", name, curvature, _CURVATURE)
    for name, window in statistics.windows.items():
        store("window", name, window, _WINDOW)
    header = {
        "schema_version": SCHEMA_VERSION,
        "model_sha256": model_sha256,
        "samples": statistics.samples,
        "data_sha256": statistics.data_sha256,
        "onnxruntime": statistics.onnxruntime,
        "metric": statistics.metric,
        "outputs": dict(statistics.outputs),
        "scales": {name: vars(scale) for name, scale in statistics.scales.items()},
        "refused": dict(statistics.refused),
        "moments": {name: moments.count for name, moments in statistics.moments.items()},
        "curvature": {name: curvature.samples for name, curvature in statistics.curvature.items()},
        "windows": {name: {"count": w.count, **vars(w.window)} for name, w in statistics.windows.items()},
    }
    with staged(path) as draft:
        safetensors.numpy.save_file(arrays, draft, metadata={"mscompile": json.dumps(header)})


def load_statistics(path: Path, *, model_sha256: str) -> Statistics:
    """Read a statistics file.

    Raises
    ------
    UsageError
        It is none, or of another version, or of another model.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = parse((file.metadata() or {})["mscompile"])
            arrays: dict[str, Array] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no iterator
        if header["schema_version"] != SCHEMA_VERSION or header["model_sha256"] != model_sha256:
            raise UsageError(
                "the statistics do not belong to this model",
                where=str(path),
                why=f"they are of schema {header['schema_version']} and of the model {header['model_sha256'][:12]}…, "
                f"not schema {SCHEMA_VERSION} and {model_sha256[:12]}…",
                hint="calibrate again with `mscompile calibrate MODEL`",
            )

        def taken(kind: str, name: str, quantities: tuple[str, ...], size: int) -> list[Array | None]:
            found = []
            for quantity in quantities:
                array = arrays.get(f"{kind}/{quantity}/{name}")
                if array is None and quantity not in _OPTIONAL:
                    raise ValueError(f"{kind} of {name!r} lack {quantity!r}")
                if array is not None:
                    whole = (size, size) if quantity in _SQUARE else (size,)
                    finite = quantity in ("low", "high") or bool(np.isfinite(array).all())
                    if (array.shape != whole and quantity != "centre") or not finite:
                        raise ValueError(f"{quantity!r} of {name!r} must be {whole} finite numbers")
                found.append(array)
            return found

        counts = [*header["moments"].values(), *header["curvature"].values(), header["samples"]]
        if not all(isinstance(count, int) and count > 0 for count in counts):
            raise ValueError("counts must be positive")
        sizes = {name: len(arrays[f"moments/mean/{name}"]) for name in header["moments"]}
        moments = {
            n: Moments(count, *taken("moments", n, _MOMENTS, sizes[n]))  # type: ignore[arg-type]
            for n, count in header["moments"].items()
        }
        curvature = {
            n: Curvature(count, *taken("curvature", n, _CURVATURE, sizes[n]))  # type: ignore[arg-type]
            for n, count in header["curvature"].items()
        }
        windows = {}
        for name, entry in header["windows"].items():
            count = entry.pop("count")
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
            window = Window(**fields)
            centre, products, shared = taken("window", name, _WINDOW, window.features)
            windows[name] = WindowMoments(window, centre, count, products, shared)  # type: ignore[arg-type]
        return Statistics(
            moments,
            curvature,
            header["refused"],
            windows,
            header["samples"],
            tuple(header["data_sha256"]),
            header["onnxruntime"],
            str(header["metric"]),
            {str(name): float(weight) for name, weight in header["outputs"].items()},
            {str(name): Scale(float(s["factor"]), float(s["step"])) for name, s in header["scales"].items()},
        )
    except (OSError, AttributeError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise UsageError(
            "the statistics cannot be read",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            hint="write them with `mscompile calibrate MODEL`",
        ) from error
