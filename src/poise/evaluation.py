"""Compare sets of images under a protocol: real ones with reconstructed or generated ones."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from poise.data import find_images, gather, head, spread
from poise.data.decoding import jpeg_round_trip, stretch_each, to_bytes
from poise.data.listing import is_run
from poise.errors import InputError, MissingExtraError
from poise.features import Extractor, available_inception, cached_features, extract, make_extractor
from poise.metrics import ImportanceWeightedNLL, Reconstruction
from poise.metrics.distances import covariance, fit_gaussian
from poise.metrics.encoding import CHUNK
from poise.metrics.listed import DISTANCES, SIMILARITIES, Pair, Reference, is_frechet
from poise.metrics.reference_statistics import (
    Conditions,
    ReferenceStatistics,
    is_statistics,
    read_statistics,
    write_statistics,
)
from poise.protocols import (
    NO_EXTRACTOR,
    Measurement,
    Protocol,
    find_protocol,
    model_protocol,
    protocols_json,
    table,
    with_count,
    with_real,
)
from poise.shapes import ByteImages, Features, Images
from poise.support.files import strict
from poise.support.version import __version__
from poise.training.machine import choose_device

# With fewer images, the covariance of Inception's 2048 features does not have full rank.
FEW_IMAGES = 2_048
# Number of real images, and of others, from which the Frechet distance in an extractor's features
# ranked damaged images rightly (benchmarks/distances.py, docs/metrics.md).
QUALIFIED = {"light": 1_000, "pixels": 2_000}
AUTO = "auto"


@dataclass(frozen=True)
class Produced:
    """A set of images to compare with real ones.

    Attributes:
        label: REC, GEN-1, GEN-2, ...
        chunks: returns n images, in chunks of floats in [0, 1].
        count: number of images. None: unlimited.
        seed: seed of their noise.
    """

    label: str
    chunks: Callable[[int], Iterator[Images]]
    count: int | None = None
    seed: int = 0


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Store all results of an evaluation. `print` shows them as a table, and so does a notebook.

    Attributes:
        measurements: numbers to compare with others, each with its protocol.
        pages: details of a model: "reconstruction", "latents", "second_stage".
        notes: remarks that are needed to interpret the numbers.
    """

    measurements: tuple[Measurement, ...]
    pages: dict[str, dict[str, Any]]
    notes: tuple[str, ...] = ()

    def value(self, metric: str, of: str | None = None) -> float:
        """Return one number, for example `evaluation.value("FID", "GEN-2")`.

        Args:
            metric: name of the metric.
            of: what was measured. It may be left out if there is only one.

        Raises:
            InputError: the number was not measured, or it was measured of several things.
        """
        found = [m for m in self.measurements if m.metric == metric and of in (None, m.of)]
        if len(found) != 1:
            sets = ", ".join(dict.fromkeys(m.of for m in self.measurements))
            known = ", ".join(dict.fromkeys(m.metric for m in self.measurements))
            problem = "ambiguous: name one with `of`" if found else "not measured"
            raise InputError(
                f"{metric} of {of or 'any set'} is {problem}; there are {known}, of {sets}"
            )
        return found[0].value

    def distance(self, of: str | None = None) -> float:
        """Return the Frechet distance of a set, whichever network measured it: FID, FD-light, ...

        Args:
            of: see `value`.

        Raises:
            InputError: see `value`.
        """
        names = [m.metric for m in self.measurements if is_frechet(m.metric)]
        return self.value(names[0] if names else "FID", of)

    def __str__(self) -> str:
        rows = self.table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__  # the default would print all pages

    def _repr_html_(self) -> str:
        """Return the table and the notes as HTML, for a notebook."""
        head, *body = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self.table()]
        rows = "".join(f"<tr>{cells}</tr>" for cells in body)
        notes = "".join(f"<p>note: {escape(note)}</p>" for note in self.notes)
        head = head.replace("td>", "th>")
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{notes}"

    def table(self) -> list[list[str]]:
        """Return the table as rows of cells, the header first.

        If a metric was measured under several protocols, a column shows their hashes. See
        `poise.protocols.table`.
        """
        return table(self.measurements, mixed=True)

    def to_json(self) -> dict[str, Any]:
        """Return plain values.

        Each measurement names its protocol by hash. The key "protocols" holds the protocols in
        full.
        """
        measurements = [m.to_json() for m in self.measurements]
        protocols = protocols_json(self.measurements)
        head = {"poise": __version__, "notes": list(self.notes)}
        return strict(head | {"protocols": protocols, "measurements": measurements} | self.pages)


def evaluate(
    real: Any,
    generated: Any,
    *,
    protocol: str | Protocol = "every-image",
    extractor: str = AUTO,
    size: int | None = None,
    count: int | None = None,
    infinity: bool = False,
    device: str = "auto",
    quiet: bool = True,
    skip_unreadable: bool = False,
    levels: int | None = None,
    max_megapixels: int | None = None,
) -> Evaluation:
    """Compare two sets of images.

    Args:
        real, generated: each a folder, an image array, a file with one, hf:owner/name or a data
            set's name; or an array or tensor, bytes or floats in [0, 1]. If a data set has an
            official split, its test images are used (its training images if the protocol's
            reference is "train"). Otherwise all images are used. The protocol may limit the number,
            and says which ones are used (`Protocol.chosen`). `real` may also be reference
            statistics, or a file of them: see `poise.metrics.read_statistics`.
        protocol: a name or a `Protocol`.
        extractor: "inception", "light", "dinov2", "pixels", or a TorchScript file. "auto": the
            protocol's, or "light" if Inception's weights are not on this machine.
        size: crop both sets to the centre square and resize to this side, in pixels.
        count: number of images of each set, chosen as the protocol says (`Protocol.chosen`). None:
            as the protocol says.
        infinity: also extrapolate the Frechet distance to infinitely many images.
        device: where the extractor runs.
        quiet: show no progress.
        skip_unreadable, levels, max_megapixels: how to read the images; see `poise.data.load`.

    Returns:
        Every distance between the sets, with its protocol, and notes.

    Raises:
        InputError: images cannot be read or compared, or the extractor is not available.

    Example:
        >>> poise.evaluate("photos/", "samples/").value("FID", "generated")      # doctest: +SKIP
        31.4
    """
    for source in (real, generated):
        if isinstance(source, (str, Path)) and is_run(Path(source)):
            raise InputError(
                f"{source} is a run: poise evaluate {source} measures it, "
                "or write its samples to a folder"
            )
    if is_statistics(generated):
        raise InputError("generated images cannot be statistics: give the images themselves")
    reading: dict[str, Any] = {
        "size": size,
        "skip_unreadable": skip_unreadable,
        "levels": levels,
        "max_megapixels": max_megapixels,
    }
    wanted = find_protocol(protocol)
    limited = with_count(wanted, count)
    if is_statistics(real):
        others = find_images(generated, side=_side(wanted), **reading)
        if len(others.images) < 2:
            raise InputError("generated images: at least 2 are needed to compare")
        reading_notes = tuple(f"generated images: {note}" for note in others.notes)
        if wanted.real is None:  # all generated images, as with real ones
            number = count or wanted.generated or len(others.images)
            wanted = replace(wanted, generated=number)
        originals, conditions, network, notes = prepare_statistics(
            real, wanted, extractor, choose_device(device), others.images.shape[-1]
        )
        others = others.images
    else:
        wanted = limited
        found, others = (
            find_images(source, side=_side(wanted), **reading) for source in (real, generated)
        )
        reading_notes = (
            *(f"real images: {note}" for note in found.notes),
            *(f"generated images: {note}" for note in others.notes),
        )
        conditions, network, notes = _conditions(wanted, extractor, device, found.side)
        if wanted.real is None:  # all images of both sets, also beside an official split
            number = conditions.generated or len(others.images)
            conditions = replace(conditions, generated=number)
        conditions = with_real(conditions, len(found.images))
        originals, others = real_images(found.images, conditions), others.images
        check_sides(originals, others)
    others = spread(others, count or len(others))
    produced = Produced(
        "generated", lambda count: chunks_of(spread(others, count), count), len(others)
    )
    measured = compare(originals, [produced], conditions, network, infinity=infinity, quiet=quiet)
    if isinstance(originals, ReferenceStatistics):
        infinity = False  # the note says that it is left out
    else:
        notes += tuple(oddities(originals, others))
    return Evaluation(tuple(measured), {}, (*reading_notes, *notes, *remarks(measured, infinity)))


def _side(protocol: Protocol) -> Literal["train", "test"]:
    """Return the side of an official split that a protocol's real images are of."""
    return "train" if protocol.reference == "train" else "test"


def _conditions(
    wanted: Protocol, extractor: str, device: str, side: Literal["train", "test", "given"]
) -> tuple[Protocol, Extractor, tuple[str, ...]]:
    """Return the protocol for real images of a side, the extractor, and notes."""
    conditions, network, notes = choose_extractor(wanted, extractor, choose_device(device))
    if network is None:
        raise InputError(
            notes[0]
            if notes
            else "two sets can only be compared by an extractor: leave out extractor none"
        )
    return replace(conditions, reference=side, generation=None), network, notes


def real_images(images: Any, protocol: Protocol) -> Any:
    """Return the real images of a protocol, after JPEG if it says so."""
    known = with_real(protocol, len(images))
    images = (spread if known.chosen == "spaced" else head)(images, known.real or 0)
    return images if protocol.jpeg is None else through_jpeg(images, protocol.jpeg)


def prepare_statistics(
    real: Any, wanted: Protocol, extractor: str | Extractor, device: torch.device, side: int
) -> tuple[ReferenceStatistics, Protocol, Extractor, tuple[str, ...]]:
    """Return reference statistics, the protocol of a comparison with them, extractor and notes.

    Args:
        real: the statistics, or a file of them.
        wanted: protocol of the produced images.
        extractor: see `evaluate`. "auto": the network of the statistics.
        device: where the extractor runs.
        side: of the produced images, in pixels.

    Raises:
        InputError: the statistics cannot be used for this comparison, or their network is not
            available.
    """
    statistics = real if isinstance(real, ReferenceStatistics) else read_statistics(real)
    name = statistics.extractor
    conditions, network, _ = choose_extractor(replace(wanted, extractor=name), extractor, device)
    if network is None and extractor == NO_EXTRACTOR:
        raise InputError(
            "reference statistics can only be compared by an extractor: leave out extractor none"
        )
    if network is None or (extractor == AUTO and network.name != name):
        raise InputError(
            f"the statistics are of {name}, whose weights are not on this machine: "
            f"--extractor {name} downloads them once"
        )
    left_out = ", ".join(metric.name for metric in DISTANCES if metric.of_features)
    notes = (
        f"reference statistics are mean and covariance: {left_out} need the features, "
        "and are left out",
    )
    return statistics, statistics.protocol(conditions, side), network, notes


def save_statistics(
    real: Any,
    out: str | Path,
    *,
    protocol: str | Protocol = "every-image",
    extractor: str = AUTO,
    size: int | None = None,
    count: int | None = None,
    device: str = "auto",
    quiet: bool = True,
    **reading: Any,
) -> ReferenceStatistics:
    """Compute the reference statistics of real images, write them to a file and return them.

    `evaluate(out, generated)` then compares with them as with the images.

    Args:
        real: see `evaluate`.
        out: an .npz file; see `poise.metrics.reference_statistics`.
        protocol, extractor, size, count, device, quiet: see `evaluate`.
        reading: how to read the images; see `poise.data.load`.

    Raises:
        InputError: images cannot be read, there are fewer than two, or the extractor is not
            available.
        RunError: the file cannot be written.

    Example:
        >>> save_statistics("photos/", "photos.npz").images                      # doctest: +SKIP
        10000
    """
    wanted = with_count(find_protocol(protocol), count)
    found = find_images(real, size=size, side=_side(wanted), **reading)
    conditions, network, _ = _conditions(wanted, extractor, device, found.side)
    conditions = with_real(conditions, len(found.images))
    images = real_images(found.images, conditions)
    if len(images) < 2:
        raise InputError(f"statistics need at least 2 images, not {len(images)}")
    conditions = replace(conditions, real=len(images), side=images.shape[-1])
    features, checksum = _real_features(images, conditions, network, quiet=quiet)
    mean = fit_gaussian(features).mean
    told = Conditions(
        reference=conditions.reference,
        images=len(images),
        side=images.shape[-1],
        pixels=conditions.pixels,
        jpeg=conditions.jpeg,
        extractor=network.name,
        extractor_checksum=network.checksum,
        resize=network.resize,
        data=checksum[:12],
        poise=__version__,
    )
    statistics = ReferenceStatistics(
        mean, covariance(features, mean), len(images), "poise", checksum[:12], told
    )
    write_statistics(out, statistics)
    return statistics


def oddities(real: Any, others: Any) -> Iterator[str]:
    """Yield a note for each suspicious property of two sets that can still be compared."""
    if real.shape[1] != others.shape[1]:
        yield (
            "one set is grey and the other in colour: "
            "grey images were used as colour images of three equal channels"
        )
    if real.shape == others.shape:
        first, second = (
            content_checksum(chunks_of(images, len(images))) for images in (real, others)
        )
        if first == second:
            yield "the two sets are the same images"


def check_sides(real: Any, others: Any) -> None:
    """Check that two sets of images can be compared.

    Raises:
        InputError: their sizes differ, or a set has fewer than two images.
    """
    if real.shape[2:] != others.shape[2:]:
        sides = (
            f"{'x'.join(map(str, real.shape[2:]))} and "
            f"{'x'.join(map(str, others.shape[2:]))} pixels"
        )
        raise InputError(
            f"images of {sides} cannot be compared fairly: "
            "resize both to one size with --size (size=)"
        )
    if min(len(real), len(others)) < 2:
        raise InputError(
            f"{len(real)} and {len(others)} images cannot be compared: each set needs at least 2"
        )


def choose_extractor(
    protocol: Protocol, spec: str | Extractor, device: torch.device
) -> tuple[Protocol, Extractor | None, tuple[str, ...]]:
    """Return the protocol with its extractor filled in, the extractor, and notes.

    Args:
        protocol: its extractor is used if `spec` is "auto".
        spec: "auto", "none", a name (see `features.make_extractor`), or an extractor.
        device: where the extractor runs.

    Returns:
        The protocol with the extractor's name and checksum; the extractor, or None for "none" or if
        none is available; notes for the user.

    Raises:
        InputError: the named extractor is not available.
    """
    network, notes = (
        _available_extractor(protocol.extractor, device)
        if spec == AUTO
        else (_named_extractor(spec, device), ())
    )
    if network is None:
        return replace(protocol, extractor=NO_EXTRACTOR), None, notes
    known = {
        "extractor": network.name,
        "extractor_checksum": network.checksum,
        "resize": network.resize,
    }
    return replace(protocol, **known), network, notes


def _named_extractor(spec: str | Extractor, device: torch.device) -> Extractor | None:
    if isinstance(spec, Extractor):
        return spec
    return None if spec == NO_EXTRACTOR else make_extractor(spec, device)


def _available_extractor(
    wanted: str, device: torch.device
) -> tuple[Extractor | None, tuple[str, ...]]:
    """Return Inception if its weights are on this machine, else the light network, and notes.

    Nothing is downloaded.
    """
    if wanted != "inception":
        return _named_extractor(wanted, device), ()
    if available_inception() is not None:
        with suppress(MissingExtraError):  # torch-fidelity's weights, but not torch-fidelity
            return make_extractor("inception", device), ()
    how = (
        "poise evaluate --extractor inception downloads it once "
        '(pip install "poise[eval]"); POISE_INCEPTION names a file'
    )
    try:
        light = make_extractor("light", device)
    except MissingExtraError:
        return None, (
            f"no FID: Inception is not at hand; {how}; "
            'offline, pip install "poise[light]" gives FD-light',
        )
    return light, (f"Inception is not at hand: compared by FD-light, which is not FID; {how}",)


def compare(
    real: Any,
    produced: Iterable[Produced],
    protocol: Protocol,
    extractor: Extractor,
    *,
    metrics: tuple[str, ...] = ("",),
    infinity: bool = False,
    quiet: bool = True,
) -> list[Measurement]:
    """Measure every distance between each produced set and the real one.

    Args:
        real: (n, channels, side, side), bytes or floats in [0, 1]. All images are used, without
            further preparation. Or reference statistics, with `protocol` from their `protocol`.
        produced: sets to compare with the real one.
        protocol: with the extractor's name and checksum. Counts and side are filled in.
        extractor: network that computes the features.
        metrics: prefixes of the names of the metrics to measure.
        infinity: also extrapolate to infinitely many images.
        quiet: show no progress.
    """
    place = _metrics_device(extractor.device)
    if isinstance(real, ReferenceStatistics):
        reference, data = Reference(None, protocol, real.gaussian), real.data
    elif len(real) < 2:
        raise InputError(
            f"{len(real)} real image cannot be compared with others, at least 2 are needed: "
            'extractor none (extractor="none") measures the model alone'
        )
    else:
        protocol = replace(protocol, real=len(real), side=real.shape[-1])
        features, checksum = _real_features(real, protocol, extractor, quiet=quiet)
        reference, data = Reference(features.to(place), protocol), checksum[:12]

    def measure(item: Produced, features: Features, conditions: Protocol) -> list[Measurement]:
        found = every_distance(
            reference,
            features.to(place),
            conditions,
            extractor,
            metrics=metrics,
            infinity=infinity,
        )
        common = {"data": data, "seed": item.seed, "device": _where(extractor)}
        return [
            Measurement(metric, item.label, value, conditions, spread=spread, **common)
            for metric, value, spread in found
        ]

    measured: list[Callable[[], list[Measurement]]] = []
    with ThreadPoolExecutor(1) as pool:
        for item in produced:
            number = _number(item, protocol)
            if number < 2:
                raise InputError(
                    f"{item.label}: {number} image cannot be compared with others, at least 2 are "
                    'needed: extractor none (extractor="none") measures the model alone'
                )
            chunks = (prepare(part, protocol) for part in item.chunks(number))
            features = extract(extractor, chunks, total=number, title=item.label, quiet=quiet)
            # On a GPU, measure this set while the features of the next one are computed.
            later = pool.submit(measure, item, features, complete(protocol, number))
            if place.type == "cpu":
                later.result()
            measured.append(later.result)
    return [measurement for result in measured for measurement in result()]


def _real_features(
    real: Any, protocol: Protocol, extractor: Extractor, *, quiet: bool
) -> tuple[Features, str]:
    """Return the features of the real images, from the cache if possible, and their checksum."""
    checksum = content_checksum(_compared(real, protocol))
    features = cached_features(
        extractor, _compared(real, protocol), checksum, total=len(real), title="real", quiet=quiet
    )
    return features, checksum


def _metrics_device(device: torch.device) -> torch.device:
    """Return the device for distances, which need float64.

    It is the extractor's GPU on CUDA, else the CPU. MPS has no float64.
    """
    return device if device.type == "cuda" else torch.device("cpu")


def _where(extractor: Extractor) -> str:
    """Return the extractor's device, and its precision if it is not float32."""
    return str(extractor.device) + (
        f", {extractor.precision}" if extractor.precision != "float32" else ""
    )


def complete(protocol: Protocol, generated: int) -> Protocol:
    """Return the protocol with the number of produced images filled in.

    The subset size of the KID is limited to the smaller set.
    """
    assert protocol.real is not None
    return replace(
        protocol,
        generated=generated,
        kid_subset_size=max(2, min(protocol.kid_subset_size, protocol.real, generated)),
    )


def _number(item: Produced, protocol: Protocol) -> int:
    wanted = (
        protocol.generated
        or (item.count if protocol.reference == "given" else None)
        or protocol.real
    )
    assert wanted is not None
    return wanted if item.count is None else min(wanted, item.count)


def data_of(images: Any, protocol: Protocol) -> str:
    """Return the checksum of real images as a measurement has it: see `Measurement.data`."""
    return content_checksum(_compared(images, protocol))[:12]


def _compared(real: Any, protocol: Protocol) -> Iterator[Images | ByteImages]:
    for part in chunks_of(real, len(real)):
        yield to_bytes(part) if protocol.pixels == "8-bit" else part


def through_jpeg(images: Any, quality: int) -> ByteImages:
    """Return all images after JPEG compression at a quality."""
    return torch.cat(
        [jpeg_round_trip(to_bytes(part), quality) for part in chunks_of(images, len(images))]
    )


def chunks_of(images: Any, count: int) -> Iterator[Images]:
    """Yield the first `count` images in chunks, as floats in [0, 1] on the CPU."""
    for start in range(0, count, CHUNK):
        yield gather(images, range(start, min(start + CHUNK, count))).cpu()


def prepare(images: Images, protocol: Protocol) -> Images | ByteImages:
    """Return produced images as the protocol compares them: stretched, rounded to 8 bits."""
    images = stretch_each(images) if protocol.stretch else images
    return to_bytes(images) if protocol.pixels == "8-bit" else images


def content_checksum(chunks: Iterable[Tensor]) -> str:
    """Return the SHA-256 of type, shape and values of images in chunks."""
    digest = hashlib.sha256()
    for part in chunks:
        digest.update(f"{part.dtype} {tuple(part.shape)}\n".encode())
        digest.update(np.ascontiguousarray(part.numpy()).data)
    return digest.hexdigest()


def every_distance(
    reference: Reference,
    produced: Features,
    protocol: Protocol,
    extractor: Extractor,
    *,
    metrics: tuple[str, ...] = ("",),
    infinity: bool = False,
) -> Iterator[tuple[str, float, float | None]]:
    """Yield name, value and spread of each metric in `poise.metrics.listed.DISTANCES`.

    Only the Frechet distance of the 2015 Inception is called FID. A metric that needs more images
    is left out, and so is one whose name begins with none of `metrics`.
    """
    pair = Pair(reference, produced, protocol, extractor)
    for metric in DISTANCES:
        name = metric.named_for(extractor)
        left_out = metric.of_features and reference.known is None
        asked = name.startswith(metrics) and (infinity or not metric.on_request)
        value = metric.measure(pair) if asked and not left_out else None
        if value is not None:
            yield name, *value


def likelihood_measurements(
    figures: Reconstruction,
    nll: ImportanceWeightedNLL | None,
    protocol: Protocol,
    *,
    seed: int,
    device: str,
    data: str,
) -> list[Measurement]:
    """Return KL and ELBO and, if it was estimated, the importance-weighted likelihood of a model.

    The list is empty for a model without a likelihood.

    Args:
        figures: KL and ELBO, in nats per image.
        nll: estimate of the negative log likelihood, or None.
        protocol: with the number of real images and their side.
        seed, device, data: see `Measurement`.
    """
    common = {
        "protocol": model_protocol(protocol),
        "unit": "nats per image",
        "seed": seed,
        "device": device,
        "data": data,
    }
    known = {"KL": figures.kl_nats, "ELBO": figures.elbo_nats}
    named = [
        Measurement(metric, "model", value, **common)
        for metric, value in known.items()
        if value is not None
    ]
    if nll is not None:
        metric = f"NLL ({nll.samples} samples)"
        named.append(
            Measurement(metric, "model", nll.mean_nats, spread=nll.standard_error_nats, **common)
        )
    return named


def restored_measurements(
    images: Iterable[Images],
    restored: Iterable[Images],
    protocol: Protocol,
    *,
    seed: int,
    device: str,
    data: str,
) -> list[Measurement]:
    """Measure how much reconstructions differ from their images.

    Args:
        images, restored: images and their reconstructions, in chunks of equal length.
        protocol: with the true number of images.
        seed, device, data: see `Measurement`.
    """
    parts: list[Tensor] = []
    for a, b in zip(images, restored, strict=True):
        a, b = (part.to(_metrics_device(torch.device(device))) for part in (a, b))
        parts.append(torch.stack([metric.measure(a, b) for metric in SIMILARITIES]))
    values = torch.cat(parts, 1).mean(1).tolist()
    common = {
        "protocol": model_protocol(protocol, generation=protocol.generation),
        "seed": seed,
        "device": device,
        "data": data,
    }
    return [
        Measurement(metric.name, "REC", value, unit=metric.unit, **common)
        for metric, value in zip(SIMILARITIES, values, strict=True)
    ]


def remarks(measured: Iterable[Measurement], infinity: bool) -> tuple[str, ...]:
    """Return notes that are needed to interpret these comparisons."""
    compared = [m for m in measured if m.protocol.extractor != NO_EXTRACTOR]
    fewest = min(
        (min(m.protocol.real or 0, m.protocol.generated or 0) for m in compared), default=FEW_IMAGES
    )
    notes: tuple[str, ...] = ()
    if fewest < FEW_IMAGES:
        notes += (
            f"Frechet distances of {fewest} images are biased upwards, more so for fewer images "
            "and for more diverse sets: compare equal numbers only",
        )
    for name, enough in QUALIFIED.items():
        if fewest < enough and any(m.protocol.extractor == name for m in compared):
            notes += (
                f"FD-{name} of {fewest} images can prefer slightly damaged images: in tests it "
                f"ranked sets rightly from {enough:,} images (docs/metrics.md)",
            )
    if infinity and compared and not any(m.metric.endswith("infinity") for m in compared):
        notes += (
            "too few images to extrapolate to infinity: "
            "it takes more than twice as many as features (light 1,280, FID 2,048)",
        )
    return notes
