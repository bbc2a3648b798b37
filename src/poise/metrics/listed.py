"""Lists of all metrics. To add a metric, write its function and add an entry to a list here.

`DISTANCES` compare features of produced images with features of real ones. `SIMILARITIES` compare
each image with its reconstruction. `evaluate` measures both. Its tables, its JSON and the report
show them. `FIGURES` are the numbers on the pages of an evaluation, with their names in tables.
`poise compare` shows those with `in_compare`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from poise.features import Extractor
from poise.metrics.distances import (
    Gaussian,
    distance_between,
    fit_gaussian,
    frechet_infinity,
    inception_score,
    kernel_distance,
)
from poise.metrics.manifold import Manifold, manifold_figures, squared_reaches
from poise.metrics.reconstruction import peak_signal_to_noise, structural_similarity
from poise.protocols import Protocol
from poise.shapes import Features, Images, PerImage

# Smallest subset of the extrapolation, if there are at least twice as many images.
SMALLEST_SUBSET = 5_000


class Reference:
    """Features of real images, with a cache of what all comparisons with them share.

    Args:
        features: (n, d). None: only their Gaussian is known, so metrics of features are left out.
        protocol: how they are measured.
        gaussian: their mean and covariance. None: those of the features.
    """

    def __init__(
        self, features: Features | None, protocol: Protocol, gaussian: Gaussian | None = None
    ) -> None:
        self.known, self._gaussian = features, gaussian
        self.neighbours = (protocol.precision_neighbours, protocol.coverage_neighbours)

    @property
    def features(self) -> Features:
        assert self.known is not None, "metrics of features are left out without them"
        return self.known

    @cached_property
    def gaussian(self) -> Gaussian:
        return self._gaussian or fit_gaussian(self.features)

    @cached_property
    def reaches(self) -> list[Tensor]:
        return squared_reaches(self.features, list(self.neighbours))


@dataclass(frozen=True)
class Pair:
    """Features of real and of produced images.

    Attributes:
        reference: features of the real images.
        produced: features of the produced images, (n, d).
        protocol: how they are measured, with the true numbers of images.
        extractor: the network that computed the features.
    """

    reference: Reference
    produced: Features
    protocol: Protocol
    extractor: Extractor

    @cached_property
    def manifold(self) -> Manifold | None:
        """Precision, recall, density and coverage, or None if there are too few images."""
        real = self.reference.features
        k, k_density = self.reference.neighbours
        if min(len(real), len(self.produced)) <= max(k, k_density):
            return None
        return manifold_figures(
            real,
            self.produced,
            neighbours=k,
            density_neighbours=k_density,
            real_reaches=self.reference.reaches,
        )


Value = tuple[float, float | None]  # a number and its spread


@dataclass(frozen=True)
class Distance:
    """A metric that compares produced images with real ones by their features.

    Attributes:
        name: name in tables and in the JSON. For networks other than Inception see `named_for`.
        measure: returns value and spread, or None if it cannot be measured, for example with too
            few images.
        of_network: whether the name includes the feature network, as in "KID-light".
        in_compare: whether `poise compare` shows it.
        on_request: whether it is measured only with `infinity`.
        of_features: whether it needs the features of the real images, not only mean and covariance.
        pattern: regular expression of its names; None: its name, or its name and a network.
    """

    name: str
    measure: Callable[[Pair], Value | None]
    of_network: bool = False
    in_compare: bool = False
    on_request: bool = False
    of_features: bool = True
    pattern: str | None = None

    def named_for(self, extractor: Extractor) -> str:
        """Return the metric's name for the features of a network."""
        word, _, rest = self.name.partition(" ")
        return f"{extractor.metric_name(word)} {rest}".strip() if self.of_network else self.name

    def is_called(self, name: str) -> bool:
        """Return whether `name` is a name of this metric, for any network."""
        own = f"{re.escape(self.name)}(-.+)?" if self.of_network else re.escape(self.name)
        return re.fullmatch(self.pattern or own, name) is not None


def _frechet(pair: Pair) -> Value:
    return distance_between(pair.reference.gaussian, fit_gaussian(pair.produced)), None


def _frechet_infinity(pair: Pair) -> Value | None:
    produced = pair.produced
    smallest = min(max(SMALLEST_SUBSET, produced.shape[1] + 1), len(produced) // 2)
    if smallest <= produced.shape[1]:
        return None
    found = frechet_infinity(pair.reference.features, produced, smallest=smallest)
    return found.value, found.standard_error


def _kernel(pair: Pair) -> Value:
    real, produced, protocol = pair.reference.features, pair.produced, pair.protocol
    found = kernel_distance(
        real,
        produced,
        subsets=protocol.kid_subsets,
        subset_size=protocol.kid_subset_size,
        seed=protocol.draws_seed,
    )
    equal_subsets = protocol.kid_subset_size == max(len(real), len(produced))
    return found.mean, None if equal_subsets else found.std


def _manifold(name: str) -> Callable[[Pair], Value | None]:
    return lambda pair: None if pair.manifold is None else (getattr(pair.manifold, name), None)


def _inception_score(pair: Pair) -> Value | None:
    classifier, protocol = pair.extractor.classifier, pair.protocol
    if classifier is None or len(pair.produced) < protocol.score_splits:
        return None
    logits = pair.produced.cpu() @ classifier.cpu().float().T
    score = inception_score(logits, splits=protocol.score_splits, seed=protocol.draws_seed)
    return score.mean, score.std


FRECHET = Distance(
    "FID",
    _frechet,
    of_network=True,
    in_compare=True,
    of_features=False,
    pattern=r"(FID|FD-.+)(?<! infinity)",
)
DISTANCES = [
    FRECHET,
    Distance(
        "FID infinity",
        _frechet_infinity,
        of_network=True,
        on_request=True,
        pattern=r"(FID|FD-.+) infinity",
    ),
    Distance("KID", _kernel, of_network=True),
    Distance("precision", _manifold("precision")),
    Distance("recall", _manifold("recall")),
    Distance("density", _manifold("density")),
    Distance("coverage", _manifold("coverage")),
    Distance("IS", _inception_score, of_network=True, of_features=False),
]


@dataclass(frozen=True)
class Similarity:
    """A metric that compares each image with its reconstruction.

    Attributes:
        name: name in tables and in the JSON.
        measure: returns one value per image, (n,), float64, for images and reconstructions in
            [0, 1]. Tables show the mean.
        unit: unit in the JSON.
        in_compare: whether `poise compare` shows it.
        on_page: whether a page of the evaluation has it, so that `poise evaluate` lists it there.
    """

    name: str
    measure: Callable[[Images, Images], PerImage]
    unit: str = ""
    in_compare: bool = False
    on_page: bool = False

    def is_called(self, name: str) -> bool:
        """Return whether `name` is the name of this metric."""
        return name == self.name


def _squared_error(images: Images, restored: Images) -> PerImage:
    return (images - restored).double().square().flatten(1).mean(1).cpu()


SIMILARITIES = [
    Similarity("MSE", _squared_error, "per dimension", on_page=True),
    Similarity("PSNR", peak_signal_to_noise, "dB", on_page=True),
    Similarity("SSIM", structural_similarity, on_page=True),
]


@dataclass(frozen=True)
class Figure:
    """A number on a page of an evaluation.

    Attributes:
        name: name in the tables of one run, with its unit. {page[key]} stands for another value.
        key: page and key in the JSON, such as "reconstruction.mse".
        style: format of its value.
        in_compare: its name in the tables of `poise compare`; None: not shown there.
        unless: key of another figure. If both values are equal, this figure is left out.
    """

    name: str
    key: str
    style: str
    in_compare: str | None = None
    unless: str | None = None

    def value(self, pages: dict[str, Any]) -> Any:
        """Return the value, or None if the pages lack it or it repeats another figure."""
        value = on_page(pages, self.key)
        return None if self.unless and value == on_page(pages, self.unless) else value


def on_page(pages: dict[str, Any], key: str) -> Any:
    """Return the value of a key such as "latents.active_units", or None if it is missing."""
    value: Any = pages
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


FIGURES = [
    Figure("MSE (per dimension)", "reconstruction.mse", ".5f", "test MSE (per dimension)"),
    Figure(
        "MSE as reconstructions are shown",
        "reconstruction.mse_as_shown",
        ".5f",
        unless="reconstruction.mse",
    ),
    Figure("PSNR (dB)", "reconstruction.psnr_db", ".2f"),
    Figure("SSIM", "reconstruction.ssim", ".3f"),
    Figure("KL (nats per image)", "reconstruction.kl_nats", ".2f", "KL (nats per image)"),
    Figure("ELBO (nats per image)", "reconstruction.elbo_nats", ".1f", "ELBO (nats per image)"),
    Figure("bits per dimension (8-bit values)", "reconstruction.bits_per_dim", ".3f"),
    Figure("NLL, {likelihood[samples]} samples (nats per image)", "likelihood.mean_nats", ".1f"),
    Figure("   effective share of the samples", "likelihood.effective_share", ".4f"),
    Figure("   share of images that are certain", "likelihood.certain_share", ".3f"),
    Figure("gamma2 (decoder variance)", "reconstruction.gamma2", ".5f", "gamma2"),
    Figure(
        "quadratic term over D/2",
        "reconstruction.quadratic_share",
        ".3f",
        "quadratic term over D/2",
    ),
    Figure("variance lost (per dimension)", "reconstruction.variance_lost", ".5f"),
    Figure("   over MSE", "reconstruction.variance_lost_share", ".3f"),
    Figure("training codes: active latents", "latents.active_units", "d", "active latents"),
    Figure("training codes: Var(mu) + {latents[noise_term]}", "latents.variance_law", ".3f"),
    Figure(
        "training codes: KL of their Gaussian from N(0, I), nats",
        "latents.aggregate.gaussian_kl_nats",
        ".3f",
    ),
    Figure("stage 2, training codes: MSE (per latent)", "second_stage.mse_sampled", ".4f"),
    Figure(
        "stage 2, training codes: variance lost (per latent)", "second_stage.variance_lost", ".4f"
    ),
    Figure("stage 2: gamma2", "second_stage.gamma2", ".4f"),
    Figure("stage 2, training codes: active latents", "second_stage.active_units", "d"),
    Figure(
        "stage 2, training codes: Var(mu) + {second_stage[noise_term]}",
        "second_stage.variance_law",
        ".3f",
    ),
    Figure("training time (seconds)", "seconds", ".0f"),
]


def figures_table(pages: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a row for each figure of the pages: its name with its unit, and its value."""
    values = [(figure, figure.value(pages)) for figure in FIGURES]
    return [
        (figure.name.format(**pages), format(value, figure.style))
        for figure, value in values
        if value is not None
    ]


def is_frechet(metric: str) -> bool:
    """Return whether a metric is a Frechet distance of any network: FID, FD-light, ..."""
    return FRECHET.is_called(metric)


def is_compared(metric: str) -> bool:
    """Return whether the tables of `poise compare` show a metric."""
    return any(m.in_compare and m.is_called(metric) for m in (*DISTANCES, *SIMILARITIES))


def is_tabulated(metric: str) -> bool:
    """Return whether `poise evaluate` shows a metric beside the figures of the pages."""
    beside = (*DISTANCES, *(m for m in SIMILARITIES if not m.on_page))
    return any(m.is_called(metric) for m in beside)
