"""Measurements of one model, the balance and overfitting derived from them, and notes on limits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import Tensor

from poise.balance import Balance
from poise.diagnosis.course import relative_fall
from poise.diagnosis.outputs import FEWEST_IMAGES, Comparison
from poise.diagnosis.subject import Case, Seen
from poise.diagnosis.verdict import IMBALANCED, INFERRED_IMBALANCED, STILL_FALLING, SURE
from poise.diagnosis.weight import InferredWeight, LossWeights
from poise.latent import variance_law
from poise.variants import PRIORS

# Inferred weight of a cross-entropy minus 1. Models trained with it: 0.00 to 0.02.
CROSS_ENTROPY_CLOSE = 0.1
# Late fall of the MSE as a share of itself. Runs of two minutes on faces: 0.13 and 0.18 (recipe
# maps); of half an hour: 0.10 to 0.11.
SHORT = 0.12
BINARY = 0.95  # share of values within 0.1 of 0 or 1; 8x8 digits have 0.65, binary images 1


@dataclass(frozen=True)
class Facts:
    """Measurements of a model without the faults that `broken` finds.

    Attributes:
        seen, train: reconstructions of the images, and of the training images if these are known.
        num_train: number of all training images; 0: not known.
        balance: the loss, or the balance that the loss function uses.
        wrapped: whether the balance is used inside a function.
        loss: weights read from the loss; None: no loss was given.
        inferred: weights inferred from the model; None: every latent has collapsed, or training has
            not converged.
        largest_variance: largest variance of the images in any direction.
        comparison: distances of samples from images; None: too few images.
        is_run: whether the model is a run of Poise.
        latent_shape: shape of the latents of a model of another library; None: a VAE of Poise.
        logits: whether the decoder returns logits, so that the figures are those after a sigmoid.
        linear_mse: MSE of the best linear VAE with `linear_latents`; None: too few images to tell.
        linear_latents: as many as the model has, but at most one for 20 images.
        falls: MSE of each stage at about 70 % of training and in the last tenth, if known.
        spike: step of a late spike of the error, the error before it, and at the end.
    """

    seen: Seen
    train: Seen | None = None
    num_train: int = 0
    balance: Balance | None = None
    loss: LossWeights | None = None
    inferred: InferredWeight | None = None
    largest_variance: float = 0.0
    comparison: Comparison | None = None
    is_run: bool = False
    latent_shape: tuple[int, ...] | None = None
    logits: bool = False
    linear_mse: float | None = None
    linear_latents: int = 0
    falls: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    spike: tuple[float, float, float] | None = None
    wrapped: bool = False

    @property
    def trained_on(self) -> Seen:
        return self.train or self.seen

    @property
    def num_latents(self) -> int:
        return self.seen.codes.mean.shape[1]

    @property
    def inactive(self) -> list[int]:
        return (~self.seen.active).nonzero().flatten().tolist()

    @cached_property
    def followed(self) -> float | None:
        """Training error read from the balance's gamma2.

        None if the balance does not follow the error, if it has a gamma2 per group, or if gamma2 is
        not below the images' error.
        """
        if self.balance is None or not self.balance.follows_error or self.balance.groups:
            return None
        gamma2 = float(self.balance.gamma2)
        return gamma2 if gamma2 < float(self.seen.error(self.balance.power).mean()) else None

    @cached_property
    def followed_groups(self) -> Tensor | None:
        """Training MSE of each channel or column, read from gamma2; None: it is not known."""
        balance = self.balance
        if balance is None or not balance.follows_error or balance.per is None:
            return None
        return balance.gamma2 if balance.power == 2 else None

    @cached_property
    def train_mse(self) -> float | None:
        if self.train is not None:
            return self.train.mse
        return self.followed if self.balance is not None and self.balance.power == 2 else None

    @cached_property
    def overfitted(self) -> float:
        """MSE of new images over MSE of training images.

        1 if the difference is within the standard errors, or if the training error is not known.
        """
        if self.train_mse is None:
            return 1.0
        variances = [
            seen.error().var() / len(seen.images)
            for seen in (self.seen, self.train)
            if seen is not None
        ]
        difference = self.seen.mse - self.train_mse
        return (
            self.seen.mse / max(self.train_mse, 1e-12)
            if difference > SURE * float(sum(variances)) ** 0.5
            else 1.0
        )

    @cached_property
    def codes_variance(self) -> float:
        """Variance of latents drawn from the posteriors, mean over latents.

        A second stage reconstructs such latents.
        """
        return float(variance_law(self.trained_on.codes.mean, self.trained_on.codes.logvar).mean())

    def fell(self, stage: int) -> float:
        """Return the late fall of a stage's MSE, as a share of the variance of its input."""
        before, after = self.falls[stage]
        return (before - after) / (self.trained_on.variance if stage == 1 else self.codes_variance)

    @property
    def short(self) -> bool:
        """Whether the error of stage 1 was still falling, too little to be a fault."""
        falling = 1 in self.falls and relative_fall(self.falls[1]) > SHORT
        return falling and not self.fell(1) > STILL_FALLING

    @cached_property
    def by_cross_entropy(self) -> bool:
        """Whether the loss is a cross-entropy; if no loss was given, judged by the model."""
        if self.loss is not None:
            return self.loss.cross_entropy
        return (
            self.inferred is not None and abs(self.inferred.cross_entropy - 1) < CROSS_ENTROPY_CLOSE
        )

    @cached_property
    def weighing(self) -> "Weighing | None":
        """Effective gamma2 and its target, from the loss or else the model; None: unknown."""
        if self.loss is not None and self.loss.known:
            new = self.loss.balanced_gamma2(self.seen)
            right = self.loss.balanced_gamma2(self.train) if self.train else self.followed or new
            return Weighing("loss", self.loss.gamma2, right, new, IMBALANCED)
        if self.inferred is None or (self.loss is None and self.by_cross_entropy):
            return None
        if self.balance is not None and not self.balance.error.is_likelihood:
            return None  # the error of features adds to the weight of the pixels
        doubt = 1 + SURE * self.inferred.relative_error
        train_mse = self.train_mse or self.seen.mse
        return Weighing(
            "model", self.inferred.gamma2, train_mse, self.seen.mse, INFERRED_IMBALANCED * doubt
        )


@dataclass(frozen=True)
class Weighing:
    """Effective decoder variance of a loss, and the errors that it should equal.

    A model that overfits has two errors. A gamma2 anywhere between them is not an imbalance.

    Attributes:
        by: source of gamma2, the loss or the model.
        gamma2: effective decoder variance, eq. 1 or 3.
        right, new: error of training images, and of new images.
        factor: factor beyond which a difference is an imbalance.
    """

    by: Literal["loss", "model"]
    gamma2: float
    right: float
    new: float
    factor: float

    @property
    def beta(self) -> float:
        return self.gamma2 / max(self.right, 1e-12)

    @property
    def bounds(self) -> tuple[float, float]:
        """Range of the equivalent beta in which the loss counts as balanced."""
        low, high = sorted((self.right, self.new))
        return low / self.factor / max(self.right, 1e-12), self.factor * high / max(
            self.right, 1e-12
        )

    @property
    def side(self) -> Literal["over", "under", "balanced"]:
        low, high = self.bounds
        if self.beta > high:
            return "over"
        return "under" if self.beta < low else "balanced"


def is_binary(images: Tensor) -> bool:
    """Return whether nearly all values are 0 or 1."""
    near = ((images - images.round()).abs() < 0.1) & (images >= -0.1) & (images <= 1.1)
    return float(near.double().mean()) > BINARY


# Inferred weight over measured weight. Healthy models: 0.9 to 1.1. Beyond it, another loss trained
# the model.
DISAGREE = 3.0


def notes_on(case: Case, facts: Facts) -> list[str]:
    """Return the notes on limits of the diagnosis, those on images first."""
    return [
        *_on_images(case, facts),
        *_on_loss(facts),
        *_on_logits(facts),
        *([] if facts.balance is None else facts.balance.faults().values()),
        *_on_cross_entropy(facts),
        *_disagreement(facts),
        *_on_length(facts),
    ]


def _on_images(case: Case, facts: Facts) -> list[str]:
    count, notes = len(facts.seen.images), []
    if count < len(case.images):
        notes.append(f"{count} of {len(case.images)} images were used, drawn at random.")
    if count < FEWEST_IMAGES:
        notes.append(
            f"{count} images are few: the figures are rough, and samples were not compared. "
            f"Give {FEWEST_IMAGES} or more."
        )
    elif facts.comparison is None:
        notes.append(
            "All images are the same after averaging down to 16x16: samples were not compared."
        )
    else:
        notes += [
            f"The prior {name} could not be fitted to the codes, so it was not tried."
            for name, prior in PRIORS.items()
            if prior.needs == "codes" and name not in facts.comparison.priors
        ]
    if facts.train is None:
        notes.append(
            "Overfitting cannot be distinguished from an imbalance: pass train_images too."
        )
    return notes


def _on_length(facts: Facts) -> list[str]:
    if not facts.short:
        return []
    before, after = facts.falls[1]
    return [
        f"Training was short: the MSE still fell by {relative_fall(facts.falls[1]):.0%} in its "
        f"last third, from {before:.3g} to {after:.3g}. A longer training gives sharper "
        "reconstructions."
    ]


def _on_loss(facts: Facts) -> list[str]:
    if facts.loss is None or facts.loss.known:
        return []
    source = (
        "its weights were inferred from the model"
        if facts.weighing is not None
        else "its weights are not known"
    )
    return [
        "The loss could not be read, because it is not a squared, absolute or cross-entropy error "
        f"plus KL; {source}."
    ]


def _on_logits(facts: Facts) -> list[str]:
    if facts.loss is not None and facts.loss.error == "logits":
        return [
            "The loss is a cross-entropy of logits: its gradient is sigmoid(r) - x. All figures "
            "are those of sigmoid(decoder(z))."
        ]
    if facts.logits:
        return [
            "The decoder looks as if it returned logits: its outputs leave the range 0 to 1, and a "
            "sigmoid brings them near the images. All figures are those of sigmoid(decoder(z)). "
            "Pass loss= to be sure."
        ]
    return []


def _on_cross_entropy(facts: Facts) -> list[str]:
    if is_binary(facts.seen.images):
        return []
    likeness = "which has no scale to balance. It suits images of 0 and 1 only, but these are grey."
    if facts.loss is not None and facts.loss.cross_entropy:
        return [f"The loss is a cross-entropy, {likeness}"]
    if facts.by_cross_entropy:
        return [f"The model looks trained with a cross-entropy, {likeness}"]
    return []


def _disagreement(facts: Facts) -> list[str]:
    loss, inferred = facts.loss, facts.inferred
    if (
        loss is None
        or not loss.known
        or loss.error != "squared"
        or inferred is None
        or not 0 < loss.gamma2 < math.inf
    ):
        return []
    if abs(math.log(inferred.gamma2 / loss.gamma2)) < math.log(DISAGREE):
        return []
    why = "training" if facts.is_run else "perhaps another loss trained the model, or training"
    return [
        f"The loss corresponds to gamma2 = {loss.gamma2:.3g}, but the model to "
        f"{inferred.gamma2:.3g}: {why} did not converge."
    ]
