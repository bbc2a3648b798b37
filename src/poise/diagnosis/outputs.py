"""Measure a decoder: the range of its outputs, its dead layers, and its samples against images.

Samples are compared with images by the Frechet distance between pixels, as a share of the images'
variance. Pixels averaged down to 16x16 are a coarse measure. But they need no feature network, and
they distinguish priors of one decoder.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import ParametrizationList

from poise.diagnosis.foreign import at
from poise.diagnosis.subject import Seen, device_of, small
from poise.latent import DiagonalGaussian
from poise.metrics import frechet_distance
from poise.priors import Prior, RenormalisedPrior, fit_prior, renormalisation_factor
from poise.sampling import CHUNK, sample
from poise.shapes import Latents
from poise.support.seeds import derive, generator
from poise.vae import VAE
from poise.variants import PRIORS

# Relative response of a decoder. Two equal latents in one batch may give outputs that differ by
# about 1e-7. The smallest response seen in a collapsed decoder that still works is 1e-4.
ROUNDING = 1e-6
PROBES = 64
SCALES = (1.0, 3.0, 10.0)  # standard deviations of the latents with which a decoder is probed
LARGE = (1e3, 1e4)  # scales of the last layer's weights: activations saturate, linear outputs grow
# Share of the range by which a bound may move between the two scales of LARGE.
SATURATED = 1e-3


@dataclass(frozen=True)
class Layer:
    """Response of one decoder layer to a batch of different latents.

    Attributes:
        name: name in the decoder, such as "layers.1".
        kind: class of the module.
        hears: whether its input differs between latents.
        answers: whether its output differs between latents.
        constant: share of its outputs that are the same for all latents, in [0, 1].
        units: number of outputs per latent.
        silent: whether every output is 0.
        zero_weight: whether it has a weight that is 0 everywhere.
    """

    name: str
    kind: str
    hears: bool
    answers: bool
    constant: float
    units: int
    silent: bool
    zero_weight: bool


def probes(mean: Latents, seed: int) -> Tensor:
    """Return latents to probe a decoder: codes of images, and normal noise of each of `SCALES`."""
    noise = torch.randn(PROBES, mean.shape[1], generator=generator("probes", seed))
    return torch.cat([mean[:PROBES], *(scale * noise for scale in SCALES)])


def response(outputs: Tensor) -> float:
    """Return the largest difference between latents in any output, over the largest output."""
    values = outputs.cpu().double().flatten(1)
    return float((values.amax(0) - values.amin(0)).max() / values.abs().max().clamp_min(1e-30))


@torch.no_grad()
def reachable_range(decoder: nn.Module, latents: Latents) -> tuple[float, float]:
    """Return the smallest and largest value that a decoder's last activation allows.

    A missing bound is infinite. All weights are replaced by random ones. Those of the last layer
    with weights are large, and then ten times larger. The outputs of a sigmoid stay within [0, 1],
    and those of a linear layer grow. So the range does not depend on training, collapse or
    divergence.
    """
    last = _last_weighted(decoder, latents)
    # A normalised weight does not grow, so the range cannot be measured.
    if last is None or isinstance(last[1], ParametrizationList):
        return -math.inf, math.inf
    (low, high), (further_low, further_high) = (
        _range_at(decoder, last[0], latents, scale) for scale in LARGE
    )
    width = high - low
    if not 0 < width < math.inf:
        return -math.inf, math.inf
    least = low if abs(further_low - low) <= SATURATED * width else -math.inf
    return least, high if abs(further_high - high) <= SATURATED * width else math.inf


def _last_weighted(decoder: nn.Module, latents: Latents) -> tuple[str, nn.Module] | None:
    called: list[tuple[str, nn.Module]] = []
    weighted = {
        name: part
        for name, part in decoder.named_modules()
        if any(True for _ in part.parameters(recurse=False))
    }
    with _hooked(weighted, lambda name, module, inputs, output: called.append((name, module))):
        decoder(latents[:2])
    return called[-1] if called else None


def _range_at(decoder: nn.Module, last: str, latents: Latents, scale: float) -> tuple[float, float]:
    source, prefix = generator("range", 0), f"{last}." if last else ""
    state = {
        name: buffer.where(buffer.isfinite(), torch.ones_like(buffer))
        for name, buffer in decoder.named_buffers()
    }
    own = {
        name
        for name, _ in decoder.named_parameters()
        if name.startswith(prefix) and "." not in name[len(prefix) :]
    }
    for name, parameter in decoder.named_parameters():
        random = torch.randn(parameter.shape, generator=source).to(parameter)
        state[name] = random * (scale if name in own else max(1, _fan_in(parameter)) ** -0.5)
    opposite = {name: -value if name in own else value for name, value in state.items()}
    outputs = torch.cat(
        [functional_call(decoder, each, (latents,)).float() for each in (state, opposite)]
    )
    return float(outputs.min()), float(outputs.max())


def _fan_in(parameter: Tensor) -> int:
    return math.prod(parameter.shape[1:])


@torch.no_grad()
def trace(decoder: nn.Module, latents: Latents) -> list[Layer]:
    """Return the response of each innermost layer of a decoder, in the order of calls."""
    layers: list[Layer] = []
    heard: dict[str, bool] = {}  # measured before a layer that works in place overwrites its input

    def hear(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            heard[name] = response(inputs[0]) > ROUNDING

    def record(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and name in heard:
            layers.append(_layer(name, module, heard.pop(name), output))

    leaves = {
        name: module for name, module in decoder.named_modules() if not list(module.children())
    }
    with _hooked(leaves, record, before=hear):
        decoder(latents)
    return layers


def _layer(name: str, module: nn.Module, hears: bool, output: Tensor) -> Layer:
    values = output.cpu().flatten(1)
    weight = getattr(module, "weight", None)
    return Layer(
        name=name,
        kind=type(module).__name__,
        hears=hears,
        answers=response(output) > ROUNDING,
        constant=float((values.amax(0) == values.amin(0)).double().mean()),
        units=values.shape[1],
        silent=not bool(values.any()),
        zero_weight=isinstance(weight, Tensor) and not bool(weight.any()),
    )


def first_deaf(layers: list[Layer]) -> Layer | None:
    """Return the first layer whose output is the same for every latent, or None."""
    return next((layer for layer in layers if not layer.answers), None)


@contextmanager
def _hooked(
    modules: dict[str, nn.Module],
    record: Callable[[str, nn.Module, Any, Any], Any],
    before: Callable[[str, nn.Module, Any], Any] | None = None,
):
    handles = [m.register_forward_hook(partial(record, name)) for name, m in modules.items()]
    if before is not None:
        handles += [
            m.register_forward_pre_hook(partial(before, name)) for name, m in modules.items()
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


MOST_SAMPLES = 1_000  # samples of each prior
# Variance of averaged images over variance of images. Below it, images differ only in patterns that
# averaging removes.
SAME = 1e-6
# With fewer images, the distance between two halves of the images is larger than any gap.
FEWEST_IMAGES = 50


@dataclass(frozen=True)
class Comparison:
    """Frechet distances from the images, as shares of the images' variance.

    Attributes:
        halves: half the distance between two halves of the images. It estimates the distance that
            the finite numbers of images alone produce.
        reconstructions: distance of reconstructions from posterior samples.
        priors: distance of samples from each prior.
        renormalised: distance of renormalised samples from each prior.
        factors: the priors' renormalisation factors.
    """

    halves: float
    reconstructions: float
    priors: Mapping[str, float]
    renormalised: Mapping[str, float]
    factors: Mapping[str, float]


def compare(
    vae: VAE, seen: Seen, codes: DiagonalGaussian, priors: Mapping[str, Prior], seed: int
) -> Comparison | None:
    """Return the distances of reconstructions and of samples from each prior to the images.

    Returns None if all images are the same after averaging down. Leaves out priors that cannot be
    fitted to the codes.

    Args:
        vae: in evaluation mode.
        seen: at least 50 images.
        codes: codes of the training images, to which further priors are fitted.
        priors: priors by name, on the VAE's device.
        seed: seed of the samples, the same with and without renormalisation.
    """
    device = device_of(vae)
    images = small(seen.images[:MOST_SAMPLES]).double()
    variance = float(images.var(0).sum())
    if variance / images.shape[1] <= SAME * seen.variance:
        return None

    def distance(produced: Tensor) -> float:
        if not produced.isfinite().all():
            return math.inf
        return frechet_distance(images, small(produced)) / variance

    def sampled(prior: Prior) -> float:
        source = derive("diagnosis", seed)
        parts = [
            sample(at(vae, start), prior, min(CHUNK, len(images) - start), seed=source, first=start)
            for start in range(0, len(images), CHUNK)
        ]
        return distance(torch.cat(parts))

    fitted = {
        name: prior.to(device)
        for name, named in PRIORS.items()
        if named.needs == "codes" and (prior := _fitted(name, codes)) is not None
    }
    factors = {
        name: renormalisation_factor(prior, codes, device=device) for name, prior in priors.items()
    }
    return Comparison(
        # The distance goes like 1/n + 1/n, and the halves have n/2 images.
        halves=frechet_distance(images[::2], images[1::2]) / variance / 2,
        reconstructions=distance(seen.restored[:MOST_SAMPLES]),
        priors={name: sampled(prior) for name, prior in {**priors, **fitted}.items()},
        renormalised={
            name: sampled(RenormalisedPrior(prior, factors[name])) for name, prior in priors.items()
        },
        factors=factors,
    )


def _fitted(name: str, codes: DiagonalGaussian) -> Prior | None:
    with warnings.catch_warnings():
        # A mixture that has not converged can still be compared.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # squares of very large codes overflow
        try:
            return fit_prior(name, codes)
        except (ValueError, RuntimeError):  # covariances of very large codes are singular
            return None


def detail(images: Tensor) -> float:
    """Return the mean square difference of neighbouring pixels of images (n, c, h, w)."""
    values = images.double()
    return float(sum(values.diff(dim=side).square().mean() for side in (2, 3)))


def largest_variance(images: Tensor) -> float:
    """Return the largest eigenvalue of the images' covariance."""
    return float(spectrum(images)[-1])


def spectrum(images: Tensor) -> Tensor:
    """Return the min(n, dimensions) largest eigenvalues of the images' covariance, ascending."""
    centred = images.flatten(1).double()
    centred = centred - centred.mean(0)
    gram = centred.T @ centred if centred.shape[1] < len(centred) else centred @ centred.T
    return torch.linalg.eigvalsh(gram) / len(images)


def linear_mse(eigenvalues: Tensor, num_latents: int, num_dims: int) -> float:
    """Return the MSE per dimension of the best linear VAE with `num_latents` latents.

    It is the noise variance of probabilistic PCA, the mean of the discarded eigenvalues. So it is
    the MSE of reconstructions from posterior samples. It is 0 if no eigenvalue is discarded.

    Source: Tipping & Bishop 1999.
    """
    discarded = eigenvalues[: max(0, len(eigenvalues) - num_latents)].clamp_min(0).sum()
    return float(discarded / max(1, num_dims - num_latents))
