"""Run all steps of a diagnosis. Each step requires that the steps before it found nothing."""

import math
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from poise.balance import Balance
from poise.diagnosis import broken, causes, outputs
from poise.diagnosis.broken import BYTES_SQUARED, faulty_loss
from poise.diagnosis.course import late_fall, late_spike
from poise.diagnosis.facts import Facts, notes_on
from poise.diagnosis.foreign import Adapted, at, with_logits
from poise.diagnosis.outputs import (
    FEWEST_IMAGES,
    compare,
    detail,
    largest_variance,
    linear_mse,
    spectrum,
)
from poise.diagnosis.subject import Case, Loss, Seen, as_case, chosen, device_of, look
from poise.diagnosis.verdict import LARGE_LOGVAR, Diagnosis, Finding
from poise.diagnosis.weight import LossWeights, inferred_weight, loss_weights
from poise.errors import InputError
from poise.metrics.encoding import CHUNK
from poise.priors import fit_prior
from poise.shapes import Values
from poise.support.progress import Progress, progress
from poise.support.seeds import noise_per_image
from poise.support.snapshots import evaluating
from poise.vae import VAE
from poise.variants import PRIORS

STEPS = 5


def diagnose(
    model: Any,
    images: Any = None,
    *,
    train_images: Any = None,
    loss: Loss | None = None,
    history: Any = None,
    seed: int = 0,
    quiet: bool = True,
) -> Diagnosis:
    """Diagnose a VAE: return its faults, the figures that show them, and a remedy for each.

    The model is used in evaluation mode and is not changed.

    Args:
        model: a run; any VAE, `poise.VAE(encoder, decoder)` with your own modules; an object with
            the methods `encode` and `decode`, such as diffusers' AutoencoderKL; or a pair
            (encode, decode) of functions or modules. Latents may have any shape (n, ...). See
            `foreign.posterior_of` for what `encode` may return.
        images: (n, ...), preferably held-out images. Floats must have the values used in training,
            in any range; bytes are divided by 255. None: the run's test images. At most 2,000
            images are used. For a conditional model: a tuple (images, condition, ...) of arrays
            with one row for each image. The model is then called as encode(images, condition) and
            decode(latents, condition).
        train_images: training images in the same form, needed to detect overfitting. None: those of
            the run, if `images` is None too.
        loss: the training loss: a balance, or any function
            loss(reconstruction, images, mean, logvar) that returns the loss of a batch. It is
            needed to find the cause of an imbalance. None: the run's balance, or for a VAE weights
            inferred from the model. A balance that the function uses is set to evaluation mode.
        history: training MSE of each step, (n,), or pairs (step, MSE), (n, 2), to find late spikes.
            None: the run's log.
        seed: seed of the samples and of the choice of images.
        quiet: show no progress.

    Returns:
        The findings, the most fundamental first; none for a healthy model.

    Raises:
        InputError: no model or no images; images that do not fit the model, or are all the same; a
            loss that raises an error, or does not return a number.

    Example:
        >>> vae = poise.VAE(*poise.networks.mlp((1, 8, 8), latent_dim=4))
        >>> print(poise.diagnose(vae, torch.rand(100, 1, 8, 8)))  # doctest: +SKIP
        1. posterior-collapse: None of the 4 latents carries information: ...
           Try: Use poise.ComputedBalance() as the loss, ...
    """
    case = as_case(model, images, train_images, loss, history)
    # The generator of the user's process stays as it is.
    with (
        evaluating(*case.modules),
        torch.random.fork_rng(devices=[]),
        progress("diagnose", STEPS, quiet=quiet) as display,
    ):
        return _examine(case, seed, display)


def _examine(case: Case, seed: int, display: Progress) -> Diagnosis:
    vae, images = chosen(case.model, case.images, case.conditions, "images", seed)
    data = [(vae, images)]
    if case.train_images is not None:
        train = case.train_images, case.train_conditions
        data.append(chosen(case.model, *train, "train_images", seed))
    figures = _sizes(case, images)
    narrow = broken.narrow_range(images) if case.in_unit_range else None
    rest = _examine_model(case, data, figures, seed, display)
    return rest if narrow is None else replace(rest, findings=(narrow, *rest.findings))


def _examine_model(
    case: Case,
    data: list[tuple[VAE, Tensor]],
    figures: dict[str, Any],
    seed: int,
    display: Progress,
) -> Diagnosis:
    """Examine a model with its images, and with its training images if these are given.

    Each item of `data` is the model, with the conditions of these images, and the images.
    """
    unusable = _unusable(data, figures, seed)
    if unusable:
        return Diagnosis(unusable, figures)
    vaes = [vae for vae, _ in data]
    looks = [look(vae, images, seed) for vae, images in data]
    weights, failure = _weights(case, vaes[-1], looks[-1], seed)
    logits = weights.error == "logits" if weights else case.loss is None and _like_logits(looks[-1])
    if logits:
        vaes = [with_logits(vae) for vae in vaes]
        looks = [replace(part, restored=part.restored.sigmoid()) for part in looks]
    vae, seen = vaes[0], looks[0]
    trained = looks[1] if len(looks) > 1 else None
    display.update(1, {})
    figures |= {
        "mse": seen.mse,
        "kl_nats": float(seen.codes.kl().double().mean()),
        "image_variance": seen.variance,
    }
    wrong_range = _out_of_range(vae, seen.images, seen.mse, figures, seed, logits=logits)
    if wrong_range is not None:
        return Diagnosis((wrong_range,), figures)
    if failure is not None:
        raise failure
    fatal = _fatal(case, vae, seen, trained, weights, figures, seed)
    display.update(2, {})
    if fatal:
        return Diagnosis(fatal, figures)
    facts = _facts(case, vaes, seen, trained, weights, seed, display)
    shape = vae.latent_shape if isinstance(vae, Adapted) else None
    facts = replace(facts, logits=logits, latent_shape=shape)
    figures |= _figures(facts)
    return Diagnosis(tuple(causes.find_causes(facts)), figures, tuple(notes_on(case, facts)))


def _weights(
    case: Case, vae: VAE, trained_on: Seen, seed: int
) -> tuple[LossWeights | None, InputError | None]:
    """Return the weights of the loss, or None and the error that it raised.

    The error is raised after the search for values out of range, which may be its cause.
    """
    if case.loss is None:
        return None, None
    shape = vae.latent_shape if isinstance(vae, Adapted) else None
    try:
        return loss_weights(case.loss, trained_on, device_of(vae), seed, shape), None
    except InputError as error:
        return None, error


def _like_logits(seen: Seen) -> bool:
    """Return whether a sigmoid turns outputs far outside [0, 1] into the images, roughly."""
    least, most = seen.images.aminmax()
    low, high = seen.restored.aminmax()
    if least < 0 or most > 1 or (low > -1 and high < 2):
        return False
    after = replace(seen, restored=seen.restored.sigmoid()).mse
    return after < min(broken.HARDLY * seen.variance, seen.mse / 2)


def _sizes(case: Case, images: Values) -> dict[str, Any]:
    least, most = (float(value) for value in images.aminmax())
    return {
        "images": len(images),
        "train_images": None if case.train_images is None else len(case.train_images),
        "dimensions": math.prod(images.shape[1:]),
        "images_least": least,
        "images_most": most,
    }


def _unusable(
    data: list[tuple[VAE, Tensor]], figures: dict[str, Any], seed: int
) -> tuple[Finding, ...]:
    """Return findings that prevent the model from processing the images."""
    (vae, images), *train = data
    finite = bool(images.isfinite().all())
    if train and finite and train[0][1].isfinite().all():
        other = broken.other_range(images, train[0][1])
        if other is not None:
            return (other,)
    diverged = broken.not_finite(vae, images) or (
        broken.not_finite(*train[0], "train_images") if train else None
    )
    if diverged is None:
        return ()
    wrong_range = _out_of_range(vae, images, None, figures, seed) if finite else None
    return (
        (diverged,)
        if wrong_range is None
        else (wrong_range, replace(diverged, remedy=causes.FIX_THE_ABOVE))
    )


def _out_of_range(
    vae: VAE,
    images: Values,
    mse: float | None,
    figures: dict[str, Any],
    seed: int,
    *,
    logits: bool = False,
) -> Finding | None:
    with torch.no_grad():
        mean = vae.encode(images[: outputs.PROBES].to(device_of(vae))).mean.float().cpu()
    latents = outputs.probes(mean.nan_to_num(0.0).clamp(-10, 10), seed).to(device_of(vae))
    reach = outputs.reachable_range(vae.decoder, latents)
    figures |= {"latents": mean.shape[1], "decoder_least": reach[0], "decoder_most": reach[1]}
    return broken.out_of_range(images, reach, mse, logits=logits)


def _fatal(
    case: Case,
    vae: VAE,
    seen: Seen,
    train: Seen | None,
    weights: LossWeights | None,
    figures: dict[str, Any],
    seed: int,
) -> tuple[Finding, ...]:
    """Return faults of the loss or the model that make all other figures meaningless."""
    known = train is not None
    balance = case.loss if isinstance(case.loss, Balance) else None
    of_loss = faulty_loss(weights, balance, train or seen, surely_trained_on=known)
    found = _without_duplicate(of_loss, _broken_model(vae, seen, figures, seed))
    if found:
        return found
    late = None if train is None else broken.other_images(seen, train)
    late = late or broken.hardly_trained(train or seen, surely_trained_on=known)
    return () if late is None else (late,)


def _without_duplicate(*found: Finding | None) -> tuple[Finding, ...]:
    """Return the findings that are not None, with only one of "data-range" and "diverged".

    The two describe the same fault.
    """
    by_name = {finding.name: finding for finding in found if finding is not None}
    if {"data-range", "diverged"} <= set(by_name):
        finite = (
            by_name["data-range"].figures.get("gamma2", 0.0)
            < BYTES_SQUARED * by_name["diverged"].figures["scale"]
        )
        del by_name["diverged" if finite else "data-range"]
    return tuple(by_name.values())


def _broken_model(vae: VAE, seen: Seen, figures: dict[str, Any], seed: int) -> Finding | None:
    exploded = broken.diverged(seen)
    if exploded is not None and exploded.figures["largest_logvar"] > LARGE_LOGVAR:
        return exploded
    return _dead_or_unsettled(vae, seen, figures, seed) or exploded


def _dead_or_unsettled(vae: VAE, seen: Seen, figures: dict[str, Any], seed: int) -> Finding | None:
    latents = outputs.probes(seen.codes.mean, seed).to(device_of(vae))
    with torch.no_grad():
        figures["decoder_response"] = change = outputs.response(vae.decode(latents))
    if change <= outputs.ROUNDING:
        return broken.dead_decoder(change, outputs.first_deaf(outputs.trace(vae.decoder, latents)))
    norms = [part for part in vae.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if norms:
        figures["mse_batch_statistics"] = batch_mse = _mse_by_batch(vae, seen, seed)
        momenta = [1.0 if norm.momentum is None else norm.momentum for norm in norms]
        return broken.unsettled_norm(seen, batch_mse, min(momenta))
    return None


@torch.no_grad()
def _mse_by_batch(vae: VAE, seen: Seen, seed: int) -> float:
    """Return the MSE, as `look` does, but with BatchNorm's statistics of each batch of 100 images.

    Everything else is in evaluation mode. BatchNorm's buffers are restored.
    """
    norms = [part for part in vae.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    kept = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    device, errors = device_of(vae), []
    for norm in norms:
        norm.train()
    for start, images in zip(count(0, CHUNK), seen.images.split(CHUNK), strict=False):
        if len(images) > 1:
            part = at(vae, start)
            posterior = part.encode(images.to(device))
            noise = noise_per_image(len(images), posterior.mean.shape[1], seed, start).to(device)
            difference = part.decode(posterior.sample(noise)).float().cpu() - images
            errors.append(difference.flatten(1).double().square().mean(1))
    for norm, buffers in zip(norms, kept, strict=True):
        norm.eval()
        norm.load_state_dict(norm.state_dict() | buffers)
    return float(torch.cat(errors).mean())


def _facts(
    case: Case,
    vaes: list[VAE],
    seen: Seen,
    train: Seen | None,
    weights: LossWeights | None,
    seed: int,
    display: Progress,
) -> Facts:
    trained_on = train or seen
    inferred = inferred_weight(vaes[-1], trained_on, seed)
    display.update(3, {})
    untrained = [name for name, prior in PRIORS.items() if prior.needs == "nothing"]
    priors = {name: fit_prior(name, trained_on.codes) for name in untrained} | dict(case.priors)
    enough = len(seen.images) >= FEWEST_IMAGES
    num_latents, known = seen.codes.mean.shape[1], len(trained_on.images)
    eigenvalues = spectrum(trained_on.images)
    # Fewer latents have a larger error, so a model that is far above it is underfitted anyway.
    compared = min(num_latents, known // causes.FEW_PER_LATENT)
    linear = linear_mse(eigenvalues, compared, seen.num_dims) if compared else None
    comparison = compare(vaes[0], seen, trained_on.codes, priors, seed) if enough else None
    display.update(STEPS, {})
    found = {stage: late_fall(course) for stage, course in case.courses.items()}
    falls = {stage: fall for stage, fall in found.items() if fall is not None}
    return Facts(
        seen=seen,
        train=train,
        num_train=0 if train is None else len(case.train_images),
        balance=case.balance,
        loss=weights,
        inferred=inferred,
        largest_variance=largest_variance(seen.images),
        linear_mse=linear,
        linear_latents=compared,
        falls=falls,
        spike=late_spike(case.courses.get(1, ())),
        wrapped=case.balance is not None and case.balance is not case.loss,
        comparison=comparison,
        is_run=case.is_run,
    )


def _figures(facts: Facts) -> dict[str, Any]:
    seen, loss, inferred, found = facts.seen, facts.loss, facts.inferred, facts.comparison
    produced = float(seen.restored.double().var(0).mean())
    figures: dict[str, Any] = {"variance_lost": seen.variance - produced}
    figures |= {
        "active_latents": int(seen.active.sum()),
        "inactive": facts.inactive,
        "variance_law": facts.codes_variance,
    }
    figures["largest_variance"] = facts.largest_variance
    if facts.linear_mse is not None:
        trained = facts.trained_on
        shares = {
            "mse_share": trained.mse / trained.variance,
            "linear_share": facts.linear_mse / trained.variance,
            "linear_latents": facts.linear_latents,
        }
        figures |= {"linear_mse": facts.linear_mse} | shares
    if seen.images.dim() == 4 and min(seen.images.shape[2:]) > 1:
        figures["detail"] = detail(seen.restored) / max(detail(seen.images), 1e-30)
    for stage, (before, after) in facts.falls.items():
        figures |= {
            f"mse_before_{stage}": before,
            f"mse_after_{stage}": after,
            f"mse_fell_{stage}": facts.fell(stage),
        }
    figures["short"] = facts.short
    if facts.train_mse is not None:
        figures["followed_gamma2" if facts.train is None else "mse_train"] = facts.train_mse
    if facts.weighing is not None:
        figures |= {
            "effective_gamma2": facts.weighing.gamma2,
            "equivalent_beta": facts.weighing.beta,
        }
        figures["balanced_from"], figures["balanced_to"] = facts.weighing.bounds
    if loss is not None:
        figures |= {
            "loss_error": loss.error,
            "loss_error_weight": loss.error_weight,
            "loss_kl_weight": loss.kl_weight,
        }
        figures["loss_known"] = loss.known
    if inferred is not None:
        figures |= {
            "inferred_gamma2": inferred.gamma2,
            "inferred_relative_error": inferred.relative_error,
        }
        figures["inferred_cross_entropy_weight"] = inferred.cross_entropy
    if found is not None:
        figures |= {
            "distance_between_halves": found.halves,
            "distance_reconstructions": found.reconstructions,
        }
        figures |= {f"distance_{name}": distance for name, distance in found.priors.items()}
        figures |= {
            f"distance_{name}_renormalised": distance
            for name, distance in found.renormalised.items()
        }
        figures |= {f"renormalisation_{name}": factor for name, factor in found.factors.items()}
    return figures
