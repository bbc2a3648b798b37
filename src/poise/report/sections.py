"""The parts of a report, each as HTML; what has no content is left out, what is missing is said."""

from collections.abc import Sequence
from typing import Any

from poise.diagnosis import Diagnosis
from poise.errors import InputError
from poise.report import cells, words
from poise.report.curves import styles_of
from poise.report.markup import (
    legend,
    paragraphs,
    picture,
    plot,
    prose,
    section,
    subhead,
    table,
    text,
    toggle,
)
from poise.report.models import PRIORS, Exhibit
from poise.report.records import Record, labels_of
from poise.studies.comparison import differences
from poise.studies.comparison import table as compared_table
from poise.studies.comparison.statistics import COVERED, FEWEST, NEAR
from poise.studies.comparison.tables import ABOUT_SPEED
from poise.studies.results import Result

TILES = (
    ("MSE", "reconstruction", "mse", ".4g", "per dimension"),
    ("PSNR", "reconstruction", "psnr_db", ".2f", "dB"),
    ("KL", "reconstruction", "kl_nats", ".2f", "nats per image"),
    ("ELBO", "reconstruction", "elbo_nats", ".1f", "nats per image"),
    ("active latents", "latents", "active_units", "d", ""),
)


def summary(records: Sequence[Record], exhibits: Sequence[Exhibit]) -> str:
    """What this is, what came out, what to do."""
    several = len(records) > 1
    what = [words.group_sentence(records)] if several else []
    what += [words.model_sentence(exhibits[0].record)] if len(exhibits) == 1 else []
    came = words.group_results(records) if several else words.result_sentences(records[0])
    tiles = "" if several else _tiles(records[0])
    return section(
        "summary",
        "In short",
        '<div class="short">',
        _part("What this is", what),
        _part("What came out", came or ["Nothing was measured yet."]),
        _part("What to do", _advice(exhibits)),
        "</div>",
        tiles,
    )


def _part(title: str, sentences: Sequence[str]) -> str:
    return f"<div>{subhead(title)}{paragraphs(sentences)}</div>"


def _advice(exhibits: Sequence[Exhibit]) -> list[str]:
    if len(exhibits) == 1:
        return words.advice(exhibits[0].record, exhibits[0].diagnosis)
    return [words.group_advice(shown.record, shown.diagnosis) for shown in exhibits]


def _tiles(record: Record) -> str:
    shown = [
        _tile(name, record.figures.get(page, {}).get(key), style, unit)
        for name, page, key, style, unit in _tiles_of(record)
    ]
    name = words.distance_name([record])
    for of, value, code in words.distances(record, name):
        shown.append(_tile(f"{name} {of}", value, ".4g", f"protocol {code}"))
    return f'<dl class="tiles">{"".join(shown)}</dl>' if any(shown) else ""


def _tiles_of(record: Record) -> list[tuple[str, str, str, str, str]]:
    return [
        tile
        for tile in TILES
        if record.has_kl or tile[2] not in ("kl_nats", "elbo_nats", "active_units")
    ]


def _tile(name: str, value: float | None, style: str, unit: str) -> str:
    if value is None:
        return ""
    return f"<div><dt>{text(name)}</dt><dd>{words.number(value, style)} <small>{text(unit)}</small></dd></div>"


def samples(exhibits: Sequence[Exhibit]) -> str:
    """Grids of each prior beside real images, and reconstructions below their originals."""
    return section(
        "samples",
        "Samples and reconstructions",
        *(_pictures_of(e, named=len(exhibits) > 1) for e in exhibits),
    )


def _pictures_of(shown: Exhibit, *, named: bool) -> str:
    head = subhead(shown.record.name) if named else ""
    return head + paragraphs(shown.missing, "missing") + _grids(shown) + _pairs(shown)


def _grids(shown: Exhibit) -> str:
    grids = (
        [picture(shown.real, "grid of real test images", "Real test images")] if shown.real else []
    )
    for label, uri in shown.samples.items():
        grids.append(
            picture(uri, f"grid of generated images, {label}", f"{label}: {PRIORS[label]}")
        )
    if shown.kept_samples:
        grids.append(
            picture(
                shown.kept_samples,
                "grid of generated images",
                "Samples, as drawn at the end of training",
            )
        )
    return f'<div class="grids">{"".join(grids)}</div>' if grids else ""


def _pairs(shown: Exhibit) -> str:
    if shown.pairs:
        made = (
            "mean" if shown.record.recipe["generation"]["reconstruct_from"] == "mean" else "sample"
        )
        caption = f"Test images, and below each its reconstruction from the {made} of its posterior"
        sheets = (
            picture(uri, "test images above their reconstructions", caption) for uri in shown.pairs
        )
        return f'<div class="wide">{"".join(sheets)}</div>'
    if shown.kept_pairs:
        caption = "Test images, each with its reconstruction to the right, as drawn at the end of training"
        return f'<div class="wide">{picture(shown.kept_pairs, "test images beside their reconstructions", caption)}</div>'
    return ""


def training(records: Sequence[Record], figures: Sequence[dict[str, Any]]) -> str:
    """The curves of both stages."""
    if not figures:
        return section(
            "training",
            "Training",
            paragraphs(["No curves: there is no log (metrics.jsonl)."], "missing"),
        )
    toggled = toggle("axis", {"images": "images seen", "seconds": "training time"})
    parts = [
        _figures_of(stage, figures, title)
        for stage, title in ((1, "Stage 1: images"), (2, "Stage 2: latents of stage 1"))
    ]
    notes = _without_kl(records, "a penalty stands in its place")
    keys = legend(styles_of(labels_of(records)))
    intro = "One thin line for each seed, one colour for each label." if len(records) > 1 else ""
    return section(
        "training",
        "Training",
        f'<div class="bar">{toggled}{keys}</div>',
        paragraphs([intro, *notes] if intro else notes),
        *parts,
    )


def _without_kl(records: Sequence[Record], reason: str) -> list[str]:
    labels = labels_of(record for record in records if not record.has_kl)
    return [f"{words.listed(labels)}: deterministic, without a KL; {reason}."] if labels else []


def _figures_of(stage: int, figures: Sequence[dict[str, Any]], title: str) -> str:
    mine = [plot(figure) for figure in figures if figure["stage"] == stage]
    return f'{subhead(title)}<div class="charts">{"".join(mine)}</div>' if mine else ""


def latents(
    exhibits: Sequence[Exhibit], records: Sequence[Record], figures: Sequence[dict[str, Any]]
) -> str:
    """The latent page of the first seed of each label."""
    if not figures:
        return section(
            "latents",
            "Latents",
            paragraphs(["There are no codes yet: stage 1 is not finished."], "missing"),
        )
    several = len(records) > len(exhibits)
    notes = (
        [f"Of the first seed of each label: {words.listed([e.record.name for e in exhibits])}."]
        if several
        else []
    )
    notes += _without_kl(
        [e.record for e in exhibits], "their codes are points, without a posterior's variance"
    )
    notes.append("From the posteriors of the training images.")
    parts = [
        _figures_of(stage, figures, title)
        for stage, title in ((1, "Stage 1"), (2, "Stage 2: latents of latents"))
    ]
    return section(
        "latents", "Latents", legend(styles_of(labels_of(records))), paragraphs(notes), *parts
    )


def diagnosis(exhibits: Sequence[Exhibit]) -> str:
    """What `poise.diagnose` says."""
    return section(
        "diagnosis",
        "Diagnosis",
        *(_diagnosis_of(shown, named=len(exhibits) > 1) for shown in exhibits),
    )


def _diagnosis_of(shown: Exhibit, *, named: bool) -> str:
    head = subhead(shown.record.name) if named else ""
    if shown.diagnosis is None:
        return head + paragraphs([shown.undiagnosed], "missing")
    return head + _findings(shown.diagnosis)


def _findings(found: Diagnosis) -> str:
    shown = "".join(f"<li>{prose(line)}</li>" for line in found.evidence)
    verdict = f'<p class="verdict good">{text(found.verdict)}</p><ul>{shown}</ul>'
    causes = "".join(
        f"<li><strong>{text(finding.name)}</strong> {prose(finding.sentence)}<br><em>Try:</em> {prose(finding.remedy)}</li>"
        for finding in found.findings
    )
    return (verdict if found.healthy else f'<ol class="findings">{causes}</ol>') + paragraphs(
        found.notes, "note"
    )


def numbers(records: Sequence[Record]) -> str:
    """The figures of each run, and what was measured under protocols."""
    if len(records) == 1:
        return section("numbers", "Numbers", _numbers_of(records[0]))
    folded = "".join(_folded(record) for record in records)
    return section(
        "numbers", "Numbers", table(cells.figures_of_all(records), kind="numbers figures"), folded
    )


def _folded(record: Record) -> str:
    content = paragraphs(record.missing, "missing") + _measured(record)
    return f"<details><summary>{text(record.name)}</summary>{content}</details>" if content else ""


def comparison(records: Sequence[Record]) -> str:
    """Labels against each other, as `poise compare` shows them; empty for a single run."""
    results = cells.results_of(records)
    if len(results) < 2:
        return ""
    reference = results[0].label
    means = paragraphs(["Mean ± sample standard deviation over seeds, on test images."])
    parts = [
        means,
        table(compared_table(results), kind="numbers"),
        _differences(results, reference),
    ]
    return section("comparison", "Comparison", *parts, _speed(results, reference))


def _differences(results: Sequence[Result], reference: str) -> str:
    if len({result.label for result in results}) < 2:
        return ""
    about = (
        f"Paired by seed; with {FEWEST} pairs or more, in brackets the {COVERED:.0%} bootstrap interval of the mean, "
        "which is too narrow where seeds are few."
    )
    rows = table(differences(results, reference), kind="numbers")
    return subhead(f"Differences from {reference}") + paragraphs([about]) + rows


def _speed(results: Sequence[Result], reference: str) -> str:
    rows = cells.speed_rows(results, reference)
    about = ABOUT_SPEED.format(near=NEAR, reference=reference)
    return subhead("Speed") + paragraphs([about]) + table(rows, kind="numbers") if rows else ""


def _numbers_of(record: Record) -> str:
    figures = [["figure", "value"], *map(list, cells.figures_table(record.figures))]
    content = table(figures, kind="numbers figures") if len(figures) > 1 else ""
    return content + paragraphs(record.missing, "missing") + _measured(record)


def _measured(record: Record) -> str:
    if record.evaluation is None:
        return ""
    try:
        rows = cells.upright(cells.evaluation_rows(record))
    except InputError as error:
        return paragraphs([f"evaluation.json cannot be shown: {error}."], "missing")
    notes = paragraphs(record.evaluation.get("notes", []), "note")
    return subhead("Measured under the protocols below") + table(rows, kind="numbers") + notes


def settings(records: Sequence[Record]) -> str:
    """Every setting; where there are several labels, what differs is set off."""
    rows = cells.settings_rows(records)
    marked = cells.varying(rows)
    note = ["Settings that differ are set off."] if marked else []
    seeds = [
        f"Seed{'s' if len(records) > 1 else ''}: {words.listed(sorted({str(r.seed) for r in records}))}."
    ]
    return section(
        "settings",
        "Settings",
        paragraphs(seeds + note),
        table(rows, marked=marked, kind="settings"),
    )


def data(records: Sequence[Record]) -> str:
    """What the runs were trained on."""
    notes = list(dict.fromkeys(note for record in records for note in record.data.get("notes", [])))
    return section(
        "data", "Data", table(cells.data_rows(records), kind="data"), paragraphs(notes, "note")
    )


def protocols(records: Sequence[Record]) -> str:
    """Every protocol in full."""
    try:
        found = cells.protocols_of(records)
    except InputError as error:
        return section(
            "protocols",
            "Protocols",
            paragraphs([f"The protocols cannot be shown: {error}."], "missing"),
        )
    if not found:
        none = "None: nothing was measured by `poise evaluate`. The figures above are those of training's end, on test images."
        return section("protocols", "Protocols", paragraphs([none], "missing"))
    lines = [str(protocol) for protocol in found.values()]
    return section(
        "protocols",
        "Protocols",
        paragraphs(lines),
        table(cells.protocol_rows(found), kind="settings"),
    )


def versions(records: Sequence[Record]) -> str:
    """What trained the runs."""
    return section("versions", "Versions", table(cells.version_rows(records)))
