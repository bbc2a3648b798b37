"""Protocols: all conditions of a comparison of images, with a hash that identifies them.

FIDs of different papers often differ because of their protocols alone. The reference may be the
training or the test images, and their number may differ. Images may be JPEG-compressed, rounded to
bytes, or stretched each to its own range. docs/metrics.md shows the effect of each choice.

This module imports no torch, because the command reads it for its help.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from poise.errors import InputError
from poise.recipes.presets import RELEASED_GENERATION
from poise.recipes.settings import Generation, check_values
from poise.support.version import __version__

HASH_LENGTH = 10
NO_EXTRACTOR = "none"
# Who computed reference statistics with the network and the resize of Poise's FID, and who did not.
ORIGINS = {
    "torch-fidelity": "its extractor inception-v3-compat, feature 2048",
    "clean-fid-legacy-tensorflow": 'mode "legacy_tensorflow"',
    "ttur": "the original FID of TensorFlow",
}
OTHERS = {
    "clean-fid-clean": "it resizes with antialiasing",
    "clean-fid-legacy-pytorch": "it has another network and another resize",
    "pytorch-fid": "it resizes with half-pixel centres",
}


@dataclass(frozen=True)
class Protocol:
    """Describe all conditions of a comparison of images, except the model.

    Attributes:
        name: name of the protocol. It does not change the hash.
        reference: source of the real images: the "test" or the "train" side of the data, or "given"
            by the user.
        real: number of real images. None: all.
        chosen: which ones if there are more. "spaced": evenly spaced, because files are often
            sorted by class. "first": the first ones, as in the released code. Empty: spaced; filled
            in when measured.
        generated: number of images for each label. None: as many as there are real ones (of a given
            set, all).
        pixels: "8-bit": rounded to the nearest of 256 levels. "float": as the network returns them.
        stretch: stretch each produced image to its own minimum and maximum first (Dai & Wipf's
            evaluation).
        jpeg: compress real images with JPEG at this quality, also those to reconstruct (the
            released CIFAR-10 loader: 75). 1 to 95. None: no JPEG.
        generation: how images are sampled and reconstructed. None: as the run's recipe says; filled
            in when measured.
        side: side of the compared images, in pixels. None: not known yet.
        extractor: network whose features are compared (see `poise.features.make_extractor`).
        extractor_checksum: SHA-256 of its weights. Empty until it is loaded.
        resize: how the extractor resizes images first, in words. Empty until it is loaded.
        kid_subsets, kid_subset_size: number and size of the subsets of the kernel distance (KID).
        draws_seed: seed of these subsets, and of the inception score's splits.
        precision_neighbours: neighbours for precision and recall.
        coverage_neighbours: neighbours for density and coverage.
        score_splits: splits of the inception score.
        statistics: who computed the mean and covariance of the real images, if another library did
            (see `poise.metrics.reference_statistics`). Empty: Poise, from the images.
    """

    name: str
    reference: Literal["test", "train", "given"] = "test"
    real: int | None = 10_000
    generated: int | None = None
    pixels: Literal["8-bit", "float"] = "8-bit"
    stretch: bool = False
    jpeg: int | None = None
    generation: Generation | None = None
    side: int | None = None
    extractor: str = "inception"
    extractor_checksum: str = ""
    resize: str = ""
    kid_subsets: int = 100
    kid_subset_size: int = 1_000
    draws_seed: int = 2020
    precision_neighbours: int = 3
    coverage_neighbours: int = 5
    score_splits: int = 10
    statistics: str = ""
    chosen: Literal["", "spaced", "first"] = ""

    def __post_init__(self) -> None:
        check_values(self)
        least = {
            "real": 1,
            "generated": 1,
            "side": 1,
            "jpeg": 1,
            "kid_subsets": 1,
            "kid_subset_size": 2,
            "score_splits": 1,
        }
        for name, bound in (least | {"precision_neighbours": 1, "coverage_neighbours": 1}).items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise InputError(f"a protocol's {name} must be at least {bound}, not {value}")
        if self.jpeg is not None and self.jpeg > 95:
            raise InputError(f"a protocol's jpeg must be at most 95, not {self.jpeg}")

    @property
    def hash(self) -> str:
        """Ten hexadecimal digits that depend on every attribute except the name.

        Attributes with their default value are left out. An attribute that a later version adds
        then leaves older hashes unchanged. So does `chosen="first"`, which was the only choice.
        """
        settings = _differing(self) | (
            {"generation": _differing(self.generation)} if self.generation else {}
        )
        settings.pop("name")
        if self.chosen == "first":
            settings.pop("chosen")
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[
            :HASH_LENGTH
        ]

    @property
    def complete(self) -> bool:
        """Whether the counts and the checksum of the extractor's weights are known."""
        known = self.extractor == NO_EXTRACTOR or self.extractor_checksum
        return bool(self.real and self.generated is not None and known)

    def __str__(self) -> str:
        jpeg = f" after JPEG {self.jpeg}" if self.jpeg else ""
        side = f" of side {self.side}" if self.side else ""
        spaced = "spaced " if self.chosen == "spaced" else ""
        images = f"{self.real} {spaced}{self.reference} images{side}{jpeg}"
        if self.extractor == NO_EXTRACTOR:
            return f"{self.name} ({self.hash}), figures of the model: {images}"
        produced = f"{self.generated} produced" + (
            ", each stretched to its own range" if self.stretch else ""
        )
        network = f"{self.extractor} {self.extractor_checksum[:8]}, {self.resize}"
        if self.statistics:
            images += f" as statistics of {self.statistics}"
        return f"{self.name} ({self.hash}): {images} against {produced}, {self.pixels}, {network}"


def _differing(settings: Any) -> dict[str, Any]:
    return {
        f.name: getattr(settings, f.name)
        for f in fields(settings)
        if getattr(settings, f.name) != f.default
    }


def model_protocol(protocol: Protocol, *, generation: Generation | None = None) -> Protocol:
    """Return the part of a protocol that affects figures of the model, such as error or likelihood.

    Args:
        protocol: with its number of real images and their side.
        generation: how the images were made, for figures that depend on it.
    """
    images = Protocol(
        protocol.name,
        protocol.reference,
        jpeg=protocol.jpeg,
        side=protocol.side,
        generation=generation,
        chosen=protocol.chosen,
    )
    return replace(
        images, real=protocol.real, generated=protocol.real, pixels="float", extractor=NO_EXTRACTOR
    )


def of_unseen_images(protocol: Protocol, there: int) -> Protocol:
    """Return the protocol of the model's own figures, which are those of test images.

    A protocol may compare with training images. Error and ELBO are then measured on test images.

    Args:
        protocol: with its number of real images.
        there: number of test images.
    """
    if protocol.reference != "train":
        return protocol
    policy = "" if protocol.chosen == "spaced" else protocol.chosen
    return with_real(replace(protocol, reference="test", chosen=policy), there)


def with_real(protocol: Protocol, there: int) -> Protocol:
    """Return the protocol with the number of real images, and how they are chosen.

    Args:
        protocol: its number of real images may be unknown or too large.
        there: number of images of its side.
    """
    real = min(protocol.real or there, there)
    spaced = not protocol.chosen and real < there
    return replace(protocol, real=real, chosen="spaced" if spaced else protocol.chosen)


DEFAULT = Protocol("default")
RELEASED_CELEBA = Protocol(
    "released-celeba",
    real=9_984,
    pixels="float",
    generation=RELEASED_GENERATION,
    chosen="first",
)

PROTOCOLS: dict[str, Protocol] = {
    "default": DEFAULT,
    "released": replace(RELEASED_CELEBA, name="released", jpeg=75),
    "released-celeba": RELEASED_CELEBA,
    "dai-wipf": replace(DEFAULT, name="dai-wipf", stretch=True),
    "50k-train": replace(DEFAULT, name="50k-train", reference="train", real=50_000),
    "every-image": replace(DEFAULT, name="every-image", reference="given", real=None),
}
"""The protocols by name.

default: raw test images, 8 bits.
released: the authors' CIFAR-10 evaluation, with generation as released.
released-celeba: the same without JPEG.
dai-wipf: the evaluation of Dai & Wipf 2019.
50k-train: the evaluation of CIFAR-10 in the GAN and diffusion literature.
every-image: all images of two given sets.
"""


def find_protocol(protocol: str | Protocol) -> Protocol:
    """Return the protocol of a name. A `Protocol` is returned as it is.

    Raises:
        InputError: no protocol has this name.
    """
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        close = get_close_matches(protocol, PROTOCOLS, 1)
        guess = f"; did you mean {close[0]}?" if close else ""
        raise InputError(
            f"there is no protocol {protocol!r}: there are {', '.join(PROTOCOLS)}{guess}"
        )
    return PROTOCOLS[protocol]


def with_count(protocol: Protocol, count: int | None) -> Protocol:
    """Return the protocol with `count` real images and as many generated ones. None: unchanged.

    Raises:
        InputError: fewer than two images, which cannot be compared.
    """
    if count is None:
        return protocol
    if count < 2:
        raise InputError(f"at least 2 images are needed to compare, not {count}")
    return replace(protocol, real=count, generated=None)


@dataclass(frozen=True)
class Measurement:
    """A number with all that is needed to compare it with others.

    Attributes:
        metric: "FID", "KID", "precision", "MSE", "ELBO", ...
        of: what was measured: REC, the label of a prior (GEN-1, ...), or a name from the user.
        value: value in `unit`.
        protocol: a complete protocol.
        spread: standard deviation over subsets (KID) or splits (IS), or standard error (NLL, and an
            extrapolation to infinity). None for other metrics.
        unit: unit of the value. "" for a pure number.
        data: first twelve digits of the SHA-256 of the real images. Only numbers with equal `data`
            are comparable.
        seed: seed of the images' noise.
        device: where the networks ran.
        version: version of Poise.
    """

    metric: str
    of: str
    value: float
    protocol: Protocol
    spread: float | None = None
    unit: str = ""
    data: str = ""
    seed: int = 0
    device: str = "cpu"
    version: str = __version__

    def __post_init__(self) -> None:
        if not isinstance(self.protocol, Protocol) or not self.protocol.complete:
            raise InputError(
                f"{self.metric} of {self.of} needs a complete protocol: "
                "counts, and the extractor's checksum"
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the protocol as its hash. NaN and infinite values become None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        value = self.value if math.isfinite(self.value) else None
        return values | {"value": value, "protocol": self.protocol.hash}


def protocols_json(measurements: Iterable[Measurement]) -> dict[str, Any]:
    """Return the protocols of measurements as plain values, by hash."""
    return {m.protocol.hash: asdict(m.protocol) for m in measurements}


def table(measurements: Iterable[Measurement], *, mixed: bool = False) -> list[list[str]]:
    """Return the measurements as rows of cells: one row per thing measured, one column per metric.

    The first row is the header.

    Args:
        measurements: each metric under one protocol and with the same real images.
        mixed: allow several protocols and real images. A column of hashes then tells them apart.

    Raises:
        InputError: a metric was measured under several protocols or with several sets of real
            images, and `mixed` is False; or a cell has two values.
    """
    measurements = list(measurements)
    metrics = list(dict.fromkeys(m.metric for m in measurements))
    conditions = {
        metric: {(m.protocol.hash, m.data) for m in measurements if m.metric == metric}
        for metric in metrics
    }
    several = sorted(metric for metric in metrics if len(conditions[metric]) > 1)
    if several and not mixed:
        what = (
            f"{', '.join(several)} measured under several protocols, or against other real images,"
        )
        raise InputError(f"{what} cannot stand in one table: show the hashes with mixed=True")
    rows: dict[tuple[str, str], dict[str, Measurement]] = {}
    for m in measurements:
        cells = rows.setdefault(
            (m.of, f"{m.protocol.hash} {m.data}".strip() if several else ""), {}
        )
        if m.metric in cells:
            raise InputError(
                f"{m.metric} of {m.of} is given twice: "
                "give one of them, or a mean and spread over seeds"
            )
        cells[m.metric] = m
    head = ["", *(["protocol, images"] if several else []), *metrics]
    return [
        head,
        *(
            [of, *([code] if several else []), *_cells(cells, metrics)]
            for (of, code), cells in rows.items()
        ),
    ]


def _cells(cells: dict[str, Measurement], metrics: list[str]) -> list[str]:
    return [show(cells[metric]) if metric in cells else "" for metric in metrics]


def show(measurement: Measurement) -> str:
    """Return the value as text, rounded to meaningful digits, with its spread."""
    size = abs(measurement.value)
    style = ".2f" if size >= 10 else ".4f" if size >= 0.1 or size == 0 else ".3g"
    spread = f" ± {measurement.spread:{style}}" if measurement.spread is not None else ""
    return f"{measurement.value:{style}}{spread}"
