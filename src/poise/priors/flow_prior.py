"""Flow prior, z = mean + std y(1), where y(0) ~ N(0, I) and dy/dt = v(y, t): GEN-flow.

The differential equation is solved in equal steps of length h. Heun's method takes

    y <- y + h [ v(y, t) + v(y + h v(y, t), t + h) ] / 2,                                       (1)

with an error of order h^2, and Euler's method

    y <- y + h v(y, t),                                                                         (2)

with an error of order h. The last step of Heun's method is one of Euler's, whose own error is of
order h^2. So n steps of Heun's method evaluate the network 2n - 1 times. See `poise.flow` for v.

The density of z, with y(1) = (z - mean) / std and the equation solved back to y(0), is

    log p(z) = log N(y(0); 0, I) - integral over t of div v(y(t), t) - sum of log std.          (3)

(Chen et al. 2018, arXiv 1806.07366, theorem 1.)

A flow with classes has one more column of noise, which draws the class of each latent vector by its
frequency among the training images. `of_class` gives all of them one class, with the same noise.
Guidance (eq. 4 of `poise.flow`) other than 1 evaluates the network twice as often.
"""

import math
from typing import final

import torch
from torch import Tensor

from poise.errors import InputError
from poise.flow import Flow
from poise.priors.base import Prior, TrainedModel
from poise.recipes.settings import Solver
from poise.shapes import Latents, Noise, PerImage

ROWS = 1_000  # maximum number of latents that are computed at once
# Of the Runge-Kutta method that solves eq. 3. For two clusters of codes, 16 steps have an error of
# 0.02 nats (mean of absolute values) against 64.
DENSITY_STEPS = 16


@final
class FlowPrior(Prior):
    """Map noise to latents by a flow (GEN-flow).

    Args:
        flow: the flow, of L latents.
        steps: number of steps of the solver, >= 1.
        solver: "heun" or "euler".
        guidance: factor of the direction of the class, >= 0. 1: the flow of the class; more: images
            that are more typical of it, and less diverse; 0: the flow of all classes.
        label: the class of all latents. None: drawn by frequency.

    Raises:
        InputError: guidance other than 1, or a class, for a flow without classes.
    """

    reference_draws = 1_000  # a draw costs tens of evaluations of the network

    def __init__(
        self,
        flow: Flow,
        *,
        steps: int,
        solver: Solver = "heun",
        guidance: float = 1.0,
        label: int | None = None,
    ) -> None:
        super().__init__()
        if not flow.classes and (guidance != 1 or label is not None):
            raise InputError(
                "labels and guidance need a flow that was trained with them: train with --labels"
            )
        self.flow, self.steps, self.solver = flow, steps, solver
        self.guidance, self.label = guidance, label
        self.noise_dims = len(flow.mean) + (flow.classes > 0)

    @classmethod
    def fitted(cls, model: TrainedModel) -> "FlowPrior":
        assert isinstance(model.second, Flow)
        chosen = model.generation
        return cls(
            model.second,
            steps=chosen.flow_steps,
            solver=chosen.flow_solver,
            guidance=chosen.guidance,
        )

    def of_class(self, label: int) -> "FlowPrior":
        how = {"steps": self.steps, "solver": self.solver, "guidance": self.guidance}
        return FlowPrior(self.flow, **how, label=label)

    @torch.no_grad()
    def latents(self, noise: Noise) -> Latents:
        self.flow.eval()
        # An exported graph takes any number of rows at once.
        parts = [noise] if torch.compiler.is_exporting() else noise.split(ROWS)
        ends = torch.cat([self._carry(part) for part in parts])
        return self.flow.mean + self.flow.std * ends

    @torch.no_grad()
    def log_density(self, latents: Latents) -> PerImage:
        """Return log p(z) of each latent vector, in nats, (n,), in the precision of `latents`.

        Eq. 3, in `DENSITY_STEPS` steps of the classical Runge-Kutta method. Each evaluates the
        network and its derivatives in all L directions four times, so this is for few latents. The
        network computes in its own precision.

        Raises:
            InputError: the flow has classes.
        """
        if self.flow.classes:
            raise InputError("the density under a flow is for flows without labels")
        self.flow.eval()
        start = ((latents - self.flow.mean) / self.flow.std).to(self.flow.mean.dtype)
        density = torch.cat([self._log_density(part) for part in start.split(ROWS)])
        return density.to(latents) - self.flow.std.to(latents).log().sum()

    def _log_density(self, y: Tensor) -> Tensor:
        """Return log p(y(1)) of standardised latents, (n,)."""
        h, divergences = -1 / DENSITY_STEPS, torch.zeros_like(y[:, 0])
        for step in range(DENSITY_STEPS):
            time = 1 + step * h
            first, a = self._with_divergence(y, time)
            second, b = self._with_divergence(y + h / 2 * first, time + h / 2)
            third, c = self._with_divergence(y + h / 2 * second, time + h / 2)
            last, d = self._with_divergence(y + h * third, time + h)
            y = y + h / 6 * (first + 2 * second + 2 * third + last)
            divergences = divergences + h / 6 * (a + 2 * b + 2 * c + d)
        return divergences - (y.square().sum(1) + y.shape[1] * math.log(2 * math.pi)) / 2

    def _with_divergence(self, y: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """Return the velocity (n, L) and its divergence (n,), the trace of its Jacobian."""
        y = y.detach().requires_grad_()
        with torch.enable_grad():
            velocity = self.flow(y, y.new_full((len(y),), time))
            slopes = [
                torch.autograd.grad(part.sum(), y, retain_graph=True)[0][:, index]
                for index, part in enumerate(velocity.unbind(1))
            ]
        return velocity.detach(), torch.stack(slopes).sum(0)

    def _carry(self, noise: Tensor) -> Tensor:
        """Return y(1) for y(0), and for the column that draws the class if there are classes."""
        h, labels = 1 / self.steps, self._labels(noise)
        y = noise if labels is None else noise[:, :-1]
        for step in range(self.steps):
            time = y.new_full(y.shape[:1], step * h)  # len(y) would fix the size of an export
            v = self._velocity(y, time, labels)
            if self.solver == "heun" and step < self.steps - 1:
                v = (v + self._velocity(y + h * v, time + h, labels)) / 2
            y = y + h * v
        return y

    def _labels(self, noise: Tensor) -> Tensor | None:
        if not self.flow.classes:
            return None
        if self.label is not None:
            return noise.new_full(noise.shape[:1], self.label, dtype=torch.long)
        uniform, bounds = torch.special.ndtr(noise[:, -1]), self.flow.frequencies.cumsum(0)[:-1]
        return (bounds < uniform[:, None]).sum(1)  # ONNX has no search

    def _velocity(self, y: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        """Return the velocity with guidance (eq. 4 of `poise.flow`)."""
        if labels is None or self.guidance == 1:
            return self.flow(y, time, labels)
        plain = self.flow(y, time)
        return plain + self.guidance * (self.flow(y, time, labels) - plain)


def evaluations(steps: int, solver: Solver) -> int:
    """Return how often a solver evaluates the velocity network for each latent vector."""
    return 2 * steps - 1 if solver == "heun" else steps
