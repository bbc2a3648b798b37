"""What is wrong with a loss whatever the model: no number, no gradient, another formula, another range."""

import math

from poise.balance import Balance, ComputedBalance, LearnedBalance, OptimalBalance
from poise.diagnosis.limits import IMBALANCED, LARGE_VALUES
from poise.diagnosis.report import Finding
from poise.diagnosis.subject import Seen
from poise.diagnosis.weight import LossWeights

TOO_LARGE = 10.0  # gamma2 that a balance followed, over the mean square of the images (at least 1)
FAR_TOO_LARGE = 100.0  # the same of any other loss, which may be meant so
TOO_SMALL = 1e-3  # gamma2 that a balance followed, over the MSE of training images
BYTES_SQUARED = 255.0**2  # errors of bytes over those of [0, 1]; a gamma2 further off has diverged
DIFFERENTIATE = (
    "Differentiate the loss itself, not its parts: a balance's terms.loss, as in terms.loss.backward(); detach what an error "
    "is divided by."
)


def faulty_loss(
    loss: LossWeights | None, balance: Balance | None, trained_on: Seen, *, surely_trained_on: bool
) -> Finding | None:
    """The first of these faults.

    Args:
        loss: its weights; None: it was not given.
        balance: the loss, where it is one of Poise's.
        trained_on: what the model makes of its training images, or of others where these are not known.
        surely_trained_on: whether they are known.
    """
    if loss is None:
        return None
    of_range = _other_range(loss, balance, trained_on, surely_trained_on)
    return _no_number(loss) or _no_gradient(loss) or _wrong_formula(loss) or of_range


def _no_number(loss: LossWeights) -> Finding | None:
    if loss.finite:
        return None
    sentence = (
        "The loss or its gradient is NaN or infinite, although the reconstructions, means and logvars given to it are not."
    )
    remedy = "Look in the loss for a division by 0, or a logarithm or root of 0 or of a negative number."
    return Finding("not-finite", sentence, {}, remedy)


def _no_gradient(loss: LossWeights) -> Finding | None:
    if not loss.flat:
        return None
    if loss.kl_formula == "absent":
        sentence = (
            "The loss depends on nothing: its gradients by reconstruction, mean and logvar are 0. Is it a constant, or built "
            "from detached parts, as terms.reconstruction and terms.kl are?"
        )
    else:
        sentence = (
            "The loss does not change with the reconstruction, so that it trains no decoder: is the reconstruction, or "
            "terms.reconstruction, which is detached, what the loss is built from? terms.loss is the one to differentiate. Or "
            "is an error divided by itself, undetached?"
        )
    return Finding("no-gradient", sentence, {"kl_weight": loss.kl_weight}, DIFFERENTIATE)


def _wrong_formula(loss: LossWeights) -> Finding | None:
    """A KL term of another formula."""
    if loss.kl_formula not in ("log-std", "reversed"):
        return None
    if loss.kl_formula == "log-std":
        sentence = "The loss's KL takes the encoder's second output for the log standard deviation; it is the log variance."
        remedy = "Write the KL as (mean^2 + exp(logvar) - logvar - 1) / 2, and sample with std = exp(logvar / 2)."
    else:
        sentence = f"The loss's KL has the wrong sign (its weight is {loss.kl_weight:.3g}): training makes the KL larger."
        remedy = "Write the KL as +1/2 sum(mean^2 + exp(logvar) - logvar - 1), and add it to the error."
    return Finding("kl-formula", sentence, {"kl_weight": loss.kl_weight}, remedy)


def _other_range(loss: LossWeights, balance: Balance | None, trained_on: Seen, surely_trained_on: bool) -> Finding | None:
    """A loss that followed, or was made for, errors of other units than these images can have."""
    least, most = (float(value) for value in trained_on.images.aminmax())
    scale = max(1.0, float(trained_on.images.double().square().mean()))
    followed = isinstance(balance, (ComputedBalance, LearnedBalance, OptimalBalance))
    gamma2 = _gamma2_of_error(loss, followed)
    large = gamma2 > (TOO_LARGE if followed else FAR_TOO_LARGE) * scale
    small = followed and surely_trained_on and max(-least, most) > LARGE_VALUES and gamma2 < TOO_SMALL * trained_on.mse
    if not (large or small):
        return None
    diverged = "has diverged, or " if large and gamma2 > BYTES_SQUARED * scale else ""
    sentence = (
        f"The loss {diverged}was trained on another range than these images: its gamma2, the squared error that it was made "
        f"for, is {gamma2:.3g}, but the images go from {least:.3g} to {most:.3g}."
    )
    remedy = (
        "Pass the very values that the model was trained on (bytes, uint8, count as [0, 1], floats as they are); best train on "
        "[0, 1]."
    )
    return Finding("data-range", sentence, {"gamma2": gamma2, "images_least": least, "images_most": most}, remedy)


def _gamma2_of_error(loss: LossWeights, followed: bool) -> float:
    """The decoder variance that the loss's error has, or NaN where its weights may mean something else."""
    if followed:
        return loss.gamma2 / loss.kl_weight if loss.known and loss.kl_weight > 0 else math.nan
    plain = loss.error == "squared" and not loss.error_averaged and not loss.batch_mismatch and loss.error_weight > 0
    near_one = abs(math.log(max(loss.kl_weight, 1e-30))) < math.log(IMBALANCED)
    return 1 / (2 * loss.error_weight) if plain and near_one else math.nan
