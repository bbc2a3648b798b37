"""Show tables on stdout, and the warnings of a run on stderr."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from poise.support.progress import warn

if TYPE_CHECKING:
    from poise.runs.run import Run

WHOLE_TABLE = 160  # columns: numbers are never cut off, even on a narrow terminal


def load_run(folder: Path, device: str) -> "Run":
    """Load a run and print its warnings.

    Raises:
        InputError, RunError: see `poise.load`.
    """
    from poise.runs.run import load

    run = load(folder, device=device)
    for line in run.warnings:
        warn(f"{line}; using the one before")
    if not run.finished:
        untrained = run.recipe.second is not None and run.second_stage is None
        without = (
            ", and stage 2 has not begun: the prior is normal unless you choose"
            if untrained
            else ""
        )
        warn(f"{folder} is not finished{without}")
    return run


def print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}")


def show_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Print a table of names and values."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(escape(name), value)
    Console().print(table)


def show_cells(title: str, rows: list[list[str]]) -> None:
    """Print a table with a header. It is never cut off, even if the terminal is too narrow."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    head, *body = rows
    table = Table(
        title=escape(title) or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for name in head:
        table.add_column(escape(name), justify="right" if name else "left", no_wrap=True)
    for row in body:
        table.add_row(*map(escape, row))
    Console(width=max(Console().width, WHOLE_TABLE)).print(table)
