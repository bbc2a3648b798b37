"""Write the tables and the curve of docs/defaults.md from results of benchmarks/defaults.py.

python benchmarks/defaults_page.py
"""

import io
import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from defaults import (
    CANDIDATES,
    DEFAULT,
    EXPERIMENT,
    LARGE_SETS,
    OF_SMALL_SETS,
    SETS,
    SMALL_SETS,
    VARIANTS,
    find,
    parts,
)
from measuring import between

from poise.errors import InputError
from poise.studies.comparison.statistics import spread
from poise.studies.comparison.tables import ABSENT, markdown, show
from poise.studies.results import Result, read_results
from poise.support.files import write_file
from poise.variants import PRIORS

ROOT = Path(__file__).parent.parent
PAGE, CURVE = ROOT / "docs" / "defaults.md", ROOT / "docs" / "defaults-minutes.png"
RESULTS = ROOT / "results"
LENGTHS = (2, 5, 10, 20, 60)  # minutes
DISTANCES = ("FID", "KID", "precision", "recall")


class Unit(NamedTuple):
    """A finished unit: see `defaults.parts`."""

    name: str
    candidate: str
    minutes: float
    result: Result


def by_few_steps(unit: Unit) -> dict[str, float]:
    """Return the distances by 4 steps of the solver if the run's recipe still had 12 steps."""
    found = unit.result.evaluation.get("few_steps", ())
    return {m["metric"]: float(m["value"]) for m in found if m["of"] == PRIORS["flow"].label}


def by_recipe(unit: Unit, metric: str) -> float:
    """Return a distance of the samples of the candidate's own prior, drawn as its recipe says."""
    return unit.result.value(metric, PRIORS[find(unit.candidate).priors[-1]].label)


def samples(unit: Unit, metric: str) -> float:
    """Return a distance of the samples of the candidate's own prior, of a flow by 4 steps."""
    few = by_few_steps(unit)
    return few[metric] if few else by_recipe(unit, metric)


def copied(unit: Unit) -> float:
    copies = unit.result.evaluation["copies"]
    return copies["samples"] / copies["test"]


COLUMNS: dict[str, Callable[[Unit], float]] = {
    "test MSE": lambda unit: unit.result.value("MSE", "REC"),
    "KL, nats": lambda unit: unit.result.value("KL"),
    "FID of REC": lambda unit: unit.result.value("FID", "REC"),
    **{metric: partial(samples, metric=metric) for metric in DISTANCES},
    "distance": copied,
}


def cell(units: list[Unit], column: Callable[[Unit], float]) -> str:
    try:
        return show(spread([column(unit) for unit in units]))
    except InputError:  # not measured for this candidate
        return ABSENT


def solver_steps(units: list[Unit]) -> str:
    """Return the table of distances of samples by 4 and by 12 steps of the flow's solver."""
    lines = []
    for unit in units:
        if few := by_few_steps(unit):
            pairs = (f"{few[m]:.4g} / {by_recipe(unit, m):.4g}" for m in DISTANCES)
            title = f"{unit.name}, {unit.minutes:g} min, seed {unit.result.seed}"
            lines.append([title, *pairs])
    return markdown([["4 / 12 steps", *DISTANCES], *lines])


def row(title: str, units: list[Unit]) -> list[str]:
    """Return the cells of units that differ in their seed only."""
    settings = units[0].result.settings
    steps = [settings[stage]["steps"] for stage in ("first", "second") if settings[stage]]
    return [
        title,
        str(len(units)),
        " + ".join(f"{number:,}" for number in steps),
        *(cell(units, column) for column in COLUMNS.values()),
    ]


def rows(units: list[Unit], wanted: Iterable[tuple[str, str, float]]) -> str:
    """Return the table of sets, candidates and minutes, without those that are not measured.

    Args:
        units: all finished ones.
        wanted: set, candidate and minutes of each row.
    """
    lines = []
    for key in wanted:
        found = [unit for unit in units if (unit.name, unit.candidate, unit.minutes) == key]
        if found:
            name, candidate, minutes = key
            lines.append(row(f"{name}, {candidate}, {minutes:g} min", found))
    return markdown([["", "seeds", "steps", *COLUMNS], *lines]) if lines else "Not measured yet."


def floor(name: str) -> dict[str, float]:
    """Return the distances of training images from test images."""
    report = json.loads((RESULTS / f"{EXPERIMENT}-floor-{name}.json").read_text())
    return {m["metric"]: m["value"] for m in report["evaluation"]["measurements"]}


def floors() -> str:
    """Return the table of the distances of real training images."""
    lines = [
        [
            f"{name}, {SETS[name].compared:,} training images",
            *(f"{floor(name)[metric]:.4g}" for metric in DISTANCES),
        ]
        for name in LARGE_SETS
    ]
    return markdown([["", *DISTANCES], *lines])


def curve(units: list[Unit]) -> bytes:
    """Return a PNG with the FID of the default over the minutes of training, by set."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {
        name: sorted(
            (unit.minutes, samples(unit, "FID"), unit.result.value("FID", "REC"))
            for unit in units
            if (unit.name, unit.candidate, unit.result.seed) == (name, DEFAULT, 0)
        )
        for name in LARGE_SETS
    }
    measured = [name for name in LARGE_SETS if found[name]]
    figure = Figure(figsize=(4 * len(measured), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(measured), squeeze=False)[0]
    for axis, name in zip(axes, measured, strict=True):
        minutes, of_samples, of_reconstructions = zip(*found[name], strict=True)
        axis.plot(minutes, of_samples, "o-", color="#1f5fa8", label="samples")
        axis.plot(minutes, of_reconstructions, "o--", color="#d9632a", label="reconstructions")
        axis.axhline(floor(name)["FID"], color="#666", linestyle=":", label="training images")
        axis.set_xscale("log")
        axis.set_xticks(minutes, [f"{each:g}" for each in minutes])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_title(f"{name}, {SETS[name].compared:,} test images", fontsize=10)
        axis.set_xlabel("minutes of two cores", fontsize=9)
        axis.set_ylabel("FID", fontsize=9)
        axis.grid(True, alpha=0.25)
        axis.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def finished() -> list[Unit]:
    """Return the units that have results."""
    return [
        Unit(*parts(f"{result.label}-{result.seed}")[:3], result)
        for result in read_results([RESULTS])
        if result.experiment == EXPERIMENT
    ]


def tables() -> dict[str, str]:
    """Return the tables of the page by the names of their marks."""
    units, ten = finished(), 10.0
    return {
        "floors": floors(),
        "candidates": rows(
            units,
            ((n, c, m) for n in LARGE_SETS for m in (ten, 60.0) for c in (*CANDIDATES, DEFAULT)),
        ),
        "steps": solver_steps(sorted(units, key=lambda unit: (unit.name, unit.minutes))),
        "lengths": rows(units, ((n, DEFAULT, m) for n in LARGE_SETS for m in LENGTHS)),
        "changes": rows(
            units, ((n, c, m) for n in LARGE_SETS for m in (ten, 60.0) for c in ("flow", *VARIANTS))
        ),
        "small": rows(
            units,
            ((n, c, m) for n in SMALL_SETS for m in LENGTHS for c in CANDIDATES | OF_SMALL_SETS),
        ),
    }


def written(page: str) -> str:
    """Return the page with its tables."""
    for name, table in tables().items():
        page = between(page, f"<!-- {name} -->", f"<!-- end of {name} -->", table)
    return page


if __name__ == "__main__":
    write_file(PAGE, written(PAGE.read_text(encoding="utf-8")).encode())
    write_file(CURVE, curve(finished()))
    print(f"written: {PAGE.relative_to(ROOT)}", file=sys.stderr)
