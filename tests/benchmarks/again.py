"""Whether the same command writes the same bytes, and leaves what it compiled as it is.

    python tests/benchmarks/again.py FOLDER
    python tests/benchmarks/again.py FOLDER/cnn.onnx FOLDER/vit.onnx [--keep 0.5] [--samples 400]

Every model NAME.onnx needs its data NAME.calib.npz beside it. Each is compiled twice, from nothing that the first run kept,
and the files compared byte by byte; then the compiled file is compiled at ``--keep 1.0``, which must give the same bytes.
Fails where it does not.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

import click
from candidates import beside, table
from fold_error import models_of

import mscompile


def digest(path: Path) -> str:
    """First digits of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def written(model: Path, data: Path, out: Path, **options: object) -> str:
    """Digest of what one compile writes."""
    mscompile.compile_model(model, data, out, mscompile.Options(cache=False, **options))  # type: ignore[arg-type]
    return digest(out)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--keep", default=0.5, show_default=True, help="Share of every site's units to keep.")
@click.option("--samples", default=400, show_default=True, help="Samples to take of the data.")
@click.option("--no-recalibrate", is_flag=True, help="Leave plans as fitted.")
def main(paths: tuple[Path, ...], keep: float, samples: int, no_recalibrate: bool) -> None:
    """Print the table; fail where bytes differ."""
    how = {"samples": samples, "recalibrate": not no_recalibrate}
    rows, same = [], True
    for path in models_of(paths):
        data = beside(path, "calib")
        with tempfile.TemporaryDirectory() as folder:
            first, second, third = (Path(folder) / f"{n}.onnx" for n in ("first", "second", "third"))
            found = [written(path, data, first, keep=keep, **how), written(path, data, second, keep=keep, **how)]
            found.append(written(first, data, third, keep=1.0, **how))
        rows.append([path.stem, *found])
        same &= len(set(found)) == 1
    print(table(["model", "first", "second", "compiled again, all kept"], rows))
    sys.exit(0 if rows and same else 1)


if __name__ == "__main__":
    main()
