"""Encoders and decoders. No loss here; any other pair of nn.Modules does as well (see `vae.VAE`).

Each factory returns `(encoder, decoder)`: the encoder maps images to `(mean, logvar)`, the decoder latents to images. For
latents of stage 1, `second_stage` returns a pair that maps latents to latents.

`resnet` and `second_stage` are those of the code released with Asperti & Trentin 2020; `infogan` and `wae` those of Dai &
Wipf 2019 (after Chen et al. 2016 and Tolstikhin et al. 2018). All of these were TensorFlow programs that relied on its
defaults, which PyTorch does not share, and which are kept here: Glorot-uniform weights and zero biases, "same" padding
that puts the odd pixel of a strided convolution at the end, BatchNorm with eps 1e-5 and a running average of decay 0.999.

That decay needs thousands of steps to settle: a short run scored in evaluation mode looks broken. `norm_decay` sets it.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from poise.errors import InputError
from poise.shapes import Images, Latents, Values

Pair = tuple[nn.Module, nn.Module]
Codes = tuple[Tensor, Tensor]  # mean and logvar, (n, latents) each

RELEASED_NORM_DECAY = 0.999
_WEIGHTED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def resnet(
    image_size: int,
    channels: int = 3,
    latent_dim: int = 64,
    *,
    scales: int | None = None,
    norm_decay: float = RELEASED_NORM_DECAY,
) -> Pair:
    """The released ResNet: residual blocks at `scales` resolutions, 32 channels at the first, twice as many at each next.

    Args:
        image_size: side in pixels, a multiple of 4 and of 2^(scales-1).
        channels: 1 or 3 (any number >= 1).
        latent_dim: number of latents.
        scales: resolutions of the encoder; by default as many as leave at least 7 pixels: 3 for 32 (CIFAR-10), 4 for 64
            (CelebA), as released. The decoder doubles from 2x2 (for 32 and 64), or the smallest odd base, to the full size.
        norm_decay: of BatchNorm's running averages, in [0, 1).

    Raises:
        InputError: a size that the network cannot take.
    """
    _check_size("resnet", image_size, 4)
    if scales is None:
        scales = max(k for k in range(1, 16) if k == 1 or (image_size % 2 ** (k - 1) == 0 and image_size >> (k - 1) >= 7))
    if scales < 1:
        raise InputError(f"scales must be >= 1, not {scales}")
    _check_size(f"resnet with {scales} scales", image_size, 2 ** (scales - 1))
    encoder = ResNetEncoder(channels, latent_dim, scales)
    decoder = ResNetDecoder(image_size, channels, latent_dim)
    return _finish(encoder, norm_decay), _finish(decoder, norm_decay)


def infogan(image_size: int, channels: int = 1, latent_dim: int = 64, *, norm_decay: float = RELEASED_NORM_DECAY) -> Pair:
    """Dai & Wipf's InfoGAN-type network: two strided convolutions and two dense layers; spectral norms in the encoder.

    Args:
        image_size: side in pixels, a multiple of 4.
        channels, latent_dim, norm_decay: see `resnet`.

    Raises:
        InputError: a size that the network cannot take.
    """
    _check_size("infogan", image_size, 4)
    encoder = _finish(InfoGANEncoder(image_size, channels, latent_dim), norm_decay, _normal_init)
    for layer in list(encoder.modules()):
        if isinstance(layer, _WEIGHTED):
            spectral_norm(layer)  # after the weights are drawn, so that its power iteration starts from them
    return encoder, _finish(InfoGANDecoder(image_size, channels, latent_dim), norm_decay, _normal_init)


def wae(image_size: int = 64, channels: int = 3, latent_dim: int = 64, *, norm_decay: float = RELEASED_NORM_DECAY) -> Pair:
    """Dai & Wipf's WAE-type network: four 5x5 convolutions up to 1024 channels, and their mirror image. Made for 64x64.

    Args:
        image_size: side in pixels, a multiple of 8.
        channels, latent_dim, norm_decay: see `resnet`.

    Raises:
        InputError: a size that the network cannot take.
    """
    _check_size("wae", image_size, 8)
    encoder, decoder = WAEEncoder(image_size, channels, latent_dim), WAEDecoder(image_size, channels, latent_dim)
    return _finish(encoder, norm_decay), _finish(decoder, norm_decay)


def mlp(
    shape: int | Sequence[int],
    latent_dim: int,
    *,
    hidden: Sequence[int] = (512, 512),
    output: Literal["sigmoid", "linear"] = "sigmoid",
) -> Pair:
    """Dense ReLU layers for vectors and for small images.

    Args:
        shape: of one item, without the batch dimension: a number of features, or (channels, height, width).
        latent_dim: number of latents.
        hidden: widths of the encoder's hidden layers, mirrored in the decoder. Empty: a linear VAE.
        output: "sigmoid" for values in [0, 1], "linear" for any others.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if output not in ("sigmoid", "linear"):
        raise InputError(f'output must be "sigmoid" or "linear", not {output!r}')
    encoder, decoder = MLPEncoder(shape, latent_dim, hidden), MLPDecoder(shape, latent_dim, hidden, output)
    return _finish(encoder), _finish(decoder)


def second_stage(latent_dim: int = 64, hidden: int = 2048, layers: int = 3) -> Pair:
    """The second stage's network: ReLU layers on each side, the input concatenated before the output layer.

    Args:
        latent_dim: latents of stage 1, and as many of its own.
        hidden: width of each layer: 2048 (CIFAR-10) or 4096 (CelebA) as released, 1024 for Dai & Wipf's small networks.
        layers: hidden layers on each side.
    """
    return _finish(SecondStageEncoder(latent_dim, hidden, layers)), _finish(SecondStageDecoder(latent_dim, hidden, layers))


class ResNetEncoder(nn.Module):
    """Convolution, residual blocks with strided convolutions between, average pool, dense residual block, two heads.

    The heads give the mean and log s, the log standard deviation: logvar = 2 log s learns at twice the pace of a head that
    gives logvar itself.
    """

    def __init__(self, channels: int, latent_dim: int, scales: int) -> None:
        super().__init__()
        widths = [32 * 2**k for k in range(scales)]
        layers: list[nn.Module] = [SameConv2d(channels, widths[0], 3), ResidualBlock(widths[0])]
        for narrow, wide in pairwise(widths):
            layers += [SameConv2d(narrow, wide, 3, stride=2), ResidualBlock(wide)]
        self.features = nn.Sequential(*layers)
        self.dense = DenseResidualBlock(widths[-1], 512)
        self.mean = nn.Linear(512, latent_dim)
        self.log_std = nn.Linear(512, latent_dim)

    def forward(self, images: Images) -> Codes:
        features = self.dense(self.features(images).mean((2, 3)))
        return self.mean(features), 2 * self.log_std(features)


class ResNetDecoder(nn.Module):
    """A dense layer to a small image, then transposed convolutions, each followed by a residual block, to full size."""

    def __init__(self, image_size: int, channels: int, latent_dim: int) -> None:
        super().__init__()
        doublings = max(k for k in range(1, 16) if image_size % 2**k == 0 and image_size >> k >= 2)
        self.base = (32 * 2**doublings, image_size >> doublings, image_size >> doublings)
        self.dense = nn.Linear(latent_dim, math.prod(self.base))
        layers: list[nn.Module] = []
        for k in reversed(range(doublings)):
            layers += [SameConvTranspose2d(32 * 2 ** (k + 1), 32 * 2**k, 3), ResidualBlock(32 * 2**k)]
        self.layers = nn.Sequential(*layers, SameConv2d(32, channels, 3), nn.Sigmoid())

    def forward(self, latents: Latents) -> Images:
        return self.layers(self.dense(latents).unflatten(1, self.base))


class ResidualBlock(nn.Module):
    """Two times BatchNorm, ReLU, convolution, beside a 3x3 convolution (never the identity)."""

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
    """Two times ReLU and dense, beside a dense layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.ReLU(), nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs))
        self.shortcut = nn.Linear(inputs, outputs)

    def forward(self, features: Tensor) -> Tensor:
        return self.shortcut(features) + self.branch(features)


class InfoGANEncoder(nn.Module):
    """All layers spectrally normalised; s = 1e-6 + softplus(head)."""

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
    """Two dense layers and two transposed convolutions."""

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
    """5x5 convolutions to 128 (stride 1), 256, 512 and 1024 channels (stride 2), two dense heads: mean and log s."""

    def __init__(self, image_size: int, channels: int, latent_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in [(channels, 128, 1), (128, 256, 2), (256, 512, 2), (512, 1024, 2)]:
            layers += [SameConv2d(inputs, outputs, 5, stride=stride), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten())
        size = 1024 * (image_size // 8) ** 2
        self.mean = nn.Linear(size, latent_dim)
        self.log_std = nn.Linear(size, latent_dim)

    def forward(self, images: Images) -> Codes:
        features = self.features(images)
        return self.mean(features), 2 * self.log_std(features)


class WAEDecoder(nn.Module):
    """A dense layer to 1024 small images, transposed 5x5 convolutions to 512, 256 and 128 channels, a convolution."""

    def __init__(self, image_size: int, channels: int, latent_dim: int) -> None:
        super().__init__()
        base = (1024, image_size // 8, image_size // 8)
        layers: list[nn.Module] = [nn.Linear(latent_dim, math.prod(base)), nn.ReLU(), nn.Unflatten(1, base)]
        for inputs, outputs in [(1024, 512), (512, 256), (256, 128)]:
            layers += [SameConvTranspose2d(inputs, outputs, 5), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, SameConv2d(128, channels, 5), nn.Sigmoid())

    def forward(self, latents: Latents) -> Images:
        return self.layers(latents)


class MLPEncoder(nn.Module):
    """Dense ReLU layers and two heads: mean and log s."""

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
    """Dense ReLU layers, a dense output of the items' shape."""

    def __init__(self, shape: Sequence[int], latent_dim: int, hidden: Sequence[int], output: str) -> None:
        super().__init__()
        widths = [latent_dim, *reversed(hidden)]
        self.layers = nn.Sequential(
            *_relu_layers(widths), nn.Linear(widths[-1], math.prod(shape)), nn.Unflatten(1, tuple(shape)),
            nn.Sigmoid() if output == "sigmoid" else nn.Identity(),
        )  # fmt: skip

    def forward(self, latents: Latents) -> Values:
        return self.layers(latents)


class SecondStageEncoder(nn.Module):
    """ReLU layers; the input is concatenated before the two heads: mean and log s."""

    def __init__(self, latent_dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*_relu_layers([latent_dim] + [hidden] * layers))
        self.mean = nn.Linear(hidden + latent_dim, latent_dim)
        self.log_std = nn.Linear(hidden + latent_dim, latent_dim)

    def forward(self, latents: Latents) -> Codes:
        features = torch.cat([self.features(latents), latents], 1)
        return self.mean(features), 2 * self.log_std(features)


class SecondStageDecoder(nn.Module):
    """ReLU layers; the input is concatenated before the linear output."""

    def __init__(self, latent_dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*_relu_layers([latent_dim] + [hidden] * layers))
        self.output = nn.Linear(hidden + latent_dim, latent_dim)

    def forward(self, latents: Latents) -> Latents:
        return self.output(torch.cat([self.features(latents), latents], 1))


class SameConv2d(nn.Conv2d):
    """Convolution whose output is ceil(size / stride): zeros are added, the odd one at the bottom and right."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride)

    def forward(self, input: Tensor) -> Tensor:
        (top, bottom), (left, right) = (_same_padding(input.shape[k], self.kernel_size[0], self.stride[0]) for k in (2, 3))
        if (top, left) == (bottom, right):
            return F.conv2d(input, self.weight, self.bias, self.stride, (top, left))
        return F.conv2d(F.pad(input, (left, right, top, bottom)), self.weight, self.bias, self.stride)


class SameConvTranspose2d(nn.ConvTranspose2d):
    """Transposed convolution of stride 2 to exactly twice the size: the adjoint of `SameConv2d` on an even size."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, stride=2, padding=(kernel - 2) // 2)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        height, width = input.shape[2:]
        return super().forward(input)[:, :, : 2 * height, : 2 * width]


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _relu_layers(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return layers


def _check_size(name: str, image_size: int, multiple: int) -> None:
    if image_size < multiple or image_size < 8 or image_size % multiple:
        least = max(8, multiple)
        lower = max(least, image_size // multiple * multiple)
        raise InputError(
            f"network {name} takes image sizes that are multiples of {multiple}, {least} or more, not {image_size}: "
            f"resize to {lower} or {lower + multiple}"
        )


def _normal_init(weight: Tensor) -> Tensor:
    return nn.init.normal_(weight, std=0.02)


def _finish(
    network: nn.Module,
    norm_decay: float = RELEASED_NORM_DECAY,
    init: Callable[[Tensor], Tensor] = nn.init.xavier_uniform_,
) -> nn.Module:
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1 - norm_decay
        if isinstance(module, _WEIGHTED):
            init(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
