"""Pairs of encoder and decoder.

Initial weights. "released" draws them as the TensorFlow programs did: Glorot-uniform, with zero biases. With them the first
steps of `resnet` and `wae` may explode at 64 pixels and more. "pytorch" keeps PyTorch's weights and differs in the heads:

- `resnet`: nothing normalises the convolutional shortcuts of its blocks. Glorot's weights keep the variance of a layer's
  input, so branch and shortcut double it in every block. PyTorch's weights have a third of that variance. At 128 pixels
  one step of Adam may still move log s by tens, and the KL grows like s^2. So the head of log s sees its input divided by
  sqrt(n), n = 512 (`WideLinear`). The head of the mean does not: divided too, it learns more slowly (docs/log.md).
- `wae`: its heads see n = 65,536 values at 64 pixels. A step of Adam moves each weight by about the learning rate, and so
  an output by up to the rate times the L1 norm of the input, which grows like n. Both heads are `WideLinear`.

`infogan` and `mlp` have one initialisation each, with which their first steps were sound (docs/log.md, 2026-11-26).
"""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from poise.errors import InputError
from poise.networks.architectures import (
    InfoGANDecoder,
    InfoGANEncoder,
    MLPDecoder,
    MLPEncoder,
    ResNetDecoder,
    ResNetEncoder,
    SecondStageDecoder,
    SecondStageEncoder,
    WAEDecoder,
    WAEEncoder,
)
from poise.networks.layers import WideLinear, normalise_spectrally

Initialisation = Literal["pytorch", "released"]
Pair = tuple[nn.Module, nn.Module]

RELEASED_NORM_DECAY = 0.999
_WEIGHTED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def resnet(
    image_size: int,
    channels: int = 3,
    latent_dim: int = 64,
    *,
    scales: int | None = None,
    norm_decay: float = RELEASED_NORM_DECAY,
    initialisation: Initialisation = "pytorch",
) -> Pair:
    """The released ResNet: residual blocks at `scales` resolutions, 32 channels at the first, twice as many at each next.

    Args:
        image_size: side in pixels, a multiple of 4 and of 2^(scales-1).
        channels: 1 or 3 (any number >= 1).
        latent_dim: number of latents.
        scales: resolutions of the encoder; by default as many as leave at least 7 pixels: 3 for 32 (CIFAR-10), 4 for 64
            (CelebA), as released. The decoder doubles from 2x2 (for 32 and 64), or the smallest odd base, to the full size.
        norm_decay: of BatchNorm's running averages, in [0, 1).
        initialisation: "pytorch", or "released", whose first steps may explode (see this module).

    Raises:
        InputError: a size that the network cannot take.
    """
    _check_size("resnet", image_size, 4)
    if scales is None:
        scales = max(
            k
            for k in range(1, 16)
            if k == 1 or (image_size % 2 ** (k - 1) == 0 and image_size >> (k - 1) >= 7)
        )
    if scales < 1:
        raise InputError(f"scales must be >= 1, not {scales}")
    _check_size(f"resnet with {scales} scales", image_size, 2 ** (scales - 1))
    head, init = _HEADS[initialisation], _INITIALISATIONS[initialisation]
    encoder = ResNetEncoder(channels, latent_dim, scales, head)
    decoder = ResNetDecoder(image_size, channels, latent_dim)
    return _initialise(encoder, norm_decay, init), _initialise(decoder, norm_decay, init)


def infogan(
    image_size: int,
    channels: int = 1,
    latent_dim: int = 64,
    *,
    norm_decay: float = RELEASED_NORM_DECAY,
) -> Pair:
    """Dai & Wipf's InfoGAN-type network: two strided convolutions and two dense layers; spectral norms in the encoder.

    Args:
        image_size: side in pixels, a multiple of 4.
        channels, latent_dim, norm_decay: see `resnet`.

    Raises:
        InputError: a size that the network cannot take.
    """
    _check_size("infogan", image_size, 4)
    encoder = _initialise(
        InfoGANEncoder(image_size, channels, latent_dim), norm_decay, _normal_init
    )
    normalise_spectrally(
        encoder
    )  # after the weights are drawn: the power iteration starts from them
    return encoder, _initialise(
        InfoGANDecoder(image_size, channels, latent_dim), norm_decay, _normal_init
    )


def wae(
    image_size: int = 64,
    channels: int = 3,
    latent_dim: int = 64,
    *,
    norm_decay: float = RELEASED_NORM_DECAY,
    initialisation: Initialisation = "pytorch",
) -> Pair:
    """Dai & Wipf's WAE-type network: four 5x5 convolutions up to 1024 channels, and their mirror image. Made for 64x64.

    Args:
        image_size: side in pixels, a multiple of 8.
        channels, latent_dim, norm_decay, initialisation: see `resnet`.

    Raises:
        InputError: a size that the network cannot take.
    """
    _check_size("wae", image_size, 8)
    head, init = _HEADS[initialisation], _INITIALISATIONS[initialisation]
    encoder, decoder = (
        WAEEncoder(image_size, channels, latent_dim, head),
        WAEDecoder(image_size, channels, latent_dim),
    )
    return _initialise(encoder, norm_decay, init), _initialise(decoder, norm_decay, init)


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
    encoder, decoder = (
        MLPEncoder(shape, latent_dim, hidden),
        MLPDecoder(shape, latent_dim, hidden, output),
    )
    return _initialise(encoder), _initialise(decoder)


def second_stage(latent_dim: int = 64, hidden: int = 2048, layers: int = 3) -> Pair:
    """The second stage's network: ReLU layers on each side, the input concatenated before the output layer.

    Args:
        latent_dim: latents of stage 1, and as many of its own.
        hidden: width of each layer: 2048 (CIFAR-10) or 4096 (CelebA) as released, 1024 for Dai & Wipf's small networks.
        layers: hidden layers on each side.
    """
    return _initialise(SecondStageEncoder(latent_dim, hidden, layers)), _initialise(
        SecondStageDecoder(latent_dim, hidden, layers)
    )


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


_INITIALISATIONS: dict[Initialisation, Callable[[Tensor], Tensor] | None] = {
    "pytorch": None,
    "released": nn.init.xavier_uniform_,
}
_HEADS: dict[Initialisation, type[nn.Linear]] = {"pytorch": WideLinear, "released": nn.Linear}


def _initialise(
    network: nn.Module,
    norm_decay: float = RELEASED_NORM_DECAY,
    init: Callable[[Tensor], Tensor] | None = nn.init.xavier_uniform_,
) -> nn.Module:
    """Set the decay of BatchNorm's averages, and draw weights by `init`, with zero biases; None: leave PyTorch's."""
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1 - norm_decay
        if init is not None and isinstance(module, _WEIGHTED):
            init(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
