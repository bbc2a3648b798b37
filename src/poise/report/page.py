"""The whole page: one file, which loads nothing. Its policy forbids the browser to ask any network for anything."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from string import Template
from typing import Any

from poise.errors import InputError
from poise.report import sections
from poise.report.curves import styles_of, training_figures
from poise.report.latent_page import latent_figures
from poise.report.markup import embedded_json, text
from poise.report.models import Exhibit, Shelf, exhibit
from poise.report.records import Record, first_of_each, labels_of, read_records
from poise.report.words import listed
from poise.support.files import write_file
from poise.support.progress import progress
from poise.support.version import __version__

HERE = Path(__file__).parent
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<p class="mark">poise report</p>
<h1>$title</h1>
<p class="sub">$subtitle</p>
<nav aria-label="sections">$contents</nav>
</header>
<main>
<noscript><p class="missing">The plots need JavaScript, which is switched off; everything else is here.</p></noscript>
$body
</main>
<footer><p>Made by poise $version on $date. This page is complete in itself: it loads nothing.</p></footer>
$values
<script>$library</script>
<script>$script</script>
</body>
</html>
"""
)
CONTENTS = {
    "summary": "In short",
    "comparison": "Comparison",
    "samples": "Samples",
    "training": "Training",
    "latents": "Latents",
    "diagnosis": "Diagnosis",
    "numbers": "Numbers",
    "settings": "Settings",
    "data": "Data",
    "protocols": "Protocols",
    "versions": "Versions",
}


def write_report(
    folders: Sequence[str | Path],
    out: str | Path = "report.html",
    *,
    device: str = "auto",
    quiet: bool = True,
) -> Path:
    """The path of a page about runs: one HTML file that needs nothing else.

    Args:
        folders: each a run's folder, or a folder with runs in it. Images and latents are shown of the first seed of each
            label: runs that share a folder's name but for the seed at its end.
        out: the page.
        device: where samples are drawn.
        quiet: no progress display.

    Raises:
        InputError: a folder holds no run, or `out` is not the name of an .html file.
        RunError: the page cannot be written.

    Example:
        >>> poise.report.write_report(["runs/digits"], "digits.html")      # doctest: +SKIP
    """
    paths, out = [Path(folder) for folder in folders], Path(out)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise InputError(f"the report is an .html file, not {out}")
    records = read_records(paths)
    exhibits = _exhibits(first_of_each(records), device, quiet)
    write_file(out, page(records, exhibits, title_of(paths, records)).encode())
    return out


def _exhibits(records: Sequence[Record], device: str, quiet: bool) -> list[Exhibit]:
    shelf, shown = Shelf(), []
    with progress("report", len(records), quiet=quiet) as display:
        for number, record in enumerate(records, 1):
            shown.append(exhibit(record, shelf, device))
            display.update(number, {})
    return shown


def title_of(paths: Sequence[Path], records: Sequence[Record]) -> str:
    """The name of the only folder given, or what is compared."""
    return paths[0].resolve().name if len(paths) == 1 else listed(labels_of(records))


def page(records: Sequence[Record], exhibits: Sequence[Exhibit], title: str) -> str:
    """The HTML of runs that were read, and of what their models show."""
    axes, curves = training_figures(records)
    pages = [(shown.record, shown.latents) for shown in exhibits]
    codes = latent_figures(pages, styles_of(labels_of(records)))
    parts = _parts(records, exhibits, curves, codes)
    values = embedded_json("values", {"axes": axes, "figures": [*curves, *codes]})
    return PAGE.substitute(
        policy=POLICY,
        title=text(title),
        subtitle=text(subtitle(records)),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        contents="".join(
            f'<a href="#{name}">{words}</a>'
            for name, words in CONTENTS.items()
            if f'id="{name}"' in parts
        ),
        body=parts,
        values=values,
        library=plotly(),
        version=__version__,
        date=datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
    )


def _parts(
    records: Sequence[Record],
    exhibits: Sequence[Exhibit],
    curves: list[dict[str, Any]],
    codes: list[dict[str, Any]],
) -> str:
    return "\n".join(
        (
            sections.summary(records, exhibits),
            sections.comparison(records),
            sections.samples(exhibits),
            sections.training(records, curves),
            sections.latents(exhibits, records, codes),
            sections.diagnosis(exhibits),
            sections.numbers(records),
            sections.settings(records),
            sections.data(records),
            sections.protocols(records),
            sections.versions(records),
        )
    )


def subtitle(records: Sequence[Record]) -> str:
    """Recipe, balance and state of a run; or how many there are."""
    if len(records) > 1:
        return f"{len(records)} runs, {len(labels_of(records))} labels"
    record = records[0]
    state = "finished" if record.summary else "not finished"
    return f"recipe {record.recipe['name']}, balance {record.recipe['first']['balance']}, seed {record.seed}, {state}"


def plotly() -> str:
    """The plotting library's script, which comes inside its package."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()
