"""Measure the ELBO of held-out images during stage 1, keep the best weights, and stop early.

The ELBO of held-out images is measured 50 to 100 times during the stage, and in the same way that
of as many training images: in evaluation mode, with the same noise each time. Both are in the log.
The weights with the best held-out ELBO are those that the run ends with.

Cost. A forward pass takes about a third of the time of a training step. With n images on each side,
e evaluations in N steps of B images take the share 2 n e / (3 N B) of the training time. So n is at
most `SHARE_OF_TIME` 3 N B / (2 e). It is at least `FEWEST_IMAGES`, whatever the share.

Overfitting. The held-out ELBO is compared image by image with that of the best weights. If it is
lower by more than `CERTAIN` standard errors of the difference, while that of the training images is
higher, and if the last `FALLING` evaluations were all worse than the best one, the model overfits.
"""

import math
from typing import Any

import torch
from torch import Tensor

from poise.balance import Balance, negative_log_likelihood
from poise.data import Dataset, head, spread
from poise.data.storage import take
from poise.errors import InputError
from poise.metrics.encoding import encoded
from poise.metrics.reconstruction import grouped_error
from poise.objectives import is_deterministic
from poise.recipes.settings import Stage
from poise.runs.log import HELD_OUT, TRAINING
from poise.shapes import PerImage
from poise.support.kernels import kernels
from poise.support.progress import warn
from poise.support.seeds import drawn
from poise.support.snapshots import evaluating
from poise.training import TrainingState, distributed, steps_between_logs, under
from poise.vae import VAE

LOGS_BETWEEN = 8  # log entries from one evaluation to the next
SHARE_OF_TIME = 0.03  # of the training time, for all evaluations
FEWEST_IMAGES, MOST_IMAGES = 50, 1_000  # of each side
CERTAIN = 3.0  # standard errors
FALLING = 3  # evaluations: a single one may be worse because the learning rate is high


class Validation:
    """The ELBO of held-out images in a stage, its best weights, and early stopping.

    Args:
        dataset: data with a validation side.
        stage: settings of stage 1.
        seed: seed of the posterior samples.
        saved: what `tensors` returned, from a checkpoint. Empty: the stage begins.

    Attributes:
        images: number of images of each side that are measured.
        every: steps between evaluations.
    """

    def __init__(self, dataset: Dataset, stage: Stage, seed: int, saved: dict[str, Tensor]) -> None:
        assert dataset.validation is not None
        self._total = total = stage.total_steps(len(dataset.train))
        self._seed, self._patience = seed, stage.patience
        self.every = LOGS_BETWEEN * steps_between_logs(total)
        batch_size = min(stage.batch_size, len(dataset.train))
        affordable = affordable_images(total, batch_size, total // self.every + 1)
        self.images = int(saved["images"]) if saved else min(affordable, len(dataset.validation))
        # Checkpoints of versions that measured the first images have no "spaced".
        spaced = not saved or "spaced" in saved
        self._held_out = (spread if spaced else head)(dataset.validation, self.images)
        some = drawn(len(dataset.train), self.images)
        self._choice = {"spaced": torch.tensor(1)} if spaced else {}
        self._training = take(dataset.train, torch.tensor(some).numpy())
        self._best = {name: tensor.clone() for name, tensor in saved.items()}
        self._waited = int(saved["waited"]) if saved else 0
        self._said = False

    def measure(self, state: TrainingState[VAE]) -> dict[str, float]:
        """Return both ELBOs for the log, as means over images; nothing between evaluations."""
        if state.step % self.every and state.step != self._total:
            return {}
        held_out, training = distributed.on_first(lambda: self._elbos(state))
        self._compare(state, held_out, training)
        means = {HELD_OUT: float(held_out.mean()), TRAINING: float(training.mean())}
        return {name: mean for name, mean in means.items() if math.isfinite(mean)}

    def ends(self) -> bool:
        """Return whether the best ELBO is so old that training stops early."""
        return self._patience is not None and self._waited >= self._patience

    def tensors(self) -> dict[str, Tensor]:
        """Return the best weights and what is known of them, for a checkpoint."""
        return self._best | {"waited": torch.tensor(self._waited)} if self._best else {}

    def restore(self, state: TrainingState[VAE]) -> None:
        """Set the network to use after training, and the balance, to the best weights."""
        if self._best:
            state.trained.load_state_dict(under("weights", self._best))
            state.balance.load_state_dict(under("balance", self._best))

    def outcome(self, state: TrainingState[VAE]) -> dict[str, Any] | None:
        """Return the figures of the best and of the last evaluation, for summary.json.

        None: no ELBO was a finite number.
        """
        if not self._best:
            return None
        best, last = self._best["held_out"], self._best["last_held_out"]
        return {
            "images": self.images,
            "best_step": int(self._best["step"]),
            "last_step": state.step,
            "steps": self._total,
            HELD_OUT: float(best.mean()),
            TRAINING: float(self._best["training"]),
            f"last_{HELD_OUT}": float(last.mean()),
            f"last_{TRAINING}": float(self._best["last_training"]),
            "overfitting": self._overfits(),
        }

    def _elbos(self, state: TrainingState[VAE]) -> tuple[Tensor, Tensor]:
        with evaluating(state.trained), kernels(state.sums.device, tf32=False):
            held_out, training = (
                elbo_per_image(state.trained, state.balance, images, self._seed)
                for images in (self._held_out, self._training)
            )
        return held_out, training

    def _compare(self, state: TrainingState[VAE], held_out: Tensor, training: Tensor) -> None:
        mean, best = held_out.mean(), self._best.get("held_out")
        self._waited += 1
        if not (mean.isfinite() and training.mean().isfinite()):
            return
        if best is None or mean > best.mean():
            self._waited = 0
            weights, balance = state.trained.state_dict(), state.balance.state_dict()
            self._best = (
                {f"weights.{name}": tensor.detach().clone() for name, tensor in weights.items()}
                | {f"balance.{name}": tensor.detach().clone() for name, tensor in balance.items()}
                | {"held_out": held_out, "training": training.mean()}
                | {"step": torch.tensor(state.step), "images": torch.tensor(self.images)}
                | self._choice
            )
        self._best |= {"last_held_out": held_out, "last_training": training.mean()}
        if not self._said and distributed.rank() == 0 and self._overfits():
            self._said = True
            warn(overfitting(self.outcome(state) or {}))

    def _overfits(self) -> bool:
        fall = self._best["held_out"] - self._best["last_held_out"]
        certain = fall.mean() > CERTAIN * fall.std() / math.sqrt(len(fall))
        rises = self._best["last_training"] > self._best["training"]
        return self._waited >= FALLING and bool(certain and rises)


def affordable_images(steps: int, batch_size: int, evaluations: int) -> int:
    """Return how many images of each side can be measured at so many evaluations.

    Args:
        steps, batch_size: of the stage.
        evaluations: number of evaluations in the stage.
    """
    affordable = int(SHARE_OF_TIME * 3 * steps * batch_size / (2 * evaluations))
    return min(max(affordable, FEWEST_IMAGES), MOST_IMAGES)


@torch.no_grad()
def elbo_per_image(vae: VAE, balance: Balance, images: Any, seed: int) -> PerImage:
    """Return the ELBO of each image in nats, with KL weight 1 and one posterior sample.

    The mean over images is `elbo_nats` of `poise.metrics.reconstruction`.

    Args:
        vae, balance: used in evaluation mode; gamma2 is the balance's.
        images: (n, channels, height, width), uint8 or float in [0, 1].
        seed: seed of the posterior samples. The noise of image i depends on (seed, i) only.

    Returns:
        (n,), float64, on the CPU.
    """
    gamma2, parts = balance.gamma2.cpu().double(), []
    num_dims = math.prod(images.shape[1:]) // gamma2.numel()
    for batch, posterior, noise in encoded(vae, images, seed):
        difference = vae.decode(posterior.sample(noise)).float() - batch
        error = grouped_error(difference, balance).cpu()
        nats = negative_log_likelihood(error, gamma2, num_dims, power=balance.power)
        nats = nats if balance.groups is None else nats.sum(1)
        parts.append(-nats - posterior.kl().cpu().double())
    return torch.cat(parts)


def check_elbo(stage: Stage, balance: Balance) -> None:
    """Check that the ELBO can choose the weights of stage 1.

    Args:
        stage, balance: of stage 1.

    Raises:
        InputError: the model has no ELBO, or its balance does not maximise the ELBO.
    """
    reason = None
    if is_deterministic(stage.objective):
        reason = f"objective {stage.objective} has no ELBO"
    elif not balance.error.is_likelihood:
        reason = f"the error {stage.error} is no likelihood, so there is no ELBO"
    elif not balance.early_stopping:
        reason = f"balance {stage.balance} moves towards a target of its own, not the best ELBO"
    if reason is not None:
        raise InputError(
            f"validation keeps the weights with the best ELBO of held-out images, and {reason}: "
            "leave validation out"
        )


def overfitting(outcome: dict[str, Any]) -> str:
    """Return the sentence that says that the model overfits the training images.

    Args:
        outcome: see `Validation.outcome`.
    """
    return (
        "overfitting: from step "
        f"{outcome['best_step']:,} to step {outcome['last_step']:,} the ELBO of held-out images "
        f"fell from {outcome[HELD_OUT]:.1f} to {outcome[f'last_{HELD_OUT}']:.1f} nats, while "
        "that of training images rose "
        f"from {outcome[TRAINING]:.1f} to {outcome[f'last_{TRAINING}']:.1f}; "
        f"the weights of step {outcome['best_step']:,} are kept: more images, flips or patience "
        "save time"
    )
