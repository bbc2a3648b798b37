"""Velocity networks of the flow prior, v(z, t) for latents z (n, L) and times t (n,) in [0, 1].

Each is a stack of residual blocks with adaptive normalisation: features of t give a scale a and a
shift b for every block,

    x + layer(SiLU((1 + a) norm(layer(SiLU(norm(x)))) + b)).

The last layer of a block and of the network starts at zero, so that v = 0 at the first step.
There is no dropout. Source: Peebles & Xie 2023 (adaptive normalisation, zero start).
"""

import math

import torch
from torch import Tensor, nn

from poise.networks.convolutional import group_norm, zeroed
from poise.shapes import Images, Latents, PerImage

TIME_WAVES, HIGHEST_FREQUENCY = 32, 1000.0


class MapVelocity(nn.Module):
    """Return the velocity of latent maps, by convolutions and self-attention.

    Args:
        latent_shape: (c, h, w) of the latent map.
        width: channels of the hidden layers.
        blocks: number of residual blocks.
        attentions: number of self-attention layers, spread evenly over the blocks.
        heads: heads of each self-attention layer.
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        width: int,
        blocks: int,
        attentions: int,
        heads: int,
    ) -> None:
        super().__init__()
        self.latent_shape = latent_shape
        channels, *sides = latent_shape
        self.time = TimeFeatures(width)
        self.input = nn.Conv2d(channels, width, 3, padding=1)
        self.position = nn.Parameter(torch.zeros(1, width, *sides))
        self.blocks = nn.ModuleList(AdaptiveConvBlock(width) for _ in range(blocks))
        places = {round((k + 1) * blocks / (attentions + 1)) - 1 for k in range(attentions)}
        self.attentions = nn.ModuleDict({str(k): SelfAttention(width, heads) for k in places})
        self.output = nn.Sequential(
            group_norm(width), nn.SiLU(), zeroed(nn.Conv2d(width, channels, 3, padding=1))
        )

    def forward(self, latents: Latents, time: PerImage) -> Latents:
        features = self.time(time)
        maps = self.input(latents.unflatten(1, self.latent_shape)) + self.position
        for index, block in enumerate(self.blocks):
            maps = block(maps, features)
            if str(index) in self.attentions:
                maps = self.attentions[str(index)](maps)
        return self.output(maps).flatten(1)


class VectorVelocity(nn.Module):
    """Return the velocity of latent vectors, by dense layers.

    Args:
        latent_dim: number of latents.
        width: width of the hidden layers.
        blocks: number of residual blocks.
    """

    def __init__(self, latent_dim: int, width: int, blocks: int) -> None:
        super().__init__()
        self.latent_shape = (latent_dim,)
        self.time = TimeFeatures(width)
        self.input = nn.Linear(latent_dim, width)
        self.blocks = nn.ModuleList(AdaptiveDenseBlock(width) for _ in range(blocks))
        self.output = nn.Sequential(
            nn.LayerNorm(width), nn.SiLU(), zeroed(nn.Linear(width, latent_dim))
        )

    def forward(self, latents: Latents, time: PerImage) -> Latents:
        features = self.time(time)
        hidden = self.input(latents)
        for block in self.blocks:
            hidden = block(hidden, features)
        return self.output(hidden)


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

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            group_norm(width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), group_norm(width)
        )
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.second = nn.Sequential(nn.SiLU(), zeroed(nn.Conv2d(width, width, 3, padding=1)))

    def forward(self, maps: Images, features: Tensor) -> Images:
        scale, shift = self.modulation(features)[:, :, None, None].chunk(2, dim=1)
        return maps + self.second(self.first(maps) * (1 + scale) + shift)


class AdaptiveDenseBlock(nn.Module):
    """Residual block of two dense layers, scaled and shifted by the features of the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width)
        )
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.second = nn.Sequential(nn.SiLU(), zeroed(nn.Linear(width, width)))

    def forward(self, hidden: Tensor, features: Tensor) -> Tensor:
        scale, shift = self.modulation(features).chunk(2, dim=1)
        return hidden + self.second(self.first(hidden) * (1 + scale) + shift)


class SelfAttention(nn.Module):
    """Add self-attention between all positions of a map to the map."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(width)
        self.projection = nn.Linear(width, 3 * width)
        self.output = zeroed(nn.Linear(width, width))

    def forward(self, maps: Images) -> Images:
        positions = self.norm(maps).flatten(2).transpose(1, 2)
        split = self.projection(positions).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind()
        # Not F.scaled_dot_product_attention: its backward pass in bfloat16 takes 4 times as long
        # as that in float32 on a CPU with AVX512-BF16 (PyTorch 2.13, 2026-11-26).
        weights = (query @ key.transpose(2, 3) / math.sqrt(query.shape[3])).softmax(dim=3)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        return maps + self.output(mixed).transpose(1, 2).unflatten(2, maps.shape[2:])
