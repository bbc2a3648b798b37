"""Result of a diagnosis, and the thresholds beyond which a figure becomes a finding."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from poise.variants import PRIORS

# Equivalent beta read from the loss. Computed, learned and optimal balances: 0.9 to 1.1.
IMBALANCED = 1.5
# Equivalent beta inferred from the model. Balanced models: 0.65 to 1.6.
INFERRED_IMBALANCED = 2.0
# MSE of new images over MSE of training images. Beyond it, gamma2 is right for the training images
# but as wrong for new images as in an imbalance. 8x8 digits: 1.1 after 1,500 steps on 1,500 images,
# 1.6 after the recipe's 3,200 steps, 10 with 100 images, 700 with 20.
OVERFITTED = 2.0
# Distance of samples minus distance of reconstructions, as a share of the variance. Healthy 8x8
# digits: 0.08; with KL x 0.1: 0.21.
GAP = 0.1
CLOSED = 0.5  # share of that gap that another prior must close
# MSE over that of the best linear VAE. Trained models on digits and Fashion-MNIST: 0.3 to 1.0.
UNDERFITTED = 1.5
# Fall of the MSE from about 70 % of training to its last tenth, as a share of the variance of what
# is learned. The digits' recipe: 0.01 in stage 1 and 0.03 in stage 2. A second stage whose MSE
# falls from 1.2 to 0.7 in all has 0.1.
STILL_FALLING = 0.05
# Share of the squared error. Beyond it, no training can fix the error. A sigmoid that nearly
# reaches 1 has 1e-3.
OUT_OF_REACH = 0.5
LARGE_VALUES = 5.0  # values of images: standardised images stay below, bytes do not
# A posterior variance of e^20 is meaningless. Trained models on 8x8 digits stay below 0.3.
LARGE_LOGVAR = 20.0
SURE = 2.0  # standard errors by which two MSEs must differ


def white(most: float) -> float:
    """Return the divisor that scales images to [0, 1]: 255 for bytes, else the largest value.

    A set of bytes may lack the value 255, so any maximum above 128 counts as bytes.
    """
    return 255.0 if 128 < most <= 255 else most


Name = Literal[
    "not-finite",  # NaN or infinite values in images, weights, outputs or KL
    "data-range",  # values that the decoder cannot produce, that use little of the range, or that
    # have another range than in training
    "no-gradient",  # the loss does not depend on the reconstruction, or on anything
    "diverged",  # numbers are finite, but far too large
    "hardly-trained",  # worse than a decoder that returns the mean image
    "other-images",  # train_images that the model was not trained on
    "dead-decoder",  # the output is the same for every latent, up to rounding
    "norm-unsettled",  # BatchNorm's running averages are far from the statistics of the images
    "kl-formula",  # the loss's KL term is not that of (mean, logvar)
    "reduction",  # means where the evidence lower bound has sums
    "over-regularised",  # the KL weight is too large
    "under-regularised",  # the KL weight is too small
    "posterior-collapse",  # latents that should carry information carry none
    "too-few-images",  # overfitting because of too few training images
    "overfitting",  # new images are reconstructed much worse than training images
    "underfitted",  # worse than the best linear VAE with as many latents
    "dominating-error",  # one column or channel makes nearly the whole error of the loss
    "learned-by-heart",  # one column or channel is overfitted, though the mean error is not
    "late-spike",  # the training error rose suddenly and did not recover
    "still-falling",  # the error of a stage was still falling when training ended
    "prior-gap",  # samples are much worse than reconstructions, and another prior helps
    "variance-lost",  # samples vary too little, and renormalising the latents helps
]


@dataclass(frozen=True)
class Finding:
    """One fault of a model, with its remedy.

    Attributes:
        name: name of the cause, see `Name`.
        sentence: description of the fault, with the figures that show it.
        figures: those figures by name.
        remedy: the one thing to try.
    """

    name: Name
    sentence: str
    figures: Mapping[str, float]
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """Findings and figures of a diagnosis. Use `print` to read it.

    Attributes:
        findings: the faults, the most fundamental first; empty for a healthy model.
        figures: all measurements by name. `mse` and its like are per dimension, from posterior
            samples. `kl_nats` is per image. `distance_...` is a Frechet distance between pixels as
            a share of the images' variance.
        notes: limits of the diagnosis.
    """

    findings: tuple[Finding, ...]
    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        return not self.findings

    @property
    def cause(self) -> Finding | None:
        """The most fundamental finding, to fix first; None for a healthy model."""
        return self.findings[0] if self.findings else None

    @property
    def verdict(self) -> str:
        """One sentence about a model without findings."""
        return _verdict(self.figures)

    @property
    def evidence(self) -> list[str]:
        """The figures that show that the model is healthy, one sentence each, with thresholds."""
        return evidence(self.figures)

    def to_json(self) -> dict[str, Any]:
        """Return the diagnosis as values for JSON. NaN and infinity become "nan", "inf", "-inf"."""
        parts = {
            "healthy": self.healthy,
            "findings": [asdict(finding) for finding in self.findings],
        }
        return _plain(parts | {"figures": dict(self.figures), "notes": list(self.notes)})

    def __str__(self) -> str:
        lines = (
            [_verdict(self.figures), *(f"- {line}" for line in evidence(self.figures))]
            if self.healthy
            else []
        )
        for number, finding in enumerate(self.findings, 1):
            lines += [f"{number}. {finding.name}: {finding.sentence}", f"   Try: {finding.remedy}"]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def _verdict(figures: Mapping[str, Any]) -> str:
    if figures.get("loss_known", True):
        short = ", but training was short (see the note)" if figures.get("short") else ""
        return f"Healthy: nothing wrong was found{short}."
    return "Nothing wrong was found in the model; the loss could not be read, see the note."


def evidence(figures: Mapping[str, Any]) -> list[str]:
    """Return the figures that show that the model is healthy, one sentence each, with thresholds.

    Figures that were not measured are left out.
    """
    samples = ", ".join(
        f"{{distance_{name}:.3f}} ({name.replace('-', ' ')})"
        for name in PRIORS
        if f"distance_{name}" in figures
    )
    templates = {
        "images_least": "the decoder can produce the images' values, {images_least:.3g} to "
        "{images_most:.3g}; it is a fault if half of the squared error comes from values that it "
        "cannot produce",
        "equivalent_beta": "the KL weight is {equivalent_beta:.2f} of the balanced one; from "
        "{balanced_from:.2g} to {balanced_to:.2g} counts as balanced",
        "active_latents": "{active_latents} of {latents} latents are active; inactive latents cost "
        "nothing, but a model without active latents has collapsed",
        "variance_law": "the codes' variance is {variance_law:.2f} times the prior's, on average "
        "over latents; 1 is ideal, and another value alone is not a fault",
        "linear_mse": "the MSE is {mse_share:.0%} of the images' variance ({linear_share:.0%} for "
        f"the best linear VAE with {{linear_latents}} latents); {UNDERFITTED:g} times the latter "
        "is underfitting",
        "detail": "reconstructions have {detail:.0%} of the images' differences between "
        "neighbouring pixels; less than that of a sharp image is blur, which longer training or "
        "more latents reduce",
        "mse_fell_1": "the MSE went from {mse_before_1:.3g} to {mse_after_1:.3g} in the last third "
        f"of training; a fall by {STILL_FALLING:.0%} of the images' variance is too much",
        "mse_fell_2": "the second stage's MSE went from {mse_before_2:.3g} to {mse_after_2:.3g} in "
        f"the last third of its training; a fall by {STILL_FALLING:.0%} of the codes' variance is "
        "too much",
        "mse_train": "the MSE is {mse_train:.4g} on training images and {mse:.4g} on the others; "
        f"{OVERFITTED:g} times the first is overfitting",
        "followed_gamma2": "gamma2 followed the training error to {followed_gamma2:.4g}, and the "
        f"MSE on these images is {{mse:.4g}}; {OVERFITTED:g} times the first is overfitting",
        "distance_normal": "Frechet distance from the images, as a share of their variance: "
        f"reconstructions {{distance_reconstructions:.3f}}, samples {samples}; a gap of {GAP:g} is "
        "a fault if another prior closes half of it",
    }
    return [text.format(**figures) for name, text in templates.items() if name in figures]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
