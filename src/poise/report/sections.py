"""Values of each section of a report. The template of NAME is templates/sections/NAME.html.

To add a section, write its template and add it to `SECTIONS`. Add a function if the template needs
values that are not in the records and exhibits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from poise.errors import InputError
from poise.report import cells, words
from poise.report.curves import Styles
from poise.report.models import PRIORS, Exhibit
from poise.report.records import Record, labels_of
from poise.studies.comparison import differences
from poise.studies.comparison import table as compared_table
from poise.studies.comparison.statistics import COVERED, FEWEST, NEAR
from poise.studies.comparison.tables import ABOUT_SPEED

TILES = (
    ("MSE", "reconstruction", "mse", ".4g", "per dimension"),
    ("PSNR", "reconstruction", "psnr_db", ".2f", "dB"),
    ("KL", "reconstruction", "kl_nats", ".2f", "nats per image"),
    ("ELBO", "reconstruction", "elbo_nats", ".1f", "nats per image"),
    ("active latents", "latents", "active_units", "d", ""),
)
NEEDS_KL = ("kl_nats", "elbo_nats", "active_units")

Values = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """Contents of a report.

    Attributes:
        records: all runs.
        exhibits: images and diagnosis of the model with the first seed of each label.
        styles: colour and dash of each label.
        axes: x values of the training curves.
        curves, codes: plots of the training curves and of the latents, drawn by page.js.
    """

    records: Sequence[Record]
    exhibits: Sequence[Exhibit]
    styles: Styles
    axes: dict[str, dict[str, list[float]]]
    curves: list[dict[str, Any]]
    codes: list[dict[str, Any]]


def summary(report: Report) -> Values:
    records, exhibits = report.records, report.exhibits
    several = len(records) > 1
    what = [words.group_sentence(records)] if several else []
    if len(exhibits) == 1:
        what.append(words.model_sentence(exhibits[0].record))
        advice = words.advice(exhibits[0].record, exhibits[0].diagnosis)
    else:
        advice = [words.group_advice(shown.record, shown.diagnosis) for shown in exhibits]
    return {
        "what": what,
        "came_out": words.group_results(records) if several else words.result_sentences(records[0]),
        "advice": advice,
        "tiles": [] if several else _tiles(records[0]),
    }


def _tiles(record: Record) -> list[tuple[str, str, str]]:
    """Return name, value and unit of each main figure of a run."""
    figures = [
        (name, record.figures.get(page, {}).get(key), style, unit)
        for name, page, key, style, unit in TILES
        if record.has_kl or key not in NEEDS_KL
    ]
    distance = words.distance_name([record])
    figures += [
        (f"{distance} {of}", value, ".4g", f"protocol {code}")
        for of, value, code in words.distances(record, distance)
    ]
    return [
        (name, words.number(value, style), unit)
        for name, value, style, unit in figures
        if value is not None
    ]


def comparison(report: Report) -> Values | None:
    """Return the comparison of labels, as `poise compare` shows it; None for one run."""
    results = cells.results_of(report.records)
    if len(results) < 2:
        return None
    reference = results[0].label
    several = len({result.label for result in results}) > 1
    return {
        "rows": compared_table(results),
        "reference": reference,
        "differences": differences(results, reference) if several else [],
        "fewest": FEWEST,
        "covered": f"{COVERED:.0%}",
        "speed": cells.speed_rows(results, reference),
        "about_speed": ABOUT_SPEED.format(near=NEAR, reference=reference),
    }


def samples(report: Report) -> Values:
    return {"priors": PRIORS}


def training(report: Report) -> Values:
    return {"deterministic": _deterministic(report.records)}


def latents(report: Report) -> Values:
    records = [shown.record for shown in report.exhibits]
    return {
        "shown": words.listed([record.name for record in records]),
        "deterministic": _deterministic(records),
    }


def _deterministic(records: Sequence[Record]) -> str:
    """Return the labels of the models without a KL."""
    return words.listed(labels_of(record for record in records if not record.has_kl))


def numbers(report: Report) -> Values:
    """Return the figures of each run, and its measurements under protocols."""
    if len(report.records) == 1:
        rows = cells.figures_table(report.records[0].figures)
        figures = [["figure", "value"], *rows] if rows else []
    else:
        figures = cells.figures_of_all(report.records)
    return {"figures": figures, "runs": [_details(record) for record in report.records]}


def _details(record: Record) -> Values:
    missing, measured = list(record.missing), None
    notes = (record.summary or {}).get("notes", [])
    if record.evaluation is not None:
        try:
            measured = cells.upright(cells.evaluation_rows(record))
            notes = [*notes, *record.evaluation.get("notes", [])]
        except InputError as error:
            missing.append(f"evaluation.json cannot be shown: {error}.")
    notes = list(dict.fromkeys(notes))
    return {"name": record.name, "missing": missing, "measured": measured, "notes": notes}


def settings(report: Report) -> Values:
    rows = cells.settings_rows(report.records)
    return {
        "rows": rows,
        "differing": cells.varying(rows),
        "seeds": words.listed(sorted({str(record.seed) for record in report.records})),
    }


def data(report: Report) -> Values:
    notes = (note for record in report.records for note in record.data.get("notes", []))
    return {"rows": cells.data_rows(report.records), "notes": list(dict.fromkeys(notes))}


def protocols(report: Report) -> Values:
    try:
        found = cells.protocols_of(report.records)
    except InputError as error:
        return {"complaint": str(error)}
    return {
        "complaint": "",
        "sentences": list(map(str, found.values())),
        "rows": cells.protocol_rows(found),
    }


def versions(report: Report) -> Values:
    return {"rows": cells.version_rows(report.records)}


class Section(NamedTuple):
    """Section of the page.

    Attributes:
        name: name of its template and its anchor.
        title: heading.
        make: function that computes the values for the template; if it returns None, the section is
            left out.
        link: entry in the contents; empty: the title.
    """

    name: str
    title: str
    make: Callable[[Report], Values | None] = lambda report: {}
    link: str = ""


SECTIONS = (  # in reading order
    Section("summary", "Summary", summary),
    Section("comparison", "Comparison", comparison),
    Section("samples", "Samples and reconstructions", samples, link="Samples"),
    Section("training", "Training", training),
    Section("latents", "Latents", latents),
    Section("diagnosis", "Diagnosis"),
    Section("numbers", "Numbers", numbers),
    Section("settings", "Settings", settings),
    Section("data", "Data", data),
    Section("protocols", "Protocols", protocols),
    Section("versions", "Versions", versions),
)


def sections_of(report: Report) -> list[Values]:
    """Return the values of each section that has something to show, with name, title and link."""
    return [
        {"name": section.name, "title": section.title, "link": section.link or section.title}
        | values
        for section in SECTIONS
        if (values := section.make(report)) is not None
    ]
