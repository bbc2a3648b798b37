"""Held-out negative log-likelihood, -log p(x), estimated by importance sampling.

With z_1 ... z_K drawn from a proposal q,

    -log p(x)  ~  -log 1/K sum_k w_k,        w_k = p(x|z_k) p(z_k) / q(z_k).                  (1)

(Burda et al. 2016, arXiv 1509.00519, eq. 8.) The expectation falls as K grows and converges to
-log p(x) from above. K must be of the order of exp(KL(p(z|x) || q)) (Chatterjee & Diaconis 2018,
arXiv 1511.01437).

**The encoder's posterior** q(z|x) as a proposal is too narrow for images that were not trained on,
so that more samples hardly help. For K = 1 the expectation of (1) is the negative ELBO.

**The refined proposal** is a mixture that is fitted to p(z|x) of each image, see
`poise.metrics.proposal`. Its components q_c have E_q[q_c / q] = 1, so these ratios are control
variates of w (Owen & Zhou 2000). For a linear decoder the estimate is then exact.

When to trust the estimate. The effective sample size is (sum w)^2 / sum w^2. Divided by K it is 1
if all samples have equal weight, and 1/K if one sample outweighs all others. In the second case (1)
is still an upper bound (up to the bias of the control variates, which is of order 1/K), but its
value means little. The standard error of log p(x) follows from the spread of w. Neither is proof.
All samples can miss a part of the true posterior, such as a mode.

p(x|z) is the likelihood of `poise.balance`, with its gamma2 and power; p(z) is N(0, I). Weights and
sums are float64; decoders run in their own precision.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from poise.balance import Balance
from poise.errors import InputError
from poise.latent import DiagonalGaussian
from poise.metrics.encoding import posteriors
from poise.metrics.proposal import (
    ADAPTATION_SAMPLES,
    ENOUGH,
    FEW_LATENTS,
    Mixture,
    adapted,
    effective_share,
    laplace,
    noise_of,
    shifts_of,
)
from poise.metrics.reconstruction import bits_per_dim
from poise.metrics.target import LogPrior, Target, target_of
from poise.shapes import Values
from poise.support.progress import progress
from poise.support.seeds import generator
from poise.vae import VAE
from poise.variants import Proposal

# Samples of one image whose noise is drawn together. Another size gives other noise.
BLOCK = 100
# A refined proposal needs a decoder's Jacobian and a matrix of L x L values for each image.
MOST_LATENTS = 256
FEWEST_TO_TELL = 50  # with fewer samples, proposals are adapted whatever the effective share
CERTAIN_NATS = 0.05  # largest standard error of a value that counts as certain
ENOUGH_CERTAIN = 0.9  # share of certain values; below it users are warned


@dataclass(frozen=True)
class ImportanceWeightedNLL:
    """Importance-weighted estimate of -log p(x), with its standard error and effective sample size.

    Attributes:
        mean_nats: mean of -log p(x) over images, in nats per image, for values in [0, 1].
        standard_error_nats: standard error of that mean, from the spread over images. It does not
            include the bias of the estimate, which is not negative without control variates.
        bits_per_dim: `mean_nats` in bits per dimension, see `bits_per_dim`; None if the data are
            not images.
        samples: K, the number of samples per image.
        effective_share: effective sample size over K, between 1/K and 1, mean over images.
        certain_share: share of the images whose own estimate has a standard error of at most
            `CERTAIN_NATS`. If it is low, use more samples.
    """

    mean_nats: float
    standard_error_nats: float
    bits_per_dim: float | None
    samples: int
    effective_share: float
    certain_share: float


def importance_weighted_nll(
    vae: VAE,
    balance: Balance,
    images: Any,
    *,
    samples: int = 1000,
    seed: int = 0,
    quiet: bool = True,
    proposal: Proposal = "refined",
) -> ImportanceWeightedNLL:
    """Return the mean of -log p(x) over images, estimated with importance weights (eq. 1).

    Args:
        vae, balance: used in evaluation mode.
        images: (n, channels, height, width), uint8 or float in [0, 1], or (n, features); n >= 2.
        samples: K, at least 1.
        seed: seed of the samples; see `nll_per_image`.
        quiet: show no progress.
        proposal: "refined", or "encoder", the posterior of the encoder.

    Raises:
        InputError: fewer than two images, samples < 1, or codes that are not finite.

    Example:
        >>> vae = poise.VAE(*poise.networks.mlp((1, 8, 8), latent_dim=4))
        >>> images = torch.rand(10, 1, 8, 8)
        >>> likelihood = importance_weighted_nll(vae, poise.FixedBalance(), images, samples=200)
        >>> 1 / 200 <= likelihood.effective_share <= 1
        True
    """
    if len(images) < 2:
        raise InputError(f"a mean with a standard error needs at least 2 images, not {len(images)}")
    each = nll_per_image(
        vae, balance, images, samples=samples, seed=seed, quiet=quiet, proposal=proposal
    )
    nll = each.nll_nats
    return ImportanceWeightedNLL(
        mean_nats=float(nll.mean()),
        standard_error_nats=float(nll.std() / math.sqrt(len(nll))),
        bits_per_dim=bits_per_dim(float(nll.mean()), math.prod(images.shape[1:]))
        if len(images.shape) == 4
        else None,
        samples=samples,
        effective_share=float(each.effective_share.mean()),
        certain_share=float((each.standard_error_nats <= CERTAIN_NATS).double().mean()),
    )


class NLLPerImage(NamedTuple):
    """Importance-weighted estimate of each image, float64 on the CPU.

    Attributes:
        nll_nats: the estimate of -log p(x), in nats. Infinite if p(x|z) is 0 for all samples.
        effective_share: effective sample size over K, between 1/K and 1.
        standard_error_nats: standard error of `nll_nats`, from the spread of the weights.
    """

    nll_nats: Tensor
    effective_share: Tensor
    standard_error_nats: Tensor

    def put(self, rows: Tensor, others: "NLLPerImage") -> None:
        """Replace the values of some images by those of `others`."""
        for values, new in zip(self, others, strict=True):
            values[rows] = new


@torch.no_grad()
def nll_per_image(
    vae: VAE,
    balance: Balance,
    images: Any,
    *,
    samples: int = 1000,
    seed: int = 0,
    quiet: bool = True,
    proposal: Proposal = "refined",
) -> NLLPerImage:
    """Return -log p(x) of each image, estimated with importance weights (eq. 1).

    The noise of image i depends on (seed, i) only. A larger K keeps the noise of a smaller K and
    adds more. So the value of an image does not depend on the other images or their number. The
    memory needed does not depend on the number of images.

    Args:
        vae, balance, images, samples, seed, quiet, proposal: as for `importance_weighted_nll`, but
            n >= 1.

    Raises:
        InputError: no images, samples < 1, or codes that are not finite.
    """
    found, first = [], 0
    with progress("likelihood", len(images), quiet=quiet) as bar:
        for batch, posterior in posteriors(vae, images):
            if not (posterior.mean.isfinite().all() and posterior.logvar.isfinite().all()):
                raise InputError(
                    "the codes must be finite; "
                    "the encoder gives NaN or infinite values for some image"
                )
            for part in _parts(batch, posterior.mean.shape[1], samples):
                found.append(
                    nll_of_values(
                        vae,
                        balance,
                        batch[part],
                        DiagonalGaussian(posterior.mean[part], posterior.logvar[part]),
                        samples=samples,
                        seed=seed,
                        proposal=proposal,
                        numbers=range(first + part.start, first + part.stop),
                    )
                )
                bar.update(first + part.stop, {})
            first += len(batch)
    return NLLPerImage(*(torch.cat(values) for values in zip(*found, strict=True)))


def _parts(batch: Tensor, latents: int, samples: int) -> list[slice]:
    """Return slices of a batch such that Jacobians and samples fit into memory."""
    values = max(latents * batch[0].numel(), samples * latents, 1)
    size = max(1, min(len(batch), 2**22 // values))
    return [slice(k, min(k + size, len(batch))) for k in range(0, len(batch), size)]


@torch.no_grad()
def nll_of_values(
    vae: VAE,
    balance: Balance,
    values: Values,
    posterior: DiagonalGaussian,
    *,
    samples: int,
    most: int | None = None,
    seed: int = 0,
    proposal: Proposal = "refined",
    numbers: range | None = None,
    log_prior: LogPrior | None = None,
    prior_takes_long: bool = False,
) -> NLLPerImage:
    """Return -log p(x) of values whose posterior is known; see `nll_per_image`.

    Args:
        vae, balance: in evaluation mode.
        values: (n, ...), float32 or float64, the precision in which the decoder runs.
        posterior: of the encoder, (n, L), finite.
        samples: K, at least 1.
        most: with a refined proposal, K grows up to this number for values that are not certain.
        seed: seed of the samples.
        proposal: see `importance_weighted_nll`.
        numbers: number of each value, which is part of the seed of its noise. None: all values have
            the same noise, and equal values have equal estimates.
        log_prior: log p(z). None: that of N(0, I).
        prior_takes_long: fit refined proposals to the posterior under N(0, I), so that `log_prior`
            is computed for the samples only.

    Raises:
        InputError: samples < 1, or an unknown proposal.
    """
    if samples < 1:
        raise InputError(f"the number of samples must be at least 1, not {samples}")
    if proposal not in get_args(Proposal):
        raise InputError(
            f"the proposal must be {' or '.join(get_args(Proposal))}, not {proposal!r}"
        )
    target = target_of(vae, balance, values, log_prior)
    fitted = target_of(vae, balance, values) if prior_takes_long else target
    code = DiagonalGaussian(
        posterior.mean.to(target.place).double(), posterior.logvar.to(target.place).double()
    )
    if proposal == "encoder" or code.mean.shape[1] > MOST_LATENTS:
        return _estimate(_log_weights_of_encoder(target, code, samples, seed, numbers), None)
    shift = shifts_of(code.mean, seed, numbers)
    mixture = laplace(fitted, code.mean, seed)
    drawn = _log_weights(target, mixture, range(samples), shift, seed)
    found = _estimate(*drawn)
    low = (found.effective_share < ENOUGH) | (samples < FEWEST_TO_TELL)
    if low.any():
        rows = low.to(target.place)
        mixture.put(rows, adapted(fitted.rows(rows), mixture.rows(rows), shift[rows], seed))
        again = _log_weights(
            target.rows(rows), mixture.rows(rows), range(samples), shift[rows], seed
        )
        for values, new in zip(drawn, again, strict=True):
            values[rows] = new
        found.put(low, _estimate(*again))
    # With few latents a narrow mode can be missed by samples whose weights hardly differ.
    enough = CERTAIN_NATS / (5 if code.mean.shape[1] <= FEW_LATENTS else 2)
    active = torch.arange(len(shift))
    while most is not None and samples < most:
        poor = found.standard_error_nats[active] > enough
        if not poor.any():
            break
        active, samples, before = active[poor], min(4 * samples, most), samples
        rows, still = active.to(target.place), poor.to(target.place)
        more = _log_weights(
            target.rows(rows), mixture.rows(rows), range(before, samples), shift[rows], seed
        )
        drawn = tuple(torch.cat([old[still], new], 1) for old, new in zip(drawn, more, strict=True))
        found.put(active, _estimate(*drawn))
    return found


@torch.no_grad()
def posterior_draws(
    vae: VAE, balance: Balance, values: Values, posterior: DiagonalGaussian, *, samples: int
) -> tuple[Tensor, Tensor]:
    """Return weighted latents whose means are those of the true posterior p(z|x).

    Args:
        vae, balance, values, posterior: see `nll_of_values`.
        samples: K, at least 1.

    Returns:
        Latents (n, K, L), and their weights (n, K), with sum 1. Equal values have equal latents.
    """
    target, start = target_of(vae, balance, values), posterior.mean.double()
    shift = shifts_of(start, 0, None)
    mixture = adapted(target, laplace(target, start, 0), shift, 0)
    latents = mixture.latents(noise_of(0, ADAPTATION_SAMPLES, samples, shift))
    densities = mixture.log_densities(latents) + mixture.shares().log()[:, None]
    return latents, (target.log_joint(latents) - densities.logsumexp(-1)).softmax(1)


def _log_weights(
    target: Target, mixture: Mixture, numbers: range, shift: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Return log w of some samples, (n, K), and the control variates q_c / q - 1, (n, K, 2 M)."""
    first = ADAPTATION_SAMPLES + numbers.start
    latents = mixture.latents(noise_of(seed, first, len(numbers), shift))
    densities = mixture.log_densities(latents)
    log_q = (densities + mixture.shares().log()[:, None]).logsumexp(-1)
    ratios = (densities[..., :-1] - log_q[..., None]).exp() - 1
    return target.log_joint(latents) - log_q, ratios


def _log_weights_of_encoder(
    target: Target, code: DiagonalGaussian, samples: int, seed: int, numbers: range | None
) -> Tensor:
    """Return log w of each sample of the encoder's posterior, (n, K)."""
    size = code.mean.shape[1]
    noise = torch.stack([_normal_noise(samples, size, seed, number) for number in numbers or [0]])
    noise = noise.to(code.mean)
    latents = code.mean[:, None] + code.std[:, None] * noise
    log_q = -0.5 * (noise.square() + code.logvar[:, None]).sum(-1) - size / 2 * math.log(
        2 * math.pi
    )
    return target.log_joint(latents) - log_q


def _normal_noise(samples: int, latents: int, seed: int, number: int) -> Tensor:
    """Return the noise of one value, (K, L), in blocks so that more samples only add to it."""
    blocks = [
        # Draw a full block and cut it: torch draws other values if asked for fewer.
        torch.randn(BLOCK, latents, generator=generator("likelihood", seed, number, block))
        for block in range(math.ceil(samples / BLOCK))
    ]
    return torch.cat(blocks)[:samples]


def no_refined(latents: int) -> str:
    """Return the sentence that says why the encoder's proposal was used."""
    return (
        f"log p(x) is by the encoder's proposal, because refined ones take at most {MOST_LATENTS} "
        f"latents and this model has {latents}: compare it with figures of this proposal only"
    )


def _estimate(log_weights: Tensor, ratios: Tensor | None) -> NLLPerImage:
    """Return the estimate of -log p(x) from log weights (n, K) and their control variates.

    The mean of w is corrected by the regression of w on the ratios, whose mean is known to be 0. If
    samples are few, or if the corrected mean is far from the mean of w, it is not corrected.
    """
    number = log_weights.shape[1]
    top = log_weights.amax(1, keepdim=True).nan_to_num(neginf=0.0)
    weights = (log_weights - top).exp()
    mean, residual = weights.mean(1), weights - weights.mean(1, keepdim=True)
    if ratios is not None and number >= 20 * ratios.shape[-1]:
        centred = ratios - ratios.mean(1, keepdim=True)
        gram = centred.mT @ centred
        ridge = 1e-9 * gram.diagonal(dim1=1, dim2=2).sum(1) + 1e-12
        gram = gram + torch.diag_embed(ridge[:, None].expand(gram.shape[:2]))
        slopes = torch.linalg.solve(gram, centred.mT @ residual[..., None])
        corrected = mean - (ratios.mean(1, keepdim=True) @ slopes)[:, 0, 0]
        sound = (corrected > 0.5 * mean) & (corrected < 2 * mean)
        mean = torch.where(sound, corrected, mean)
        residual = torch.where(sound[:, None], residual - (centred @ slopes)[..., 0], residual)
    # One sample says nothing about its error.
    error = residual.square().mean(1).sqrt() / mean / math.sqrt(max(1, number - 1))
    error = error if number > 1 else torch.full_like(error, math.inf)
    error = error.nan_to_num(nan=math.inf, posinf=math.inf)
    return NLLPerImage(
        -(mean.log() + top[:, 0]).cpu(), effective_share(log_weights).cpu(), error.cpu()
    )
