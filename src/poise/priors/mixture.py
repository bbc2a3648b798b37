"""Gaussian mixture prior, fitted to the training codes: GEN-mixture.

With labels a mixture is fitted to the codes of each class. Together they are one mixture, whose
weights are multiplied by the frequencies of the classes.
"""

import math
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from poise.errors import InputError
from poise.latent import DiagonalGaussian
from poise.priors.base import Prior, TrainedModel
from poise.shapes import ClassOfEach, Latents, Noise, PerImage
from poise.support.seeds import derive, generator

# The defaults of scikit-learn's max_iter, tol (nats) and reg_covar.
MOST_ITERATIONS, LEAST_GAIN, LEAST_VARIANCE = (100, 1e-3, 1e-6)
MOST_CODES = 20_000  # maximum number of codes that a mixture is fitted to
MOST_LATENTS = 512  # the time of a fit grows with their square


@final
class MixturePrior(Prior):
    """Draw latents from a Gaussian mixture with full covariances.

    The first column of the noise selects the component.

    Args:
        weights: (components,), with sum 1.
        means: (components, latents).
        factors: (components, latents, latents), lower Cholesky factors of the covariances.
        labels: (components,), the class of each component. None: the mixture has no classes.
    """

    weights: Tensor
    means: Tensor
    factors: Tensor
    labels: Tensor | None

    def __init__(
        self, weights: Tensor, means: Tensor, factors: Tensor, labels: ClassOfEach | None = None
    ) -> None:
        super().__init__()
        for name, value in (("weights", weights), ("means", means), ("factors", factors)):
            self.register_buffer(name, value)
        self.register_buffer("labels", labels)
        self.noise_dims = 1 + means.shape[1]

    @classmethod
    def fitted(cls, model: TrainedModel) -> "MixturePrior":
        return fit_mixture(
            model.codes(),
            components=model.components,
            seed=model.seed,
            device=model.device,
            labels=model.labels,
        )

    def of_class(self, label: int) -> "MixturePrior":
        if self.labels is None:
            return super().of_class(label)  # pyright: ignore[reportReturnType]  # it raises
        mine = self.labels == label
        weights = self.weights[mine]
        return MixturePrior(weights / weights.sum(), self.means[mine], self.factors[mine])

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], latents: int) -> "MixturePrior":
        """Return the mixture of a state dict.

        Args:
            tensors: weights, means and factors by name, and labels if it has classes.
            latents: number of latents, which the means must have.

        Raises:
            InputError: the tensors are not those of such a mixture.
        """
        count = len(tensors.get("weights", torch.empty(0)))
        shapes = {"weights": (count,), "means": (count, latents)}
        shapes["factors"] = (count, latents, latents)
        labels = tensors.get("labels", torch.zeros(count, dtype=torch.int64))
        known = labels.shape == (count,) and labels.dtype == torch.int64
        fits = (
            known
            and tensors.keys() - {"labels"} == shapes.keys()
            and all(
                tensors[name].shape == shape
                and tensors[name].dtype == torch.float32
                and tensors[name].isfinite().all()
                for name, shape in shapes.items()
            )
        )
        if not count or not fits or not (tensors["weights"] >= 0).all():
            raise InputError(f"the saved mixture is not one of {latents} latents")
        return cls(**tensors)

    def latents(self, noise: Noise) -> Latents:
        uniform = torch.special.ndtr(noise[:, 0])
        bounds = self.weights.cumsum(0)[:-1]
        component = (bounds < uniform[:, None]).sum(1)  # ONNX has no search
        spread = torch.einsum("nij,nj->ni", self.factors[component], noise[:, 1:])
        return self.means[component] + spread

    def log_density(self, latents: Latents) -> PerImage:
        """Return log p(z) of each latent vector, in nats, (n,), in the precision of `latents`."""
        parts = [
            _log_density(latents, *(value.to(latents) for value in part))
            for part in zip(self.weights, self.means, self.factors, strict=True)
        ]
        return torch.stack(parts, 1).logsumexp(1)


def fit_mixture(
    codes: DiagonalGaussian,
    *,
    components: int = 10,
    seed: int = 0,
    device: str | torch.device = "cpu",
    labels: ClassOfEach | None = None,
) -> MixturePrior:
    """Fit a mixture to one latent vector sampled from the posterior of each training image.

    At most 20,000 images are used, chosen at random. A component of 64 latents has 2,145
    parameters, so that more images would change them little.

    Args:
        codes: (n, latents), the posteriors of the training images.
        components: maximum number of components, >= 1. The mixture has fewer if there are fewer
            than ten images per component. With labels, of each class.
        seed: seed of the sampling, the choice of images and the initialisation.
        device: device of the fit, in float64. A device without float64 is replaced by the CPU.
        labels: (n,), the class of each image; a mixture is then fitted to each class. None: one
            mixture is fitted to all images.

    Returns:
        The mixture, on the CPU.

    Raises:
        InputError: there are no codes, more than 512 latents, or values that are too large.
    """
    if len(codes) == 0:
        raise InputError("there are no codes to fit a mixture to: give at least one")
    if codes.mean.shape[1] > MOST_LATENTS:
        raise InputError(
            f"a mixture with full covariances takes at most {MOST_LATENTS} latents, not "
            f"{codes.mean.shape[1]}: use a flow (--second flow)"
        )
    source = generator("mixture", seed)
    codes = DiagonalGaussian(codes.mean.cpu(), codes.logvar.cpu())
    latents = codes.sample(torch.randn(codes.mean.shape, generator=source))
    if not latents.isfinite().all():
        raise InputError("no mixture can be fitted to codes that are not finite or very large")
    some = torch.arange(len(latents))
    if len(latents) > MOST_CODES:
        some = torch.randperm(len(latents), generator=source)[:MOST_CODES]
    place = torch.device(device if torch.device(device).type != "mps" else "cpu")

    def fitted(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        number = max(1, min(components, len(values) // 10))
        return expectation_maximisation(
            values.double(), number, derive("mixture", seed) % 2**32, place
        )

    if labels is None:
        return MixturePrior(*fitted(latents[some]))
    parts, of_components = [], []
    for label in labels.unique().tolist():
        mine = labels == label
        chosen = some[mine[some]]
        weights, means, factors = fitted(latents[chosen if len(chosen) else mine])
        parts.append((weights * mine.float().mean(), means, factors))
        of_components += [label] * len(weights)
    weights, means, factors = (torch.cat(values) for values in zip(*parts, strict=True))
    return MixturePrior(weights, means, factors, torch.tensor(of_components))


def expectation_maximisation(
    values: Tensor, components: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit a Gaussian mixture with full covariances by expectation maximisation.

    It starts from k-means. The steps and the result are those of scikit-learn's `GaussianMixture`,
    but they run on any device. On 16 cores scikit-learn took 27 s for 20,000 codes of 64 latents,
    more than the rest of an evaluation of 10,000 images on an H200 (2026-11-26).

    Args:
        values: (n, dims), float64.
        components: number of components, >= 1.
        seed: seed of k-means.
        device: device of the computation.

    Returns:
        Weights (components,), means (components, dims) and lower Cholesky factors of the
        covariances (components, dims, dims), float32 on the CPU.
    """
    from sklearn.cluster import KMeans

    kmeans = KMeans(components, n_init=1, random_state=seed)  # pyright: ignore[reportArgumentType]
    labels = kmeans.fit(values.numpy()).labels_
    shares = F.one_hot(torch.from_numpy(labels).long(), components).double().to(device)
    values = values.to(device)
    weights, means, factors = _maximisation_step(values, shares)
    earlier = -math.inf
    for _ in range(MOST_ITERATIONS):
        log_densities = torch.stack(
            [_log_density(values, *part) for part in zip(weights, means, factors, strict=True)], 1
        )
        log_likelihoods = log_densities.logsumexp(1, keepdim=True)
        weights, means, factors = _maximisation_step(
            values, (log_densities - log_likelihoods).exp()
        )
        likelihood = float(log_likelihoods.mean())
        if abs(likelihood - earlier) < LEAST_GAIN:
            break
        earlier = likelihood
    return weights.float().cpu(), means.float().cpu(), factors.float().cpu()


def _maximisation_step(values: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Do the M step: return weights, means and Cholesky factors of the components.

    `shares` (n, components) is the responsibility of each component for each value.
    """
    counts = shares.sum(0) + 10 * torch.finfo(shares.dtype).eps
    means = shares.T @ values / counts[:, None]
    ridge = LEAST_VARIANCE * torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
    factors = []
    for share, count, mean in zip(shares.T, counts, means, strict=True):
        centred = values - mean
        factor, failed = torch.linalg.cholesky_ex(
            (share[:, None] * centred).T @ centred / count + ridge
        )
        if failed:
            raise InputError("no mixture can be fitted to these codes: their range is too wide")
        factors.append(factor)
    return counts / counts.sum(), means, torch.stack(factors)


def _log_density(values: Tensor, weight: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Return the log of a component's weight times its density at each value, (n,)."""
    whitened = torch.linalg.solve_triangular(factor, (values - mean).T, upper=False)
    constant = weight.log() - factor.diagonal().log().sum() - len(mean) / 2 * math.log(2 * math.pi)
    return constant - whitened.square().sum(0) / 2
