"""How a run is measured: once for each protocol, each kept as soon as it is there, and all of them together in the end."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from poise.data import Dataset
from poise.evaluation import AUTO, choose_extractor, complete
from poise.features import Extractor, make_extractor
from poise.protocols import DEFAULT, NO_EXTRACTOR, Protocol, model_protocol
from poise.recipes.settings import Generation, from_json
from poise.runs.checkpoint import MANIFEST, checkpoints
from poise.runs.run import Run
from poise.studies.results import Result
from poise.support.files import strict, write_json
from poise.variants import PRIORS, PriorName

SMALL_SIDE = (
    16  # up to which pictures are compared pixel by pixel: `pixels` keeps every one of them
)
SMALL_NOTE = "images of at most 16x16 are compared pixel by pixel (FD-pixels): networks for photographs say little about them"
PIXELS_NOTE = (
    "neither Inception nor the light network is at hand: compared by pixels averaged to 16x16 (FD-pixels), which says little "
    'about photographs; pip install "poise[light]" (FD-light) or "poise[eval]" (FID), or POISE_INCEPTION'
)


@dataclass(frozen=True)
class Measuring:
    """How each run is evaluated.

    Attributes:
        protocols: each complete but for the run's own way to make images: extractor, counts and side are filled in.
        extractor: see `poise.features.make_extractor`; "none": no comparison.
        priors: of which samples are compared; reconstructions always are.
        notes: what is to be said of the choice.
    """

    protocols: tuple[Protocol, ...]
    extractor: str
    priors: tuple[PriorName, ...]
    notes: tuple[str, ...] = ()

    @property
    def sets(self) -> tuple[str, ...]:
        """What is compared with real images: REC, GEN-1, ..."""
        return ("REC", *(prior.label for name, prior in PRIORS.items() if name in self.priors))

    def covers(self, result: Result) -> bool:
        """Whether a result has every set under every protocol."""
        own = from_json(Generation, result.settings["generation"])
        protocols = [replace(p, generation=p.generation or own) for p in self.protocols]
        wanted = {(model_protocol(p, generation=p.generation).hash, "REC") for p in protocols}
        if self.extractor != NO_EXTRACTOR:
            wanted |= {(p.hash, label) for p in protocols for label in self.sets}
        return wanted <= {(m["protocol"], m["of"]) for m in result.measurements()}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Measuring":
        protocols = tuple(from_json(Protocol, p, "protocol") for p in values["protocols"])
        return cls(protocols, values["extractor"], tuple(values["priors"]), tuple(values["notes"]))


def measuring_for(
    dataset: Dataset,
    protocols: Iterable[Protocol],
    extractor: str,
    priors: Iterable[PriorName],
    device: torch.device,
) -> Measuring:
    """The protocols with all filled in that is known before a run is trained; the extractor loaded once, to see that it can be.

    Args:
        dataset: that the runs learn.
        protocols: as named.
        extractor: "auto": pixels for images of at most 16x16, else Inception, the light network or pixels: the first that is
            at hand.
        priors, device: see `Measuring`, `Run.evaluate`.

    Raises:
        InputError: an extractor that cannot be had.
    """
    spec, notes = resolve_extractor(extractor, dataset.shape[1], device)
    network, _, _ = choose_extractor(DEFAULT, spec, device)
    known = {name: getattr(network, name) for name in ("extractor", "extractor_checksum", "resize")}
    completed = tuple(_counted(replace(protocol, **known), dataset) for protocol in protocols)
    return Measuring(completed, spec, tuple(priors), notes)


def _counted(protocol: Protocol, dataset: Dataset) -> Protocol:
    side: Literal["train", "test"] = "train" if protocol.reference == "train" else "test"
    there = len(getattr(dataset, side))
    real = min(protocol.real or there, there)
    return complete(
        replace(protocol, reference=side, real=real, side=dataset.shape[1]),
        protocol.generated or real,
    )


def resolve_extractor(spec: str, side: int, device: torch.device) -> tuple[str, tuple[str, ...]]:
    """The extractor that "auto" means here, and what there is to say of it."""
    if spec != AUTO:
        return spec, ()
    if side <= SMALL_SIDE:
        return "pixels", (SMALL_NOTE,)
    _, network, notes = choose_extractor(DEFAULT, AUTO, device)
    return (network.name, notes) if network is not None else ("pixels", (PIXELS_NOTE,))


def measured(run: Run, measuring: Measuring, seed: int) -> dict[str, Any]:
    """The evaluation of a run under all protocols, as `Evaluation.to_json` gives it, with its "seconds".

    What was measured under a protocol is kept in the run's folder, so that a stop loses one protocol's work at most; what
    another extractor measured before stays in the result.
    """
    network = cache(lambda: _loaded(measuring.extractor, run.device))
    parts = [_part(run, measuring, protocol, seed, network) for protocol in measuring.protocols]
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
    return joined | {"seconds": round(sum(part["seconds"] for part in parts), 2)}


def _loaded(spec: str, device: torch.device) -> str | Extractor:
    return spec if spec == NO_EXTRACTOR else make_extractor(spec, device)


def _part(
    run: Run,
    measuring: Measuring,
    protocol: Protocol,
    seed: int,
    network: Callable[[], str | Extractor],
) -> dict[str, Any]:
    """What a protocol gives, from the run's folder if it was measured before."""
    asked = {"priors": measuring.priors, "seed": seed, "weights": _weights(run.folder)}
    request = strict({"protocol": asdict(protocol)} | asked)
    path = run.folder / "measured" / f"{protocol.name}-{protocol.hash}.json"
    if (kept := _kept(path)) and kept["request"] == request:
        return kept
    began = time.monotonic()
    evaluation = run.evaluate(
        protocol=protocol, extractor=network(), priors=measuring.priors, seed=seed
    )
    part = {
        "request": request,
        "seconds": time.monotonic() - began,
        "evaluation": evaluation.to_json(),
    }
    write_json(path, part)
    return strict(part)


def _earlier(folder: Path, parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is kept that other extractors measured of the same weights with the same seed."""
    used = {part["request"]["protocol"]["extractor"] for part in parts}
    same = [parts[0]["request"][name] for name in ("weights", "seed")]
    kept = [part for path in sorted((folder / "measured").glob("*.json")) if (part := _kept(path))]
    asked = [
        part for part in kept if [part["request"][name] for name in ("weights", "seed")] == same
    ]
    return [part for part in asked if part["request"]["protocol"]["extractor"] not in used]


def _weights(folder: Path) -> dict[str, str]:
    """Hashes of the newest checkpoint's files."""
    return json.loads((checkpoints(folder / "checkpoints")[-1] / MANIFEST).read_text())["sha256"]


def _kept(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
