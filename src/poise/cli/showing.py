"""What the commands show: tables on stdout, warnings of the run they open on stderr."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poise.runs.run import Run

WHOLE_TABLE = 160  # columns: numbers are never cut off, whatever the terminal's width


def load_run(folder: Path, device: str) -> "Run":
    """A run, with its warnings said."""
    from poise.runs.run import load

    run = load(folder, device=device)
    for line in run.warnings:
        print(f"poise: warning: {line}; using the one before", file=sys.stderr)
    if not run.finished:
        untrained = run.recipe.second is not None and run.second is None
        without = (
            ", and stage 2 has not begun: the prior is normal unless you choose"
            if untrained
            else ""
        )
        print(f"poise: warning: {folder} is not finished{without}", file=sys.stderr)
    return run


def show_table(title: str, rows: list[tuple[str, str]]) -> None:
    """A table on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(escape(name), value)
    Console().print(table)


def show_cells(title: str, rows: list[list[str]]) -> None:
    """A table with a head on stdout, whole even where the terminal is too narrow for it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    head, *body = rows
    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in head:
        table.add_column(escape(name), justify="right" if name else "left", no_wrap=True)
    for row in body:
        table.add_row(*map(escape, row))
    Console(width=max(Console().width, WHOLE_TABLE)).print(table)
