"""A model and images -> a diagnosis. Each step needs the ones before it to have found nothing."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from poise.balance import Balance
from poise.diagnosis import broken, causes, decoder
from poise.diagnosis.facts import CROSS_ENTROPY_CLOSE, Facts
from poise.diagnosis.generation import FEWEST_IMAGES, compare, largest_variance
from poise.diagnosis.report import Diagnosis, Finding
from poise.diagnosis.subject import Seen, check_fit, device_of, look, some_images, undisturbed
from poise.diagnosis.weight import LossWeights, inferred_weight, loss_weights
from poise.errors import InputError
from poise.latent import variance_law
from poise.metrics import CHUNK
from poise.priors import NormalPrior, Prior
from poise.progress import Progress, progress
from poise.run import Run
from poise.shapes import Values
from poise.vae import VAE

Loss = Balance | Callable[..., Any]
DISAGREE = 3.0  # inferred over measured weight: healthy models 0.9 to 1.1; larger, the loss is not what trained the model
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
    """What is wrong with a VAE, in plain words, with the figures that show it and the one thing to try.

    The model is used in evaluation mode and left as it was.

    Args:
        model: a run, or any VAE: `poise.VAE(encoder, decoder)` around modules of one's own.
        images: (n, ...), best ones that it was not trained on. Of the very values that it is trained on, whatever their
            range, as floats; bytes are divided by 255. None: the run's test images. At most 2,000 are looked at.
        train_images: the same of the training images: needed to see overfitting. None: the run's, if `images` are too.
        loss: what the VAE was trained with: a balance, or any function loss(reconstruction, images, mean, logvar) that
            returns the loss of a batch. With it the cause of an imbalance can be named. None: the run's balance; for a VAE,
            the weights are inferred from the model. A balance inside a function must be in evaluation mode.
        seed: of samples and of the choice of images.
        quiet: no progress display.

    Raises:
        InputError: no images; they do not fit the model, or are all the same; the loss does not give a number.

    Example:
        >>> vae = poise.VAE(*poise.networks.mlp((1, 8, 8), latent_dim=4))
        >>> print(poise.diagnose(vae, torch.rand(100, 1, 8, 8)))        # doctest: +SKIP
        1. posterior-collapse: None of the 4 latents carries information: ...
           Try: Use poise.ComputedBalance() as the loss, ...
    """
    case = (
        _case_of_run(model, images, train_images, loss) if isinstance(model, Run) else _case(model, images, train_images, loss)
    )
    disturbed = [module for module in (case.vae, case.loss) if isinstance(module, nn.Module)]
    with undisturbed(*disturbed), progress("diagnose", STEPS, quiet=quiet) as display:
        return _examine(case, seed, display)


@dataclass(frozen=True)
class Case:
    """What is to be looked at: a model, images (n, ...), training images, the loss, and priors besides N(0, I)."""

    vae: VAE
    images: Any
    train_images: Any
    loss: Loss | None
    priors: Mapping[str, Prior]


def _case(vae: VAE, images: Any, train_images: Any, loss: Loss | None) -> Case:
    if images is None:
        raise InputError("images are needed to diagnose a VAE: diagnose(vae, images), the values that it is trained on")
    return Case(vae, images, train_images, loss, {})


def _case_of_run(run: Run, images: Any, train_images: Any, loss: Loss | None) -> Case:
    if images is None:
        dataset = run.dataset()
        images, train_images = dataset.test, dataset.train if train_images is None else train_images
    for name, given in (("images", images), ("train_images", train_images)):
        if given is not None and list(getattr(given, "shape", ()))[1:] != list(run.data["shape"]):
            wanted = f"(n, {', '.join(map(str, run.data['shape']))})"
            raise InputError(f"{name} must have shape {wanted}, not {tuple(getattr(given, 'shape', ()))}")
    second = {} if run.second is None else {"second-stage": run.prior("second-stage")}
    return Case(run.first.vae, images, train_images, run.first.balance if loss is None else loss, second)


def _examine(case: Case, seed: int, display: Progress) -> Diagnosis:
    images = _chosen(case.vae, case.images, "images", seed)
    train = None if case.train_images is None else _chosen(case.vae, case.train_images, "train_images", seed)
    diverged = broken.not_finite(case.vae, images)
    figures = _sizes(case, images)
    if diverged is not None:
        wrong_range = _out_of_range(case.vae, images, None, figures, seed) if images.isfinite().all() else None
        follows = replace(diverged, remedy=causes.CURE_THE_ABOVE)
        return Diagnosis((diverged,) if wrong_range is None else (wrong_range, follows), figures)
    seen = look(case.vae, images, seed)
    display.update(1, {})
    figures |= {"mse": seen.mse, "kl_nats": float(seen.codes.kl().double().mean())}
    trained_on = seen if train is None else look(case.vae, train, seed)
    weights = None if case.loss is None else loss_weights(case.loss, trained_on, device_of(case.vae), seed)
    formula = broken.wrong_formula(weights)
    fatal = _out_of_range(case.vae, images, seen.mse, figures, seed) or _fatal(case.vae, seen, figures, seed)
    display.update(2, {})
    if fatal is not None or formula is not None:
        return Diagnosis(tuple(filter(None, (fatal, formula))), figures)
    facts = _facts(case, seen, None if train is None else trained_on, weights, seed, display)
    figures |= _figures(facts)
    return Diagnosis(tuple(causes.find_causes(facts)), figures, tuple(_notes(case, facts)))


def _chosen(vae: VAE, images: Any, name: str, seed: int) -> Values:
    images = some_images(images, name, seed)
    check_fit(vae, images, name)
    if bool((images == images[:1]).all()):
        raise InputError(f"all {len(images)} {name} are the same: there is nothing to learn")
    return images


def _sizes(case: Case, images: Values) -> dict[str, Any]:
    least, most = (float(value) for value in images.aminmax())
    return {
        "images": len(images),
        "train_images": None if case.train_images is None else len(case.train_images),
        "dimensions": math.prod(images.shape[1:]),
        "images_least": least,
        "images_most": most,
    }


def _out_of_range(vae: VAE, images: Values, mse: float | None, figures: dict[str, Any], seed: int) -> Finding | None:
    with torch.no_grad():
        mean = vae.encode(images[: decoder.PROBES].to(device_of(vae))).mean.float().cpu()
    latents = decoder.probes(mean.nan_to_num(0.0).clamp(-10, 10), seed).to(device_of(vae))
    reach = decoder.reachable_range(vae.decoder, latents)
    figures |= {"latents": mean.shape[1], "decoder_least": reach[0], "decoder_most": reach[1]}
    return broken.out_of_range(images, reach, mse)


def _fatal(vae: VAE, seen: Seen, figures: dict[str, Any], seed: int) -> Finding | None:
    """What makes every other figure meaningless."""
    latents = decoder.probes(seen.codes.mean, seed).to(device_of(vae))
    with torch.no_grad():
        figures["decoder_response"] = change = decoder.response(vae.decode(latents))
    if change <= decoder.ROUNDING:
        return broken.dead_decoder(change, decoder.first_deaf(decoder.trace(vae.decoder, latents)))
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in vae.modules()):
        figures["mse_batch_statistics"] = batch_mse = _mse_by_batch(vae, seen)
        return broken.unsettled_norm(seen, batch_mse)
    return None


@torch.no_grad()
def _mse_by_batch(vae: VAE, seen: Seen) -> float:
    """MSE of reconstructions with BatchNorm's statistics from each batch of 100, everything else in evaluation mode."""
    norms = [part for part in vae.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    kept = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    device, errors = device_of(vae), []
    for norm in norms:
        norm.train()
    for images in seen.images.split(CHUNK):
        if len(images) > 1:
            errors.append((vae.reconstruct(images.to(device)).float().cpu() - images).flatten(1).double().square().mean(1))
    for norm, buffers in zip(norms, kept, strict=True):
        norm.eval()
        norm.load_state_dict(norm.state_dict() | buffers)
    return float(torch.cat(errors).mean())


def _facts(case: Case, seen: Seen, train: Seen | None, weights: LossWeights | None, seed: int, display: Progress) -> Facts:
    trained_on = train or seen
    inferred = inferred_weight(case.vae, trained_on, seed)
    display.update(3, {})
    priors = {"normal": NormalPrior(seen.codes.mean.shape[1]), **case.priors}
    enough = len(seen.images) >= FEWEST_IMAGES
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
        comparison=comparison,
    )


def _figures(facts: Facts) -> dict[str, Any]:
    seen, loss, inferred, found = facts.seen, facts.loss, facts.inferred, facts.comparison
    real, produced = (part.double().var(0, correction=0).mean() for part in (seen.images, seen.restored))
    law = variance_law(facts.trained_on.codes.mean, facts.trained_on.codes.logvar).mean()
    figures: dict[str, Any] = {"image_variance": float(real), "variance_lost": float(real - produced)}
    figures |= {"active_latents": int(seen.active.sum()), "inactive": facts.inactive, "variance_law": float(law)}
    figures["largest_variance"] = facts.largest_variance
    if facts.train_mse is not None:
        figures["mse_train"] = facts.train_mse
    if facts.weighing is not None:
        figures |= {"effective_gamma2": facts.weighing.gamma2, "equivalent_beta": facts.weighing.beta}
    if loss is not None:
        figures |= {"loss_error": loss.error, "loss_error_weight": loss.error_weight, "loss_kl_weight": loss.kl_weight}
    if inferred is not None:
        figures |= {"inferred_gamma2": inferred.gamma2, "inferred_relative_error": inferred.relative_error}
        figures["inferred_cross_entropy_weight"] = inferred.cross_entropy
    if found is not None:
        figures |= {"distance_between_halves": found.halves, "distance_reconstructions": found.reconstructions}
        figures |= {f"distance_{name}": distance for name, distance in found.priors.items()}
        figures |= {f"distance_{name}_renormalised": distance for name, distance in found.renormalised.items()}
        figures |= {f"renormalisation_{name}": factor for name, factor in found.factors.items()}
    return figures


def _notes(case: Case, facts: Facts) -> list[str]:
    count, notes = len(facts.seen.images), []
    if count < len(case.images):
        notes.append(f"{count} of {len(case.images)} images were looked at, drawn at random.")
    if count < FEWEST_IMAGES:
        notes.append(
            f"{count} images are few: the figures are rough, and samples were not compared; give {FEWEST_IMAGES} or more."
        )
    if facts.train is None:
        notes.append("Without train_images overfitting cannot be told from an imbalance: pass them too.")
    if facts.loss is not None and not facts.loss.known:
        notes.append(
            "The loss is no squared, absolute or cross-entropy error plus KL: its weights were inferred from the model."
        )
    if facts.inferred is not None and facts.loss is None and abs(facts.inferred.cross_entropy - 1) < CROSS_ENTROPY_CLOSE:
        notes.append("It looks trained with a cross-entropy, which has no scale to balance; right for images of 0 and 1 only.")
    if facts.inferred is not None and facts.weighing is not None and facts.weighing.by == "loss":
        notes += _disagreement(facts, facts.inferred.gamma2)
    return notes


def _disagreement(facts: Facts, inferred: float) -> list[str]:
    loss = facts.loss
    if loss is None or loss.error != "squared" or not 0 < loss.gamma2 < math.inf or inferred <= 0:
        return []
    if abs(math.log(inferred / loss.gamma2)) < math.log(DISAGREE):
        return []
    return [
        f"The loss amounts to gamma2 = {loss.gamma2:.3g}, the model to {inferred:.3g}: is this the loss that trained it, and "
        f"had it come to rest?"
    ]
