"""Rules from figures to findings, for a model whose values are finite and whose layers work."""

import math

from poise.diagnosis.facts import Facts, Weighing, is_binary
from poise.diagnosis.groups import dominating_error, learned_by_heart, unbalanced_group
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

CLOSE = 0.05  # relative; the inferred weight is accurate to about 3 %
# Codes' variance over the prior's, or the inverse. Below it, samples resemble codes. Healthy
# models: 1.0 to 1.2.
FAR_LAW = 1.5
NO_WEIGHT = 1e-6  # KL weight relative to its value at balance
# Training images per latent. With N images and L latents, the error of a linear VAE is
# (1 + L/N) / (1 - L/N) times as large on new images: 10 % more here.
FEW_PER_LATENT = 20
FEW = 200  # with fewer images, any network with some thousand weights overfits
# Largest variance of a direction over gamma2, divided by that of pure noise, (1 + sqrt(D/n))^2
# (Marchenko & Pastur 1967). Below it, images look like noise.
WORTH_ENCODING = 1.1
LEAST_RATIO = 2.0  # the same, not divided
MOST_NAMED = 16  # latents in a sentence
RENORMALISED = 0.8  # distance with renormalisation over distance without; healthy models: 0.92
# Reduction of the distance by renormalisation, as a share of the variance. Healthy 8x8 digits:
# 0.01.
GAIN = 0.05
FIX_THE_ABOVE = "Fix the above, and train again."
USUAL_CAUSES = (
    "an error averaged over pixels instead of summed, a decoder variance fixed at 1, "
    "a KL weight above 1"
)
MAY_BE_OVERFITTING = (
    "A model that overfits looks the same: pass train_images to distinguish the two."
)
PASS_TRAINING_IMAGES = "Pass train_images, to distinguish an imbalance from overfitting."
USE_COMPUTED = (
    "Use poise.ComputedBalance() as the loss, or poise train --balance computed. It sums both "
    "parts, and its gamma2 follows the error."
)
USE_COMPUTED_ABSOLUTE = (
    "Use poise.ComputedBalance(power=1) as the loss. It sums both parts, and its gamma2 follows "
    "the absolute error."
)
USE_NATS = (
    "Sum cross-entropy and KL over their dimensions and add them without weights, as "
    "poise.ComputedBalance().combine(None, kl, nll=cross_entropy) does."
)
NATS_AS_THEY_ARE = (
    "Pass the cross-entropy to combine as nll=, summed over its dimensions, and leave the KL as it "
    "is."
)
RETURN_ITS_LOSS = (
    "Return the balance's terms.loss as it is: the function around it changes its weights."
)
FOLLOW_SOONER = (
    "Train longer, or use poise.ComputedBalance(): its gamma2 reaches the error within a few "
    "hundred batches."
)


def find_causes(facts: Facts) -> list[Finding]:
    """Return all findings, the most fundamental first.

    Reports lost variance only if it finds no prior gap.
    """
    found = [imbalance(facts), collapse(facts), overfitting(facts)]
    found += [None if found[2] else learned_by_heart(facts)]
    found += [dominating_error(facts) or unbalanced_group(facts), late_spike(facts)]
    # Any of these explains a large or falling error.
    wrong = any(finding is not None for finding in found)
    found += [None if wrong else underfitting(facts)]
    found += [still_falling(facts, stage) for stage in facts.falls if stage > 1 or not wrong]
    found += [prior_gap(facts) or lost_variance(facts)]
    return [finding for finding in found if finding is not None]


def imbalance(facts: Facts) -> Finding | None:
    """Find a KL weight that is too large or too small, and its cause."""
    weighing = facts.weighing
    if weighing is None or weighing.side == "balanced":
        return None
    reason, reduced = (_by_loss if weighing.by == "loss" else _by_model)(facts, weighing)
    over, unsure = weighing.side == "over", not reduced and _may_be_overfitting(facts, weighing)
    name = "reduction" if reduced else "over-regularised" if over else "under-regularised"
    times = _times(weighing.beta if over else 1 / weighing.beta if weighing.beta else math.inf)
    effects = (
        [_blocked(facts)] if over else [*_unlike(facts), *([MAY_BE_OVERFITTING] if unsure else [])]
    )
    sentence = (
        f"The KL weight is {times} too {'large' if over else 'small'}: "
        f"{' '.join([f'{reason}.', *effects])}"
    )
    figures = {
        "equivalent_beta": weighing.beta,
        "effective_gamma2": weighing.gamma2,
        "balanced_gamma2": weighing.right,
    }
    return Finding(
        name, sentence, figures, PASS_TRAINING_IMAGES if unsure else _balance_remedy(facts)
    )


def _may_be_overfitting(facts: Facts, weighing: Weighing) -> bool:
    """Return whether overfitting could explain a small KL weight.

    The weight may be right for the training images, whose error is not known.
    """
    if weighing.side == "over" or facts.train is not None or facts.followed is not None:
        return False
    return weighing.by == "model" or (
        facts.loss is not None and _near(facts.loss.kl_weight, 1, IMBALANCED - 1)
    )


def _times(factor: float) -> str:
    return "infinitely" if factor > 1e6 else f"{factor:.3g} times"


def _by_loss(facts: Facts, weighing: Weighing) -> tuple[str, bool]:
    """Return the cause of the imbalance in the loss, and whether it is a mean instead of a sum."""
    loss = facts.loss
    assert loss is not None and loss.error is not None
    error, over = _ERRORS[loss.error], weighing.side == "over"
    if loss.kl_weight < NO_WEIGHT * loss.error_weight * weighing.right:
        return "the loss does not change with mean and logvar, so it has no KL", False
    if loss.batch_mismatch or (loss.error_averaged if over else loss.kl_averaged):
        return _means(facts, loss, error), True
    gamma2 = loss.gamma2 / loss.kl_weight
    reasons = []
    if not _near(loss.kl_weight, 1, IMBALANCED - 1):
        reasons.append(f"the loss multiplies the KL by {loss.kl_weight:.3g}")
    if loss.cross_entropy and not _near(gamma2, 1, IMBALANCED - 1):
        reasons.append(f"the loss multiplies the cross-entropy by {loss.error_weight:.3g}")
    elif not _near(gamma2, weighing.right, IMBALANCED - 1) or not reasons:
        reasons.append(
            f"the loss has a decoder variance gamma2 of {gamma2:.3g}, "
            f"but the mean {error} is {weighing.right:.3g}"
        )
    return " and ".join(reasons), False


_ERRORS = {
    "squared": "squared error",
    "absolute": "absolute error",
    "cross-entropy": "cross-entropy",
    "logits": "cross-entropy",
}


def _means(facts: Facts, loss: LossWeights, error: str) -> str:
    """Say what the loss averages although the evidence lower bound sums it."""
    means = []
    if loss.error_averaged:
        means.append(f"the {error} over the {facts.seen.num_dims} values of an image")
    if loss.kl_averaged:
        means.append(f"the KL over the {facts.num_latents} latents")
    words = [f"the loss averages {' and '.join(means)}, instead of summing"] if means else []
    if loss.batch_mismatch:
        words.append(
            f"the loss averages one of {error} and KL over the batch and sums the other "
            f"(figures for batches of {BATCH})"
        )
    return "; ".join(words)


def _by_model(facts: Facts, weighing: Weighing) -> tuple[str, bool]:
    """Return the likely cause of the inferred weight, and whether it is a mean instead of a sum."""
    num_dims, gamma2 = facts.seen.num_dims, weighing.gamma2
    reason = (
        f"the posterior variances correspond to a decoder variance gamma2 of {gamma2:.3g}, "
        f"but the MSE is {weighing.right:.3g}"
    )
    patterns = [
        (num_dims / 2, True, f"as if the squared error were averaged over {num_dims} values"),
        (
            num_dims / 2 / facts.num_latents,
            True,
            "as if squared error and KL were averaged over values and latents",
        ),
        (1.0, False, "as if gamma2 were fixed at 1"),
        (0.5, False, "as if the loss were squared error plus KL, with gamma2 fixed at 1/2"),
    ]
    for value, reduced, words in patterns:
        if num_dims > 2 and _near(gamma2, value, CLOSE):
            return f"{reason}: {words}", reduced
    return reason, False


def _blocked(facts: Facts) -> str:
    return f"The MSE stays at {facts.seen.mse / facts.seen.variance:.0%} of the images' variance."


def _unlike(facts: Facts) -> list[str]:
    law = facts.codes_variance
    if _near(law, 1, FAR_LAW - 1):
        return []
    return [
        f"The codes' variance is {law:.3g} times that of N(0, I), "
        "so samples from N(0, I) are unlike any code."
    ]


def _balance_remedy(facts: Facts) -> str:
    balance, weighing, loss = facts.balance, facts.weighing, facts.loss
    if loss is not None and loss.cross_entropy:
        return USE_NATS if balance is None else NATS_AS_THEY_ARE
    if balance is None:
        return USE_COMPUTED if loss is None or loss.error != "absolute" else USE_COMPUTED_ABSOLUTE
    if facts.wrapped and loss is not None and loss.known and balance.groups is None:
        own = float(balance.gamma2) * balance.kl_weight
        if not _near(loss.gamma2, own, IMBALANCED - 1):
            return RETURN_ITS_LOSS
    if balance.follows_error and not _near(balance.kl_weight, 1, IMBALANCED - 1):
        return (
            "Use the balance computed without kl_weight: its default 1 gives the evidence lower "
            "bound."
        )
    over = weighing is not None and weighing.side == "over"
    other = FOLLOW_SOONER if balance.follows_error else USE_COMPUTED
    return balance.remedy(over_regularised=over) or other


def collapse(facts: Facts) -> Finding | None:
    """Find posterior collapse: all latents inactive, or most of them in an over-regularised model.

    Some inactive latents in a balanced model are not a fault: they are pruned and cost nothing.
    """
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
        ("This follows from the imbalance above.", FIX_THE_ABOVE) if over else _why_collapsed(facts)
    )
    sentence = f"{which} information: their posterior means do not vary over the images. {reason}"
    figures = {"active_latents": float(count - len(idle)), "latents": float(count)}
    figures |= {"largest_variance": facts.largest_variance, "mse": facts.seen.mse}
    return Finding("posterior-collapse", sentence, figures, remedy)


def _why_collapsed(facts: Facts) -> tuple[str, str]:
    ratio = facts.largest_variance / max(facts.seen.mse, 1e-30)
    of_noise = (1 + math.sqrt(facts.seen.num_dims / len(facts.seen.images))) ** 2
    if ratio < max(LEAST_RATIO, WORTH_ENCODING * of_noise):
        noise = (
            "The images do not vary enough in any direction to be worth encoding: "
            "they look like noise."
        )
        return noise, "Check that the images are the data that you want to learn."
    own = None if facts.balance is None else facts.balance.small_start
    if facts.weighing is not None:
        stuck = (
            "The loss is balanced and allows active latents (the largest variance of the images is "
            f"{ratio:.3g} times the MSE). Either the KL was too strong at first, or training has "
            "only begun."
        )
        return stuck, _begin_small(own)
    blocked = (
        "A latent becomes active as soon as the images' variance in one direction exceeds gamma2. "
        f"The largest variance is {facts.largest_variance:.3g} and the MSE is "
        f"{facts.seen.mse:.3g}, so the KL weight is at least {ratio:.3g} times too large. "
        f"Usual causes: {USUAL_CAUSES}. To find the cause, pass loss=, your loss function."
    )
    return blocked, _begin_small(own) if own else USE_COMPUTED


def _begin_small(own: str | None) -> str:
    option = f"{own} of your balance" if own else "poise.ComputedBalance(start=0.001)"
    return (
        "Train longer if training was short. Otherwise start with a small decoder variance, "
        f"{option}: latents then become active first."
    )


def overfitting(facts: Facts) -> Finding | None:
    """Find overfitting: new images are reconstructed much worse than training images."""
    train_mse = facts.train_mse
    if facts.overfitted < OVERFITTED or train_mse is None:
        return None
    ratio, number = facts.overfitted, facts.num_train
    known = f"The MSE is {train_mse:.3g} on training images and {facts.seen.mse:.3g} on others"
    followed = (
        f"The balance followed the training error to gamma2 = {train_mse:.3g}, and the MSE on "
        f"these images is {facts.seen.mse:.3g}"
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
        sentence = f"The model was trained on {number} images and overfits them. {sentence}."
        remedy = f"Train on more images: at least {enough} for {facts.num_latents} latents."
        return Finding("too-few-images", sentence, figures, remedy)
    remedy = "Use early stopping: end training at the step with the best ELBO on held-out images."
    return Finding(
        "overfitting", f"{sentence}: the model overfits its training images.", figures, remedy
    )


def underfitting(facts: Facts) -> Finding | None:
    """Find underfitting: the MSE is far above that of the best linear VAE."""
    seen, linear = facts.trained_on, facts.linear_mse
    if linear is None or seen.mse <= UNDERFITTED * max(linear, 1e-30):
        return None
    cross_entropy = facts.by_cross_entropy
    if cross_entropy and is_binary(seen.images):
        return None  # a cross-entropy suits binary images and does not minimise the squared error
    sentence = (
        f"The model has learned little: its MSE is {seen.mse / seen.variance:.0%} of the images' "
        f"variance ({seen.mse:.3g}). The best linear VAE with {facts.linear_latents} latents has "
        f"{linear / seen.variance:.0%} ({linear:.3g})."
    )
    figures = {"mse": seen.mse, "linear_mse": linear, "image_variance": seen.variance}
    remedy = (
        "Train longer. If the MSE does not fall, use another learning rate or a larger network."
    )
    if cross_entropy:
        remedy = (
            "If the loss is a cross-entropy, use a squared error with poise.ComputedBalance(): "
            "on grey images a cross-entropy gives the KL too much weight. "
            f"Otherwise {remedy[0].lower()}{remedy[1:]}"
        )
    return Finding("underfitted", sentence, figures, remedy)


def still_falling(facts: Facts, stage: int) -> Finding | None:
    """Find a stage whose error was still falling when its training ended."""
    before, after = facts.falls[stage]
    if not facts.fell(stage) > STILL_FALLING:
        return None
    sentence = (
        f"Stage {stage} was still learning when training ended: its MSE fell from {before:.3g} to "
        f"{after:.3g} in the last third."
    )
    figures = {"before": before, "after": after}
    remedy = "Train it longer."
    if facts.is_run:
        remedy = "Train it longer: --more-minutes or --more-epochs continue a run" + (
            "." if stage == 1 else ", or a new run with --second-epochs."
        )
    return Finding("still-falling", sentence, figures, remedy)


def late_spike(facts: Facts) -> Finding | None:
    """Find a sudden rise of the training error that training did not recover from."""
    if facts.spike is None:
        return None
    step, before, after = facts.spike
    sentence = (
        f"Training went well until step {step:,.0f}: the MSE was {before:.3g}, rose suddenly, and "
        f"was {after:.3g} at the end."
    )
    again = (
        "Train again at half the learning rate, with --validation 0.05, which keeps the best "
        "weights"
        if facts.is_run
        else "Train again from a checkpoint before that step, at half the learning rate"
    )
    remedy = f"{again}, and look at the batches of that step: one of them may hold damaged values."
    figures = {"step": step, "before": before, "after": after}
    return Finding("late-spike", sentence, figures, remedy)


def prior_gap(facts: Facts) -> Finding | None:
    """Find a prior whose samples are much worse than reconstructions, and a much better prior."""
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
        "Samples are further from the images than reconstructions: "
        f"{found.priors[used]:.2f} ({_latents(used)}) against {found.reconstructions:.2f}, "
        f"as shares of the images' variance. With {_latents(best)} the distance is "
        f"{rivals[best]:.2f}; this closes {min(closed, 1):.0%} of the gap.{_following(facts)}"
    )
    figures = {
        "distance": found.priors[used],
        "reconstructions": found.reconstructions,
        "best": rivals[best],
        "closed": closed,
    }
    return Finding("prior-gap", sentence, figures, _use_prior(best, facts))


def _following(facts: Facts) -> str:
    imbalanced = facts.weighing is not None and facts.weighing.side != "balanced"
    return (
        " This follows from the imbalance above: fix that first. "
        "The other prior helps the present model."
    ) * imbalanced


def _latents(prior: str) -> str:
    return f"latents from {find_prior(prior).words}"


def _use_prior(name: str, facts: Facts) -> str:
    if facts.is_run:
        return f'Sample {_latents(name)}: run.sample(n, prior="{name}").'
    if facts.latent_shape is not None:
        return (
            f"Draw {_latents(name)}, under torch.no_grad(), with mean and logvar of the training "
            f'images: prior = poise.priors.fit_prior("{name}", '
            "poise.DiagonalGaussian(mean.flatten(1), logvar.flatten(1))), then decode "
            "prior.latents(torch.randn(n, prior.noise_dims))"
            f".unflatten(1, {facts.latent_shape})."
        )
    return (
        f"Draw {_latents(name)}, under torch.no_grad(): "
        f'prior = poise.priors.fit_prior("{name}", vae.encode(train_images)), '
        "then vae.decode(prior.latents(torch.randn(n, prior.noise_dims)))."
    )


def _used_prior(found: Comparison) -> str:
    return default_prior(
        next((kind for name in found.priors if (kind := find_prior(name).second_stage)), None)
    )


def lost_variance(facts: Facts) -> Finding | None:
    """Find samples that come closer to the images when their latents are renormalised."""
    found = facts.comparison
    if found is None:
        return None
    used = _used_prior(found)
    before, after, factor = found.priors[used], found.renormalised[used], found.factors[used]
    if not (after <= RENORMALISED * before < math.inf) or before - after < max(GAIN, found.halves):
        return None
    sentence = (
        f"Latents from {find_prior(used).words} are {'narrower' if factor > 1 else 'wider'} than "
        f"the codes. If they are multiplied by {factor:.3g}, the samples' distance from the "
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
    """Return whether two positive values differ by a factor of at most 1 + within."""
    return value > 0 and target > 0 and abs(math.log(value / target)) <= math.log1p(within)
