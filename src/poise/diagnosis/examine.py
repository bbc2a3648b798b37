"""Run all steps of a diagnosis. Each step requires that the steps before it found nothing."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from poise.balance import Balance
from poise.diagnosis import broken, causes, outputs
from poise.diagnosis.broken import BYTES_SQUARED, faulty_loss
from poise.diagnosis.facts import Facts, notes_on
from poise.diagnosis.outputs import FEWEST_IMAGES, compare, largest_variance, linear_mse, spectrum
from poise.diagnosis.subject import Case, Loss, Seen, as_case, chosen, device_of, look, undisturbed
from poise.diagnosis.verdict import LARGE_LOGVAR, Diagnosis, Finding
from poise.diagnosis.weight import LossWeights, inferred_weight, loss_weights
from poise.metrics import CHUNK
from poise.priors import fit_prior
from poise.runs.run import Run
from poise.shapes import Values
from poise.support.progress import Progress, progress
from poise.vae import VAE
from poise.variants import PRIORS

STEPS = 5


def diagnose(
    model: Run | VAE,
    images: Any = None,
    *,
    train_images: Any = None,
    loss: Loss | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> Diagnosis:
    """Diagnose a VAE: return its faults, the figures that show them, and a remedy for each.

    The model is used in evaluation mode and is not changed.

    Args:
        model: a run, or any VAE: `poise.VAE(encoder, decoder)` with your own modules.
        images: (n, ...), preferably held-out images. Floats must have the values used in training,
            in any range; bytes are divided by 255. None: the run's test images. At most 2,000
            images are used.
        train_images: training images in the same form, needed to detect overfitting. None: those of
            the run, if `images` is None too.
        loss: the training loss: a balance, or any function
            loss(reconstruction, images, mean, logvar) that returns the loss of a batch. It is
            needed to find the cause of an imbalance. None: the run's balance, or for a VAE weights
            inferred from the model. A balance inside a function must be in evaluation mode.
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
    case = as_case(model, images, train_images, loss)
    disturbed = [module for module in (case.vae, case.loss) if isinstance(module, nn.Module)]
    with undisturbed(*disturbed), progress("diagnose", STEPS, quiet=quiet) as display:
        return _examine(case, seed, display)


def _examine(case: Case, seed: int, display: Progress) -> Diagnosis:
    images = chosen(case.vae, case.images, "images", seed)
    train = (
        None
        if case.train_images is None
        else chosen(case.vae, case.train_images, "train_images", seed)
    )
    figures = _sizes(case, images)
    narrow = broken.narrow_range(images) if case.in_unit_range else None
    rest = _examine_model(case, images, train, figures, seed, display)
    return rest if narrow is None else replace(rest, findings=(narrow, *rest.findings))


def _examine_model(
    case: Case,
    images: Tensor,
    train: Tensor | None,
    figures: dict[str, Any],
    seed: int,
    display: Progress,
) -> Diagnosis:
    unusable = _unusable(case.vae, images, train, figures, seed)
    if unusable:
        return Diagnosis(unusable, figures)
    seen = look(case.vae, images, seed)
    trained = None if train is None else look(case.vae, train, seed)
    display.update(1, {})
    figures |= {
        "mse": seen.mse,
        "kl_nats": float(seen.codes.kl().double().mean()),
        "image_variance": seen.variance,
    }
    wrong_range = _out_of_range(case.vae, images, seen.mse, figures, seed)
    if wrong_range is not None:
        return Diagnosis((wrong_range,), figures)
    weights = (
        None
        if case.loss is None
        else loss_weights(case.loss, trained or seen, device_of(case.vae), seed)
    )
    fatal = _fatal(case, seen, trained, weights, figures, seed)
    display.update(2, {})
    if fatal:
        return Diagnosis(fatal, figures)
    facts = _facts(case, seen, trained, weights, seed, display)
    figures |= _figures(facts)
    return Diagnosis(tuple(causes.find_causes(facts)), figures, tuple(notes_on(case, facts)))


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
    vae: VAE, images: Tensor, train: Tensor | None, figures: dict[str, Any], seed: int
) -> tuple[Finding, ...]:
    """Return findings that prevent the model from processing the images."""
    finite = bool(images.isfinite().all())
    if train is not None and finite and train.isfinite().all():
        other = broken.other_range(images, train)
        if other is not None:
            return (other,)
    diverged = broken.not_finite(vae, images) or (
        None if train is None else broken.not_finite(vae, train, "train_images")
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
    vae: VAE, images: Values, mse: float | None, figures: dict[str, Any], seed: int
) -> Finding | None:
    with torch.no_grad():
        mean = vae.encode(images[: outputs.PROBES].to(device_of(vae))).mean.float().cpu()
    latents = outputs.probes(mean.nan_to_num(0.0).clamp(-10, 10), seed).to(device_of(vae))
    reach = outputs.reachable_range(vae.decoder, latents)
    figures |= {"latents": mean.shape[1], "decoder_least": reach[0], "decoder_most": reach[1]}
    return broken.out_of_range(images, reach, mse)


def _fatal(
    case: Case,
    seen: Seen,
    train: Seen | None,
    weights: LossWeights | None,
    figures: dict[str, Any],
    seed: int,
) -> tuple[Finding, ...]:
    """Return faults of the loss or the model that make all other figures meaningless."""
    balance, known = case.loss if isinstance(case.loss, Balance) else None, train is not None
    of_loss = faulty_loss(weights, balance, train or seen, surely_trained_on=known)
    found = _without_duplicate(of_loss, _broken_model(case.vae, seen, figures, seed))
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
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in vae.modules()):
        figures["mse_batch_statistics"] = batch_mse = _mse_by_batch(vae, seen)
        return broken.unsettled_norm(seen, batch_mse)
    return None


@torch.no_grad()
def _mse_by_batch(vae: VAE, seen: Seen) -> float:
    """Return the MSE with BatchNorm's statistics of each batch of 100 images.

    Everything else is in evaluation mode. BatchNorm's buffers are restored.
    """
    norms = [part for part in vae.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    kept = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    device, errors = device_of(vae), []
    for norm in norms:
        norm.train()
    for images in seen.images.split(CHUNK):
        if len(images) > 1:
            errors.append(
                (vae.reconstruct(images.to(device)).float().cpu() - images)
                .flatten(1)
                .double()
                .square()
                .mean(1)
            )
    for norm, buffers in zip(norms, kept, strict=True):
        norm.eval()
        norm.load_state_dict(norm.state_dict() | buffers)
    return float(torch.cat(errors).mean())


def _facts(
    case: Case,
    seen: Seen,
    train: Seen | None,
    weights: LossWeights | None,
    seed: int,
    display: Progress,
) -> Facts:
    trained_on = train or seen
    inferred = inferred_weight(case.vae, trained_on, seed)
    display.update(3, {})
    untrained = [name for name, prior in PRIORS.items() if prior.needs == "nothing"]
    priors = {name: fit_prior(name, trained_on.codes) for name in untrained} | dict(case.priors)
    enough = len(seen.images) >= FEWEST_IMAGES
    num_latents, known = seen.codes.mean.shape[1], len(trained_on.images)
    eigenvalues = spectrum(trained_on.images)
    linear = (
        linear_mse(eigenvalues, num_latents, seen.num_dims)
        if known >= causes.FEW_PER_LATENT * num_latents
        else None
    )
    comparison = compare(case.vae, seen, trained_on.codes, priors, seed) if enough else None
    display.update(STEPS, {})
    return Facts(
        seen=seen,
        train=train,
        num_train=0 if train is None else len(case.train_images),
        balance=case.loss if isinstance(case.loss, Balance) else None,
        loss=weights,
        inferred=inferred,
        largest_variance=largest_variance(seen.images),
        linear_mse=linear,
        falls=case.falls,
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
        }
        figures |= {"linear_mse": facts.linear_mse} | shares
    for stage, (before, after) in facts.falls.items():
        figures |= {
            f"mse_before_{stage}": before,
            f"mse_after_{stage}": after,
            f"mse_fell_{stage}": facts.fell(stage),
        }
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
