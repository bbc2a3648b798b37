"""The refined proposal of importance sampling: a mixture that is fitted to p(z|x) of each value.

Gauss-Newton steps from the mean of the encoder's posterior find the mode of p(x, z). The curvature
there gives axes. Along each axis the standard deviation is set so that log p(x, z) is 1/2 lower one
standard deviation from the mode, on average of both sides. If the effective sample size is low,
mean and covariance are set to those of the weighted samples, up to `ADAPTATIONS` times. With at
most `FEW_LATENTS` latents the best of many draws from the prior are starts too, so that several
modes are found. The proposal is the mixture

    q = 0.75 N(m, S) + 0.2 N(m, a^2 S) + 0.05 N(0, I),        a = 1 + 2 / sqrt(L),            (1)

with several m, S if there are several modes. Noise is a scrambled Sobol sequence.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from poise.metrics.target import Target
from poise.support.seeds import derive, generator

FEW_LATENTS, STARTS = 4, 256  # with so few latents, so many draws of the prior are tried as starts
NEWTON_STEPS, CONVERGED_NATS = 12, 1e-3
# Where a Gauss-Newton step gains little, it is damped, relative to the largest curvature, or made
# shorter.
DAMPING, SHORTER = (0.01, 0.1, 1.0), (0.5, 0.2, 0.05, 0.01)
ADAPTATIONS, ADAPTATION_SAMPLES = 6, 256
ENOUGH = 0.6  # effective share that needs no adaptation
SHARES = (0.75, 0.2, 0.05)  # weights of eq. 1


@dataclass(frozen=True)
class Mixture:
    """The proposal of eq. 1 for each of n values, with M pairs m, S.

    Args:
        weights: (n, M), with sum 1.
        means: (n, M, L).
        axes: (n, M, L, L), orthonormal columns: the eigenvectors of S.
        stds: (n, M, L), the roots of the eigenvalues of S.
    """

    weights: Tensor
    means: Tensor
    axes: Tensor
    stds: Tensor

    @property
    def wider(self) -> float:
        """Return a of eq. 1."""
        return 1 + 2 / math.sqrt(self.means.shape[-1])

    def rows(self, rows: Tensor) -> "Mixture":
        """Return the proposals of some of the values."""
        return Mixture(*(value[rows] for value in self._tensors()))

    def clone(self) -> "Mixture":
        return Mixture(*(value.clone() for value in self._tensors()))

    def put(self, rows: Tensor, others: "Mixture") -> None:
        """Replace the proposals of some of the values by those of `others`."""
        for values, new in zip(self._tensors(), others._tensors(), strict=True):
            values[rows] = new

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.weights, self.means, self.axes, self.stds

    def shares(self) -> Tensor:
        """Return the weights of all 2 M + 1 components of eq. 1, (n, 2 M + 1)."""
        narrow, wide, prior = SHARES
        last = torch.full_like(self.weights[:, :1], prior)
        return torch.cat([narrow * self.weights, wide * self.weights, last], 1)

    def latents(self, noise: "MixtureNoise") -> Tensor:
        """Return the latents of some noise, (n, K, L)."""
        pairs, latents = self.weights.shape[1], noise.normal
        bounds = self.shares().cumsum(1)[:, :-1].contiguous()
        component = torch.searchsorted(bounds, noise.choice.contiguous())
        spread = torch.where(component >= pairs, self.wider, 1.0)[..., None] * latents
        for pair in range(pairs):
            moved = (spread * self.stds[:, pair, None]) @ self.axes[:, pair].mT
            chosen = (component == pair) | (component == pair + pairs)
            latents = torch.where(chosen[..., None], self.means[:, pair, None] + moved, latents)
        return latents

    def log_densities(self, latents: Tensor) -> Tensor:
        """Return the log density of each component at latents (n, K, L), (n, K, 2 M + 1)."""
        size, narrow = latents.shape[-1], []
        for pair in range(self.weights.shape[1]):
            apart = (latents - self.means[:, pair, None]) @ self.axes[:, pair]
            narrow.append((apart / self.stds[:, pair, None]).square().sum(-1) / -2)
        squares = torch.stack(narrow, -1)
        volume = self.stds.log().sum(-1)[:, None]
        wide = squares / self.wider**2 - volume - size * math.log(self.wider)
        prior = latents.square().sum(-1, keepdim=True) / -2
        return torch.cat([squares - volume, wide, prior], -1) - size / 2 * math.log(2 * math.pi)


def laplace(target: Target, start: Tensor, seed: int) -> Mixture:
    """Return proposals at the modes of log p(x, z), with widths along the axes of the curvature."""
    starts = _starts(target, start, seed)
    means, axes, stds, heights = [], [], [], []
    for first in starts.unbind(1):
        mode, directions, curvature = _mode(target, first)
        std, height = _widths(target, mode, directions, curvature.rsqrt())
        means.append(mode)
        axes.append(directions)
        stds.append(std)
        heights.append(height + std.log().sum(-1))
    mass = torch.stack(heights, 1)
    weights = (mass - mass.amax(1, keepdim=True)).nan_to_num(nan=0.0).exp()
    weights = weights / weights.sum(1, keepdim=True) + 0.05
    return Mixture(
        weights / weights.sum(1, keepdim=True),
        torch.stack(means, 1),
        torch.stack(axes, 1),
        torch.stack(stds, 1),
    )


def _starts(target: Target, start: Tensor, seed: int) -> Tensor:
    """Return starts of the search for modes, (n, M, L).

    The first is `start` or 0, whichever is better. Of at most `FEW_LATENTS` latents, two more are
    the best draw of the prior, and the best draw that is at least 1 away from it.
    """
    candidates = torch.stack([start, torch.zeros_like(start)], 1)
    best = target.log_joint(candidates).argmax(1)
    first = candidates[torch.arange(len(start)), best]
    if start.shape[1] > FEW_LATENTS:
        return first[:, None]
    draws = 1.5 * torch.special.ndtri(_sobol(start.shape[1], seed, STARTS, 0)).to(start)
    heights = target.log_joint_of_shared(draws).nan_to_num(-math.inf)
    second = draws[heights.argmax(1)]
    near = torch.cdist(second, draws) < 1
    third = draws[heights.masked_fill(near, -math.inf).argmax(1)]
    return torch.stack([first, second, third], 1)


def _mode(target: Target, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mode of log p(x, z), and axes and curvatures of its Gauss-Newton Hessian.

    With the gradient g of log p(x|z) and a root R of its curvature, see `Target.slope`, the
    gradient is g - z and the Hessian -(I + R R^T).
    """
    mode, latents = start.clone(), start.shape[1]
    height = target.log_joint(mode[:, None])[:, 0]
    axes = torch.eye(latents, dtype=mode.dtype, device=mode.device).repeat(len(mode), 1, 1)
    curvature = torch.ones_like(mode)
    active = height.isfinite().nonzero()[:, 0]
    for _ in range(NEWTON_STEPS):
        if not len(active):
            break
        part, z = target.rows(active), mode[active]
        gradient, root = part.slope(z)
        gradient = gradient - z
        values, vectors = torch.linalg.eigh((root @ root.mT).nan_to_num(0.0, 1e30, -1e30))
        values = 1 + values.clamp_min(0)
        axes[active], curvature[active] = vectors, values
        along = (vectors.mT @ gradient[..., None])[..., 0].nan_to_num(0.0)
        moved = z + (vectors @ (along / values)[..., None])[..., 0]
        gain = part.log_joint(moved[:, None])[:, 0] - height[active]
        # A quadratic function gains half of gradient times step.
        poor = (gain < 0.25 * (along.square() / values).sum(1)).nonzero()[:, 0]
        if len(poor):
            values, along = values[poor], along[poor]
            divisors = [values + damping * values.amax(1, keepdim=True) for damping in DAMPING]
            divisors += [values / length for length in SHORTER]
            steps = torch.stack(
                [(vectors[poor] @ (along / d)[..., None])[..., 0] for d in divisors]
            )
            candidates = z[poor, None] + steps.transpose(0, 1)
            heights, best = part.rows(poor).log_joint(candidates).max(1)
            better = heights - height[active[poor]] > gain[poor]
            chosen = candidates[torch.arange(len(poor), device=best.device), best]
            moved[poor[better]] = chosen[better]
            gain[poor[better]] = (heights - height[active[poor]])[better]
        higher = gain > 0
        mode[active[higher]] = moved[higher]
        height[active[higher]] += gain[higher]
        active = active[gain > CONVERGED_NATS]
    return mode, axes, curvature


def _widths(target: Target, mode: Tensor, axes: Tensor, stds: Tensor) -> tuple[Tensor, Tensor]:
    """Return stds at which log p(x, z) is 1/2 below the mode, and its value at the mode, (n,)."""
    stds, height = stds.clone(), target.log_joint(mode[:, None])[:, 0]
    active = height.isfinite().nonzero()[:, 0]
    for _ in range(4):
        if not len(active):
            break
        apart = (axes[active] * stds[active][:, None]).mT
        around = torch.cat([mode[active][:, None] + apart, mode[active][:, None] - apart], 1)
        fall = (height[active][:, None] - target.rows(active).log_joint(around)).clamp(-1e8, 1e8)
        fall = fall.unflatten(1, (2, -1)).mean(1).clamp_min(0.125)
        stds[active] = stds[active] / (2 * fall).sqrt()
        active = active[((fall < 0.3) | (fall > 0.8)).any(1)]
    return stds, height


def adapted(target: Target, mixture: Mixture, shift: Tensor, seed: int) -> Mixture:
    """Fit the proposals with a low effective share to their own weighted samples, some times."""
    noise, kept = noise_of(seed, 0, ADAPTATION_SAMPLES, shift), mixture.clone()
    best = torch.full_like(shift[:, 0], -1.0)
    active, trial = torch.arange(len(shift), device=shift.device), mixture
    for _ in range(1 + ADAPTATIONS):
        latents = trial.latents(noise.rows(active))
        densities = trial.log_densities(latents) + trial.shares().log()[:, None]
        log_q = densities.logsumexp(-1)
        log_weights = target.rows(active).log_joint(latents) - log_q
        share = effective_share(log_weights)
        better = share > best[active]
        best[active[better]] = share[better]
        kept.put(active[better], trial.rows(better))
        go_on = (share < ENOUGH) & log_weights.isfinite().any(1)
        if not go_on.any():
            break
        active, trial = active[go_on], trial.rows(go_on)
        log_q, log_weights = log_q[go_on], log_weights[go_on]
        responsibility = (densities[go_on] - log_q[..., None]).exp()
        trial = _fitted(trial, latents[go_on], log_weights, responsibility)
    return kept


def _fitted(
    mixture: Mixture, latents: Tensor, log_weights: Tensor, responsibility: Tensor
) -> Mixture:
    """Return a mixture with the moments of weighted samples.

    Weights are flattened until they have an effective size of three samples per latent, so that
    the covariance is not that of one sample.
    """
    pairs, size = mixture.weights.shape[1], latents.shape[-1]
    enough = min(3 * (size + 1), latents.shape[1] / 4) / latents.shape[1]
    power = torch.ones_like(log_weights[:, :1])
    for _ in range(6):
        low = effective_share(power * log_weights)[:, None] < enough
        power = torch.where(low, power / 2, power)
    share = (power * log_weights).softmax(1)
    share = share[..., None] * (
        responsibility[..., :pairs] + responsibility[..., pairs : 2 * pairs]
    )
    total = share.sum(1) + 1e-12
    means = torch.einsum("nkm,nkl->nml", share, latents) / total[..., None]
    found = total[..., None] > 1e-6
    means = torch.where(found, means, mixture.means)
    apart = latents[:, :, None] - means[:, None]
    covariance = torch.einsum("nkm,nkmi,nkmj->nmij", share, apart, apart)
    covariance = covariance / total[..., None, None]
    before = (mixture.axes * mixture.stds.square()[:, :, None]) @ mixture.axes.mT
    covariance = torch.where(found[..., None], 0.98 * covariance + 0.02 * before, before)
    values, axes = torch.linalg.eigh(covariance.nan_to_num(0.0))
    stds = values.clamp_min(1e-24).sqrt()
    weights = total / total.sum(1, keepdim=True) + 0.02
    return Mixture(weights / weights.sum(1, keepdim=True), means, axes, stds)


def effective_share(log_weights: Tensor) -> Tensor:
    """Return (sum w)^2 / sum w^2 / K of each row, (n,); 0 if no weight is positive."""
    share = (2 * log_weights.logsumexp(1) - (2 * log_weights).logsumexp(1)).exp()
    return share.nan_to_num(0.0) / log_weights.shape[1]


class MixtureNoise(NamedTuple):
    """Noise of samples of a mixture: uniform numbers (n, K), normal ones (n, K, L)."""

    choice: Tensor
    normal: Tensor

    def rows(self, rows: Tensor) -> "MixtureNoise":
        return MixtureNoise(self.choice[rows], self.normal[rows])


def shifts_of(like: Tensor, seed: int, numbers: range | None) -> Tensor:
    """Return the random shift of the Sobol points of each value, (n, 1 + L); 0 without numbers."""
    if numbers is None:
        return like.new_zeros(len(like), like.shape[1] + 1)
    shifts = [
        torch.rand(like.shape[1] + 1, generator=generator("likelihood", seed, number))
        for number in numbers
    ]
    return torch.stack(shifts).to(like)


def noise_of(seed: int, first: int, count: int, shift: Tensor) -> MixtureNoise:
    """Return the noise of `count` points of a Sobol sequence from the number `first`, shifted."""
    points = _sobol(shift.shape[1], seed, count, first).to(shift)
    # All values have the same noise if none is shifted. It is then transformed only once.
    shifts = shift if shift.any() else shift[:1]
    uniform = ((points + shifts[:, None]) % 1).clamp(1e-12, 1 - 1e-12)
    normal = torch.special.ndtri(uniform[..., 1:])
    return MixtureNoise(uniform[..., 0].expand(len(shift), -1), normal.expand(len(shift), -1, -1))


def _sobol(dims: int, seed: int, count: int, first: int) -> Tensor:
    source = torch.quasirandom.SobolEngine(dims, scramble=True, seed=derive("sobol", seed))
    source.fast_forward(first)
    return source.draw(count, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
