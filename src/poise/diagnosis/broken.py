"""What makes every other figure meaningless: numbers, ranges, layers and formulas that are broken."""

import math

import torch
from torch import Tensor

from poise.diagnosis.decoder import Layer
from poise.diagnosis.report import Finding
from poise.diagnosis.subject import Seen, device_of
from poise.diagnosis.weight import LossWeights
from poise.metrics import CHUNK
from poise.shapes import Values
from poise.vae import VAE

LARGE_VALUES = 5.0  # of images: standardised ones stay within, bytes do not
OUT_OF_REACH = 0.5  # share of the squared error: with more, no training can mend it; a sigmoid that misses 1 by little has 1e-3
UNSETTLED = 2.0  # MSE with running averages over MSE with batch statistics; settled ones: 1.0 to 1.2


@torch.no_grad()
def not_finite(vae: VAE, images: Values) -> Finding | None:
    """NaN or infinite values, and where they come first: in images, weights, codes, KL or outputs."""
    bad = ~images.flatten(1).isfinite().all(1)
    if bad.any():
        sentence = f"{int(bad.sum())} of {len(images)} images hold NaN or infinite values."
        return Finding("not-finite", sentence, {"images": float(bad.sum())}, "Repair or leave out these images.")
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
        return f"Divide the images by {_white(most):.4g}: from values so large an encoder's logvar overflows at once."
    return "Train again at a tenth of the learning rate."


def _overflow(vae: VAE, images: Tensor) -> Finding | None:
    posterior = vae.encode(images)
    outputs = {"means": posterior.mean, "logvars": posterior.logvar, "KL": posterior.kl(), "images": vae.decode(posterior.mean)}
    for name, value in outputs.items():
        if not value.isfinite().all():
            most = float(posterior.logvar.nan_to_num(0.0).abs().max())
            where = "decoder's" if name == "images" else "encoder's"
            sentence = f"The {where} {name} are NaN or infinite though all weights are finite; |logvar| goes up to {most:.3g}."
            bound = "Bound logvar in the encoder, as with logvar.clamp(-20, 20), and train again."
            remedy = _divergence_remedy(images) if float(images.abs().max()) > LARGE_VALUES else bound
            return Finding("not-finite", sentence.replace("KL are", "KL is"), {"largest_logvar": most}, remedy)
    return None


def out_of_range(images: Values, reach: tuple[float, float], mse: float | None) -> Finding | None:
    """Images with values that the decoder cannot produce.

    Args:
        images: (n, ...), finite.
        reach: least and greatest value that the decoder can give.
        mse: of reconstructions; None: they are not finite, and the images' variance stands for it.
    """
    (least, most), (low, high) = (float(value) for value in images.aminmax()), reach
    missed = float((images - images.clamp(low, high)).double().square().mean())
    variance = float((images - images.mean(0)).double().square().mean())
    share = min(1.0, missed / max(variance if mse is None else mse, 1e-30))
    if share < OUT_OF_REACH:
        return None
    bounds = f"between {low:.3g} and {high:.3g}"
    if math.isinf(low) or math.isinf(high):
        bounds = f"above {low:.3g}" if math.isinf(high) else f"below {high:.3g}"
    outcome = "numbers overflow" if mse is None else f"{share:.0%} of the squared error is out of its reach"
    sentence = f"The images' values go from {least:.3g} to {most:.3g}, but the decoder's outputs stay {bounds}: {outcome}."
    figures = {"images_least": least, "images_most": most, "decoder_least": low, "decoder_most": high, "share_of_error": share}
    return Finding("data-range", sentence, figures, _range_remedy(least, most, low, high))


def _range_remedy(least: float, most: float, low: float, high: float) -> str:
    if (round(low, 2), round(high, 2)) not in ((0, 1), (-1, 1)):
        return "Take the last activation out of the decoder, or map the images into its range."
    top = _white(most)
    if least >= 0:
        return f"Divide the images by {top:.4g}{', times 2, minus 1' if low < -0.5 else ''}: for training, and here."
    if least >= -1.01 and most <= 1.01:
        return "Map the images from [-1, 1] to [0, 1] by (x + 1) / 2, or end the decoder with tanh in place of sigmoid."
    return f"Map the images to [{low:.0f}, {high:.0f}] instead of standardising them, or end the decoder with a linear layer."


def _white(most: float) -> float:
    """What to divide by: 255 for bytes, whose greatest value may be missing."""
    return 255.0 if 128 < most <= 255 else most


def dead_decoder(change: float, layer: Layer | None) -> Finding:
    """A decoder that gives the same image for every latent, from `layer` on."""
    reason, remedy = _dead_layer(layer)
    figures = {"decoder_response": change}
    if layer is not None:
        figures |= {"units": float(layer.units), "constant_units": layer.constant}
    return Finding("dead-decoder", f"The decoder gives the same image for every latent: {reason}.", figures, remedy)


def _dead_layer(layer: Layer | None) -> tuple[str, str]:
    if layer is None:
        return "no layer of its own is to blame", "Look for the place where its forward method drops the latents."
    name = f"layer {layer.name} ({layer.kind})"
    if not layer.hears:
        return f"what reaches its {name} is the same already", "Look at what its forward method does before that layer."
    if layer.zero_weight:
        remedy = f"Draw the weights of decoder layer {layer.name} anew (torch.nn.init.xavier_uniform_), and train again."
        return f"all weights of its {name} are 0", remedy
    if layer.silent:
        remedy = "Train again from new weights at a tenth of the learning rate; if units die again, use LeakyReLU there."
        return f"all {layer.units} units of its {name} are dead, they give 0 whatever comes in", remedy
    remedy = "Train again from new weights at a tenth of the learning rate."
    return f"all {layer.units} units of its {name} are saturated, they give the same whatever comes in", remedy


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


def wrong_formula(loss: LossWeights | None) -> Finding | None:
    """A KL term of another formula."""
    if loss is None or loss.kl_formula not in ("log-std", "reversed"):
        return None
    if loss.kl_formula == "log-std":
        sentence = "The loss's KL takes the encoder's second output for the log standard deviation; it is the log variance."
        remedy = "Write the KL as (mean^2 + exp(logvar) - logvar - 1) / 2, and sample with std = exp(logvar / 2)."
    else:
        sentence = f"The loss's KL has the wrong sign (its weight is {loss.kl_weight:.3g}): training makes the KL larger."
        remedy = "Write the KL as +1/2 sum(mean^2 + exp(logvar) - logvar - 1), and add it to the error."
    return Finding("kl-formula", sentence, {"kl_weight": loss.kl_weight}, remedy)
