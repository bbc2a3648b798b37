"""What limits a diagnosis, in a sentence each."""

import math

from poise.diagnosis.facts import Facts, is_binary
from poise.diagnosis.generation import FEWEST_IMAGES
from poise.diagnosis.inputs import Case

DISAGREE = 3.0  # inferred over measured weight: healthy models 0.9 to 1.1; larger, the loss is not what trained the model


def notes_on(case: Case, facts: Facts) -> list[str]:
    """The notes, what concerns the images first."""
    return [*_on_images(case, facts), *_on_loss(facts), *_on_cross_entropy(facts), *_disagreement(facts)]


def _on_images(case: Case, facts: Facts) -> list[str]:
    count, notes = len(facts.seen.images), []
    if count < len(case.images):
        notes.append(f"{count} of {len(case.images)} images were looked at, drawn at random.")
    if count < FEWEST_IMAGES:
        notes.append(
            f"{count} images are few: the figures are rough, and samples were not compared; give {FEWEST_IMAGES} or more."
        )
    elif facts.comparison is None:
        notes.append("The images are the same once averaged down to 16x16: samples were not compared.")
    elif "mixture" not in facts.comparison.priors:
        notes.append("No mixture of Gaussians could be fitted to the codes: it was not tried as a prior.")
    if facts.train is None:
        notes.append("Without train_images overfitting cannot be told from an imbalance: pass them too.")
    return notes


def _on_loss(facts: Facts) -> list[str]:
    if facts.loss is None or facts.loss.known:
        return []
    source = "its weights were inferred from the model" if facts.weighing is not None else "its weights are not known"
    return [f"The loss could not be read: it is no squared, absolute or cross-entropy error plus KL; {source}."]


def _on_cross_entropy(facts: Facts) -> list[str]:
    if is_binary(facts.seen.images):
        return []
    likeness = "which has no scale to balance; right for images of 0 and 1 only, and these are grey."
    if facts.loss is not None and facts.loss.error == "cross-entropy":
        return [f"The loss is a cross-entropy, {likeness}"]
    if facts.by_cross_entropy:
        return [f"It looks trained with a cross-entropy, {likeness}"]
    return []


def _disagreement(facts: Facts) -> list[str]:
    loss, inferred = facts.loss, facts.inferred
    if loss is None or not loss.known or loss.error != "squared" or inferred is None or not 0 < loss.gamma2 < math.inf:
        return []
    if abs(math.log(inferred.gamma2 / loss.gamma2)) < math.log(DISAGREE):
        return []
    return [
        f"The loss amounts to gamma2 = {loss.gamma2:.3g}, the model to {inferred.gamma2:.3g}: is this the loss that trained "
        f"it, and had it come to rest?"
    ]
