"""What makes every other figure meaningless: numbers, ranges and layers of a model that are broken or not yet trained, and
a loss that is wrong whatever the model: no number, no gradient, another formula, another range.
"""

import math

import torch
from torch import Tensor

from poise.balance import Balance
from poise.diagnosis.outputs import Layer
from poise.diagnosis.subject import Seen, device_of
from poise.diagnosis.verdict import (
    IMBALANCED,
    LARGE_LOGVAR,
    LARGE_VALUES,
    OUT_OF_REACH,
    SURE,
    Finding,
    white,
)
from poise.diagnosis.weight import LossWeights
from poise.metrics import CHUNK
from poise.shapes import Values
from poise.vae import VAE

OTHER_RANGE = 1.7  # of widths and of standard deviations: [-1, 1] and [0, 1] differ by 2, 50 of the 8x8 digits from all by 1.02
BYTES = (200, 300)  # ratio of two ranges that are bytes and [0, 1]
OTHER_IMAGES = 2.0  # MSE of training images over that of others; otherwise at most 1
EXPLODED = 10.0  # MSE over the mean square of the images (at least 1): an untrained network gives small values
HARDLY = 1.2  # MSE over the images' variance; a decoder that has learned nothing but the mean image has 1.00 to 1.01
UNSETTLED = (
    2.0  # MSE with running averages over MSE with batch statistics; settled ones: 1.0 to 1.2
)


@torch.no_grad()
def not_finite(vae: VAE, images: Values, name: str = "images") -> Finding | None:
    """NaN or infinite values, and where they come first: in images, weights, codes, KL or outputs."""
    bad = ~images.flatten(1).isfinite().all(1)
    if bad.any():
        sentence = f"{int(bad.sum())} of {len(images)} {name} hold NaN or infinite values."
        return Finding(
            "not-finite",
            sentence,
            {"images": float(bad.sum())},
            "Repair or leave out these images.",
        )
    for name, value in (*vae.named_parameters(), *vae.named_buffers()):
        if not value.isfinite().all():
            share = float((~value.isfinite()).float().mean())
            sentence = f"{share:.0%} of {name} is NaN or infinite: training has diverged."
            return Finding("not-finite", sentence, {"share": share}, _divergence_remedy(images))
    for start in range(0, len(images), CHUNK):
        found = _overflow(vae, images[start : start + CHUNK].to(device_of(vae)))
        if found is not None:
            return found
    return None


def _divergence_remedy(images: Values) -> str:
    most = float(images.abs().max())
    if most > LARGE_VALUES:
        return f"Divide the images by {white(most):.4g}: from values so large an encoder's logvar overflows at once."
    return "Train again at a tenth of the learning rate."


def _overflow(vae: VAE, images: Tensor) -> Finding | None:
    posterior = vae.encode(images)
    outputs = {
        "means": posterior.mean,
        "logvars": posterior.logvar,
        "KL": posterior.kl(),
        "images": vae.decode(posterior.mean),
    }
    for name, value in outputs.items():
        if not value.isfinite().all():
            finite = posterior.logvar[posterior.logvar.isfinite()].abs()
            most = float(finite.max()) if len(finite) else math.nan
            where = "decoder's" if name == "images" else "encoder's"
            logvar = (
                "no logvar is finite" if math.isnan(most) else f"|logvar| goes up to {most:.3g}"
            )
            sentence = (
                f"The {where} {name} are NaN or infinite though all weights are finite; {logvar}."
            )
            remedy = _overflow_remedy(images, most, where)
            return Finding(
                "not-finite", sentence.replace("KL are", "KL is"), {"largest_logvar": most}, remedy
            )
    return None


def _overflow_remedy(images: Tensor, largest_logvar: float, where: str) -> str:
    if float(images.abs().max()) > LARGE_VALUES:
        return _divergence_remedy(images)
    if largest_logvar > LARGE_LOGVAR:
        return "Bound logvar in the encoder, as with logvar.clamp(-20, 20), and train again."
    network = where.removesuffix("'s")
    return f"Look in the {network}'s forward method for a division by 0, or a logarithm or root of a negative number."


def other_range(images: Tensor, train: Tensor) -> Finding | None:
    """Training images of other units than the images."""
    ranges = [tuple(float(value) for value in part.aminmax()) for part in (images, train)]
    (least, most), (train_least, train_most) = ranges
    widths = (train_most - train_least) / (most - least)
    stds = float(train.double().std() / images.double().std())
    if min(max(widths, 1 / widths), max(stds, 1 / stds)) < OTHER_RANGE:
        return None
    sentence = f"train_images go from {train_least:.3g} to {train_most:.3g}, but images from {least:.3g} to {most:.3g}."
    figures = {
        "images_least": least,
        "images_most": most,
        "train_least": train_least,
        "train_most": train_most,
    }
    larger = "train_images" if widths > 1 else "images"
    divided = f"; divide {larger} by 255" if BYTES[0] < max(widths, 1 / widths) < BYTES[1] else ""
    remedy = "Give both with the values that the model was trained on: bytes (uint8) count as [0, 1], floats as they are"
    return Finding("data-range", sentence, figures, f"{remedy}{divided}.")


def other_images(seen: Seen, train: Seen) -> Finding | None:
    """Training images on which the model does far worse than on others."""
    error = (
        SURE * float(sum(each.error().var() / len(each.images) for each in (seen, train))) ** 0.5
    )
    if train.mse - seen.mse <= error or train.mse < OTHER_IMAGES * seen.mse:
        return None
    sentence = (
        f"The MSE is {train.mse:.3g} on train_images and {seen.mse:.3g} on images, although a model does best on what it was "
        f"trained on: these are not its training images, or not prepared in the same way."
    )
    figures = {"mse_train": train.mse, "mse": seen.mse}
    return Finding(
        "other-images",
        sentence,
        figures,
        "Pass the training images as they went into training, or exchange the two.",
    )


def diverged(seen: Seen) -> Finding | None:
    """A model whose numbers are finite and beyond all measure."""
    logvar, square = float(seen.codes.logvar.max()), float(seen.images.double().square().mean())
    exploded = not seen.mse < EXPLODED * max(1.0, square)
    if logvar <= LARGE_LOGVAR and not exploded:
        return None
    sentence = (
        f"Training has diverged: the MSE is {seen.mse:.3g}, {seen.mse / seen.variance:.3g} times the images' variance, and "
        f"logvar goes up to {logvar:.3g}."
    )
    figures = {
        "mse": seen.mse,
        "image_variance": seen.variance,
        "scale": max(1.0, square),
        "largest_logvar": logvar,
    }
    return Finding("diverged", sentence, figures, _exploded_remedy(seen.images))


def _exploded_remedy(images: Values) -> str:
    most = float(images.abs().max())
    bound = "bound logvar in the encoder, as with logvar.clamp(-20, 20)"
    if most > LARGE_VALUES:
        return f"Divide the images by {white(most):.4g}, {bound}, and train again."
    return f"{bound[0].upper()}{bound[1:]}, and train again at a tenth of the learning rate, on images of these very values."


def hardly_trained(seen: Seen, *, surely_trained_on: bool) -> Finding | None:
    """A model that does worse than the mean image would.

    Args:
        seen: best what it makes of its training images.
        surely_trained_on: whether these are its training images; others it may also know too little.
    """
    error = float(seen.error().std()) / len(seen.images) ** 0.5
    if seen.mse - SURE * error < HARDLY * seen.variance:
        return None
    sentence = (
        f"It is hardly trained yet: the MSE is {seen.mse:.3g}, {seen.mse / seen.variance:.3g} times the images' variance, more "
        f"than if it gave the mean image always."
    )
    most = float(seen.images.abs().max())
    divide = (
        f"Divide the images by {white(most):.4g}, for training and here. "
        if most > LARGE_VALUES
        else ""
    )
    remedy = f"{divide}Train longer; if the MSE stays there, at another learning rate."
    if not surely_trained_on:
        sentence += " (A model that knows other images by heart, or learned from values of another range, looks the same.)"
        remedy += " If it is trained, pass train_images."
    return Finding(
        "hardly-trained", sentence, {"mse": seen.mse, "image_variance": seen.variance}, remedy
    )


def out_of_range(images: Values, reach: tuple[float, float], mse: float | None) -> Finding | None:
    """Images with values that the decoder cannot produce.

    Args:
        images: (n, ...), finite.
        reach: least and greatest value that the decoder can give.
        mse: of reconstructions; None: they are not finite, and the images' variance stands for it.
    """
    (least, most), (low, high) = (float(value) for value in images.aminmax()), reach
    missed = float((images - images.clamp(low, high)).double().square().mean())
    variance = float(images.double().var(0, correction=0).mean())
    share = min(1.0, missed / max(variance if mse is None else mse, 1e-30))
    if share < OUT_OF_REACH:
        return None
    bounds = f"between {low:.3g} and {high:.3g}"
    if math.isinf(low) or math.isinf(high):
        bounds = f"above {low:.3g}" if math.isinf(high) else f"below {high:.3g}"
    outcome = (
        "numbers overflow"
        if mse is None
        else f"{share:.0%} of the squared error is out of its reach"
    )
    sentence = f"The images' values go from {least:.3g} to {most:.3g}, but the decoder's outputs stay {bounds}: {outcome}."
    figures = {
        "images_least": least,
        "images_most": most,
        "decoder_least": low,
        "decoder_most": high,
        "share_of_error": share,
    }
    return Finding("data-range", sentence, figures, _range_remedy(least, most, low, high))


def _range_remedy(least: float, most: float, low: float, high: float) -> str:
    if (round(low, 2), round(high, 2)) not in ((0, 1), (-1, 1)):
        return "Take the last activation out of the decoder, or map the images into its range."
    top = white(most)
    if least >= 0:
        return f"Divide the images by {top:.4g}{', times 2, minus 1' if low < -0.5 else ''}: for training, and here."
    if least >= -1.01 and most <= 1.01:
        return "Map the images from [-1, 1] to [0, 1] by (x + 1) / 2, or end the decoder with tanh in place of sigmoid."
    return f"Map the images to [{low:.0f}, {high:.0f}] instead of standardising them, or end the decoder with a linear layer."


def dead_decoder(change: float, layer: Layer | None) -> Finding:
    """A decoder that gives the same image for every latent, from `layer` on."""
    reason, remedy = _dead_layer(layer)
    figures = {"decoder_response": change}
    if layer is not None:
        figures |= {"units": float(layer.units), "constant_units": layer.constant}
    return Finding(
        "dead-decoder",
        f"The decoder gives the same image for every latent: {reason}.",
        figures,
        remedy,
    )


def _dead_layer(layer: Layer | None) -> tuple[str, str]:
    if layer is None:
        return (
            "no layer of its own is to blame",
            "Look for the place where its forward method drops the latents.",
        )
    name = f"layer {layer.name} ({layer.kind})"
    if not layer.hears:
        return (
            f"what reaches its {name} is the same already",
            "Look at what its forward method does before that layer.",
        )
    if layer.zero_weight:
        remedy = f"Draw the weights of decoder layer {layer.name} anew (torch.nn.init.xavier_uniform_), and train again."
        return f"all weights of its {name} are 0", remedy
    if layer.silent:
        remedy = "Train again from new weights at a tenth of the learning rate; if units die again, use LeakyReLU there."
        return (
            f"all {layer.units} units of its {name} are dead, they give 0 whatever comes in",
            remedy,
        )
    remedy = "Train again from new weights at a tenth of the learning rate."
    return (
        f"all {layer.units} units of its {name} are saturated, they give the same whatever comes in",
        remedy,
    )


def unsettled_norm(seen: Seen, batch_mse: float) -> Finding | None:
    """BatchNorm whose running averages are not those of the images."""
    if seen.mse < UNSETTLED * batch_mse:
        return None
    return Finding(
        "norm-unsettled",
        f"In evaluation mode the MSE is {seen.mse:.4g}, with the statistics of each batch {batch_mse:.4g}: BatchNorm's running "
        f"averages are not those of these images.",
        {"mse": seen.mse, "mse_batch_statistics": batch_mse},
        "Train longer or with a larger BatchNorm momentum (0.1), or pass a few hundred training batches in training mode.",
    )


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
        "The loss or its gradient is NaN or infinite, although the reconstructions, means and "
        "logvars given to it are not."
    )
    remedy = (
        "Look in the loss for a division by 0, or a logarithm or root of 0 or of a negative number."
    )
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
        remedy = (
            "Write the KL as +1/2 sum(mean^2 + exp(logvar) - logvar - 1), and add it to the error."
        )
    return Finding("kl-formula", sentence, {"kl_weight": loss.kl_weight}, remedy)


def _other_range(
    loss: LossWeights, balance: Balance | None, trained_on: Seen, surely_trained_on: bool
) -> Finding | None:
    """A loss that followed, or was made for, errors of other units than these images can have."""
    least, most = (float(value) for value in trained_on.images.aminmax())
    scale = max(1.0, float(trained_on.images.double().square().mean()))
    followed = balance is not None and balance.follows_error
    gamma2 = _gamma2_of_error(loss, followed)
    large = gamma2 > (TOO_LARGE if followed else FAR_TOO_LARGE) * scale
    small = (
        followed
        and surely_trained_on
        and max(-least, most) > LARGE_VALUES
        and gamma2 < TOO_SMALL * trained_on.mse
    )
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
    return Finding(
        "data-range",
        sentence,
        {"gamma2": gamma2, "images_least": least, "images_most": most},
        remedy,
    )


def _gamma2_of_error(loss: LossWeights, followed: bool) -> float:
    """The decoder variance that the loss's error has, or NaN where its weights may mean something else."""
    if followed:
        return loss.gamma2 / loss.kl_weight if loss.known and loss.kl_weight > 0 else math.nan
    plain = (
        loss.error == "squared"
        and not loss.error_averaged
        and not loss.batch_mismatch
        and loss.error_weight > 0
    )
    near_one = abs(math.log(max(loss.kl_weight, 1e-30))) < math.log(IMBALANCED)
    return 1 / (2 * loss.error_weight) if plain and near_one else math.nan
