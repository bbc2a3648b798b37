"""Weights of error and KL in a loss, read from its gradients or inferred from the trained model.

The equations are in `poise.diagnosis`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from poise.diagnosis.foreign import at
from poise.diagnosis.subject import Seen, device_of, first_line
from poise.errors import InputError
from poise.metrics.encoding import CHUNK
from poise.shapes import Batch, Latents, Values
from poise.support.seeds import generator
from poise.vae import VAE

# "logits": the cross-entropy of a decoder that returns logits.
Error = Literal["squared", "absolute", "cross-entropy", "logits"]
KLFormula = Literal["exact", "log-std", "reversed", "other", "absent"]

# Cosine of two gradients. Squared and absolute errors have at most 0.8; rounding keeps 1 - 1e-6.
PROPORTIONAL = 0.99
# Images in the batch on which a loss is evaluated; then on half of it. A sum over the batch doubles
# with the batch, a mean does not.
BATCH = 128
# Relative to the loss. For an error that is divided by itself, only rounding of 1e-7 remains.
NO_SLOPE = 1e-5
MOST_GROUPS = 1_000  # columns of a table
FEW_IMAGES = 256  # 512 antithetic draws: the inferred weight is accurate to about 2 %
PAIRS = 2


@dataclass(frozen=True)
class LossWeights:
    """A loss written as error_weight * error + kl_weight * KL.

    Error and KL are summed over dimensions and averaged over the batch.

    Attributes:
        error: kind of error in the loss; None: none of these.
        error_weight, kl_weight: weights per image. If only one of the two is summed over the
            batch, for a batch of 128.
        weights: error weight of each channel or column, if these differ, else empty. `error_weight`
            is then their mean, weighted by the errors.
        kl_formula: "exact" for the KL of N(mean, exp(logvar)), "log-std" for the KL of
            N(mean, exp(2 logvar)), "reversed" for the wrong sign.
        batch_mismatch: whether one of the two is summed over the batch and the other averaged.
        batch_summed: whether the whole loss is summed over the batch.
        error_averaged: whether the error is averaged over the values of an image; None: the loss
            accepts images of one size only.
        kl_averaged: whether the KL is averaged over latents; None as for `error_averaged`.
        group_errors: mean error of each group, if the loss returns the terms of a balance with
            groups, else empty.
        finite: whether the loss and its gradients are finite.
        flat: whether the loss does not change with the reconstruction, up to rounding.
    """

    error: Error | None
    error_weight: float
    kl_weight: float
    kl_formula: KLFormula
    batch_mismatch: bool
    error_averaged: bool | None
    kl_averaged: bool | None
    finite: bool = True
    flat: bool = False
    batch_summed: bool = False
    weights: tuple[float, ...] = ()
    group_errors: tuple[float, ...] = ()

    @property
    def cross_entropy(self) -> bool:
        return self.error in ("cross-entropy", "logits")

    @property
    def known(self) -> bool:
        """Whether `gamma2` is defined for this loss."""
        return self.finite and self.error is not None and self.kl_formula in ("exact", "absent")

    @property
    def gamma2(self) -> float:
        """Effective decoder variance k / (p c), eq. 1 for any power p of the error.

        For a cross-entropy it is k / c, which is 1 at balance.
        """
        power = 2 if self.error == "squared" else 1
        return self.kl_weight / (power * self.error_weight) if self.error_weight else math.inf

    def balanced_gamma2(self, seen: Seen) -> float:
        """Return the balanced gamma2: the mean error, or 1 for a cross-entropy.

        A cross-entropy is a likelihood without a scale.
        """
        if self.cross_entropy:
            return 1.0
        return float(seen.error(1 if self.error == "absolute" else 2).mean())


def loss_weights(
    loss: Callable[..., Any],
    seen: Seen,
    device: torch.device,
    seed: int,
    latent_shape: Sequence[int] | None = None,
) -> LossWeights:
    """Read the weights of error and KL from the gradients of a loss.

    The gradients are taken at reconstructions and at random means and logvars.

    Args:
        loss: loss(reconstruction, images, mean, logvar) that returns a scalar, or a tuple with a
            field `loss`.
        seen: images and their reconstructions.
        device: device of the loss.
        seed: seed of the random means and logvars.
        latent_shape: shape of mean and logvar of one image. None: that of the codes.

    Raises:
        InputError: the loss raises an error, or does not return a scalar.
    """
    shape = seen.codes.mean.shape[1:] if latent_shape is None else latent_shape
    drawn = torch.randn(2, BATCH, *shape, generator=generator("loss", seed))
    rows = torch.arange(BATCH) % len(seen.images)
    # The loss can be read even if the model has diverged.
    restored = seen.restored[rows].nan_to_num(0.0, 0.0, 0.0)
    points = [point.to(device) for point in (restored, seen.images[rows], drawn[0], drawn[1] / 2)]
    whole = _gradients(loss, *points)
    if not whole.finite:
        return LossWeights(None, math.nan, math.nan, "other", False, None, None, finite=False)
    half = _gradients(loss, *(point[: BATCH // 2] for point in points))
    try:
        wide = _gradients(loss, *(torch.cat([point, point], -1) for point in points))
    except InputError:  # the loss accepts images of one size only
        wide = None
    return _compared(whole, half, wide)


def _compared(whole: "_Gradients", half: "_Gradients", wide: "_Gradients | None") -> LossWeights:
    """Compare the weights with those of half the batch, and of twice the values and latents."""
    (error, error_slope, weights), (formula, kl_slope) = _error(whole), _kl(whole)
    kind = error or "squared"
    # The factor of all groups together; 0 if it is rounding.
    slope = whole.error_slope(kind) if error_slope else 0.0
    error_mean = _doubles(slope, half.error_slope(kind))
    kl_mean = _doubles(kl_slope, half.kl_slope())
    # A part that is 0 is neither a sum nor a mean.
    summed = not (error_mean or kl_mean) and bool(error_slope or kl_slope)
    batch = 1 if summed else BATCH
    return LossWeights(
        error=error,
        error_weight=error_slope * batch,
        kl_weight=kl_slope * batch,
        weights=tuple(weight * batch for weight in weights),
        group_errors=whole.group_errors,
        kl_formula=formula,
        batch_mismatch=error_mean != kl_mean,
        batch_summed=summed,
        error_averaged=None if wide is None else _doubles(slope, wide.error_slope(kind)),
        kl_averaged=None if wide is None else _doubles(kl_slope, wide.kl_slope()),
        flat=error is not None and not error_slope,
    )


@dataclass(frozen=True)
class _Gradients:
    """Value and gradients of a loss, and the point where they were taken; float64.

    `error` is the gradient with respect to the reconstruction, `kl` that with respect to mean and
    logvar.
    """

    reconstruction: Tensor
    images: Tensor
    mean: Tensor
    logvar: Tensor
    error: Tensor
    kl: Tensor
    value: float
    group_errors: tuple[float, ...]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.value) and bool(
            self.error.isfinite().all() and self.kl.isfinite().all()
        )

    def errors(self) -> dict[Error, Tensor]:
        """Return the gradients of each kind of error, summed over all values."""
        difference = self.reconstruction - self.images
        variance = (self.reconstruction * (1 - self.reconstruction)).clamp_min(1e-12)
        kinds: dict[Error, Tensor] = {"squared": 2 * difference, "absolute": difference.sign()}
        if float(self.reconstruction.min()) >= 0 and float(self.reconstruction.max()) <= 1:
            kinds["cross-entropy"] = difference / variance
        kinds["logits"] = self.reconstruction.sigmoid() - self.images
        return kinds

    def kls(self) -> dict[KLFormula, Tensor]:
        """Return the gradients of KL(N(mean, exp(logvar)) || N(0, I)), and with logvar as log s."""
        return {
            "exact": torch.cat([self.mean, (self.logvar.exp() - 1) / 2]),
            "log-std": torch.cat([self.mean, (2 * self.logvar).exp() - 1]),
        }

    def error_slope(self, kind: Error) -> float:
        return _slope(self.error, self.errors().get(kind, self.error))

    def kl_slope(self) -> float:
        return _slope(self.kl, self.kls()["exact"])


def _gradients(
    loss: Callable[..., Any], reconstruction: Values, images: Values, mean: Batch, logvar: Batch
) -> _Gradients:
    at = [point.detach().clone().requires_grad_() for point in (reconstruction, mean, logvar)]
    try:
        # A loss may change its inputs in place, so it gets copies.
        returned = loss(*(point.clone() for point in (at[0], images, at[1], at[2])))
        value = _scalar(returned)
        slopes = (
            torch.autograd.grad(value, at, materialize_grads=True)
            if value.requires_grad
            else map(torch.zeros_like, at)
        )
    except InputError:
        raise
    except Exception as error:  # a user's loss can raise anything
        raise InputError(
            f"loss(reconstruction, images, mean, logvar) failed: {first_line(error)}"
        ) from error
    by_error, by_mean, by_logvar = (slope.detach().cpu().double() for slope in slopes)
    errors = getattr(returned, "group_error", None)
    of_groups = errors.tolist() if isinstance(errors, Tensor) and errors.dim() == 1 else []
    values = (tensor.detach().cpu().double() for tensor in (reconstruction, images, mean, logvar))
    return _Gradients(
        *values,
        error=by_error,
        kl=torch.cat([by_mean, by_logvar]),
        value=float(value.detach()),
        group_errors=tuple(of_groups),
    )


def _scalar(returned: Any) -> Tensor:
    value = getattr(returned, "loss", returned)
    if isinstance(value, Tensor) and value.numel() != 1:
        raise InputError(
            "loss must return one number, the loss of the batch, but the value that it returned "
            f"has shape {tuple(value.shape)}: return its mean or sum"
        )
    if not isinstance(value, Tensor) or value.is_complex():
        raise InputError(
            "loss must return one number as a tensor, the loss of the batch, "
            f"not {type(value).__name__}"
        )
    return value.reshape(())


def _error(found: _Gradients) -> tuple[Error | None, float, tuple[float, ...]]:
    """Return the error whose gradient is proportional to that of the loss, and the factor.

    The third value has the factor of each channel or column, if they differ.
    """
    kinds = found.errors()
    kind = max(kinds, key=lambda kind: _cosine(found.error, kinds[kind]))
    if _cosine(found.error, kinds[kind]) > PROPORTIONAL:
        return kind, _slope(found.error, kinds[kind]), ()
    flat = found.error.norm() * (found.reconstruction - found.images).norm() < NO_SLOPE * abs(
        found.value
    )
    if flat or not found.error.any():
        return "squared", 0.0, ()
    return _error_of_groups(found)


def _error_of_groups(found: _Gradients) -> tuple[Error | None, float, tuple[float, ...]]:
    """Return the error of a loss that weighs each channel or column, as `_error` does."""
    if not groups_of(found.images):
        return None, 0.0, ()
    kinds: tuple[Error, ...] = ("squared", "absolute")
    for kind in kinds:
        power = 2 if kind == "squared" else 1
        errors = (found.reconstruction - found.images).abs().pow(power).transpose(0, 1)
        slopes = []
        for given, expected in zip(
            found.error.transpose(0, 1), found.errors()[kind].transpose(0, 1), strict=True
        ):
            if given.any() and _cosine(given, expected) < PROPORTIONAL:
                break
            slopes.append(_slope(given, expected))
        else:
            share = errors.flatten(1).sum(1)
            mean = float((torch.tensor(slopes, dtype=share.dtype) * share).sum() / share.sum())
            return kind, mean, tuple(slopes)
    return None, 0.0, ()


def groups_of(images: Values) -> int:
    """Return the number of groups of an error: columns of a table, or channels; 0: one group."""
    return images.shape[1] if images.dim() in (2, 4) and 1 < images.shape[1] <= MOST_GROUPS else 0


def _kl(found: _Gradients) -> tuple[KLFormula, float]:
    gradients = found.kls()
    slope = found.kl_slope()
    if not found.kl.any():
        return "absent", 0.0
    for formula, gradient in gradients.items():
        if _cosine(found.kl, gradient) > PROPORTIONAL:
            return formula, slope
    return ("reversed" if _cosine(found.kl, gradients["exact"]) < -PROPORTIONAL else "other"), slope


def _slope(values: Tensor, by: Tensor) -> float:
    return float((values * by).sum() / by.square().sum().clamp_min(1e-300))


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-300))


def _doubles(weight: float, other: float) -> bool:
    """Return whether a weight changed by a factor of about 2 with the number of terms.

    The weight of an average changes with the number of its terms; that of a sum does not.
    """
    return weight * other > 0 and abs(math.log2(other / weight)) > 0.5


@dataclass(frozen=True)
class InferredWeight:
    """Weights of a loss, inferred from the model that it trained.

    Attributes:
        gamma2: effective decoder variance, eq. 3.
        relative_error: standard error of gamma2 over images, divided by gamma2.
        cross_entropy: eq. 3 with a cross-entropy instead of SE / 2; 1 for a model trained with it.
            NaN if images or outputs leave [0, 1].
    """

    gamma2: float
    relative_error: float
    cross_entropy: float


def inferred_weight(vae: VAE, seen: Seen, seed: int) -> InferredWeight | None:
    """Infer the effective gamma2 of the loss that trained a VAE from its posteriors (eq. 3).

    Returns None if no latent is active, or if the result is not a positive number. The second case
    occurs if training has not converged.

    Args:
        vae: in evaluation mode.
        seen: reconstructions, at best of its training images.
        seed: seed of the posterior samples.
    """
    if not seen.active.any():
        return None
    count, device = min(len(seen.images), FEW_IMAGES), device_of(vae)
    source = generator("inferred", seed)
    numerators = torch.zeros(len(ERRORS), count, dtype=torch.float64)
    for start in range(0, count, CHUNK):
        rows = slice(start, min(start + CHUNK, count))
        mean, std, images = (
            part[rows].to(device) for part in (seen.codes.mean, seen.codes.std, seen.images)
        )
        for _ in range(PAIRS):
            noise = torch.randn(mean.shape, generator=source).to(device)
            # Antithetic draws: the part of the error that is linear in the noise cancels.
            for signed in (noise, -noise):
                numerators[:, rows] += _error_slopes(at(vae, start), images, mean, std * signed)[
                    :, :, seen.active
                ].sum(2) / (2 * PAIRS)
    denominator = (1 - seen.codes.logvar[:count].double().exp())[:, seen.active].sum(1)
    (gamma2, relative_error), (cross_entropy, _) = (
        _ratio(each, denominator) for each in numerators
    )
    if not (0 < gamma2 < math.inf and math.isfinite(relative_error)):
        return None
    within = all(
        float(part.min()) >= 0 and float(part.max()) <= 1 for part in (seen.images, seen.restored)
    )
    return InferredWeight(gamma2, relative_error, cross_entropy if within else math.nan)


@torch.enable_grad()
def _error_slopes(vae: VAE, images: Values, mean: Latents, step: Latents) -> Tensor:
    """Return s dE/ds of each error for each image and latent, (errors, n, latents).

    It is taken at one draw z = mean + step, with step = s eps.
    """
    latents = (mean + step).requires_grad_()
    restored = vae.decode(latents).float()
    if not restored.requires_grad:  # a decoder without gradients, such as one that rounds
        return torch.zeros(len(ERRORS), *latents.shape, dtype=torch.float64)
    slopes = [
        torch.autograd.grad(
            error(restored, images), latents, retain_graph=True, materialize_grads=True
        )[0]
        for error in ERRORS
    ]
    return torch.stack([(slope * step).cpu().double() for slope in slopes])


def _half_squares(reconstruction: Tensor, images: Tensor) -> Tensor:
    return (reconstruction - images).square().sum() / 2


def _cross_entropy(reconstruction: Tensor, images: Tensor) -> Tensor:
    return F.binary_cross_entropy(
        reconstruction.nan_to_num(0.0).clamp(0, 1), images.clamp(0, 1), reduction="sum"
    )


ERRORS = (_half_squares, _cross_entropy)


def _ratio(above: Tensor, below: Tensor) -> tuple[float, float]:
    """Return the ratio of two sums over images, and its relative standard error."""
    ratio = float(above.sum() / below.sum())
    scatter = (above - ratio * below).square().sum() * len(above) / max(len(above) - 1, 1)
    return ratio, float(scatter.sqrt() / above.sum().abs())
