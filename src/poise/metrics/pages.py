"""The types of the figures in evaluation.json and summary.json, to check files that are read."""

from dataclasses import dataclass, field, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypedDict, get_args, get_origin, get_type_hints

from poise.metrics.latents import LatentStatistics
from poise.metrics.likelihood import ImportanceWeightedNLL
from poise.metrics.reconstruction import Reconstruction
from poise.support.files import convert


@dataclass(frozen=True)
class Measured:
    """A measurement in a result's file, see `poise.protocols.Measurement`."""

    metric: str
    of: str
    value: float | None
    protocol: str
    spread: float | None = None
    unit: str = ""
    data: str = ""
    seed: int = 0
    device: str = ""
    version: str = ""


def page_of(*figures: type) -> Any:
    """Return the type of a page in a file: figures of dataclasses by name, each optional or null.

    A page may hold other keys, too: those of other versions.
    """
    hints = {name: hint for cls in figures for name, hint in get_type_hints(cls).items()}
    make: Any = TypedDict
    return make("Page", {name: _or_null(hint) for name, hint in hints.items()}, total=False)


def _or_null(hint: Any) -> Any:
    optional = get_origin(hint) is UnionType
    plain = next(part for part in get_args(hint) if part is not NoneType) if optional else hint
    if isinstance(plain, type) and is_dataclass(plain):
        return page_of(plain) | None
    return (list[float | None] if get_origin(plain) is tuple else plain) | None


@dataclass(frozen=True)
class AsShown:
    """The figures that `Run.evaluate` adds to its page of reconstructions."""

    mse_as_shown: float
    images: int


PAGES: dict[str, Any] = {
    "reconstruction": page_of(Reconstruction, AsShown),
    "latents": page_of(LatentStatistics),
    "second_stage": page_of(Reconstruction, LatentStatistics),
    "likelihood": page_of(ImportanceWeightedNLL),
}


@dataclass(frozen=True)
class Lists:
    """The parts of an evaluation beside its pages."""

    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)
    measurements: list[Measured] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_pages(values: dict[str, Any], where: str) -> None:
    """Check the types of what evaluation.json and summary.json hold.

    Raises:
        InputError: a value has another type. `where` names the file in the message.
    """
    convert(values, Lists, where)
    for name, kind in PAGES.items():
        convert(values.get(name), kind | None, f"{where}: {name}")
