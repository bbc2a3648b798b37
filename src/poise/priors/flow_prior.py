"""Flow prior, z = mean + std y(1), where y(0) ~ N(0, I) and dy/dt = v(y, t): GEN-flow.

The differential equation is solved in equal steps of length h. Heun's method takes

    y <- y + h [ v(y, t) + v(y + h v(y, t), t + h) ] / 2,                                       (1)

with an error of order h^2, and Euler's method

    y <- y + h v(y, t),                                                                         (2)

with an error of order h. The last step of Heun's method is one of Euler's, whose own error is of
order h^2. So n steps of Heun's method evaluate the network 2n - 1 times. See `poise.flow` for v.
"""

from typing import final

import torch
from torch import Tensor

from poise.flow import Flow
from poise.priors.base import Prior, TrainedModel
from poise.recipes.settings import Solver
from poise.shapes import Latents, Noise

ROWS = 1_000  # maximum number of latents that are computed at once


@final
class FlowPrior(Prior):
    """Map noise to latents by a flow (GEN-flow).

    Args:
        flow: the flow, of L latents.
        steps: number of steps of the solver, >= 1.
        solver: "heun" or "euler".
    """

    reference_draws = 1_000  # a draw costs tens of evaluations of the network

    def __init__(self, flow: Flow, *, steps: int, solver: Solver = "heun") -> None:
        super().__init__()
        self.flow, self.steps, self.solver = flow, steps, solver
        self.noise_dims = len(flow.mean)

    @classmethod
    def fitted(cls, model: TrainedModel) -> "FlowPrior":
        assert isinstance(model.second, Flow)
        chosen = model.generation
        return cls(model.second, steps=chosen.flow_steps, solver=chosen.flow_solver)

    @torch.no_grad()
    def latents(self, noise: Noise) -> Latents:
        self.flow.eval()
        # An exported graph takes any number of rows at once.
        parts = [noise] if torch.compiler.is_exporting() else noise.split(ROWS)
        ends = torch.cat([self._carry(part) for part in parts])
        return self.flow.mean + self.flow.std * ends

    def _carry(self, y: Tensor) -> Tensor:
        """Return y(1) for y(0)."""
        h = 1 / self.steps
        for step in range(self.steps):
            time = y.new_full(y.shape[:1], step * h)  # len(y) would fix the size of an export
            v = self.flow(y, time)
            if self.solver == "heun" and step < self.steps - 1:
                v = (v + self.flow(y + h * v, time + h)) / 2
            y = y + h * v
        return y


def evaluations(steps: int, solver: Solver) -> int:
    """Return how often a solver evaluates the velocity network for each latent vector."""
    return 2 * steps - 1 if solver == "heun" else steps
