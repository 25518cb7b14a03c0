"""Untrained networks in torch of the kinds that are exported most, small, written as the libraries they come from do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from mscompile.models.architectures import ARCHITECTURES


def pictures(size: int = 16) -> tuple[Tensor, ...]:
    """Two pictures."""
    return (torch.randn(2, 3, size, size),)


def tokens() -> tuple[Tensor, ...]:
    """Two sentences."""
    return (torch.randint(0, 100, (2, 17)),)


def sequences() -> tuple[Tensor, ...]:
    """Two sequences of vectors."""
    return (torch.randn(2, 10, 32),)


class Encoder(nn.Module):
    """Two of torch's own encoder layers, which take samples or positions first."""

    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first, norm_first=True, activation="gelu")
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 5)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        given = x if self.batch_first else x.transpose(0, 1)
        return self.head(self.layers(given).mean(1 if self.batch_first else 0))


class Packed(nn.Module):
    """Self-attention with one projection for queries, keys and values, by torch's fused function."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.packed, self.out, self.head = (
            nn.LayerNorm(32),
            nn.Linear(32, 96),
            nn.Linear(32, 32),
            nn.Linear(32, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = self.packed(self.norm(x)).reshape(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        seen = functional.scaled_dot_product_attention(query, key, value)
        return self.head((x + self.out(seen.transpose(1, 2).reshape(batch, length, width))).mean(1))


class Grouped(nn.Module):
    """Grouped-query attention: two heads of keys and values for four of queries; then a gated feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.query, self.key, self.value = (nn.Linear(32, n, bias=False) for n in (32, 16, 16))
        self.out, self.gate, self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.head = nn.Linear(32, 5)

    def turn(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """What is done to queries and keys [batch, heads, places, channels]."""
        return query, key

    def forward(self, x: Tensor) -> Tensor:
        (batch, length, width), seen = x.shape, self.norm(x)
        query, key, value = (
            layer(seen).view(batch, length, -1, 8).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        query, key = self.turn(query, key)
        key, value = (part[:, :, None].expand(batch, 2, 2, length, 8).reshape(batch, 4, length, 8) for part in (key, value))
        weights = (query @ key.transpose(-1, -2) * 8**-0.5).softmax(-1)
        x = x + self.out((weights @ value).transpose(1, 2).reshape(batch, length, width))
        return self.head((x + self.down(functional.silu(self.gate(x)) * self.up(x))).mean(1))


class RootMeanSquare(nn.Module):
    """Normalisation by the root mean square, step by step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Rotary(Grouped):
    """The same with queries and keys normalised per head, then rotated by their place."""

    def __init__(self) -> None:
        super().__init__()
        self.query_norm, self.key_norm = RootMeanSquare(8), RootMeanSquare(8)
        self.register_buffer("rates", 1e4 ** -(torch.arange(0, 8, 2) / 8), persistent=False)

    def turn(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(query.shape[2], dtype=torch.float32), self.rates).repeat(1, 2)
        cosine, sine = angles.cos()[None, None], angles.sin()[None, None]

        def rotated(x: Tensor) -> Tensor:
            low, high = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
            return x * cosine + torch.cat((-high, low), -1) * sine

        return rotated(self.query_norm(query)), rotated(self.key_norm(key))


class ClassToken(nn.Module):
    """A vision transformer that reads its class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 32, 4, 4), nn.Parameter(torch.randn(1, 1, 32))
        self.places = nn.Parameter(0.1 * torch.randn(1, 17, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True, activation="gelu")
        self.layer, self.norm, self.head = layer, nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(x.shape[0], -1, -1)
        x = torch.cat((token, self.patches(x).flatten(2).transpose(1, 2)), dim=1) + self.places
        return self.head(self.norm(self.layer(x))[:, 0])


class Mixer(nn.Module):
    """A class token on a residual stream that nothing normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.token = nn.Linear(32, 48), nn.Parameter(torch.randn(1, 1, 48))
        self.up, self.down, self.mix, self.head = nn.Linear(48, 64), nn.Linear(64, 48), nn.Linear(11, 11), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), self.first(x)), dim=1)
        x = x + self.down(functional.gelu(self.up(x)))
        return self.head((x + self.mix(x.transpose(1, 2)).transpose(1, 2))[:, 0])


class Windows(nn.Module):
    """Attention within shifted windows, with a learned table of relative positions, as in Swin transformers."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.norm, self.packed, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(49, 2))
        places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        apart = (places[:, :, None] - places[:, None]).permute(1, 2, 0) + 3
        self.register_buffer("apart", (apart[..., 0] * 7 + apart[..., 1]).view(-1), persistent=False)
        self.feed = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        areas = torch.zeros(1, 8, 8, 1)
        for number, (row, column) in enumerate((r, c) for r in range(2) for c in range(2)):
            areas[:, -shift * row or None :, -shift * column or None :] = number
        area = self.parted(areas).view(-1, 16)
        hidden = torch.where(area[:, None] == area[:, :, None], 0.0, -100.0)
        self.register_buffer("hidden", hidden if shift else None, persistent=False)

    def parted(self, x: Tensor) -> Tensor:
        """Windows of 4 by 4 as samples."""
        batch, height, width, channels = x.shape
        apart = x.view(batch, height // 4, 4, width // 4, 4, channels)
        return apart.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 16, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        seen = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2)) if self.shift else self.norm(x)
        packed = self.packed(self.parted(seen)).reshape(-1, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
        query, key, value = packed[0], packed[1], packed[2]
        table = self.table[self.apart].view(16, 16, -1).permute(2, 0, 1).contiguous()
        scores = (query * 8**-0.5) @ key.transpose(-2, -1) + table.unsqueeze(0)
        if self.hidden is not None:
            scores = (scores.view(batch, 4, 2, 16, 16) + self.hidden[None, :, None]).view(-1, 2, 16, 16)
        found = self.out((scores.softmax(-1) @ value).transpose(1, 2).reshape(-1, 16, channels))
        found = found.view(batch, height // 4, width // 4, 4, 4, channels).permute(0, 1, 3, 2, 4, 5).contiguous()
        found = found.view(batch, height, width, channels)
        x = x + (torch.roll(found, (self.shift, self.shift), (1, 2)) if self.shift else found)
        return x + self.feed(x)


class Swin(nn.Module):
    """Two such layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.layers, self.head = (
            nn.Conv2d(3, 16, 2, 2),
            nn.Sequential(Windows(0), Windows(2)),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(x).permute(0, 2, 3, 1)).mean((1, 2)))


class ConvNext(nn.Module):
    """Depthwise convolution, normalisation over channels at the end, two products, a gain for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 16, 7, padding=3, groups=16)
        self.feed = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.gain, self.head = nn.Parameter(torch.randn(16)), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(
            (x + (self.gain * self.feed(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)).mean((2, 3))
        )


class Mobile(nn.Module):
    """An inverted residual block with squeeze and excitation by hard functions, as in MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish())
        self.wide = nn.Sequential(nn.Conv2d(16, 48, 1), nn.BatchNorm2d(48), nn.Hardswish())
        self.deep = nn.Sequential(nn.Conv2d(48, 48, 5, 1, 2, groups=48), nn.BatchNorm2d(48), nn.Hardswish())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(48, 12, 1), nn.ReLU(), nn.Conv2d(12, 48, 1))
        self.narrow, self.head = nn.Sequential(nn.Conv2d(48, 16, 1), nn.BatchNorm2d(16)), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        deep = self.deep(self.wide(x))
        x = x + self.narrow(deep * functional.hardsigmoid(self.squeeze(deep)))
        return self.head(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


class UNet(nn.Module):
    """Down, and up again by a transposed convolution and by resampling, beside what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (self.pair(*sizes) for sizes in ((3, 16), (16, 32), (32, 48)))
        self.lift, self.near = nn.ConvTranspose2d(48, 32, 2, 2), nn.Conv2d(32, 16, 1)
        self.back, self.last, self.out = self.pair(64, 32), self.pair(32, 16), nn.Conv2d(16, 2, 1)

    @staticmethod
    def pair(*sizes: int) -> nn.Module:
        """A convolution, normalised."""
        return nn.Sequential(nn.Conv2d(*sizes, 3, padding=1, bias=False), nn.BatchNorm2d(sizes[1]), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(functional.max_pool2d(one, 2))
        x = self.lift(self.three(functional.max_pool2d(two, 2)))
        rows, columns = two.shape[2] - x.shape[2], two.shape[3] - x.shape[3]
        x = functional.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        x = self.back(torch.cat([two, x], 1))
        x = self.near(functional.interpolate(x, size=one.shape[-2:], mode="nearest"))
        return self.out(self.last(torch.cat([one, x], 1)))


class Conv1D(nn.Module):
    """A product whose matrix is stored the other way round."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(0.1 * torch.randn(before, after)), nn.Parameter(torch.zeros(after))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.bias.shape[0])


class Gpt(nn.Module):
    """One layer of GPT-2: packed projections, a causal mask by choice, embeddings that are also the last weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(100, 32), nn.Embedding(64, 32)
        self.packed, self.out, self.up, self.down = Conv1D(32, 96), Conv1D(32, 32), Conv1D(32, 128), Conv1D(128, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.register_buffer("seen", torch.ones(64, 64, dtype=torch.bool).tril().view(1, 1, 64, 64), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[-1])[None])
        parts = self.packed(self.norms[0](x)).split(32, dim=2)
        query, key, value = (part.view(*part.shape[:-1], 4, 8).permute(0, 2, 1, 3) for part in parts)
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(8)
        low = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)
        scores = torch.where(self.seen[:, :, : ids.shape[-1], : ids.shape[-1]], scores, low)
        found = torch.matmul(scores.softmax(-1), value).permute(0, 2, 1, 3).contiguous()
        x = x + self.out(found.view(*found.shape[:-2], 32))
        up = self.up(self.norms[1](x))
        x = x + self.down(0.5 * up * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * torch.pow(up, 3.0)))))
        return functional.linear(self.norms[2](x), self.words.weight)


class Bert(nn.Module):
    """Two layers of BERT as Hugging Face writes it, attention spelled out; the first word is read."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(100, 32), nn.Embedding(64, 32), nn.Embedding(2, 32)
        self.register_buffer("numbers", torch.arange(64)[None])
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    **{name: nn.Linear(32, 32) for name in ("query", "key", "value", "out")},
                    **{"up": nn.Linear(32, 128), "down": nn.Linear(128, 32)},
                    **{"norm": nn.LayerNorm(32), "last": nn.LayerNorm(32)},
                }
            )
            for _ in range(2)
        )

    def forward(self, ids: Tensor, kinds: Tensor, mask: Tensor) -> Tensor:
        hidden = (1.0 - mask[:, None, None, :].float()) * -10000.0
        x = self.words(ids) + self.kinds(kinds)
        x = self.norm(x + self.places(self.numbers[:, : ids.shape[1]]))
        for layer in self.layers:
            query, key, value = (
                layer[name](x).view(x.shape[0], x.shape[1], 4, 8).permute(0, 2, 1, 3) for name in ("query", "key", "value")
            )
            scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(8) + hidden
            found = torch.matmul(scores.softmax(-1), value).permute(0, 2, 1, 3).contiguous()
            x = layer["norm"](layer["out"](found.view(found.shape[0], found.shape[1], 32)) + x)
            x = layer["last"](layer["down"](functional.gelu(layer["up"](x))) + x)
        return self.head(x[:, 0])


def sentences() -> tuple[Tensor, ...]:
    """Two sentences, of which kinds their words are, and how long they are."""
    mask = torch.ones(2, 17, dtype=torch.int64)
    mask[0, 11:] = 0
    return (*tokens(), torch.zeros(2, 17, dtype=torch.int64), mask)


NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "resnet": (ARCHITECTURES["resnet"].build, lambda: (torch.randn(2, 1, 28, 28),)),
    "vit": (ARCHITECTURES["vit"].build, lambda: (torch.randn(2, 1, 28, 28),)),
    "nn.TransformerEncoder": (Encoder, sequences),
    "nn.TransformerEncoder, positions first": (lambda: Encoder(batch_first=False), sequences),
    "packed projection": (Packed, sequences),
    "grouped-query, gated": (Grouped, sequences),
    "rotary, normalised heads": (Rotary, sequences),
    "class token": (ClassToken, pictures),
    "class token, no norm": (Mixer, sequences),
    "Swin": (Swin, pictures),
    "ConvNeXt": (ConvNext, pictures),
    "MobileNetV3": (Mobile, pictures),
    "U-Net": (UNet, pictures),
    "GPT-2": (Gpt, tokens),
    "BERT": (Bert, sentences),
}
