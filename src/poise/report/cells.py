"""Tables of a report as rows of cells. The first row is the head."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from poise.errors import InputError
from poise.metrics.listed import figures_table
from poise.protocols import Measurement, Protocol, table
from poise.recipes.settings import from_json
from poise.report.records import Record, first_of_each
from poise.studies.comparison import speed
from poise.studies.results import Result, curves

Rows = list[list[str]]


def flat(values: dict[str, Any], where: str = "") -> dict[str, str]:
    """Flatten nested settings to texts by dotted name."""
    rows: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            rows |= flat(value, f"{where}{key}.")
        else:
            rows[f"{where}{key}"] = plain(value)
    return rows


def plain(value: Any) -> str:
    """Format the value of a setting."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    return ", ".join(map(plain, value)) if isinstance(value, (list, tuple)) else str(value)


def settings_rows(records: Sequence[Record]) -> Rows:
    """Return a row for each setting except the seed, and a column for each label."""
    columns = {record.label: flat(record.recipe) for record in first_of_each(records)}
    for column in columns.values():
        column.pop("seed", None)
    return _side_by_side("setting", columns)


def _side_by_side(corner: str, columns: dict[str, dict[str, str]]) -> Rows:
    """Return a row for each name in any column, under a head with the names of the columns."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = ([name, *(column.get(name, "–") for column in columns.values())] for name in names)
    return [[corner, *columns], *rows]


def varying(rows: Rows) -> set[int]:
    """Return the indices of rows whose cells differ, counted without the head."""
    return {k for k, row in enumerate(rows[1:]) if len(set(row[1:])) > 1}


def data_rows(records: Iterable[Record]) -> Rows:
    """Return a row for each data set that the runs were trained on."""
    rows = [["source", "shape", "training images", "test images", "SHA-256"]]
    for record in records:
        data = record.data
        counts = [f"{data['train']:,}", f"{data['test']:,}"]
        rows.append(
            [str(data["source"]), " × ".join(map(str, data["shape"])), *counts, data["checksum"]]
        )
    return _distinct(rows)


def version_rows(records: Iterable[Record]) -> Rows:
    """Return a row for each combination of software versions and device used in training."""
    names = list(
        dict.fromkeys(name for record in records for name in record.config.get("versions", {}))
    )
    rows = [[*names, "device"]]
    for record in records:
        versions = record.config.get("versions", {})
        rows.append(
            [
                *(str(versions.get(name, "–")) for name in names),
                (record.summary or {}).get("device", "–"),
            ]
        )
    return _distinct(rows)


def _distinct(rows: Rows) -> Rows:
    return [list(row) for row in dict.fromkeys(map(tuple, rows))]


def figures_of_all(records: Sequence[Record]) -> Rows:
    """Return a row for each figure and a column for each run."""
    return _side_by_side("", {r.name: dict(figures_table(r.figures)) for r in records})


def measurements_of(record: Record) -> list[Measurement]:
    """Return the measurements of the last evaluation, with their protocols.

    Raises:
        InputError: evaluation.json was written by another version of Poise.
    """
    evaluation = record.evaluation or {}
    protocols = protocols_of([record])
    try:
        return [_measurement(values, protocols) for values in evaluation.get("measurements", [])]
    except (KeyError, TypeError) as error:
        raise InputError(f"evaluation.json cannot be read: {error}") from error


def _measurement(values: dict[str, Any], protocols: dict[str, Protocol]) -> Measurement:
    value = float("nan") if values["value"] is None else values["value"]
    return Measurement(**values | {"value": value, "protocol": protocols[values["protocol"]]})


def protocols_of(records: Iterable[Record]) -> dict[str, Protocol]:
    """Return the protocols of all measurements of these runs, by hash."""
    found: dict[str, Any] = {}
    for record in records:
        found |= (record.evaluation or {}).get("protocols", {})
    return {code: from_json(Protocol, values, f"protocol {code}") for code, values in found.items()}


def evaluation_rows(record: Record) -> Rows:
    """Return a row for each measured set of images and a column for each metric."""
    measured = measurements_of(record)
    return table(measured, mixed=True) if measured else []


def protocol_rows(protocols: dict[str, Protocol]) -> Rows:
    """Return a row for each attribute and a column for each protocol."""
    return _side_by_side("", {code: flat(asdict(p)) for code, p in protocols.items()})


def upright(rows: Rows) -> Rows:
    """Transpose a table with many columns and few rows, so that it fits a phone and a page."""
    if not rows or len(rows[0]) <= max(len(rows), 6):
        return rows
    return [list(column) for column in zip(*rows, strict=True)]


def results_of(records: Iterable[Record]) -> list[Result]:
    """Return the results of the finished runs, from `poise compare` or else from their files."""
    finished = [record for record in records if record.summary]
    return [replace(r.result, label=r.label) if r.result else _as_result(r) for r in finished]


def _as_result(record: Record) -> Result:
    nothing: dict[str, Any] = {"protocols": {}, "measurements": [], "notes": []}
    pages = {name: page for name, page in record.figures.items() if isinstance(page, dict)}
    return Result(
        experiment="report",
        label=record.label,
        seed=record.seed,
        settings=record.recipe,
        data=record.data,
        provenance={},
        seconds={"training": (record.summary or {}).get("seconds", math.nan)},
        curves=_curves(record),
        evaluation=nothing | pages | (record.evaluation or {}),
    )


def _curves(record: Record) -> dict[str, dict[str, list[float]]]:
    try:
        return curves(record.folder / "metrics.jsonl")
    except (OSError, ValueError, KeyError):  # no log, or an incomplete one
        return {}


def speed_rows(results: Sequence[Result], reference: str) -> Rows:
    """Return the rows of `poise.studies.comparison.speed`, or none if a run has no curves."""
    return speed(results, reference) if all("1" in result.curves for result in results) else []
