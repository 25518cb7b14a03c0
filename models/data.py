"""Training, test and calibration data of the reference models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mscompile.errors import UsageError
from mscompile.models import mnist

Pair = tuple[NDArray[Any], NDArray[np.int64]]
CALIBRATION = 2000  # training examples that go with a model
CONTEXT = 64  # characters the decoder sees
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # the decoder's tokens; every other character reads as "?"


@dataclass(frozen=True)
class Data:
    """Network inputs with their labels.

    Attributes
    ----------
    train, test, calib
        The parts; `calib` is the very object `test` where the calibration data are the held-out ones.
    about
        What the data are, for the card.
    licence
        Under which terms they come, for the card.
    unit
        What is classified.
    from_folder
        Whether they are read from the folder named by the user.
    """

    train: Pair
    test: Pair
    calib: Pair
    about: str
    licence: str
    unit: str = "images"
    from_folder: bool = False


Loader = Callable[[Path | None, int], Data]


def _draw(pair: Pair, seed: int) -> Pair:
    """Draw the calibration data from a training part."""
    rows = np.random.default_rng(seed).permutation(len(pair[1]))[:CALIBRATION]
    return pair[0][rows], pair[1][rows]


def mnist_data(*item: int) -> Loader:
    """Make the loader of MNIST with inputs of shape `item`."""

    def load(folder: Path | None, seed: int) -> Data:
        if folder is None:
            raise UsageError(
                "the model learns from MNIST, and no data were given",
                where="--data",
                why="MNIST does not come with the package",
                hint="pass --data FOLDER, a folder with the four idx files of MNIST",
            )
        train, test = (
            (images.reshape(-1, *item).astype(np.float32) / np.float32(255), labels.astype(np.int64))
            for images, labels in mnist.read(folder)
        )
        return Data(
            train,
            test,
            _draw(train, seed),
            "MNIST, handwritten digits of 28x28 pixels, grey values divided by 255: "
            f"{len(train[1])} images to train, {len(test[1])} to test",
            "MNIST by Y. LeCun, C. Cortes and C. J. C. Burges, CC BY-SA 3.0",
            from_folder=True,
        )

    return load


def text_data(folder: Path | None, seed: int) -> Data:  # noqa: ARG001
    """Cut the language reference inside every Python installation into windows of characters."""
    from pydoc_data.topics import topics

    # Topics repeat one another, so each paragraph counts once: the held-out tenth is text never trained on.
    paragraphs = dict.fromkeys(p for key in sorted(topics) for p in topics[key].split("\n\n"))
    code = {character: token for token, character in enumerate(ALPHABET)}
    tokens = np.array([code.get(c, code["?"]) for c in "\n\n".join(paragraphs)], np.int64)
    cut = len(tokens) * 9 // 10

    def windows(part: NDArray[np.int64], step: int) -> Pair:
        view = np.lib.stride_tricks.sliding_window_view(part, CONTEXT + 1)[::step]
        return view[:, :-1].copy(), view[:, 1:].copy()

    train = windows(tokens[:cut], CONTEXT // 4)
    return Data(
        train,
        windows(tokens[cut:], CONTEXT),
        _draw(train, seed),
        f"the text of `pydoc_data.topics` of Python {sys.version.split()[0]}, each paragraph once, as windows of "
        f"{CONTEXT} characters over newline and the printable ASCII characters, in this order: "
        f"{cut} characters to train, the last {len(tokens) - cut} to test",
        "Python documentation, Python Software Foundation License Version 2",
        unit="next characters",
    )


def digits_data(folder: Path | None, seed: int) -> Data:  # noqa: ARG001
    """Split the digits of scikit-learn, the same way for every seed."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = (images.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    y = labels.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(y))
    train, test = ((x[rows], y[rows]) for rows in (np.sort(order[:1000]), np.sort(order[1000:])))
    return Data(
        train,
        test,
        test,
        "the digits of scikit-learn, 8x8 pixels, grey values divided by 16: "
        f"{len(train[1])} images to train, the other {len(test[1])} to test",
        "Optical Recognition of Handwritten Digits by E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, "
        "doi:10.24432/C50P49, CC BY 4.0; the copy of scikit-learn",
    )
