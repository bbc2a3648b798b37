"""Figures of rows under a model: density, ELBO, reconstruction error; and the test that uses them.

The balance measures a `poise.balance.TableError`. NaN in a row is missing and does not count.
"""

import copy
import math
from typing import NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

from poise.balance import Balance, TableError, negative_log_likelihood
from poise.metrics import encode_all
from poise.metrics.encoding import CHUNK, encoded
from poise.metrics.likelihood import (
    ADAPTATION_SAMPLES,
    NLLPerImage,
    nll_of_values,
    posterior_draws,
)
from poise.metrics.target import LogPrior
from poise.support.seeds import generator
from poise.vae import VAE
from poise.variants import Proposal

# Nominal level of the one-sided test that a network is better than a linear model. The rows also
# chose the network's weights, so that the real level is higher.
LEVEL = 0.05
# Rows of this test. Of fewer rows a t-test says nothing if the densities have heavy tails.
FEWEST_COMPARED, MOST_COMPARED = 10, 1_000
LARGEST_ROW = 1e30  # bound of scaled values in float32, whose products must be finite
MOST = 1e140  # bound of scaled values in float64, whose squares must be finite
ROW_VALUES = 2**21  # latents of importance samples held in memory


class HeldOut(NamedTuple):
    """Log densities in nats, squared reconstruction errors and weights of held-out rows, (n,).

    A row of weight 2 counts twice in means, and once as an observation.
    """

    densities: Tensor
    errors: Tensor
    weights: Tensor

    @classmethod
    def of(cls, vae: VAE, balance: Balance, rows: Tensor, weights: Tensor) -> "HeldOut":
        """Compute the figures of at most `MOST_COMPARED` different rows."""
        rows, weights = rows[:MOST_COMPARED], weights[:MOST_COMPARED]
        density = -row_nll(vae, balance, rows.double(), samples=100, most=1_000).nll_nats
        latents = encode_all(vae, rows).mean * stretch(vae, error_of(balance), rows)
        errors = squared_errors(vae, error_of(balance), rows, latents)
        return cls(density, errors, weights.double())

    def is_better_than(self, line: "HeldOut", *, shared: bool = True) -> bool:
        """Return whether these figures are better beyond their noise.

        If all columns share their noise, the density must be higher by a t-test at `LEVEL`, and the
        error lower by one standard error. Else the density must be higher by one standard error: an
        error that adds up columns of unequal noise says little.

        Args:
            line: the figures of the same rows under a linear model.
            shared: whether all columns share their noise.
        """
        if len(self.densities) < FEWEST_COMPARED:
            return False
        gain = _standardised(self.densities - line.densities, self.weights)
        if not shared:
            return gain > 1
        quantile = float(student.ppf(1 - LEVEL, len(self.densities) - 1))
        return gain > quantile and _standardised(line.errors - self.errors, self.weights) > 1


def _standardised(differences: Tensor, weights: Tensor) -> float:
    """Return the weighted mean over its standard error, for two values or more."""
    shares, n = weights / weights.sum(), len(differences)
    mean = (shares * differences).sum()
    error = math.sqrt(float((shares * (differences - mean)).square().sum()) * n / (n - 1))
    return float(mean) / max(error, 1e-300)


def error_of(balance: Balance) -> TableError:
    """Return the error of a balance for tables."""
    assert isinstance(balance.error, TableError)
    return balance.error


@torch.no_grad()
def row_nll(
    vae: VAE,
    balance: Balance,
    rows: Tensor,
    *,
    samples: int,
    most: int,
    proposal: Proposal = "refined",
    log_prior: LogPrior | None = None,
    prior_takes_long: bool = False,
) -> NLLPerImage:
    """Return -log p(x) of scaled rows, float64; see `poise.metrics.likelihood.nll_of_values`."""
    # A float32 decoder loses several nats for rows far from all others. The encoder's posterior
    # loses more for them.
    refined = proposal == "refined"
    kind, bound = (torch.float64, MOST) if refined else (torch.float32, LARGEST_ROW)
    vae, rows = copy.deepcopy(vae).to(kind), rows.clamp(-bound, bound).to(kind)
    latents = vae.encode(rows[:1]).mean.shape[1]
    many = max(1, ROW_VALUES // (max(samples, ADAPTATION_SAMPLES) * latents))
    found = [
        nll_of_values(
            vae,
            balance,
            part,
            vae.encode(part),
            samples=samples,
            most=most,
            proposal=proposal,
            log_prior=log_prior,
            prior_takes_long=prior_takes_long,
        )
        for part in rows.split(many)
    ]
    return NLLPerImage(*(torch.cat(values) for values in zip(*found, strict=True)))


@torch.no_grad()
def elbo(vae: VAE, balance: Balance, rows: Tensor) -> float:
    """Return the mean ELBO of rows in nats, with one posterior sample each."""
    error, elbos, gamma2 = error_of(balance), [], balance.gamma2
    place = torch.device("cpu") if gamma2.device.type == "mps" else gamma2.device  # for float64
    gamma2 = gamma2.to(place).double()
    for batch, posterior, noise in encoded(vae, rows, 0):
        decoded, batch = vae.decode(posterior.sample(noise)).to(place), batch.to(place)
        squares, dims = _squares(error, decoded, batch)
        if error.groups is None:
            nll = negative_log_likelihood(squares.sum(1), gamma2, dims.sum(1))
        else:
            nll = negative_log_likelihood(squares, gamma2, dims).sum(1)
        of_categories = error.nats(decoded.double(), batch.double())
        nll = nll if of_categories is None else nll + of_categories
        elbos.append(-nll - posterior.kl().to(place).double())
    return float(torch.cat(elbos).mean())


def _squares(error: TableError, decoded: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared errors of the numbers, float64, and whether they are observed."""
    apart = (decoded - rows)[:, : error.numeric].double()
    observed = ~rows[:, : error.numeric].isnan()
    return torch.where(observed, apart, 0.0).square(), observed


def stretch(vae: VAE, error: TableError, rows: Tensor) -> Tensor:
    """Return the factors on posterior means that reconstruct rows better: 1 / (1 - s^2), or 1."""
    codes = encode_all(vae, rows)
    variance = codes.logvar.exp().mean(0)
    factors = torch.where(variance < 0.99, 1 / (1 - variance), 1.0)
    stretched, plain = (
        squared_errors(vae, error, rows, latents).mean()
        for latents in (codes.mean * factors, codes.mean)
    )
    return factors if stretched < plain else torch.ones_like(factors)


@torch.no_grad()
def squared_errors(vae: VAE, error: TableError, rows: Tensor, latents: Tensor) -> Tensor:
    """Return the squared error of each decoded row, (n,).

    That of a category is the squared distance of its probabilities from the one-hot value.
    """
    device = next(vae.parameters()).device
    decoded = torch.cat([vae.decode(part.to(device)).cpu() for part in latents.split(CHUNK)])
    total = _squares(error, decoded, rows)[0].sum(1)
    blocks = (
        values[:, error.numeric :].double().split(error.categories, 1) for values in (decoded, rows)
    )
    if error.categories:
        for logits, hot in zip(*blocks, strict=True):
            apart = torch.where(hot.isnan(), 0.0, logits.softmax(1) - hot)
            total = total + apart.square().sum(1)
    return total


@torch.no_grad()
def expected_rows(vae: VAE, balance: Balance, rows: Tensor, *, samples: int) -> Tensor:
    """Return E[x^ | observed cells] of each row: means of numbers and probabilities of categories.

    Args:
        vae, balance: on the CPU.
        rows: (n, columns), NaN where missing.
        samples: importance samples of each row.

    Returns:
        (n, columns), float64.
    """
    vae, error, found = copy.deepcopy(vae).double(), error_of(balance), []
    rows = rows.double().clamp(-MOST, MOST)
    latents = vae.encode(rows[:1]).mean.shape[1]
    many = max(1, ROW_VALUES // (max(samples, ADAPTATION_SAMPLES) * max(latents, rows.shape[1])))
    for part in rows.split(many):
        codes, weights = posterior_draws(vae, balance, part, vae.encode(part), samples=samples)
        decoded = vae.decode(codes.flatten(0, 1)).view(*codes.shape[:2], -1)
        found.append((weights[..., None] * probabilities(decoded, error)).sum(1))
    return torch.cat(found)


@torch.no_grad()
def drawn_rows(vae: VAE, balance: Balance, rows: Tensor, *, samples: int, seed: int) -> Tensor:
    """Return f(z) for one draw of z from p(z | observed cells) of each row, float64."""
    vae, source, found = copy.deepcopy(vae).double(), generator("draws of rows", seed), []
    rows = rows.double().clamp(-MOST, MOST)
    for part in rows.split(CHUNK):
        codes, weights = posterior_draws(vae, balance, part, vae.encode(part), samples=samples)
        chosen = torch.multinomial(weights, 1, generator=source)[:, 0]
        found.append(vae.decode(codes[torch.arange(len(part)), chosen]))
    return torch.cat(found)


def probabilities(decoded: Tensor, error: TableError) -> Tensor:
    """Return decoded rows (..., columns) with probabilities in place of logits."""
    numbers, logits = decoded.split([error.numeric, sum(error.categories)], -1)
    blocks = logits.split(error.categories, -1) if error.categories else ()
    return torch.cat([numbers, *(block.softmax(-1) for block in blocks)], -1)
