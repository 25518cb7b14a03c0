"""Networks of the published shape, trained as plainly as the published one seems to be: Adam on normalised pixels."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mscompile.models import mnist

BATCH = 128
MEAN, STD = 0.1307, 0.3081
CALIBRATION = 2000
"""Training images given to a compiler."""
Phases = Sequence[tuple[int, float]]
"""Epochs and their constant rate, one phase after the other."""
CONSTANT: Phases = ((5, 1e-3),)
CUT: Phases = ((5, 1e-3), (2, 1e-4))
"""The same, and then a tenth of the rate: more accurate by a point."""
Part = dict[str, npt.NDArray[Any]]


def pixels(data: Path) -> tuple[Part, Part]:
    """Training and test images of MNIST as rows of 784 normalised pixels, with labels."""
    train, test = (
        {"x": ((x.reshape(-1, 784).astype(np.float32) / 255 - MEAN) / STD).astype(np.float32), "label": y.astype(np.int64)}
        for x, y in mnist.read(data)
    )
    return train, test


def train_plainly(train: Part, seed: int, target: Path, phases: Phases = CONSTANT) -> None:
    """Train an MLP 784-512-512-10 by Adam and write its file."""
    torch: Any = importlib.import_module("torch")
    from mscompile.models.architectures import ARCHITECTURES
    from mscompile.models.export import export

    torch.manual_seed(seed)
    net = ARCHITECTURES["mlp"].build()
    optimiser = torch.optim.Adam(net.parameters())
    x, y = torch.from_numpy(train["x"]), torch.from_numpy(train["label"])
    for epochs, rate in phases:
        optimiser.param_groups[0]["lr"] = rate
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(BATCH):
                loss = torch.nn.functional.cross_entropy(net(x[rows]), y[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    export(net, train["x"][:4], target)
