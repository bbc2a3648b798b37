"""Find faults that make all other figures meaningless.

In the model: values that are not finite, a wrong range, dead layers, too little training. In the
loss: no number, no gradient, a wrong KL formula, another range.
"""

import math

import torch
from torch import Tensor

from poise.balance import Balance
from poise.data.loading import NARROW
from poise.diagnosis.foreign import at, shown_name
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
from poise.metrics.encoding import CHUNK
from poise.shapes import Values
from poise.vae import VAE

# Ratio of widths and of standard deviations. [-1, 1] and [0, 1] differ by 2; 50 of the 8x8 digits
# differ from all of them by 1.02.
OTHER_RANGE = 1.7
BYTES = (200, 300)  # ratio of two ranges that are bytes and [0, 1]
OTHER_IMAGES = 2.0  # MSE of training images over MSE of other images; normally at most 1
# MSE over the mean square of the images (at least 1). An untrained network has small outputs.
EXPLODED = 10.0
# MSE over the images' variance. A decoder that has learned only the mean image has 1.00 to 1.01.
HARDLY = 1.2
# MSE with running averages over MSE with batch statistics. Converged averages: 1.0 to 1.2.
UNSETTLED = 2.0


@torch.no_grad()
def not_finite(vae: VAE, images: Values, name: str = "images") -> Finding | None:
    """Find NaN or infinite values in images, weights, codes, KL or outputs. Reports the first."""
    bad = ~images.flatten(1).isfinite().all(1)
    if bad.any():
        sentence = f"{int(bad.sum())} of {len(images)} {name} hold NaN or infinite values."
        return Finding(
            "not-finite",
            sentence,
            {"images": float(bad.sum())},
            "Repair or remove these images.",
        )
    for name, value in (*vae.named_parameters(), *vae.named_buffers()):
        if not value.isfinite().all():
            share = float((~value.isfinite()).float().mean())
            sentence = (
                f"{share:.0%} of {shown_name(name)} is NaN or infinite: training has diverged."
            )
            return Finding("not-finite", sentence, {"share": share}, _divergence_remedy(images))
    for start in range(0, len(images), CHUNK):
        found = _overflow(at(vae, start), images[start : start + CHUNK].to(device_of(vae)))
        if found is not None:
            return found
    return None


def _divergence_remedy(images: Values) -> str:
    most = float(images.abs().max())
    if most > LARGE_VALUES:
        return f"{_rescale(images)}: with such large values an encoder's logvar overflows at once."
    return "Train again at a tenth of the learning rate."


def _rescale(images: Values) -> str:
    """Return the remedy for values that are too large."""
    if images.dim() == 2:
        return (
            "Standardise each column: subtract its mean and divide by its standard deviation, "
            "both of the training rows"
        )
    return f"Divide the images by {white(float(images.abs().max())):.4g}"


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
    return (
        f"Check the {network}'s forward method for a division by 0, "
        "or a logarithm or root of a negative number."
    )


def narrow_range(images: Tensor) -> Finding | None:
    """Find images that use little of the range 0 to 1, such as 12-bit data read as 16-bit."""
    least, most = (float(value) for value in images.aminmax())
    if not most - least < NARROW:
        return None
    sentence = (
        f"The images use only the values from {least:.3g} to {most:.3g} of 0 to 1, "
        f"which is {most - least:.1%} of the range: they look "
        f"{'black' if most < 0.5 else 'like fog'}."
    )
    figures = {"images_least": least, "images_most": most}
    remedy = (
        "Train again with --levels N, where N is the value in the files that means white "
        "(masks: 1; 12 bits: 4095), or rescale the array."
    )
    return Finding("data-range", sentence, figures, remedy)


def other_range(images: Tensor, train: Tensor) -> Finding | None:
    """Find training images whose range of values differs from that of the images."""
    ranges = [tuple(float(value) for value in part.aminmax()) for part in (images, train)]
    (least, most), (train_least, train_most) = ranges
    widths = (train_most - train_least) / (most - least)
    stds = float(train.double().std() / images.double().std())
    if min(max(widths, 1 / widths), max(stds, 1 / stds)) < OTHER_RANGE:
        return None
    sentence = (
        f"train_images go from {train_least:.3g} to {train_most:.3g}, "
        f"but images go from {least:.3g} to {most:.3g}."
    )
    figures = {
        "images_least": least,
        "images_most": most,
        "train_least": train_least,
        "train_most": train_most,
    }
    larger = "train_images" if widths > 1 else "images"
    divided = f"; divide {larger} by 255" if BYTES[0] < max(widths, 1 / widths) < BYTES[1] else ""
    remedy = (
        "Pass both with the values that the model was trained on "
        "(bytes, uint8, count as [0, 1]; floats are used as they are)"
    )
    return Finding("data-range", sentence, figures, f"{remedy}{divided}.")


def other_images(seen: Seen, train: Seen) -> Finding | None:
    """Find training images that the model reconstructs far worse than other images."""
    error = (
        SURE * float(sum(each.error().var() / len(each.images) for each in (seen, train))) ** 0.5
    )
    if train.mse - seen.mse <= error or train.mse < OTHER_IMAGES * seen.mse:
        return None
    sentence = (
        f"The MSE is {train.mse:.3g} on train_images and {seen.mse:.3g} on images, but a model "
        "does best on its training images. So train_images are not its training images, or they "
        "were prepared in another way."
    )
    figures = {"mse_train": train.mse, "mse": seen.mse}
    return Finding(
        "other-images",
        sentence,
        figures,
        "Pass the training images exactly as they were used in training, "
        "or swap the two arguments.",
    )


def diverged(seen: Seen) -> Finding | None:
    """Find a diverged model: its values are finite but far too large."""
    logvar, square = float(seen.codes.logvar.max()), float(seen.images.double().square().mean())
    exploded = not seen.mse < EXPLODED * max(1.0, square)
    if logvar <= LARGE_LOGVAR and not exploded:
        return None
    sentence = (
        f"Training has diverged: the MSE is {seen.mse:.3g}, {seen.mse / seen.variance:.3g} times "
        f"the images' variance, and logvar goes up to {logvar:.3g}."
    )
    figures = {
        "mse": seen.mse,
        "image_variance": seen.variance,
        "scale": max(1.0, square),
        "largest_logvar": logvar,
    }
    return Finding("diverged", sentence, figures, _exploded_remedy(seen.images, logvar))


def _exploded_remedy(images: Values, logvar: float) -> str:
    most = float(images.abs().max())
    # Not if it is bounded already.
    bound = "bound logvar in the encoder, as with logvar.clamp(-20, 20)"
    steps = [bound] if logvar > LARGE_LOGVAR else []
    if most > LARGE_VALUES:
        return f"{', '.join([_rescale(images), *steps])}, and train again."
    steps += ["train again at a tenth of the learning rate, on images with exactly these values."]
    words = ", and ".join(steps)
    return f"{words[0].upper()}{words[1:]}"


def hardly_trained(seen: Seen, *, surely_trained_on: bool) -> Finding | None:
    """Find a model whose MSE is worse than that of the mean image.

    Args:
        seen: images, at best its training images.
        surely_trained_on: whether these are its training images. On other images, a model that
            overfits has a large MSE too.
    """
    error = float(seen.error().std()) / len(seen.images) ** 0.5
    if seen.mse - SURE * error < HARDLY * seen.variance:
        return None
    sentence = (
        f"The model is hardly trained: the MSE is {seen.mse:.3g}, {seen.mse / seen.variance:.3g} "
        "times the images' variance. A decoder that always returns the mean image does better."
    )
    most = float(seen.images.abs().max())
    divide = f"{_rescale(seen.images)}, in training and here. " if most > LARGE_VALUES else ""
    remedy = f"{divide}Train longer. If the MSE does not fall, use another learning rate."
    if not surely_trained_on:
        sentence += (
            " (A model that overfits other images, or was trained on another range of values, "
            "looks the same.)"
        )
        remedy += " If the model is already trained, pass train_images."
    return Finding(
        "hardly-trained", sentence, {"mse": seen.mse, "image_variance": seen.variance}, remedy
    )


def out_of_range(
    images: Values, reach: tuple[float, float], mse: float | None, *, logits: bool = False
) -> Finding | None:
    """Find images with values that the decoder cannot produce.

    Args:
        images: (n, ...), finite.
        reach: smallest and largest value that the decoder can produce.
        mse: MSE of reconstructions; None: they are not finite, and the images' variance is used.
        logits: whether the loss applies a sigmoid to the decoder's outputs.
    """
    (least, most), (low, high) = (float(value) for value in images.aminmax()), reach
    missed = float((images - images.clamp(low, high)).double().square().mean())
    variance = float(images.double().var(0, correction=0).mean())
    share = min(1.0, missed / max(variance if mse is None else mse, 1e-30))
    # A sigmoid of a sigmoid goes from 0.5 to 0.73.
    twice = logits and (round(low, 2), round(high, 2)) == (0.5, 0.73)
    if share < OUT_OF_REACH and not twice:
        return None
    bounds = f"between {low:.3g} and {high:.3g}"
    if math.isinf(low) or math.isinf(high):
        bounds = f"above {low:.3g}" if math.isinf(high) else f"below {high:.3g}"
    outcome = (
        "numbers overflow"
        if mse is None
        else f"{share:.0%} of the squared error comes from values that it cannot produce"
    )
    outputs = "a sigmoid of the decoder's outputs stays" if logits else "the decoder's outputs stay"
    sentence = (
        f"The images' values go from {least:.3g} to {most:.3g}, but {outputs} {bounds}: {outcome}."
    )
    figures = {
        "images_least": least,
        "images_most": most,
        "decoder_least": low,
        "decoder_most": high,
        "share_of_error": share,
    }
    remedy = _range_remedy(least, most, low, high)
    if images.dim() == 2 and max(-least, most) > LARGE_VALUES:
        remedy = f"{_rescale(images)}, and end the decoder with a linear layer."
    if twice:
        remedy = (
            "The loss already applies a sigmoid: remove the decoder's last activation, "
            "or use binary_cross_entropy without logits."
        )
    return Finding("data-range", sentence, figures, remedy)


def _range_remedy(least: float, most: float, low: float, high: float) -> str:
    if (round(low, 2), round(high, 2)) not in ((0, 1), (-1, 1)):
        return "Remove the decoder's last activation, or scale the images to its range."
    top = white(most)
    if least >= 0:
        return (
            f"Divide the images by {top:.4g}"
            f"{', multiply by 2 and subtract 1' if low < -0.5 else ''}, in training and here."
        )
    if least >= -1.01 and most <= 1.01:
        return (
            "Map the images from [-1, 1] to [0, 1] by (x + 1) / 2, "
            "or end the decoder with tanh instead of sigmoid."
        )
    return (
        f"Scale the images to [{low:.0f}, {high:.0f}] instead of standardising them, "
        "or end the decoder with a linear layer."
    )


def dead_decoder(change: float, layer: Layer | None) -> Finding:
    """Report a decoder that returns the same image for every latent.

    `layer` is its first layer with a constant output; None: there is no such layer.
    """
    reason, remedy = _dead_layer(layer)
    figures = {"decoder_response": change}
    if layer is not None:
        figures |= {"units": float(layer.units), "constant_units": layer.constant}
    return Finding(
        "dead-decoder",
        f"The decoder returns the same image for every latent: {reason}.",
        figures,
        remedy,
    )


def _dead_layer(layer: Layer | None) -> tuple[str, str]:
    if layer is None:
        return (
            "no single layer is the cause",
            "Find the place in its forward method where the latents are lost.",
        )
    name = f"layer {shown_name(layer.name)} ({layer.kind})"
    if not layer.hears:
        return (
            f"the input of its {name} is already the same",
            "Check what its forward method does before that layer.",
        )
    if layer.zero_weight:
        remedy = (
            f"Initialise the weights of decoder layer {shown_name(layer.name)} again "
            "(torch.nn.init.xavier_uniform_), and train again."
        )
        return f"all weights of its {name} are 0", remedy
    if layer.silent:
        remedy = (
            "Train again from new weights at a tenth of the learning rate. "
            "If units die again, use LeakyReLU there."
        )
        return (
            f"all {layer.units} units of its {name} are dead and output 0 for every input",
            remedy,
        )
    remedy = "Train again from new weights at a tenth of the learning rate."
    return (
        f"all {layer.units} units of its {name} are saturated "
        "and give the same output for every input",
        remedy,
    )


def unsettled_norm(seen: Seen, batch_mse: float, momentum: float) -> Finding | None:
    """Find BatchNorm layers whose running averages do not match the images.

    `momentum` is the smallest of the layers.
    """
    if seen.mse < UNSETTLED * batch_mse:
        return None
    return Finding(
        "norm-unsettled",
        f"The MSE is {seen.mse:.4g} in evaluation mode, but {batch_mse:.4g} with batch statistics: "
        "BatchNorm's running averages do not match these images.",
        {"mse": seen.mse, "mse_batch_statistics": batch_mse},
        f"Train longer, {'use a larger BatchNorm momentum (0.1), ' if momentum < 0.1 else ''}"
        "or run a few hundred training batches in training mode.",
    )


# gamma2 of a balance that follows the error, over the mean square of the images (at least 1).
TOO_LARGE = 10.0
FAR_TOO_LARGE = 100.0  # the same for any other loss, whose large gamma2 may be intended
TOO_SMALL = 1e-3  # gamma2 of a balance that follows the error, over the MSE of training images
# Squared errors of bytes over those of [0, 1]. A gamma2 that is larger by more has diverged.
BYTES_SQUARED = 255.0**2
DIFFERENTIATE = (
    "Differentiate the loss itself, not its parts: use a balance's terms.loss, "
    "as in terms.loss.backward(). Detach the value that an error is divided by."
)


def faulty_loss(
    loss: LossWeights | None, balance: Balance | None, trained_on: Seen, *, surely_trained_on: bool
) -> Finding | None:
    """Return the first fault of the loss: no number, no gradient, wrong KL formula, other range.

    Args:
        loss: weights of the loss; None: no loss was given.
        balance: the loss, if it is a balance of Poise.
        trained_on: the training images, or other images if these are not known.
        surely_trained_on: whether the training images are known.
    """
    if loss is None:
        return None
    of_range = _other_range(loss, balance, trained_on, surely_trained_on)
    return _no_number(loss) or _no_gradient(loss) or _wrong_formula(loss) or of_range


def _no_number(loss: LossWeights) -> Finding | None:
    if loss.finite:
        return None
    sentence = (
        "The loss or its gradient is NaN or infinite, although its inputs (reconstructions, means "
        "and logvars) are finite."
    )
    remedy = (
        "Check the loss for a division by 0, or a logarithm or root of 0 or of a negative number."
    )
    return Finding("not-finite", sentence, {}, remedy)


def _no_gradient(loss: LossWeights) -> Finding | None:
    if not loss.flat:
        return None
    if loss.kl_formula == "absent":
        sentence = (
            "The loss depends on nothing: its gradients with respect to reconstruction, mean and "
            "logvar are 0. It may be a constant, or be built from detached parts, such as "
            "terms.reconstruction and terms.kl."
        )
    else:
        sentence = (
            "The loss does not change with the reconstruction, so it does not train the decoder. "
            "It may use a detached reconstruction, or terms.reconstruction, which is detached: use "
            "terms.loss. Or it divides an error by itself without detach()."
        )
    return Finding("no-gradient", sentence, {"kl_weight": loss.kl_weight}, DIFFERENTIATE)


def _wrong_formula(loss: LossWeights) -> Finding | None:
    """Find a KL term that uses logvar as log standard deviation, or has the wrong sign."""
    if loss.kl_formula not in ("log-std", "reversed"):
        return None
    if loss.kl_formula == "log-std":
        sentence = (
            "The loss's KL uses the encoder's second output as the log standard deviation, "
            "but it is the log variance."
        )
        remedy = (
            "Write the KL as (mean^2 + exp(logvar) - logvar - 1) / 2, "
            "and sample with std = exp(logvar / 2)."
        )
    else:
        sentence = (
            f"The loss's KL has the wrong sign (its weight is {loss.kl_weight:.3g}): "
            "training increases the KL."
        )
        remedy = (
            "Write the KL as +1/2 sum(mean^2 + exp(logvar) - logvar - 1), and add it to the error."
        )
    return Finding("kl-formula", sentence, {"kl_weight": loss.kl_weight}, remedy)


def _other_range(
    loss: LossWeights, balance: Balance | None, trained_on: Seen, surely_trained_on: bool
) -> Finding | None:
    """Find a loss whose gamma2 belongs to images with another range of values."""
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
        f"The loss {diverged}was trained on another range than these images: its gamma2, the "
        f"squared error that it fits, is {gamma2:.3g}, but the images go from {least:.3g} to "
        f"{most:.3g}."
    )
    remedy = (
        "Pass exactly the values that the model was trained on (bytes, uint8, count as [0, 1]; "
        "floats are used as they are). It is best to train on [0, 1]."
    )
    return Finding(
        "data-range",
        sentence,
        {"gamma2": gamma2, "images_least": least, "images_most": most},
        remedy,
    )


def _gamma2_of_error(loss: LossWeights, followed: bool) -> float:
    """Return the decoder variance of the loss's error, or NaN if its weights are ambiguous."""
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
