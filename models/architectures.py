"""The reference architectures: what each is, what it learns from, and how long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from mscompile.models.data import ALPHABET, CONTEXT, Loader, digits_data, mnist_data, text_data


def chain(**layers: nn.Module) -> nn.Sequential:
    """Chain layers under their names, which become the names of the weights."""
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    """Make a 3x3 convolution with zero padding that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def mlp() -> nn.Module:
    """Three linear layers."""
    return chain(
        fc1=nn.Linear(784, 512),
        relu1=nn.ReLU(),
        fc2=nn.Linear(512, 512),
        relu2=nn.ReLU(),
        fc3=nn.Linear(512, 10),
    )


def cnn() -> nn.Module:
    """Three convolutions and two linear layers."""
    return chain(
        conv1=conv(1, 16),
        relu1=nn.ReLU(),
        conv2=conv(16, 32),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        conv3=conv(32, 64),
        relu3=nn.ReLU(),
        pool3=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(64 * 7 * 7, 128),
        relu4=nn.ReLU(),
        fc2=nn.Linear(128, 10),
    )


def digits() -> nn.Module:
    """Three convolutions, the first batch-normalised, and two linear layers."""
    return chain(
        conv1=conv(1, 32),
        norm1=nn.BatchNorm2d(32),
        relu1=nn.ReLU(),
        conv2=conv(32, 48),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        conv3=conv(48, 64),
        relu3=nn.ReLU(),
        pool3=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(64 * 2 * 2, 64),
        relu4=nn.ReLU(),
        fc2=nn.Linear(64, 10),
    )


class Residual(nn.Module):  # type: ignore[misc]
    """Two batch-normalised convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = chain(
            conv1=conv(width, width),
            norm1=nn.BatchNorm2d(width),
            relu=nn.ReLU(),
            conv2=conv(width, width),
            norm2=nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the identity."""
        return relu(x + self.branch(x))


class GlobalAverage(nn.Module):  # type: ignore[misc]
    """Mean over the picture."""

    def forward(self, x: Tensor) -> Tensor:
        """Average [batch, channels, rows, columns] to [batch, channels]."""
        return x.mean((2, 3))


def resnet() -> nn.Module:
    """Three residual blocks of 32 channels."""
    return chain(
        stem=chain(conv=conv(1, 32), norm=nn.BatchNorm2d(32), relu=nn.ReLU(), pool=nn.MaxPool2d(2)),
        block1=Residual(32),
        pool=nn.MaxPool2d(2),
        block2=Residual(32),
        block3=Residual(32),
        average=GlobalAverage(),
        head=nn.Linear(32, 10),
    )


class Attention(nn.Module):  # type: ignore[misc]
    """Multi-head self-attention in plain operators."""

    mask: Tensor

    def __init__(self, width: int, heads: int, length: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        # A finite penalty: exp(-10000) is exactly 0 in float32, and the file holds no infinity.
        future = torch.full((length, length), -1e4).triu(1)
        self.register_buffer("mask", future if causal else None, persistent=False)

    def split(self, x: Tensor) -> Tensor:
        """Split [batch, length, width] into [batch, head, length, width of a head]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        score = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        if self.mask is not None:
            score = score + self.mask
        return self.out((score.softmax(-1) @ value).transpose(1, 2).flatten(2))


class Block(nn.Module):  # type: ignore[misc]
    """Pre-norm transformer block: attention, then a feed-forward layer four times as wide."""

    def __init__(self, width: int, heads: int, length: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, length, causal)
        self.feed = chain(up=nn.Linear(width, 4 * width), gelu=nn.GELU(), down=nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Add what both halves say to the residual stream."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class VisionTransformer(nn.Module):  # type: ignore[misc]
    """Patches, blocks, the mean over the patches, a linear head."""

    def __init__(self, *, size: int, patch: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        length = (size // patch) ** 2
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads, length, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, 1, size, size] to [batch, 10]."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def vit() -> nn.Module:
    """Four transformer blocks of width 64 over patches of 7x7."""
    return VisionTransformer(size=28, patch=7, width=64, heads=4, depth=4)


class Decoder(nn.Module):  # type: ignore[misc]
    """Character embedding, causal blocks, a linear head."""

    def __init__(self, *, vocabulary: int, length: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads, length, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [batch, length] to [batch, length, vocabulary]."""
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.position)))


def decoder() -> nn.Module:
    """Three causal transformer blocks of width 64."""
    return Decoder(vocabulary=len(ALPHABET), length=CONTEXT, width=64, heads=4, depth=3)


def jitter(x: Tensor) -> Tensor:
    """Shift every picture by at most one pixel along each axis and add a little noise."""
    n, _, rows, columns = x.shape
    down, right = torch.randint(0, 3, (2, n, 1, 1))
    row, column = down + torch.arange(rows)[:, None], right + torch.arange(columns)
    shifted = pad(x, (1, 1, 1, 1))[torch.arange(n)[:, None, None], 0, row, column]
    return shifted[:, None] + 0.05 * torch.randn_like(x)


@dataclass(frozen=True)
class Architecture:
    """One line of the table: builder, data, and how to train.

    Attributes
    ----------
    build
        Makes the untrained network.
    load
        Reads the data.
    about
        The architecture in words, for the card.
    epochs, rate, batch
        Passes over the training set, highest learning rate, examples in a step.
    augment
        Changes the inputs of a training step.
    fold
        Also export a second file, with batch normalisation folded into the convolutions.
    """

    build: Callable[[], nn.Module]
    load: Loader
    about: str
    epochs: int
    rate: float
    batch: int = 128
    augment: Callable[[Tensor], Tensor] = lambda x: x
    fold: bool = False


PICTURE = mnist_data(1, 28, 28)
ARCHITECTURES = {
    "mlp": Architecture(mlp, mnist_data(784), "fully connected 784-512-512-10 with ReLU", 8, 1e-3),
    "cnn": Architecture(
        cnn,
        PICTURE,
        "3x3 convolutions 1-16-32-64, zero-padded, with ReLU and 2x2 max-pooling after the last two; "
        "fully connected 3136-128-10",
        4,
        2e-3,
    ),
    "resnet": Architecture(
        resnet,
        PICTURE,
        "3x3 convolution to 32 channels with batch normalisation, ReLU and 2x2 max-pooling; three residual blocks "
        "(convolution, normalisation, ReLU, convolution, normalisation, addition, ReLU) of 32 channels with 2x2 "
        "max-pooling after the first; global average; fully connected 32-10",
        3,
        5e-3,
        fold=True,
    ),
    "vit": Architecture(
        vit,
        PICTURE,
        "vision transformer over 16 patches of 7x7 pixels with learned positions: four pre-norm blocks of width 64 "
        "with 4 heads and a GELU layer of 256; mean over the patches; fully connected 64-10",
        10,
        2e-3,
    ),
    "decoder": Architecture(
        decoder,
        text_data,
        f"causal transformer over {CONTEXT} characters out of {len(ALPHABET)} with learned positions: three pre-norm "
        f"blocks of width 64 with 4 heads and a GELU layer of 256; fully connected 64-{len(ALPHABET)}",
        6,
        4e-3,
    ),
    "digits": Architecture(
        digits,
        digits_data,
        "3x3 convolutions 1-32-48-64, zero-padded, with ReLU, batch normalisation after the first and 2x2 max-pooling "
        "after the last two; fully connected 256-64-10",
        100,
        4e-3,
        batch=50,
        augment=jitter,
    ),
}
