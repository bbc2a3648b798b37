"""The model that is looked at, left as it was, and what it makes of images."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.latent import ACTIVE_VARIANCE, DiagonalGaussian
from poise.metrics import CHUNK
from poise.shapes import PerImage, Values
from poise.support.seeds import noise_per_image
from poise.vae import VAE

SIDE = 16  # images are averaged down to this side before samples are compared with them


@dataclass(frozen=True)
class Seen:
    """What a VAE makes of images, on the CPU.

    Attributes:
        images: (n, ...).
        codes: their posteriors.
        restored: each decoded from one sample of its posterior.
    """

    images: Tensor
    codes: DiagonalGaussian
    restored: Tensor

    def error(self, power: float = 2) -> PerImage:
        """|x - x^|^power of each image, its *mean* over dimensions."""
        return (self.restored - self.images).double().abs().pow(power).flatten(1).mean(1)

    @cached_property
    def mse(self) -> float:
        return float(self.error().mean())

    @cached_property
    def variance(self) -> float:
        """Of the images about their mean image, the mean over dimensions: the MSE of a decoder that ignores its latents."""
        return float(self.images.double().var(0).mean())

    @cached_property
    def active(self) -> Tensor:
        """(latents,), whether a latent's mean varies over the images (Burda et al. 2016)."""
        return self.codes.mean.double().var(0, correction=0) > ACTIVE_VARIANCE

    @property
    def num_dims(self) -> int:
        return math.prod(self.images.shape[1:])


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode inside the block; they and torch's global generator as they were after it."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for part, training in modes:
            part.training = training


def device_of(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


@torch.no_grad()
def look(vae: VAE, images: Values, seed: int) -> Seen:
    """Posteriors and reconstructions of all images; image i's noise is a function of (seed, i)."""
    parts, device = [], device_of(vae)
    for start in range(0, len(images), CHUNK):
        posterior = vae.encode(images[start : start + CHUNK].to(device))
        noise = noise_per_image(len(posterior.mean), posterior.mean.shape[1], seed, start).to(device)
        restored = vae.decode(posterior.sample(noise))
        parts.append([part.float().cpu() for part in (posterior.mean, posterior.logvar, restored)])
    mean, logvar, restored = (torch.cat(part) for part in zip(*parts, strict=True))
    return Seen(images, DiagonalGaussian(mean, logvar), restored)


def small(images: Values) -> Tensor:
    """(n, values), averaged over areas down to 16x16 where they are pictures."""
    if images.dim() == 4:
        height, width = (min(side, SIDE) for side in images.shape[2:])
        images = F.adaptive_avg_pool2d(images, (height, width))
    return images.flatten(1)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
