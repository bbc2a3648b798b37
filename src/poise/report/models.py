"""Parts of a report that need the trained model: samples, reconstructions, codes, diagnosis.

Samples are shown beside their nearest training images (`copies`), codes as maps if they have a
`latent_shape`.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from poise.data import Dataset, gather
from poise.diagnosis import Diagnosis, diagnose
from poise.errors import InputError, RunError
from poise.metrics import latent_statistics
from poise.metrics.copies import most_searched, nearest
from poise.report.pictures import contact_sheet, paired_sheet, picture_uri
from poise.report.records import Record
from poise.runs.run import Run, load
from poise.shapes import Images
from poise.support.files import read_regular
from poise.support.html import data_uri
from poise.support.seeds import drawn
from poise.variants import PRIORS as NAMED

TILES = 36
COLUMNS = 6
PAIRS = 32
PAIRS_OF_A_SHEET = 16
NEIGHBOURS_IN_A_ROW = 9
NEIGHBOURS_OF_A_SHEET = 18
MAPPED = 8  # images whose latent maps are shown
MOST_CHANNELS = 16
MOST_CLASSES, SAMPLES_OF_A_CLASS = 20, 8
LARGEST_CODE = 3  # standard deviations of N(0, 1) that are drawn white
MOST_PNG = 1_500_000  # bytes; larger pictures from the end of training are not embedded
PRIORS = {prior.label: f"latents from {prior.words}" for prior in NAMED.values()}


@dataclass
class Exhibit:
    """Images, latent statistics and diagnosis of the model of one run.

    Attributes:
        record: contents of the run's files.
        real, pairs: data URIs of real images, and of test images above their reconstructions.
        kept_pairs, kept_samples: data URIs of the pictures that training wrote at its end, used if
            the model or the data cannot be loaded.
        samples: data URI of the samples from each prior, by "GEN-1", ...
        classes: data URI of samples of each class, one row per class, if the run has labels.
        about_classes: their caption.
        progress: data URI of progress.png.
        neighbours: data URIs of samples from the default prior above their nearest training images.
        about_neighbours: their caption.
        distances: rows of the table of distances from the nearest training image; the first row is
            the head.
        searched: which training images were searched, in words.
        maps: data URI of latent maps of test images.
        about_maps: their caption.
        latents: latent statistics by "latents" and "second_stage", as in summary.json.
        diagnosis: diagnosis of the model; None: `undiagnosed` says why.
        missing: a sentence for each thing that cannot be shown.
    """

    record: Record
    real: str | None = None
    pairs: list[str] = field(default_factory=list)
    kept_pairs: str | None = None
    kept_samples: str | None = None
    samples: dict[str, str] = field(default_factory=dict)
    classes: str | None = None
    about_classes: str = ""
    progress: str | None = None
    neighbours: list[str] = field(default_factory=list)
    about_neighbours: str = ""
    distances: list[tuple[str, str, str]] = field(default_factory=list)
    searched: str = ""
    maps: str | None = None
    about_maps: str = ""
    latents: dict[str, dict[str, Any]] = field(default_factory=dict)
    diagnosis: Diagnosis | None = None
    undiagnosed: str = "No diagnosis: the model cannot be loaded."
    missing: list[str] = field(default_factory=list)


class DataSetCache:
    """Cache of data sets by checksum. The runs of a comparison share a data set.

    A data set that cannot be read for one run may be readable for another, from another place.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Dataset] = {}

    def dataset(self, run: Run) -> Dataset | str:
        """Return the data set of a run, or the reason why it cannot be read."""
        if run.data["source"] == "array":
            return "they were an array, which a run does not keep"
        key = run.data["checksum"]
        if key not in self._kept:
            try:
                self._kept[key] = run.dataset()
            except (InputError, RunError, OSError) as error:
                return _sentence(error)
        return self._kept[key]


def exhibit(record: Record, data_sets: DataSetCache, device: str = "auto") -> Exhibit:
    """Load the model of a run; return its images, latent statistics and diagnosis."""
    shown = Exhibit(record)
    shown.latents = {
        name: record.figures[name] for name in ("latents", "second_stage") if name in record.figures
    }
    if record.alone:
        shown.missing.append(
            "Only the result of this run is here, without its model, so no pictures can be drawn."
        )
        shown.undiagnosed = "No diagnosis: only the result of this run is here, without its model."
        return shown
    if (record.folder / "progress.png").exists():
        _attempt(shown, "No progress", lambda: _show_progress(shown))
    try:
        run = load(record.folder, device=device)
    except (InputError, RunError) as error:
        shown.missing.append(
            f"The model cannot be loaded, so it gives no pictures: {_sentence(error)}."
        )
        _take_kept_pictures(shown, samples=True)
        return shown
    samples = _show_samples(shown, run)
    if run.classes:
        _attempt(shown, "No samples of each class", lambda: _show_classes(shown, run))
    _show_data(shown, run, data_sets.dataset(run), samples)
    _add_codes(shown, run)
    return shown


def _show_progress(shown: Exhibit) -> None:
    shown.progress = picture_uri(shown.record.folder / "progress.png")


def _show_samples(shown: Exhibit, run: Run) -> dict[str, Images]:
    """Show samples from each prior, and return them by "GEN-1", ..."""
    drawn_images: dict[str, Images] = {}
    for prior, named in NAMED.items():
        label = named.label
        if named.second_stage not in (None, run.second_stage):
            if named.second_stage == run.recipe.second_stage:
                shown.missing.append(
                    f"Stage 2 has not begun, so there are no samples from {named.words} ({label})."
                )
            continue
        if named.second_stage is None and prior not in run.available_priors:
            continue
        _attempt(
            shown,
            f"No {label} samples",
            lambda label=label, prior=prior: drawn_images.update(
                {label: run.sample(TILES, prior=prior, seed=run.recipe.seed)}
            ),
        )
    shown.samples = {label: contact_sheet(of, COLUMNS) for label, of in drawn_images.items()}
    return drawn_images


def _show_classes(shown: Exhibit, run: Run) -> None:
    """Show samples of each class, one row per class, all rows with the same noise."""
    prior = "flow" if run.flow is not None else "mixture"
    names = run.classes[:MOST_CLASSES]
    how: dict[str, Any] = {"prior": prior, "seed": run.recipe.seed}
    rows = [run.sample(SAMPLES_OF_A_CLASS, label=name, **how) for name in names]
    shown.classes = contact_sheet(torch.cat(rows), SAMPLES_OF_A_CLASS)
    total = len(run.classes)
    which = f"the first {len(names)} of {total}" if total > len(names) else str(total)
    shown.about_classes = (
        f"Samples of each class ({NAMED[prior].label}), {which} classes, from top to bottom: "
        f"{', '.join(names)}"
    )


def _attempt(shown: Exhibit, what: str, work: Callable[[], None]) -> None:
    try:
        work()
    # scikit-learn's mixture raises ValueError for too few codes.
    except (InputError, RunError, ValueError) as error:
        shown.missing.append(f"{what}: {_sentence(error)}.")


def _show_data(
    shown: Exhibit, run: Run, dataset: Dataset | str, samples: dict[str, Images]
) -> None:
    if isinstance(dataset, str):
        shown.missing.append(
            f"No real images are shown, because the data cannot be read again: {dataset}."
        )
        shown.undiagnosed = f"No diagnosis, because the data cannot be read again: {dataset}."
        _take_kept_pictures(shown)
        return
    test = gather(dataset.test, drawn(len(dataset.test), TILES))
    shown.real = contact_sheet(test, COLUMNS)
    _attempt(shown, "No reconstructions", lambda: _show_pairs(shown, run, test))
    _attempt(shown, "No latent maps", lambda: _show_maps(shown, run, test))
    _attempt(
        shown,
        "No nearest training images",
        lambda: _show_neighbours(shown, run, dataset.train, test, samples),
    )
    _show_diagnosis(shown, run, dataset)


def _show_pairs(shown: Exhibit, run: Run, originals: torch.Tensor) -> None:
    originals = originals[drawn(len(originals), PAIRS)]
    restored = run.reconstruct(originals)
    both = zip(originals.split(PAIRS_OF_A_SHEET), restored.split(PAIRS_OF_A_SHEET), strict=True)
    shown.pairs = [paired_sheet(*part) for part in both]


def _show_maps(shown: Exhibit, run: Run, images: Images) -> None:
    """Show the mean codes of some images, one row per channel, if the network has latent maps."""
    shape = getattr(run.first.vae.decoder, "latent_shape", ())
    if len(shape) != 3:
        return
    images = images[:MAPPED]
    maps = run.encode(images).mean.unflatten(1, shape)[:, :MOST_CHANNELS]
    grey = (0.5 + maps / (2 * LARGEST_CODE)).clamp(0, 1)
    large = F.interpolate(grey, images.shape[2:], mode="nearest")  # (images, channels, h, w)
    rows = [images, *(one[:, None].expand_as(images) for one in large.unbind(1))]
    shown.maps = contact_sheet(torch.cat(rows), len(images))
    channels, height, width = shape
    of = f"the first {MOST_CHANNELS} of {channels}" if channels > MOST_CHANNELS else str(channels)
    shown.about_maps = (
        f"Test images and their mean codes, one row for each channel ({of} channels of "
        f"{height}×{width} latents). Black is −{LARGEST_CODE}, white is {LARGEST_CODE}."
    )


def _show_neighbours(
    shown: Exhibit, run: Run, training: Any, test: Images, samples: dict[str, torch.Tensor]
) -> None:
    """Show samples above their nearest training images, and the distances beside held-out ones."""
    if not samples:
        return
    sets = {f"samples, {label}": of for label, of in samples.items()}
    sets |= {"held-out test images": test, "their reconstructions": run.reconstruct(test)}
    flips = run.recipe.data.flips
    found = nearest(torch.cat(list(sets.values())), training, run.device, mirrored=flips)
    counts = [len(of) for of in sets.values()]
    distances = dict(zip(sets, found.distances.split(counts), strict=True))
    label = NAMED[run.default_prior].label
    if label in samples:
        position = list(samples).index(label)
        sheets = zip(
            samples[label].split(NEIGHBOURS_OF_A_SHEET),
            found.images.split(counts)[position].split(NEIGHBOURS_OF_A_SHEET),
            strict=True,
        )
        shown.about_neighbours = f"Samples ({label}), each above its nearest training image"
        shown.neighbours = [paired_sheet(*sheet, columns=NEIGHBOURS_IN_A_ROW) for sheet in sheets]
    rows = [(name, f"{of.quantile(0.5):.4f}", f"{of.min():.4f}") for name, of in distances.items()]
    shown.distances = [("nearest training image of", "median distance", "smallest"), *rows]
    total, searched = len(training), most_searched(training)
    shown.searched = (
        f"All {total:,} training images were searched."
        if searched == total
        else f"{searched:,} of {total:,} training images were searched, drawn with a fixed seed."
    ) + (" Their mirror images were searched, too." if flips else "")


def _show_diagnosis(shown: Exhibit, run: Run, dataset: Dataset) -> None:
    if not shown.record.has_kl:
        shown.undiagnosed = (
            "No diagnosis: only VAEs can be diagnosed, and this model is deterministic."
        )
        return
    try:
        shown.diagnosis = diagnose(run, dataset.test, train_images=dataset.train)
    except (InputError, RunError) as error:
        shown.undiagnosed = f"No diagnosis: {_sentence(error)}."


def _add_codes(shown: Exhibit, run: Run) -> None:
    """Compute the latent statistics of an unfinished run, which has no summary yet."""
    if "latents" not in shown.latents and (run.folder / "codes").exists():
        _attempt(
            shown,
            "No latent page",
            lambda: shown.latents.update(latents=_of_codes(run)),
        )


def _of_codes(run: Run) -> dict[str, Any]:
    found = latent_statistics(run.codes)
    return asdict(found.without_posterior() if run.deterministic else found)


def _take_kept_pictures(shown: Exhibit, *, samples: bool = False) -> None:
    """Embed the pictures that training wrote at its end."""
    shown.kept_pairs = _kept(shown.record.folder / "reconstructions.png")
    shown.kept_samples = _kept(shown.record.folder / "samples.png") if samples else None


def _kept(path: Path) -> str | None:
    with suppress(OSError):  # there is none, or it is no regular file
        content = read_regular(path)
        return data_uri(content) if len(content) < MOST_PNG else None
    return None


def _sentence(error: Exception) -> str:
    """Return the error message as one line without a full stop."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
