"""From figures to findings: what is wrong with a model that works, each rule with its threshold."""

import math

from poise.diagnosis.facts import Facts, Weighing, is_binary
from poise.diagnosis.outputs import Comparison
from poise.diagnosis.verdict import (
    CLOSED,
    GAP,
    IMBALANCED,
    OVERFITTED,
    STILL_FALLING,
    UNDERFITTED,
    Finding,
)
from poise.diagnosis.weight import BATCH, LossWeights
from poise.variants import default_prior, find_prior

CLOSE = 0.05  # relative: the inferred weight is known to about 3 %
FAR_LAW = 1.5  # codes' variance over the prior's, either way: with less, samples are like codes; healthy models: 1.0 to 1.2
NO_WEIGHT = 1e-6  # of the KL, relative to its weight at balance
FEW_PER_LATENT = 20  # with N images and L latents even a linear VAE errs (1 + L/N) / (1 - L/N) more on new ones: here 10 %
FEW = 200  # with so few, no network of some thousand weights does without learning them by heart
WORTH_ENCODING = (
    2.0  # largest variance of a direction over gamma2: in noise alone it is (1 + sqrt(D/n))^2
)
MOST_NAMED = 16  # latents in a sentence
RENORMALISED = 0.8  # distance with renormalisation over distance without; healthy: 0.92
GAIN = 0.05  # what renormalisation must take off the distance, share of variance; healthy 8x8 digits: 0.01
CURE_THE_ABOVE = "Cure the above, and train again."
USUAL_CAUSES = "an error averaged over pixels where it should be summed, a decoder variance held at 1, a KL weight above 1"
BY_HEART = (
    "A model that knows its training images by heart looks the same: pass train_images to tell."
)
PASS_TRAINING_IMAGES = "Pass train_images, to tell an imbalance from overfitting."
USE_COMPUTED = (
    "Use poise.ComputedBalance() as the loss, or poise train --balance computed: it sums both "
    "parts and follows the error."
)
FOLLOW_SOONER = (
    "Train longer, or use poise.ComputedBalance(): its gamma2 is at the error within some hundred "
    "batches."
)


def find_causes(facts: Facts) -> list[Finding]:
    """Everything wrong, the most fundamental first. Of two ways to better samples, the one that does more."""
    found = [imbalance(facts), collapse(facts), overfitting(facts)]
    wrong = any(
        finding is not None for finding in found
    )  # what explains a large or a falling error
    found += [None if wrong else underfitting(facts)]
    found += [still_falling(facts, stage) for stage in facts.falls if stage > 1 or not wrong]
    found += [prior_gap(facts) or lost_variance(facts)]
    return [finding for finding in found if finding is not None]


def imbalance(facts: Facts) -> Finding | None:
    """A KL that counts for too much or too little, and why."""
    weighing = facts.weighing
    if weighing is None or weighing.side == "balanced":
        return None
    reason, reduced = (_by_loss if weighing.by == "loss" else _by_model)(facts, weighing)
    over, unsure = weighing.side == "over", not reduced and _by_heart(facts, weighing)
    name = "reduction" if reduced else "over-regularised" if over else "under-regularised"
    times = _times(weighing.beta if over else 1 / weighing.beta if weighing.beta else math.inf)
    effects = [_blocked(facts)] if over else [*_unlike(facts), *([BY_HEART] if unsure else [])]
    sentence = f"The KL counts {times} too {'much' if over else 'little'}: {' '.join([f'{reason}.', *effects])}"
    figures = {
        "equivalent_beta": weighing.beta,
        "effective_gamma2": weighing.gamma2,
        "balanced_gamma2": weighing.right,
    }
    return Finding(
        name, sentence, figures, PASS_TRAINING_IMAGES if unsure else _balance_remedy(facts)
    )


def _by_heart(facts: Facts, weighing: Weighing) -> bool:
    """Whether a KL that seems too weak may be one that was right for training images, which are not known."""
    if weighing.side == "over" or facts.train is not None or facts.followed is not None:
        return False
    return weighing.by == "model" or (
        facts.loss is not None and _near(facts.loss.kl_weight, 1, IMBALANCED - 1)
    )


def _times(factor: float) -> str:
    return "infinitely" if factor > 1e6 else f"{factor:.3g} times"


def _by_loss(facts: Facts, weighing: Weighing) -> tuple[str, bool]:
    """What of the loss makes the imbalance, and whether it is a mean in place of a sum."""
    loss = facts.loss
    assert loss is not None and loss.error is not None
    error, over = _ERRORS[loss.error], weighing.side == "over"
    if loss.kl_weight < NO_WEIGHT * loss.error_weight * weighing.right:
        return "the loss does not change with mean and logvar, it has no KL", False
    if loss.batch_mismatch or (loss.error_averaged if over else loss.kl_averaged):
        return _means(facts, loss, error), True
    gamma2 = loss.gamma2 / loss.kl_weight
    reasons = []
    if not _near(loss.kl_weight, 1, IMBALANCED - 1):
        reasons.append(f"the loss multiplies it by {loss.kl_weight:.3g}")
    if loss.error == "cross-entropy" and not _near(gamma2, 1, IMBALANCED - 1):
        reasons.append(f"the loss multiplies the cross-entropy by {loss.error_weight:.3g}")
    elif not _near(gamma2, weighing.right, IMBALANCED - 1) or not reasons:
        reasons.append(
            f"the loss has a decoder variance gamma2 of {gamma2:.3g} where the mean {error} is {weighing.right:.3g}"
        )
    return " and ".join(reasons), False


_ERRORS = {
    "squared": "squared error",
    "absolute": "absolute error",
    "cross-entropy": "cross-entropy",
}


def _means(facts: Facts, loss: LossWeights, error: str) -> str:
    """What the loss averages although the evidence lower bound sums it."""
    means = []
    if loss.error_averaged:
        means.append(f"the {error} over the {facts.seen.num_dims} values of an image")
    if loss.kl_averaged:
        means.append(f"the KL over the {facts.num_latents} latents")
    words = [f"the loss averages {' and '.join(means)}, where it should sum"] if means else []
    if loss.batch_mismatch:
        words.append(
            f"the loss averages one of {error} and KL over the batch and sums the other (here for batches of {BATCH})"
        )
    return "; ".join(words)


def _by_model(facts: Facts, weighing: Weighing) -> tuple[str, bool]:
    """What the inferred weight looks like, and whether that is a mean in place of a sum."""
    num_dims, gamma2 = facts.seen.num_dims, weighing.gamma2
    reason = (
        f"the posteriors' variances are those of a gamma2 (decoder variance) of {gamma2:.3g}, "
        f"the MSE is {weighing.right:.3g}"
    )
    patterns = [
        (num_dims / 2, True, f"as if the squared error were averaged over {num_dims} values"),
        (
            num_dims / 2 / facts.num_latents,
            True,
            "as if squared error and KL were averaged over values and latents",
        ),
        (1.0, False, "as if gamma2 were held at 1"),
        (0.5, False, "as if the squared error were summed as it is, which holds gamma2 at 1/2"),
    ]
    for value, reduced, words in patterns:
        if num_dims > 2 and _near(gamma2, value, CLOSE):
            return f"{reason}: {words}", reduced
    return reason, False


def _blocked(facts: Facts) -> str:
    return f"The error stays at {facts.seen.mse / facts.seen.variance:.0%} of the images' variance."


def _unlike(facts: Facts) -> list[str]:
    law = facts.codes_variance
    if _near(law, 1, FAR_LAW - 1):
        return []
    return [
        f"The codes' variance is {law:.3g} times that of N(0, I), so that samples from N(0, I) are unlike any code."
    ]


def _balance_remedy(facts: Facts) -> str:
    balance, weighing = facts.balance, facts.weighing
    if balance is None:
        return USE_COMPUTED
    if balance.follows_error and not _near(balance.kl_weight, 1, IMBALANCED - 1):
        return "Leave out kl_weight: 1 is the evidence lower bound."
    over = weighing is not None and weighing.side == "over"
    other = FOLLOW_SOONER if balance.follows_error else USE_COMPUTED
    return balance.remedy(over_regularised=over) or other


def collapse(facts: Facts) -> Finding | None:
    """Latents that carry nothing. Some idle latents in a balanced model are none: they are pruned, and cost nothing."""
    idle, count = facts.inactive, facts.num_latents
    over = facts.weighing is not None and facts.weighing.side == "over"
    if len(idle) < count and not (over and 2 * len(idle) > count):
        return None
    named = ", ".join(map(str, idle[:MOST_NAMED])) + (", ..." if len(idle) > MOST_NAMED else "")
    which = (
        f"None of the {count} latents carries"
        if len(idle) == count
        else f"{len(idle)} of {count} latents ({named}) carry no"
    )
    reason, remedy = (
        ("This follows from the above.", CURE_THE_ABOVE) if over else _why_collapsed(facts)
    )
    sentence = f"{which} information: their posterior means do not vary over the images. {reason}"
    figures = {"active_latents": float(count - len(idle)), "latents": float(count)}
    figures |= {"largest_variance": facts.largest_variance, "mse": facts.seen.mse}
    return Finding("posterior-collapse", sentence, figures, remedy)


def _why_collapsed(facts: Facts) -> tuple[str, str]:
    ratio = facts.largest_variance / max(facts.seen.mse, 1e-30)
    if ratio < WORTH_ENCODING:
        noise = (
            "In no direction do the images vary enough to be worth encoding: they look like noise."
        )
        return noise, "Look at the images: are they what you mean to learn?"
    own = None if facts.balance is None else facts.balance.small_start
    if facts.weighing is not None:
        stuck = (
            f"The loss's balance allows it (the images vary by {ratio:.3g} times the MSE): the KL was too strong at first, or "
            f"training has only begun."
        )
        return stuck, _begin_small(own)
    blocked = (
        f"A latent is used as soon as images vary in one direction by more than gamma2: they do by "
        f"{facts.largest_variance:.3g}, and the MSE is {facts.seen.mse:.3g}, so the KL counts at least {ratio:.3g} times too "
        f"much. Usual causes: {USUAL_CAUSES}; pass loss=, your loss function, to have it named."
    )
    return blocked, _begin_small(own) if own else USE_COMPUTED


def _begin_small(own: str | None) -> str:
    option = f"{own} of your balance" if own else "poise.ComputedBalance(start=0.001)"
    return (
        "Train longer if it was short; else begin with a small decoder variance, "
        f"{option}: latents are then used first."
    )


def overfitting(facts: Facts) -> Finding | None:
    """New images that are reconstructed much worse than training images, for want of these or not."""
    train_mse = facts.train_mse
    if facts.overfitted < OVERFITTED or train_mse is None:
        return None
    ratio, number = facts.overfitted, facts.num_train
    known = f"The MSE is {train_mse:.3g} on training images and {facts.seen.mse:.3g} on others"
    followed = (
        f"The loss followed the training error to gamma2 = {train_mse:.3g}, and the MSE on these "
        f"images is {facts.seen.mse:.3g}"
    )
    sentence = f"{followed if facts.train is None else known}, {ratio:.3g} times as much"
    figures = {
        "followed_gamma2" if facts.train is None else "mse_train": train_mse,
        "mse": facts.seen.mse,
        "ratio": ratio,
    }
    enough = max(FEW, FEW_PER_LATENT * facts.num_latents)
    if 0 < number < enough:
        figures |= {"train_images": float(number), "enough": float(enough)}
        sentence = f"It was trained on {number} images and learned them by heart. {sentence}."
        remedy = f"Train on more images: at least {enough} for {facts.num_latents} latents."
        return Finding("too-few-images", sentence, figures, remedy)
    remedy = (
        "Stop training earlier: at the step with the best ELBO on images that are not trained on."
    )
    return Finding(
        "overfitting", f"{sentence}: it learned the training images by heart.", figures, remedy
    )


def underfitting(facts: Facts) -> Finding | None:
    """A model that does worse than the best linear one with as many latents."""
    seen, linear = facts.trained_on, facts.linear_mse
    if linear is None or seen.mse <= UNDERFITTED * max(linear, 1e-30):
        return None
    cross_entropy = facts.by_cross_entropy
    if cross_entropy and is_binary(seen.images):
        return None  # a cross-entropy is right for them, and does not minimise the squared error
    sentence = (
        f"It has learned little: reconstructions leave {seen.mse / seen.variance:.0%} of the images' variance (MSE "
        f"{seen.mse:.3g}), where the best linear VAE with {facts.num_latents} latents leaves {linear / seen.variance:.0%} "
        f"({linear:.3g})."
    )
    figures = {"mse": seen.mse, "linear_mse": linear, "image_variance": seen.variance}
    remedy = (
        "Train longer; if the MSE stays there, at another learning rate or with a larger network."
    )
    if cross_entropy:
        remedy = (
            "If the loss is a cross-entropy, use a squared error with poise.ComputedBalance(): on grey images a "
            f"cross-entropy leaves the KL too much weight. Else: {remedy[0].lower()}{remedy[1:]}"
        )
    return Finding("underfitted", sentence, figures, remedy)


def still_falling(facts: Facts, stage: int) -> Finding | None:
    """A stage whose error was falling when its training ended."""
    before, after = facts.falls[stage]
    if not facts.fell(stage) > STILL_FALLING:
        return None
    sentence = (
        f"Stage {stage} was still learning when training ended: its MSE fell from {before:.3g} to "
        f"{after:.3g} in the last third."
    )
    option = "--epochs" if stage == 1 else "--second-epochs"
    figures = {"before": before, "after": after}
    return Finding("still-falling", sentence, figures, f"Train it longer: {option}.")


def prior_gap(facts: Facts) -> Finding | None:
    """Samples much worse than reconstructions, where another prior is much better."""
    found = facts.comparison
    if found is None:
        return None
    used = _used_prior(found)
    gap = found.priors[used] - found.reconstructions
    rivals = {
        name: distance
        for name, distance in found.priors.items()
        if name != used and distance < math.inf
    }
    best = min(rivals, key=lambda name: rivals[name], default=None)
    if best is None or not gap >= max(GAP, found.halves):
        return None
    closed = (found.priors[used] - rivals[best]) / gap if gap < math.inf else 1.0
    if closed < CLOSED:
        return None
    sentence = (
        f"Samples are further from the images than reconstructions are: {found.priors[used]:.2f} ({_latents(used)}) against "
        f"{found.reconstructions:.2f}, in shares of the images' variance; with {_latents(best)} it is {rivals[best]:.2f}, "
        f"which closes {min(closed, 1):.0%} of the gap.{_following(facts)}"
    )
    figures = {
        "distance": found.priors[used],
        "reconstructions": found.reconstructions,
        "best": rivals[best],
        "closed": closed,
    }
    return Finding("prior-gap", sentence, figures, _use_prior(best, is_run=facts.is_run))


def _following(facts: Facts) -> str:
    imbalanced = facts.weighing is not None and facts.weighing.side != "balanced"
    return (
        " This follows from the imbalance above: cure that first, and use the other prior for the model as it is."
        * imbalanced
    )


def _latents(prior: str) -> str:
    return f"latents from {find_prior(prior).words}"


def _use_prior(name: str, *, is_run: bool) -> str:
    if is_run:
        return f'Sample {_latents(name)}: run.sample(n, prior="{name}").'
    return (
        f"Draw {_latents(name)}, under torch.no_grad(): "
        f'prior = poise.priors.fit_prior("{name}", vae.encode(train_images)), '
        "then vae.decode(prior.latents(torch.randn(n, prior.noise_dims)))."
    )


def _used_prior(found: Comparison) -> str:
    has_second = any(find_prior(name).needs == "second stage" for name in found.priors)
    return default_prior(second_stage=has_second)


def lost_variance(facts: Facts) -> Finding | None:
    """Samples that come closer to the images when their latents are renormalised."""
    found = facts.comparison
    if found is None:
        return None
    used = _used_prior(found)
    before, after, factor = found.priors[used], found.renormalised[used], found.factors[used]
    if not (after <= RENORMALISED * before < math.inf) or before - after < max(GAIN, found.halves):
        return None
    sentence = (
        f"Latents from {find_prior(used).words} are narrower than the codes by a factor of "
        f"{factor:.3g}; scaled by it, the samples' distance from the "
        f"images falls from {before:.2f} to {after:.2f} of the images' variance."
    )
    how = "poise sample --renormalise always" if facts.is_run else "poise.priors.RenormalisedPrior"
    remedy = f"Multiply latents by {factor:.3g} before decoding ({how})."
    return Finding(
        "variance-lost",
        sentence,
        {"distance": before, "renormalised": after, "factor": factor},
        remedy,
    )


def _near(value: float, target: float, within: float = 0.01) -> bool:
    """Whether they differ by a factor of at most 1 + within."""
    return value > 0 and target > 0 and abs(math.log(value / target)) <= math.log1p(within)
