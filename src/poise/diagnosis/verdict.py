"""What a diagnosis says, and beyond which figure something is a finding."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from poise.variants import PRIORS

IMBALANCED = (
    1.5  # equivalent beta read from the loss; computed, learned and optimal balances: 0.9 to 1.1
)
INFERRED_IMBALANCED = 2.0  # equivalent beta inferred from the model; balanced models: 0.65 to 1.6
OVERFITTED = 2.0  # MSE of new over training images: gamma2, right for these, is then as wrong for new ones as an imbalance;
# 8x8 digits: 1.1 after 1,500 steps on 1,500 images, 1.6 after the recipe's 3,200, 10 with 100 images, 700 with 20
GAP = 0.1  # distance of samples less that of reconstructions, share of variance; healthy 8x8 digits: 0.08, with KL x 0.1: 0.21
CLOSED = 0.5  # share of that gap that another prior must close
UNDERFITTED = (
    1.5  # MSE over that of the best linear VAE; trained ones, digits and Fashion-MNIST: 0.3 to 1.0
)
STILL_FALLING = 0.05  # of an MSE from about 70 % of training to its last tenth, as a share of the variance of what is learned;
# the digits' recipe 0.01 in stage 1 and 0.03 in stage 2; a second stage on its way from 1.2 to 0.7 has 0.1
OUT_OF_REACH = 0.5  # share of the squared error: with more, no training can mend it; a sigmoid that misses 1 by little has 1e-3
LARGE_VALUES = 5.0  # of images: standardised ones stay within, bytes do not
LARGE_LOGVAR = (
    20.0  # posteriors of a variance of e^20 are none; on 8x8 digits, trained ones stay below 0.3
)
SURE = 2.0  # standard errors by which two MSEs must differ


def white(most: float) -> float:
    """What to divide images by: 255 for bytes, whose greatest value may be missing."""
    return 255.0 if 128 < most <= 255 else most


Name = Literal[
    "not-finite",  # NaN or infinite values in images, weights, outputs or KL
    "data-range",  # images have values that the decoder cannot produce, or other ones than in training
    "no-gradient",  # the loss does not change with the reconstruction, or with nothing at all
    "diverged",  # numbers are finite, but beyond all measure
    "hardly-trained",  # worse than a decoder that gives the mean image
    "other-images",  # train_images that the model was not trained on
    "dead-decoder",  # the output is the same for every latent, to rounding
    "norm-unsettled",  # BatchNorm's running averages are far from the statistics of the images
    "kl-formula",  # the loss's KL term is not that of (mean, logvar)
    "reduction",  # means where the evidence lower bound has sums
    "over-regularised",  # the KL counts for too much
    "under-regularised",  # the KL counts for too little
    "posterior-collapse",  # latents that should carry information carry none
    "too-few-images",  # trained on so few that it learned them by heart
    "overfitting",  # new images are reconstructed much worse than training images
    "underfitted",  # worse than the best linear VAE with as many latents
    "still-falling",  # the error of a stage was still falling when training ended
    "prior-gap",  # samples are much worse than reconstructions, and another prior helps
    "variance-lost",  # samples vary too little, and renormalising the latents helps
]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        name: of the cause, see `Name`.
        sentence: what it is, in plain words, with the figures that show it.
        figures: those figures.
        remedy: the one thing to try.
    """

    name: Name
    sentence: str
    figures: Mapping[str, float]
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """All that is wrong, and all that was measured. `print` it to read it.

    Attributes:
        findings: the most fundamental cause first; empty for a healthy model.
        figures: everything that was measured, by name: `mse` and the like per dimension, from posterior samples; `kl_nats`
            per image; `distance_...`: Frechet distance between pixels as a share of the images' variance.
        notes: what limits the diagnosis.
    """

    findings: tuple[Finding, ...]
    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        return not self.findings

    @property
    def cause(self) -> Finding | None:
        """The most fundamental finding: what to cure first."""
        return self.findings[0] if self.findings else None

    @property
    def verdict(self) -> str:
        """One sentence on a model with no findings."""
        return _verdict(self.figures)

    @property
    def evidence(self) -> list[str]:
        """The figures that show health, and how far they may go, a sentence each."""
        return evidence(self.figures)

    def to_json(self) -> dict[str, Any]:
        """Plain values. Numbers that JSON does not know (NaN, infinite) become the words "nan", "inf", "-inf"."""
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
        return "Healthy: nothing wrong was found."
    return "Nothing wrong was found in the model; the loss could not be read, see the note."


def evidence(figures: Mapping[str, Any]) -> list[str]:
    """The figures that show health, and how far they may go, in words; what was not measured is left out."""
    samples = ", ".join(
        f"{{distance_{name}:.3f}} ({name.replace('-', ' ')})"
        for name in PRIORS
        if f"distance_{name}" in figures
    )
    templates = {
        "images_least": "the images' values, {images_least:.3g} to {images_most:.3g}, are within the decoder's reach; half of "
        "the squared error outside would be a fault",
        "equivalent_beta": "the KL's weight is {equivalent_beta:.2f} of the balanced one; from {balanced_from:.2g} to "
        "{balanced_to:.2g} counts as balanced",
        "active_latents": "{active_latents} of {latents} latents are active; those that are not cost nothing, but none would "
        "be a collapse",
        "variance_law": "the codes' variance is {variance_law:.2f} times the prior's, on average over latents; 1 is ideal, and "
        "alone it is no fault",
        "linear_mse": "reconstructions leave {mse_share:.0%} of the images' variance, the best linear VAE with as many "
        f"latents {{linear_share:.0%}}; {UNDERFITTED:g} times as much would be underfitting",
        "mse_fell_2": "the second stage's MSE went from {mse_before_2:.3g} to {mse_after_2:.3g} in the last third of its "
        f"training; a fall by {STILL_FALLING:.0%} of the codes' variance would be too much",
        "mse_train": "the MSE is {mse_train:.4g} on training images and {mse:.4g} on the others; "
        f"{OVERFITTED:g} times as much would be overfitting",
        "followed_gamma2": "the loss followed the training error to {followed_gamma2:.4g}, and the MSE is {mse:.4g} on these "
        f"images; {OVERFITTED:g} times as much would be overfitting",
        "distance_normal": "Frechet distance from the images, as a share of their variance: reconstructions "
        f"{{distance_reconstructions:.3f}}, samples {samples}; a gap of {GAP:g} that another prior closes by half would be a "
        "fault",
    }
    return [text.format(**figures) for name, text in templates.items() if name in figures]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
