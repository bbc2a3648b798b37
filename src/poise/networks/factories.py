"""Factories of encoder and decoder pairs, and their initial weights.

initialisation="released" draws weights as the TensorFlow programs did: Glorot-uniform, with zero
biases. The first steps of `resnet` and `wae` may then explode at 64 pixels and more.

initialisation="pytorch" keeps PyTorch's initial weights and changes the heads:

- `resnet`: no layer normalises the convolutional shortcuts of its blocks. Glorot's weights preserve
  the variance of a layer's input, so that branch and shortcut double it in every block. PyTorch's
  weights have a third of that variance. At 128 pixels one step of Adam may still change log s by
  tens, and the KL grows like s^2. So the head of log s divides its input by sqrt(n), n = 512
  (`WideLinear`). The head of the mean does not: with the division it learns more slowly
  (docs/log.md).
- `wae`: its heads have n = 65,536 inputs at 64 pixels. A step of Adam changes each weight by about
  the learning rate. So it changes an output by up to the learning rate times the L1 norm of the
  input, which grows like n. Both heads are `WideLinear`.

`infogan` and `mlp` have one initialisation each. Their first steps were stable with it
(docs/log.md, 2026-11-26).
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
from poise.networks.convolutional import ConvDecoder, ConvEncoder
from poise.networks.layers import WideLinear, normalise_spectrally
from poise.networks.velocity import MapVelocity, VectorVelocity

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
    """Return the ResNet encoder and decoder of Asperti & Trentin's released code.

    The encoder has residual blocks at `scales` resolutions, with 32 channels at the first and twice
    as many at each next. The decoder doubles its resolution from 2x2 (for 32 and 64 pixels), or
    from the smallest odd base, to the full size.

    Args:
        image_size: side in pixels, at least 8, a multiple of 4 and of 2^(scales-1).
        channels: number of channels, >= 1; usually 1 or 3.
        latent_dim: number of latents, >= 1.
        scales: number of resolutions of the encoder, >= 1. Default: as many as leave at least 7
            pixels. As released, this is 3 for 32 pixels (CIFAR-10) and 4 for 64 (CelebA).
        norm_decay: decay of the running averages of BatchNorm, in [0, 1).
        initialisation: "pytorch" or "released". The first steps of "released" may explode (see
            `poise.networks.factories`).

    Raises:
        InputError: `image_size` or `scales` does not fit this network.
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
    """Return Dai & Wipf's InfoGAN-type encoder and decoder.

    Each has two strided convolutions and two dense layers. The encoder is spectrally normalised.

    Args:
        image_size: side in pixels, at least 8, a multiple of 4.
        channels, latent_dim, norm_decay: see `resnet`.

    Raises:
        InputError: `image_size` does not fit this network.
    """
    _check_size("infogan", image_size, 4)
    encoder = _initialise(
        InfoGANEncoder(image_size, channels, latent_dim), norm_decay, _normal_init
    )
    # After the weights are drawn, since the power iteration starts from them.
    normalise_spectrally(encoder)
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
    """Return Dai & Wipf's WAE-type encoder and decoder, which were designed for 64x64 pixels.

    The encoder has four 5x5 convolutions with up to 1024 channels. The decoder mirrors it.

    Args:
        image_size: side in pixels, a multiple of 8.
        channels, latent_dim, norm_decay, initialisation: see `resnet`.

    Raises:
        InputError: `image_size` does not fit this network.
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
    """Return an encoder and a decoder of dense ReLU layers, for vectors and small images.

    Args:
        shape: shape of one item, without the batch dimension: a number of features, or (channels,
            height, width).
        latent_dim: number of latents, >= 1.
        hidden: widths of the encoder's hidden layers. The decoder has them in reverse order. Empty:
            a linear VAE.
        output: "sigmoid" for values in [0, 1], "linear" for other values.

    Raises:
        InputError: `output` is neither of the two.
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
    """Return the encoder and decoder of stage 2, for the latents of stage 1.

    Each has dense ReLU layers. The input is concatenated to the input of the output layer.

    Args:
        latent_dim: number of latents of stage 1, and of stage 2.
        hidden: width of the hidden layers. As released: 2048 (CIFAR-10), 4096 (CelebA). Dai & Wipf:
            1024 for their small networks.
        layers: number of hidden layers in the encoder and in the decoder.
    """
    return _initialise(SecondStageEncoder(latent_dim, hidden, layers)), _initialise(
        SecondStageDecoder(latent_dim, hidden, layers)
    )


def conv(
    image_size: int, channels: int = 3, latent_channels: int = 4, *, width: int | None = None
) -> Pair:
    """Return a convolutional encoder and decoder with a latent map.

    The side of the latent map is that of the image divided by 4 below 64 pixels, by 8 up to 128
    pixels, and by 16 above. Latents are vectors (n, L), L = c h w. Both modules hold
    `latent_shape`, (c, h, w). Meant for images from 28 to 256 pixels.

    Args:
        image_size: side in pixels, at least 8, a multiple of the divisor above.
        channels: number of channels, >= 1; usually 1 or 3.
        latent_channels: number of channels c of the latent map, >= 1.
        width: channels of the hidden layers at the resolution of the latent map, a multiple of 8.
            Each larger resolution has half as many. Default: 128.

    Raises:
        InputError: `image_size` or `width` does not fit this network.
    """
    factor = 4 if image_size < 64 else 8 if image_size <= 128 else 16
    _check_size("conv", image_size, factor)
    width = 128 if width is None else width
    _check_width("conv", width)
    levels = 2 if factor == 4 else 3
    widths = tuple(max(8, width >> k) for k in reversed(range(levels)))
    shape = (latent_channels, image_size // factor, image_size // factor)
    patch = factor >> (levels - 1)
    return (
        ConvEncoder(channels, shape, patch, widths, (1,) * levels),
        ConvDecoder(channels, shape, patch, widths, (1,) * (levels - 1) + (2,)),
    )


def flow(
    latent_shape: tuple[int, ...],
    *,
    width: int | None = None,
    blocks: int | None = None,
    classes: int = 0,
) -> nn.Module:
    """Return the velocity network of the flow prior: latents (n, L) and times (n,) to (n, L).

    Args:
        latent_shape: (c, h, w) of a latent map, for a convolutional network; or (L,), for a
            network of dense layers.
        width: channels or width of the hidden layers, a multiple of 8. Default: 96 for maps, 512
            for vectors. The convolutional network has twice as many at half resolution.
        blocks: number of residual blocks, >= 3 for maps, >= 1 for vectors. Default: 7 for maps, of
            which 3 at half resolution; 6 for vectors. Each block at half resolution is followed by
            a self-attention layer.
        classes: number of classes. The network then takes a third argument, the class of each
            latent vector (n,), where `classes` stands for none. 0: none.

    Raises:
        InputError: a setting does not fit this network.
    """
    if len(latent_shape) not in (1, 3):
        raise InputError(f"latent_shape must be (L,) or (c, h, w), not {latent_shape}")
    maps = len(latent_shape) == 3
    width = (96 if maps else 512) if width is None else width
    blocks = (7 if maps else 6) if blocks is None else blocks
    _check_width("flow", width)
    if blocks < (least := 3 if maps else 1):
        raise InputError(f"network flow takes {least} blocks or more here, not {blocks}")
    if not maps:
        return VectorVelocity(latent_shape[0], width, blocks, classes)
    outer = blocks // 3
    return MapVelocity(latent_shape, width, (outer, blocks - 2 * outer, outer), classes)


def _check_width(name: str, width: int) -> None:
    if width < 8 or width % 8:
        raise InputError(f"network {name} takes widths that are multiples of 8, not {width}")


def _check_size(name: str, image_size: int, multiple: int) -> None:
    if image_size < multiple or image_size < 8 or image_size % multiple:
        least = max(8, multiple)
        lower = max(least, image_size // multiple * multiple)
        raise InputError(
            f"network {name} takes image sizes that are multiples of {multiple}, {least} or more, "
            f"not {image_size}: resize to {lower} or {lower + multiple}"
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
    """Set the decay of BatchNorm's running averages and draw the initial weights.

    `init` draws the weights, and biases are zero. None keeps PyTorch's initial weights and biases.
    """
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1 - norm_decay
        if init is not None and isinstance(module, _WEIGHTED):
            init(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
