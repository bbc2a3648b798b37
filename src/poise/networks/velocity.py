"""Velocity networks of the flow prior, v(z, t) for latents z (n, L) and times t (n,) in [0, 1].

Each is a stack of residual blocks with adaptive normalisation: features of t give a scale a and a
shift b for every block,

    x + layer(SiLU((1 + a) norm(layer(SiLU(norm(x)))) + b)).

The last layer of a block and of the network starts at zero, so that v = 0 at the first step.
There is no dropout. With classes, an embedding of the class is added to the features of t; it
starts at zero, and its last row is of no class. Source: Peebles & Xie 2023 (adaptive
normalisation, zero start).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.networks.convolutional import group_norm, zeroed
from poise.shapes import ClassOfEach, Images, Latents, PerImage

TIME_WAVES, HIGHEST_FREQUENCY = 32, 1000.0
HEAD_WIDTH = 32  # channels of an attention head


class MapVelocity(nn.Module):
    """Return the velocity of latent maps, by a U-shaped convolutional network.

    Residual blocks at the resolution of the map, at half of it with self-attention, and at full
    resolution again. Blocks at half resolution have twice the channels, so that all blocks cost the
    same. A map with an odd side is padded.

    Args:
        latent_shape: (c, h, w) of the latent map.
        width: channels at full resolution.
        blocks: number of residual blocks before, at and after half resolution. Each block at half
            resolution is followed by a self-attention layer.
        classes: number of classes that it is conditioned on. 0: none.
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        width: int,
        blocks: tuple[int, int, int],
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.latent_shape = latent_shape
        channels, height, breadth = latent_shape
        self.padding = (0, breadth % 2, 0, height % 2)
        halves = (height + 1) // 2, (breadth + 1) // 2
        inner = 2 * width
        before, inside, after = blocks
        self.time = TimeFeatures(inner)
        self.input = nn.Conv2d(channels, width, 3, padding=1)
        self.position = nn.Parameter(torch.zeros(1, width, 2 * halves[0], 2 * halves[1]))
        self.before = nn.ModuleList(AdaptiveConvBlock(width, inner) for _ in range(before))
        self.down = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * width, inner, 1))
        self.inner_position = nn.Parameter(torch.zeros(1, inner, *halves))
        self.inside = nn.ModuleList(AdaptiveConvBlock(inner, inner) for _ in range(inside))
        self.attentions = nn.ModuleList(SelfAttention(inner) for _ in range(inside))
        self.up = nn.Sequential(nn.Conv2d(inner, 4 * width, 1), nn.PixelShuffle(2))
        self.after = nn.ModuleList(AdaptiveConvBlock(width, inner) for _ in range(after))
        self.output = nn.Sequential(
            group_norm(width), nn.SiLU(), zeroed(nn.Conv2d(width, channels, 3, padding=1))
        )
        self.label = class_embedding(classes, inner)

    def forward(
        self, latents: Latents, time: PerImage, labels: ClassOfEach | None = None
    ) -> Latents:
        features = self.time(time)
        if self.label is not None:
            features = features + self.label(labels)
        maps = F.pad(latents.unflatten(1, self.latent_shape), self.padding)
        maps = self.input(maps) + self.position
        for block in self.before:
            maps = block(maps, features)
        inner = self.down(maps) + self.inner_position
        for block, attention in zip(self.inside, self.attentions, strict=True):
            inner = attention(block(inner, features))
        maps = maps + self.up(inner)
        for block in self.after:
            maps = block(maps, features)
        _, height, breadth = self.latent_shape
        return self.output(maps)[:, :, :height, :breadth].flatten(1)


class VectorVelocity(nn.Module):
    """Return the velocity of latent vectors, by dense layers.

    Args:
        latent_dim: number of latents.
        width: width of the hidden layers.
        blocks: number of residual blocks.
        classes: number of classes that it is conditioned on. 0: none.
    """

    def __init__(self, latent_dim: int, width: int, blocks: int, classes: int = 0) -> None:
        super().__init__()
        self.latent_shape = (latent_dim,)
        self.time = TimeFeatures(width)
        self.input = nn.Linear(latent_dim, width)
        self.blocks = nn.ModuleList(AdaptiveDenseBlock(width, width) for _ in range(blocks))
        self.output = nn.Sequential(
            nn.LayerNorm(width), nn.SiLU(), zeroed(nn.Linear(width, latent_dim))
        )
        self.label = class_embedding(classes, width)

    def forward(
        self, latents: Latents, time: PerImage, labels: ClassOfEach | None = None
    ) -> Latents:
        features = self.time(time)
        if self.label is not None:
            features = features + self.label(labels)
        hidden = self.input(latents)
        for block in self.blocks:
            hidden = block(hidden, features)
        return self.output(hidden)


def class_embedding(classes: int, width: int) -> nn.Embedding | None:
    """Return an embedding of the classes and of "no class", all zero; None without classes."""
    return nn.Embedding.from_pretrained(torch.zeros(classes + 1, width), False) if classes else None


class TimeFeatures(nn.Module):
    """Return features (n, width) of times (n,): sines and cosines, then two dense layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * TIME_WAVES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, time: PerImage) -> Tensor:
        exponents = torch.linspace(0, 1, TIME_WAVES, dtype=time.dtype, device=time.device)
        angles = time[:, None] * HIGHEST_FREQUENCY**exponents
        return self.layers(torch.cat([angles.sin(), angles.cos()], dim=1))


class AdaptiveConvBlock(nn.Module):
    """Residual block of two 3x3 convolutions, scaled and shifted by the features of the time."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            group_norm(width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), group_norm(width)
        )
        self.modulation = zeroed(nn.Linear(features, 2 * width))
        self.second = nn.Sequential(nn.SiLU(), zeroed(nn.Conv2d(width, width, 3, padding=1)))

    def forward(self, maps: Images, features: Tensor) -> Images:
        scale, shift = self.modulation(features)[:, :, None, None].chunk(2, dim=1)
        return maps + self.second(self.first(maps) * (1 + scale) + shift)


class AdaptiveDenseBlock(nn.Module):
    """Residual block of two dense layers, scaled and shifted by the features of the time."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width)
        )
        self.modulation = zeroed(nn.Linear(features, 2 * width))
        self.second = nn.Sequential(nn.SiLU(), zeroed(nn.Linear(width, width)))

    def forward(self, hidden: Tensor, features: Tensor) -> Tensor:
        scale, shift = self.modulation(features).chunk(2, dim=1)
        return hidden + self.second(self.first(hidden) * (1 + scale) + shift)


class SelfAttention(nn.Module):
    """Add self-attention between all positions of a map to the map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = next(k for k in range(max(1, width // HEAD_WIDTH), 0, -1) if width % k == 0)
        self.norm = group_norm(width)
        self.projection = nn.Linear(width, 3 * width)
        self.output = zeroed(nn.Linear(width, width))

    def forward(self, maps: Images) -> Images:
        positions = self.norm(maps).flatten(2).transpose(1, 2)
        split = self.projection(positions).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind()
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return maps + self.output(mixed).transpose(1, 2).unflatten(2, maps.shape[2:])
