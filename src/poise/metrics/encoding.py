"""Encode images in chunks of a fixed size, so that no metric depends on the batch size."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from poise.data import gather
from poise.data.decoding import PixelMoments
from poise.errors import InputError
from poise.latent import DiagonalGaussian
from poise.shapes import Values
from poise.support.kernels import own_kernels
from poise.support.seeds import noise_per_image
from poise.vae import VAE

CHUNK = 100


def encode_all(vae: VAE, images: Any) -> DiagonalGaussian:
    """Return the posteriors of all images, (n, latents), float32 on the CPU.

    Sets the networks to evaluation mode.

    Raises:
        InputError: there are no images.
    """
    codes = list(encode_chunks(vae, images))
    return DiagonalGaussian(
        torch.cat([part.mean for part in codes]), torch.cat([part.logvar for part in codes])
    )


def encode_chunks(vae: VAE, images: Any) -> Iterator[DiagonalGaussian]:
    """Yield the posteriors of `encode_all` chunk by chunk, float32 on the CPU.

    Needs memory for one chunk of `CHUNK` images only.
    """
    for _, posterior in posteriors(vae, images):
        yield DiagonalGaussian(posterior.mean.float().cpu(), posterior.logvar.float().cpu())


def posteriors(vae: VAE, images: Any) -> Iterator[tuple[Values, DiagonalGaussian]]:
    """Yield chunks of images and their posteriors, on the networks' device.

    Sets the networks to evaluation mode.

    Raises:
        InputError: there are no images, or the encoder does not take float32.
    """
    if not len(images):
        raise InputError("there are no images to encode")
    device = next(vae.parameters()).device
    vae.eval()
    for start in range(0, len(images), CHUNK):
        batch = gather(images, range(start, min(start + CHUNK, len(images)))).to(device)
        try:
            with torch.no_grad(), own_kernels(device):
                posterior = vae.encode(batch)
        except RuntimeError:
            check_precision(vae, "this measurement")  # or else it is another error
            raise
        yield batch, posterior


def check_precision(module: nn.Module, what: str) -> None:
    """Raise an InputError if a weight is not float32, in which `what` computes."""
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise InputError(
                f"{name} is {kind}, and {what} computes in float32: pass copy.deepcopy(vae).float()"
            )


def encoded(vae: VAE, images: Any, seed: int) -> Iterator[tuple[Values, DiagonalGaussian, Tensor]]:
    """Yield chunks of images, their posteriors, and standard normal noise for one sample per image.

    The noise of image i depends on (seed, i) only.
    """
    first = 0
    for batch, posterior in posteriors(vae, images):
        noise = noise_per_image(len(batch), posterior.mean.shape[1], seed, first).to(batch.device)
        first += len(batch)
        yield batch, posterior, noise


def pixel_std(images: Any) -> float:
    """Return the standard deviation of each dimension over images, averaged over dimensions.

    Args:
        images: (n, channels, height, width), uint8 or float in [0, 1].
    """
    moments = PixelMoments()
    for start in range(0, len(images), CHUNK):
        moments.add(gather(images, range(start, min(start + CHUNK, len(images)))))
    return moments.std()
