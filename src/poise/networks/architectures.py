"""Network modules: encoders, which return `(mean, logvar)`, and decoders."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.networks.layers import SameConv2d, SameConvTranspose2d
from poise.shapes import Images, Latents, Values

Codes = tuple[Tensor, Tensor]  # mean and logvar, (n, latents) each


class ResNetEncoder(nn.Module):
    """Encode images with residual blocks at several resolutions.

    Layers: a convolution, residual blocks with strided convolutions between them, an average pool,
    a dense residual block and two heads. The heads return the mean and log s, the log standard
    deviation. logvar = 2 log s learns twice as fast as a head that returns logvar.

    Args:
        channels: channels of the images.
        latent_dim: number of latents.
        scales: number of resolutions.
        head: type of the layer that returns log s.
    """

    def __init__(
        self, channels: int, latent_dim: int, scales: int, head: type[nn.Linear] = nn.Linear
    ) -> None:
        super().__init__()
        widths = [32 * 2**k for k in range(scales)]
        layers: list[nn.Module] = [SameConv2d(channels, widths[0], 3), ResidualBlock(widths[0])]
        for narrow, wide in pairwise(widths):
            layers += [SameConv2d(narrow, wide, 3, stride=2), ResidualBlock(wide)]
        self.features = nn.Sequential(*layers)
        self.dense = DenseResidualBlock(widths[-1], 512)
        self.mean = nn.Linear(512, latent_dim)
        self.log_std = head(512, latent_dim)

    def forward(self, images: Images) -> Codes:
        features = self.dense(self.features(images).mean((2, 3)))
        return self.mean(features), 2 * self.log_std(features)


class ResNetDecoder(nn.Module):
    """Decode latents with a dense layer, transposed convolutions and residual blocks.

    The dense layer makes a small image. Each transposed convolution doubles its size and is
    followed by a residual block.
    """

    def __init__(self, image_size: int, channels: int, latent_dim: int) -> None:
        super().__init__()
        doublings = max(k for k in range(1, 16) if image_size % 2**k == 0 and image_size >> k >= 2)
        self.base = (32 * 2**doublings, image_size >> doublings, image_size >> doublings)
        self.dense = nn.Linear(latent_dim, math.prod(self.base))
        layers: list[nn.Module] = []
        for k in reversed(range(doublings)):
            layers += [
                SameConvTranspose2d(32 * 2 ** (k + 1), 32 * 2**k, 3),
                ResidualBlock(32 * 2**k),
            ]
        self.layers = nn.Sequential(*layers, SameConv2d(32, channels, 3), nn.Sigmoid())

    def forward(self, latents: Latents) -> Images:
        return self.layers(self.dense(latents).unflatten(1, self.base))


class ResidualBlock(nn.Module):
    """Add a branch of twice (BatchNorm, ReLU, 3x3 convolution) to a shortcut.

    The shortcut is a 3x3 convolution, never the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), SameConv2d(channels, channels, 3),
            nn.BatchNorm2d(channels), nn.ReLU(), SameConv2d(channels, channels, 3),
        )  # fmt: skip
        self.shortcut = SameConv2d(channels, channels, 3)

    def forward(self, images: Images) -> Images:
        return self.shortcut(images) + self.branch(images)


class DenseResidualBlock(nn.Module):
    """Add a branch of twice (ReLU, dense layer) to a shortcut, which is a dense layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.ReLU(), nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs)
        )
        self.shortcut = nn.Linear(inputs, outputs)

    def forward(self, features: Tensor) -> Tensor:
        return self.shortcut(features) + self.branch(features)


class InfoGANEncoder(nn.Module):
    """Encode images with two strided convolutions, a dense layer and two heads.

    The standard deviation is s = 1e-6 + softplus(head). `infogan` normalises all layers spectrally.
    """

    def __init__(self, image_size: int, channels: int, latent_dim: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            SameConv2d(channels, 64, 4, stride=2), nn.LeakyReLU(0.2),
            SameConv2d(64, 128, 4, stride=2), nn.BatchNorm2d(128), nn.LeakyReLU(0.2), nn.Flatten(),
            nn.Linear(128 * (image_size // 4) ** 2, 1024), nn.BatchNorm1d(1024), nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.mean = nn.Linear(1024, latent_dim)
        self.raw_std = nn.Linear(1024, latent_dim)

    def forward(self, images: Images) -> Codes:
        features = self.features(images)
        return self.mean(features), 2 * (1e-6 + F.softplus(self.raw_std(features))).log()


class InfoGANDecoder(nn.Module):
    """Decode latents with two dense layers and two transposed convolutions."""

    def __init__(self, image_size: int, channels: int, latent_dim: int) -> None:
        super().__init__()
        base = (128, image_size // 4, image_size // 4)
        size = math.prod(base)
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, 1024), nn.BatchNorm1d(1024), nn.ReLU(),
            nn.Linear(1024, size), nn.BatchNorm1d(size), nn.ReLU(), nn.Unflatten(1, base),
            SameConvTranspose2d(128, 64, 4), nn.BatchNorm2d(64), nn.ReLU(),
            SameConvTranspose2d(64, channels, 4), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, latents: Latents) -> Images:
        return self.layers(latents)


class WAEEncoder(nn.Module):
    """Encode images with four 5x5 convolutions and two dense heads, for the mean and log s.

    The convolutions have 128 (stride 1), 256, 512 and 1024 channels (stride 2).
    """

    def __init__(
        self, image_size: int, channels: int, latent_dim: int, head: type[nn.Linear] = nn.Linear
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in [
            (channels, 128, 1),
            (128, 256, 2),
            (256, 512, 2),
            (512, 1024, 2),
        ]:
            layers += [
                SameConv2d(inputs, outputs, 5, stride=stride),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers, nn.Flatten())
        size = 1024 * (image_size // 8) ** 2
        self.mean = head(size, latent_dim)
        self.log_std = head(size, latent_dim)

    def forward(self, images: Images) -> Codes:
        features = self.features(images)
        return self.mean(features), 2 * self.log_std(features)


class WAEDecoder(nn.Module):
    """Decode latents with a dense layer, three transposed 5x5 convolutions and a convolution.

    The dense layer has 1024 small channels. The transposed convolutions have 512, 256 and 128.
    """

    def __init__(self, image_size: int, channels: int, latent_dim: int) -> None:
        super().__init__()
        base = (1024, image_size // 8, image_size // 8)
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, math.prod(base)),
            nn.ReLU(),
            nn.Unflatten(1, base),
        ]
        for inputs, outputs in [(1024, 512), (512, 256), (256, 128)]:
            layers += [SameConvTranspose2d(inputs, outputs, 5), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, SameConv2d(128, channels, 5), nn.Sigmoid())

    def forward(self, latents: Latents) -> Images:
        return self.layers(latents)


class MLPEncoder(nn.Module):
    """Encode values with dense ReLU layers and two heads, for the mean and log s."""

    def __init__(self, shape: Sequence[int], latent_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), *_relu_layers([math.prod(shape), *hidden]))
        width = [math.prod(shape), *hidden][-1]
        self.mean = nn.Linear(width, latent_dim)
        self.log_std = nn.Linear(width, latent_dim)

    def forward(self, values: Values) -> Codes:
        features = self.features(values)
        return self.mean(features), 2 * self.log_std(features)


class MLPDecoder(nn.Module):
    """Decode latents with dense ReLU layers and a dense output in the shape of one item."""

    def __init__(
        self, shape: Sequence[int], latent_dim: int, hidden: Sequence[int], output: str
    ) -> None:
        super().__init__()
        widths = [latent_dim, *reversed(hidden)]
        self.layers = nn.Sequential(
            *_relu_layers(widths),
            nn.Linear(widths[-1], math.prod(shape)), nn.Unflatten(1, tuple(shape)),
            nn.Sigmoid() if output == "sigmoid" else nn.Identity(),
        )  # fmt: skip

    def forward(self, latents: Latents) -> Values:
        return self.layers(latents)


class SecondStageEncoder(nn.Module):
    """Encode latents with dense ReLU layers and two heads, for the mean and log s.

    The input of the network is concatenated to the input of the heads.
    """

    def __init__(self, latent_dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*_relu_layers([latent_dim] + [hidden] * layers))
        self.mean = nn.Linear(hidden + latent_dim, latent_dim)
        self.log_std = nn.Linear(hidden + latent_dim, latent_dim)

    def forward(self, latents: Latents) -> Codes:
        features = torch.cat([self.features(latents), latents], 1)
        return self.mean(features), 2 * self.log_std(features)


class SecondStageDecoder(nn.Module):
    """Decode latents with dense ReLU layers and a linear output.

    The input of the network is concatenated to the input of the output layer.
    """

    def __init__(self, latent_dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*_relu_layers([latent_dim] + [hidden] * layers))
        self.output = nn.Linear(hidden + latent_dim, latent_dim)

    def forward(self, latents: Latents) -> Latents:
        return self.output(torch.cat([self.features(latents), latents], 1))


def _relu_layers(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return layers
