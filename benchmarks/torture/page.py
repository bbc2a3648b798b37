"""The tables of docs/reliability.md, from the reports of the parts."""

import json
from pathlib import Path
from typing import Any

from benchmarks.measuring import between
from benchmarks.torture.cases import FAILURES, OK, REFUSED

PAGE = Path("docs/reliability.md")
RESULTS = Path("results")
PARTS = {
    "kills": "Kills",
    "fuzzing": "Damaged files",
    "storage": "Disks, clocks, two users of a folder",
    "planted": "NaN, infinity, absurd rates",
    "sizes": "Sizes",
    "surroundings": "Surroundings",
    "dependencies": "Dependencies",
}
MISSING = "This part has not run yet.\n"
Report = dict[str, Any]


def read_reports(results: Path = RESULTS) -> dict[str, Report]:
    """Return the report of each part that has run."""
    paths = {name: results / f"torture-{name}.json" for name in PARTS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def with_tables(page: str, reports: dict[str, Report]) -> str:
    """Return the page with the tables of the reports between their marks."""
    tables = {name: table(reports[name]) if name in reports else MISSING for name in PARTS}
    for name, text in {"all": summary(reports), **tables}.items():
        page = between(page, f"<!-- {name} -->", f"<!-- end of {name} -->", text)
    return page


def markdown(rows: list[list[Any]]) -> str:
    head, *body = [[str(cell) for cell in row] for row in rows]
    marks = ["---", *["--:" for _ in head[1:]]]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, marks, *body])


def summary(reports: dict[str, Report]) -> str:
    rows: list[list[Any]] = [["part", "cases", "done", "refused in one line", "failed", "minutes"]]
    for name, title in PARTS.items():
        if name in reports:
            report = reports[name]
            rows.append([title, *totals(report["groups"]), f"{report['seconds'] / 60:.1f}"])
    return markdown(rows)


def totals(groups: list[dict[str, Any]]) -> list[int]:
    failed = [sum(row[name] for name in FAILURES) for row in groups]
    columns = [[row[name] for row in groups] for name in ("tried", OK, REFUSED)]
    return [sum(column) for column in [*columns, failed]]


def table(report: Report) -> str:
    """Return the counts of each group, and the figures of the part."""
    rows: list[list[Any]] = [["what", "cases", "done", "refused in one line", "failed"]]
    rows += [[row["group"], *totals([row])] for row in report["groups"]]
    text = markdown(rows)
    if report["figures"]:
        names = list(next(iter(report["figures"].values())))
        head = ["", *names]
        text += "\n" + markdown(
            [head, *[[key, *[row[n] for n in names]] for key, row in report["figures"].items()]]
        )
    return text
