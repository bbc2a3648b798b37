"""Encoder and decoder whose latents are a small image, a latent map of shape (c, h, w).

Outside these modules latents are vectors (n, L) with L = c h w. Both modules hold `latent_shape`
and reshape. There is no dense layer, so that reconstructions keep details.

The networks have no BatchNorm. A residual block adds to its input

    conv(SiLU(norm(conv(SiLU(norm(x)))))),

with group normalisation. The last convolution of a block starts at zero, so that a block is the
identity at the first step. The head of the log variance is a `WideConv2d`, since the KL grows like
exp(logvar). Resolution changes by `nn.PixelUnshuffle` and `nn.PixelShuffle`, which move pixels into
channels and back.
"""

import math
from typing import TypeVar

from torch import Tensor, nn

from poise.networks.layers import WideConv2d
from poise.shapes import Images, Latents

GROUPS = 8
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


class ConvEncoder(nn.Module):
    """Encode images as the mean and log variance of a latent map.

    Args:
        channels: channels of the images.
        latent_shape: (c, h, w) of the latent map.
        patch: side of the patches that become one position of the first level.
        widths: channels at each resolution, from the largest image to the latent map. Each level
            halves the side.
        blocks: number of residual blocks at each resolution.
    """

    def __init__(
        self,
        channels: int,
        latent_shape: tuple[int, int, int],
        patch: int,
        widths: tuple[int, ...],
        blocks: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.latent_shape = latent_shape
        layers: list[nn.Module] = [
            nn.PixelUnshuffle(patch),
            nn.Conv2d(channels * patch**2, widths[0], 3, padding=1),
        ]
        for level, (width, number) in enumerate(zip(widths, blocks, strict=True)):
            if level > 0:
                layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * widths[level - 1], width, 1)]
            layers += [ConvBlock(width) for _ in range(number)]
        self.features = nn.Sequential(*layers, group_norm(widths[-1]), nn.SiLU())
        self.mean = nn.Conv2d(widths[-1], latent_shape[0], 3, padding=1)
        self.logvar = WideConv2d(widths[-1], latent_shape[0], 3, padding=1)

    def forward(self, images: Images) -> tuple[Tensor, Tensor]:
        features = self.features(images - 0.5)
        return self.mean(features).flatten(1), self.logvar(features).flatten(1)


class ConvDecoder(nn.Module):
    """Decode latent maps; the mirror of `ConvEncoder`, with the same arguments.

    The output is not bounded. It starts as grey, 0.5.
    """

    def __init__(
        self,
        channels: int,
        latent_shape: tuple[int, int, int],
        patch: int,
        widths: tuple[int, ...],
        blocks: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.latent_shape = latent_shape
        layers: list[nn.Module] = [nn.Conv2d(latent_shape[0], widths[-1], 3, padding=1)]
        for level in reversed(range(len(widths))):
            layers += [ConvBlock(widths[level]) for _ in range(blocks[level])]
            if level > 0:
                layers += [nn.Conv2d(widths[level], 4 * widths[level - 1], 1), nn.PixelShuffle(2)]
        pixels = nn.Conv2d(widths[0], channels * patch**2, 3, padding=1)
        self.layers = nn.Sequential(
            *layers, group_norm(widths[0]), nn.SiLU(), zeroed(pixels), nn.PixelShuffle(patch)
        )

    def forward(self, latents: Latents) -> Images:
        return self.layers(latents.unflatten(1, self.latent_shape)) + 0.5


class ConvBlock(nn.Module):
    """Add a branch of twice (group normalisation, SiLU, 3x3 convolution) to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            group_norm(width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            group_norm(width), nn.SiLU(), zeroed(nn.Conv2d(width, width, 3, padding=1)),
        )  # fmt: skip

    def forward(self, images: Images) -> Images:
        return images + self.branch(images)


def group_norm(width: int) -> nn.GroupNorm:
    """Return a group normalisation of `GROUPS` groups, or of fewer that divide `width`."""
    return nn.GroupNorm(math.gcd(GROUPS, width), width)


def zeroed(layer: Layer) -> Layer:
    """Set the weight and bias of a layer to zero, in place, and return it."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
