"""Reference models: small trained networks to compile, and the recipes that make them.

``digits`` lies in this package, ready to use; the others are trained where they are needed::

    python -m mscompile.models train mlp --data FOLDER_OF_MNIST -o FOLDER

Importing this package needs no torch; training does (``pip install mscompile[torch]``).
"""

from __future__ import annotations

from pathlib import Path

from mscompile.errors import UsageError

NAMES = ("mlp", "cnn", "resnet", "vit", "decoder", "digits")


def path(name: str = "digits") -> Path:
    """Return the ONNX file of a model that comes with the package.

    Its data (``NAME.calib.npz``) and its card (``NAME.md``) lie beside it.
    """
    file = Path(__file__).parent / f"{name}.onnx"
    if name not in NAMES or not file.is_file():
        raise UsageError(
            f"no reference model {name!r} comes with the package",
            where=str(file.parent),
            why=f"the models are {', '.join(NAMES)}; of these only digits is shipped",
            hint=f"train it: python -m mscompile.models train {name if name in NAMES else 'mlp'} -o FOLDER",
        )
    return file
