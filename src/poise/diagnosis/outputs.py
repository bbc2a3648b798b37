"""What a decoder can produce at all, and where it stops listening to its latents.

Samples against images: Frechet distances between pixels, as shares of the images' variance.

Pixels, averaged down to 16x16, are a coarse measure, but need no network, and tell priors of one decoder apart.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import ParametrizationList

from poise.diagnosis.subject import Seen, device_of, small
from poise.latent import DiagonalGaussian
from poise.metrics import frechet_distance
from poise.priors import Prior, RenormalisedPrior, fit_prior, renormalisation_factor
from poise.sampling import sample
from poise.shapes import Latents
from poise.support.seeds import derive, generator
from poise.vae import VAE
from poise.variants import PRIORS

ROUNDING = 1e-6  # relative: of two equal latents in one batch, outputs may differ by some 1e-7; the least response seen in a
# collapsed but living decoder is 1e-4
PROBES = 64
SCALES = (1.0, 3.0, 10.0)  # of N(0, I): a decoder that answers to none of them answers to nothing
LARGE = (1e3, 1e4)  # of the last layer's weights: activations saturate, sums grow
SATURATED = 1e-3  # of the range: how much a bound may move from the first of LARGE to the second


@dataclass(frozen=True)
class Layer:
    """How one layer of a decoder answers to a batch of different latents.

    Attributes:
        name: in the decoder, as in "layers.1".
        kind: class of the module.
        hears: whether its input differs between latents.
        answers: whether its output does.
        constant: share of its outputs that are the same for all latents.
        units: outputs per latent.
        silent: whether every output is 0.
        zero_weight: whether it has a weight and all of it is 0.
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
    """Latents to try a decoder with: codes of images, and draws from N(0, I), from narrow to far too wide."""
    noise = torch.randn(PROBES, mean.shape[1], generator=generator("probes", seed))
    return torch.cat([mean[:PROBES], *(scale * noise for scale in SCALES)])


def response(outputs: Tensor) -> float:
    """Largest difference that latents make to any value, relative to the largest value."""
    values = outputs.cpu().double().flatten(1)
    return float((values.amax(0) - values.amin(0)).max() / values.abs().max().clamp_min(1e-30))


@torch.no_grad()
def reachable_range(decoder: nn.Module, latents: Latents, seed: int = 0) -> tuple[float, float]:
    """Least and greatest value that the decoder's last activation can give, whatever the weights; infinite without bound.

    All weights are replaced by random ones, those of the last layer that has any by large ones, and by ten times larger
    ones: the outputs of a sigmoid stay within [0, 1], those of a linear layer grow. So neither training nor collapse nor
    divergence hides the range.
    """
    last = _last_weighted(decoder, latents)
    if last is None or isinstance(
        last[1], ParametrizationList
    ):  # a normalised weight does not grow
        return -math.inf, math.inf
    (low, high), (further_low, further_high) = (
        _range_at(decoder, last[0], latents, scale, seed) for scale in LARGE
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


def _range_at(
    decoder: nn.Module, last: str, latents: Latents, scale: float, seed: int
) -> tuple[float, float]:
    source, prefix = generator("range", seed), f"{last}." if last else ""
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
    """The decoder's innermost layers in the order in which they are called."""
    layers: list[Layer] = []

    def record(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and inputs and isinstance(inputs[0], Tensor):
            layers.append(_layer(name, module, inputs[0], output))

    leaves = {
        name: module for name, module in decoder.named_modules() if not list(module.children())
    }
    with _hooked(leaves, record):
        decoder(latents)
    return layers


def _layer(name: str, module: nn.Module, given: Tensor, output: Tensor) -> Layer:
    values = output.cpu().flatten(1)
    weight = getattr(module, "weight", None)
    return Layer(
        name=name,
        kind=type(module).__name__,
        hears=response(given) > ROUNDING,
        answers=response(output) > ROUNDING,
        constant=float((values.amax(0) == values.amin(0)).double().mean()),
        units=values.shape[1],
        silent=not bool(values.any()),
        zero_weight=isinstance(weight, Tensor) and not bool(weight.any()),
    )


def first_deaf(layers: list[Layer]) -> Layer | None:
    """The first layer whose output is the same for every latent."""
    return next((layer for layer in layers if not layer.answers), None)


@contextmanager
def _hooked(modules: dict[str, nn.Module], record: Callable[[str, nn.Module, Any, Any], Any]):
    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def call(module: nn.Module, inputs: Any, output: Any) -> None:
            record(name, module, inputs, output)

        return call

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


MOST_SAMPLES = 1_000  # of each prior
SAME = 1e-6  # variance of averaged images over that of images: with less, they differ in a pattern that averages out
FEWEST_IMAGES = 50  # of fewer, the distance between two halves of the images is larger than any gap


@dataclass(frozen=True)
class Comparison:
    """How far from the images a VAE's products are, all as shares of the images' variance.

    Attributes:
        halves: distance between two halves of the images, halved: what the numbers of images alone would give.
        reconstructions: of the images, from posterior samples.
        priors: of samples from each prior.
        renormalised: of samples from each prior, renormalised.
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
    """Return the distances from the images of reconstructions and of samples from each prior.

    None if the images are the same once averaged down. Priors that cannot be fitted to the codes
    are left out.

    Args:
        vae: in evaluation mode.
        seen: at least 50 images.
        codes: of the training images, to which further priors are fitted.
        priors: by name, on the VAE's device.
        seed: of the samples: the same ones with and without renormalisation.
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
        return distance(sample(vae, prior, len(images), seed=derive("diagnosis", seed)))

    fitted = {
        name: prior.to(device)
        for name, named in PRIORS.items()
        if named.needs == "codes" and (prior := _fitted(name, codes)) is not None
    }
    factors = {
        name: renormalisation_factor(prior, codes, device=device) for name, prior in priors.items()
    }
    return Comparison(
        halves=frechet_distance(images[::2], images[1::2])
        / variance
        / 2,  # it goes like 1/n + 1/n, and the halves have n/2
        reconstructions=distance(seen.restored[:MOST_SAMPLES]),
        priors={name: sampled(prior) for name, prior in {**priors, **fitted}.items()},
        renormalised={
            name: sampled(RenormalisedPrior(prior, factors[name])) for name, prior in priors.items()
        },
        factors=factors,
    )


def _fitted(name: str, codes: DiagonalGaussian) -> Prior | None:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # it is compared, whatever it has converged to
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # of codes so large that their squares overflow
        try:
            return fit_prior(name, codes)
        except (
            ValueError,
            RuntimeError,
        ):  # covariances that are singular to rounding: codes far too large
            return None


def largest_variance(images: Tensor) -> float:
    """Variance of images along the direction in which they vary most: the largest eigenvalue of their covariance."""
    return float(spectrum(images)[-1])


def spectrum(images: Tensor) -> Tensor:
    """Return the eigenvalues of the images' covariance, ascending, of min(n, dimensions) directions."""
    centred = images.flatten(1).double()
    centred = centred - centred.mean(0)
    gram = centred.T @ centred if centred.shape[1] < len(centred) else centred @ centred.T
    return torch.linalg.eigvalsh(gram) / len(images)


def linear_mse(eigenvalues: Tensor, num_latents: int, num_dims: int) -> float:
    """Return the error per dimension of the best linear VAE with so many latents.

    It is the noise variance of probabilistic PCA, the mean of the discarded eigenvalues (Tipping &
    Bishop 1999), and so the MSE of reconstructions from posterior samples. 0 where none is discarded.
    """
    discarded = eigenvalues[: max(0, len(eigenvalues) - num_latents)].clamp_min(0).sum()
    return float(discarded / max(1, num_dims - num_latents))
