"""The model that is looked at, left as it was, and what it makes of images."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.datasets import Rows, gather
from poise.errors import InputError
from poise.latent import ACTIVE_VARIANCE, DiagonalGaussian
from poise.metrics import CHUNK
from poise.seeds import derive, noise_per_image
from poise.shapes import PerImage, Values
from poise.vae import VAE

MOST_IMAGES = 2_000  # figures are then within some percent, and a small network takes seconds
MOST_VALUES = 2**26  # of all images together, 256 MiB: fewer large images are looked at
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


def some_images(images: Any, name: str, seed: int) -> Values:
    """At most `MOST_IMAGES` of them, drawn at random where there are more: float32, bytes divided by 255, on the CPU.

    Raises:
        InputError: not an array of at least two images.
    """
    if isinstance(images, str) or not (isinstance(images, (Tensor, np.ndarray, Rows))):
        raise InputError(f"{name} must be an array or a tensor (n, ...), not {type(images).__name__}")
    shape = tuple(images.shape)
    if len(shape) < 2 or 0 in shape or len(images) < 2:
        raise InputError(f"{name} must be (n, ...) with at least two images, not of shape {shape}")
    count = max(2, min(len(images), MOST_IMAGES, MOST_VALUES // math.prod(shape[1:])))
    order = np.random.default_rng(derive("diagnosis", seed)).permutation(len(images))
    return gather(images, order[:count]).detach().cpu()  # in a random order: data sets are often sorted by class


@torch.no_grad()
def check_fit(vae: VAE, images: Values, name: str) -> None:
    """Raises InputError where the VAE does not take such images, or gives back another shape."""
    given = f"{name} of shape ({', '.join(map(str, images.shape[1:]))})"
    few = images[:2].to(device_of(vae))
    try:
        mean = vae.encode(few).mean
        produced = tuple(vae.decode(mean).shape[1:])
    except RuntimeError as error:
        raise InputError(f"the VAE does not take {given}: {str(error).splitlines()[0]}") from error
    if mean.dim() != 2:
        raise InputError(f"the encoder gives codes of shape {tuple(mean.shape)}; a diagnosis needs (n, latents): flatten them")
    if produced != tuple(images.shape[1:]):
        raise InputError(f"the decoder gives images of shape {produced} for {given}: they must be the same")


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
