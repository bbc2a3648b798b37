"""Render the whole page: one self-contained file that forbids the browser all network access."""

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from markupsafe import Markup, escape

from poise.errors import InputError
from poise.report.curves import styles_of, training_figures
from poise.report.latent_page import latent_figures
from poise.report.models import DataSetCache, Exhibit, exhibit
from poise.report.records import Record, first_of_each, labels_of, read_records
from poise.report.sections import Report, sections_of
from poise.report.words import listed
from poise.support.files import write_file
from poise.support.html import templates
from poise.support.progress import progress
from poise.support.version import __version__


def write_report(
    folders: str | Path | Sequence[str | Path],
    out: str | Path = "report.html",
    *,
    device: str = "auto",
    quiet: bool = True,
) -> Path:
    """Write a self-contained HTML page about runs and return its path.

    Args:
        folders: folders of runs, or folders with runs in them. Runs whose folders differ only by
            the seed at the end of the name share a label. Images and latents are shown for the
            first seed of each label.
        out: path of the page, an .html file.
        device: device on which samples are drawn.
        quiet: show no progress.

    Raises:
        InputError: a folder holds no run, or `out` is not the name of an .html file.
        RunError: the page cannot be written.

    Example:
        >>> poise.report.write_report(["runs/digits"], "digits.html")  # doctest: +SKIP
    """
    several = [folders] if isinstance(folders, (str, Path)) else folders
    paths, out = [Path(folder) for folder in several], Path(out)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise InputError(f"the report must be an .html file, not {out}")
    records = read_records(paths)
    exhibits = _exhibits(first_of_each(records), device, quiet)
    text = page(records, exhibits, title_of(paths, records))
    # The name of a folder may hold bytes that are not UTF-8.
    write_file(out, text.encode(errors="backslashreplace"))
    return out


def _exhibits(records: Sequence[Record], device: str, quiet: bool) -> list[Exhibit]:
    data_sets, shown = DataSetCache(), []
    with progress("report", len(records), quiet=quiet) as display:
        for number, record in enumerate(records, 1):
            shown.append(exhibit(record, data_sets, device))
            display.update(number, {})
    return shown


def title_of(paths: Sequence[Path], records: Sequence[Record]) -> str:
    """Return the name of the folder if only one is given, or else the compared labels."""
    return paths[0].resolve().name if len(paths) == 1 else listed(labels_of(records))


def page(records: Sequence[Record], exhibits: Sequence[Exhibit], title: str) -> str:
    """Return the HTML of the report."""
    styles = styles_of(labels_of(records))
    axes, curves = training_figures(records)
    codes = latent_figures([(shown.record, shown.latents) for shown in exhibits], styles)
    report = Report(records, exhibits, styles, axes, curves, codes)
    pages = templates("poise.report", autoescape=True)
    pages.filters["prose"] = prose
    return pages.get_template("page.html").render(
        title=title,
        subtitle=subtitle(records),
        report=report,
        sections=sections_of(report),
        plotly=plotly(),
        version=__version__,
        date=datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
    )


def prose(sentence: str) -> Markup:
    """Return a sentence as HTML, with words in backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(sentence))))


def subtitle(records: Sequence[Record]) -> str:
    """Return recipe, balance, seed and state of one run, or the numbers of runs and labels."""
    if len(records) > 1:
        return f"{len(records)} runs, {len(labels_of(records))} labels"
    record = records[0]
    state = "finished" if record.summary else "not finished"
    name, balance = record.recipe["name"], record.recipe["first"]["balance"]
    return f"recipe {name}, balance {balance}, seed {record.seed}, {state}"


def plotly() -> str:
    """Return the script of plotly.js from the installed package."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()
