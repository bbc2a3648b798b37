"""Find single columns of a table, or channels of images, that spoil the others or are overfitted.

A mean over all values hides both. With one gamma2 for all values, a column with a large error
decides gamma2 for all. A column with a small error may be overfitted, and the mean error of
all columns does not show it.
"""

import torch
from torch import Tensor

from poise.diagnosis.facts import Facts
from poise.diagnosis.subject import Seen
from poise.diagnosis.verdict import Finding
from poise.diagnosis.weight import groups_of

DOMINATES = 0.9  # share of one group in the error of the loss
IGNORED = 0.9  # MSE over variance: the group is not learned
# MSE of new rows over MSE of training rows, of one group. The columns of healthy tables: below 2.
BY_HEART = 4.0
SURE_OF_MANY = 4.0  # standard errors: there may be hundreds of columns
FEW_VALUES = 20
FAR_ABOVE = 3.0  # error over gamma2 of a group


def dominating_error(facts: Facts) -> Finding | None:
    """Find a group that makes nearly the whole error of the loss, so that others are ignored."""
    loss, seen = facts.loss, facts.trained_on
    count = groups_of(seen.images)
    if not count or loss is None or not loss.known or loss.cross_entropy:
        return None
    errors = of_groups(seen, 1 if loss.error == "absolute" else 2).mean(0)
    weighed = errors * torch.tensor(loss.weights or [1.0] * count, dtype=errors.dtype)
    top = int(weighed.argmax())
    share = float(weighed[top] / weighed.sum())
    variances = seen.images.double().var(0).reshape(count, -1).mean(1)
    squares = of_groups(seen, 2).mean(0)
    ignored = (squares > IGNORED * variances) & (variances > 0)
    ignored[top] = False
    number = int(ignored.sum())
    if not share >= DOMINATES or not number:
        return None
    noun = _noun(seen)
    sentence = (
        f"The error of {noun} {top} is {share:.1%} of the error in the loss. "
        f"{number} of the other {count - 1} {noun}s are not learned: their MSE is at least "
        f"{IGNORED:.0%} of their variance."
    )
    figures = {"group": float(top), "share": share, "ignored": float(number)}
    if facts.balance is not None and facts.balance.groups:
        remedy = f"Train longer: the gamma2 of each {noun} has to settle at its error first."
    else:
        remedy = (
            f"Give each {noun} a gamma2 of its own: poise.ComputedBalance(groups={count}, "
            f'per="channel"). Or standardise the {noun}s.'
        )
    return Finding("dominating-error", sentence, figures, remedy)


def unbalanced_group(facts: Facts) -> Finding | None:
    """Find a group of a balance that counts too much: its error is far above its gamma2."""
    loss, balance = facts.loss, facts.balance
    if loss is None or balance is None or facts.train is None or not loss.group_errors:
        return None  # on other images, the error of a model that overfits is larger
    errors, gamma2 = torch.tensor(loss.group_errors), balance.gamma2.detach().cpu()
    if errors.shape != gamma2.shape:
        return None
    ratios = errors / gamma2
    top = int(ratios.nan_to_num(0.0).argmax())
    if not float(ratios[top]) > FAR_ABOVE:
        return None
    sentence = (
        f"Group {top} of the balance counts {float(ratios[top]):.3g} times too much: its error is "
        f"{float(errors[top]):.3g}, but its gamma2 is {float(gamma2[top]):.3g}."
    )
    figures = {"group": float(top), "error": float(errors[top]), "gamma2": float(gamma2[top])}
    remedy = (
        "Train longer, or look for a change of the data: gamma2 follows the error."
        if balance.follows_error
        else f"Use poise.ComputedBalance(groups={len(gamma2)}): each gamma2 follows its error."
    )
    return Finding("dominating-error", sentence, figures, remedy)


def learned_by_heart(facts: Facts) -> Finding | None:
    """Find a group that new rows reconstruct much worse than training rows."""
    seen, count = facts.seen, groups_of(facts.seen.images)
    if not count:
        return None
    errors = of_groups(seen, 2)
    new, variance = errors.mean(0), errors.var(0) / len(errors)
    if facts.train is not None:
        of_training = of_groups(facts.train, 2)
        old = of_training.mean(0)
        variance = variance + of_training.var(0) / len(of_training)
    elif facts.followed_groups is not None:
        old = facts.followed_groups.double().cpu()
    else:
        return None
    sure = new - old > SURE_OF_MANY * variance.sqrt()
    ratios = torch.where(sure, new / old.clamp_min(1e-30), 0.0)
    worst = int(ratios.argmax())
    ratio = float(ratios[worst])
    if ratio < BY_HEART:
        return None
    noun, known = _noun(seen), "on training rows" if facts.train else "in training, by its gamma2,"
    more = int((ratios >= BY_HEART).sum()) - 1
    sentence = (
        f"The model overfits {noun} {worst}: its MSE is {float(old[worst]):.3g} "
        f"{known} and {float(new[worst]):.3g} on others, {ratio:.3g} times as much"
        f"{f'; and {more} more {noun}s' if more else ''}."
    )
    figures = {"group": float(worst), "mse_train": float(old[worst]), "mse": float(new[worst])}
    values = len(facts.trained_on.images[:, worst].unique())
    if values <= FEW_VALUES:
        remedy = (
            f"It takes only {values} values: leave it out of the error and pass its cross-entropy "
            "as nll=, which needs no gamma2."
        )
    else:
        remedy = (
            "Use early stopping, or leave it out if it says nothing about the others, "
            "such as the number of a record."
        )
    return Finding("learned-by-heart", sentence, figures | {"ratio": ratio}, remedy)


def of_groups(seen: Seen, power: float) -> Tensor:
    """Return |x - x^|^power of each image and group, a mean over dimensions, (n, groups)."""
    error = (seen.restored - seen.images).double().abs().pow(power)
    return error if error.dim() == 2 else error.flatten(2).mean(2)


def _noun(seen: Seen) -> str:
    return "column" if seen.images.dim() == 2 else "channel"
