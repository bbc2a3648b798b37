"""Early stopping on held-out rows."""

import copy
import math
import warnings
from typing import Any, ClassVar

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from poise.flow import Flow
from poise.support.seeds import generator
from poise.tables.scoring import elbo
from poise.training import TrainingState
from poise.vae import VAE

MOST_STEPS = 50  # maximum number of steps between evaluations of the held-out rows
PATIENCE_ROWS = 100_000  # rows trained on without a higher ELBO after which training stops
LEAST_PATIENCE = 200  # the same in steps, for large batches
RISING_NATS = 0.1  # rise of the ELBO in the last steps that causes a ConvergenceWarning
DRAWS = 1_000  # minimum number of noise rows for the held-out error of a flow


class ElboOf:
    """Score of a VAE: the ELBO of held-out rows (n, features), in nats per row."""

    rising: ClassVar[str] = "the ELBO of held-out rows rose by {:.2f} nats"

    def __init__(self, held_out: Tensor) -> None:
        self.held_out = held_out

    def __call__(self, state: TrainingState[VAE]) -> float:
        return elbo(state.network, state.balance, self.held_out)


class VelocityErrorOf:
    """Score of a flow: minus the mean squared error of the velocity, for held-out codes (n, L).

    The noise is the same at each call. Codes are repeated, so that it has at least `DRAWS` rows.
    """

    rising: ClassVar[None] = None

    def __init__(self, held_out: Tensor, seed: int) -> None:
        self.held_out = held_out.repeat(max(1, DRAWS // max(1, len(held_out))), 1)
        self.noise = torch.randn(
            len(self.held_out), held_out.shape[1] + 1, generator=generator("held-out noise", seed)
        )

    @torch.no_grad()
    def __call__(self, state: TrainingState[Flow]) -> float:
        flow = state.trained.eval()
        between, time, target = flow.target(
            self.held_out.to(flow.mean.device), self.noise.to(flow.mean.device)
        )
        return -float((flow(between, time) - target).square().mean())


class EarlyStopping:
    """Stop training when the score of held-out rows stops rising, and keep the best weights.

    Held-out rows are scored every epoch at first, later after each twentieth of the steps so
    far, and at least every `MOST_STEPS` steps, whatever the length of training.

    Args:
        state: the state that is trained.
        score: score of the state, higher is better. If no rows are held out, training does not stop
            early and keeps the last weights.
        steps: length of training, in steps.
        batch: rows per step.
        rows: number of training rows.
    """

    def __init__(
        self,
        state: TrainingState[Any],
        score: ElboOf | VelocityErrorOf,
        *,
        steps: int,
        batch: int,
        rows: int,
    ) -> None:
        self.state, self.score, self.steps = state, score, steps
        self.epoch = math.ceil(rows / batch)
        self.patience = max(LEAST_PATIENCE, math.ceil(PATIENCE_ROWS / batch))
        self.next = min(MOST_STEPS, self.epoch)
        self.checked = 0
        self.scores: list[tuple[int, float]] = []  # step and score
        self.best, self.best_step = -math.inf, 0
        self.kept: tuple[dict[str, Any], dict[str, Any]] | None = None

    def should_stop(self) -> bool:
        """Return whether the score has not risen for long. Call it after every step."""
        step = self.state.step
        if step >= self.next and step > self.checked:  # may be called twice in one step
            self.check()
            self.next = step + min(MOST_STEPS, max(self.epoch, step // 20))
        return bool(len(self.score.held_out)) and step - self.best_step > self.patience

    def check(self) -> None:
        """Compute the score, and keep a copy of the weights if they are the best so far."""
        state, self.checked = self.state, self.state.step
        if not len(self.score.held_out):
            return
        score = self.score(state)
        state.network.train()
        self.scores.append((state.step, score))
        if score > self.best:
            self.best, self.best_step = score, state.step
            self.kept = (
                copy.deepcopy(state.trained.state_dict()),
                copy.deepcopy(state.balance.state_dict()),
            )

    def restore(self) -> None:
        """Restore the best weights, and warn if the ELBO was still rising at the last step.

        Without held-out rows, the weights are the last ones, averaged if the stage keeps averages.
        """
        if self.state.step > self.checked:
            self.check()
        self._warn_if_rising()
        weights = self.state.trained.state_dict()
        if self.kept is not None:
            self.state.step = self.best_step
            weights, balance = self.kept
            self.state.balance.load_state_dict(balance)
        self.state.network.load_state_dict(weights)

    def _warn_if_rising(self) -> None:
        late = 0.8 * self.steps
        before = [score for step, score in self.scores if step <= late]
        after = [score for step, score in self.scores if step > late]
        if not (self.score.rising and self.state.step == self.steps and before and after):
            return
        if (rise := max(after) - max(before)) > RISING_NATS:
            text = (
                f"{self.score.rising.format(rise)} in the last fifth of "
                f"{self.steps} steps: train for more steps"
            )
            warnings.warn(text, ConvergenceWarning, stacklevel=6)  # at the caller of `fit`
