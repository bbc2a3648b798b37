"""The command: see the package."""

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from claims.design import Trial, design, quick
from claims.page import PAGE, README, RESULTS, in_readme, page, short_table, with_table
from claims.work import work
from poise.errors import InputError, RunError
from poise.studies.results import Result, read_results
from poise.support.files import write_file

RUNS, QUICK = Path("runs/claims"), Path("runs/claims-quick")


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    options = parser().parse_args(arguments)
    try:
        options.action(options)
    except (InputError, RunError) as error:
        sys.exit(f"claims: {error}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m claims", description="The evidence for what the method is said to do."
    )
    actions = made.add_subparsers(required=True)
    runs = actions.add_parser(
        "run", help="train and measure what is not done yet, and go on with what was interrupted"
    )
    runs.set_defaults(action=run)
    runs.add_argument(
        "--only",
        nargs="+",
        metavar="PATTERN",
        help="experiments by name: claims-digits, claims-digits-batch-*",
    )
    runs.add_argument("--mnist", type=Path, help="its folder or .npz; else POISE_DATA is searched")
    runs.add_argument("--fashion", type=Path, help="the same for Fashion-MNIST")
    runs.add_argument(
        "--processes", type=int, default=2, help="of one thread each; 0: none but this one"
    )
    runs.add_argument(
        "--runs", type=Path, default=RUNS, help="where runs lie until they are measured"
    )
    runs.add_argument("--results", type=Path, default=RESULTS)
    runs.add_argument("--keep", action="store_true", help="keep the runs")
    trial = actions.add_parser(
        "quick", help="the same pipeline on the digits in seconds: it shows that everything runs"
    )
    trial.set_defaults(action=run_quickly)
    trial.add_argument("--out", type=Path, default=QUICK)
    trial.add_argument(
        "--processes", type=int, default=0, help="two need longer to start than it takes"
    )
    pages = actions.add_parser("page", help="write docs/claims.md and the table in README.md")
    pages.set_defaults(action=write)
    pages.add_argument("--results", type=Path, default=RESULTS)
    listed = actions.add_parser("list", help="the runs, one a line")
    listed.set_defaults(action=show)
    return made


def run(options: argparse.Namespace) -> None:
    """The design's runs, or some of them."""
    wanted = [
        t
        for t in design()
        if not options.only or any(fnmatch(t.experiment, pattern) for pattern in options.only)
    ]
    if not wanted:
        raise InputError(
            f"no experiment is called {' or '.join(options.only)}: python -m claims list shows them"
        )
    given = {"mnist": options.mnist, "fashion-mnist": options.fashion}
    sources = {name: str(path.resolve()) for name, path in given.items() if path}
    work(
        wanted,
        options.runs,
        options.results,
        sources,
        processes=options.processes,
        keep=options.keep,
    )


def run_quickly(options: argparse.Namespace) -> None:
    """A few small runs, and a page of them."""
    trials: list[Trial] = quick()
    work(trials, options.out / "runs", options.out / "results", {}, processes=options.processes)
    results = read_results([options.out / "results"])
    write_file(options.out / "claims.md", page(results, trials).encode())
    write_file(options.out / "table.md", short_table(results).encode())


def write(options: argparse.Namespace) -> None:
    """docs/claims.md and README.md from results."""
    results = there(options.results)
    write_file(PAGE, page(results).encode())
    write_file(README, with_table(README.read_text(encoding="utf-8"), in_readme(results)).encode())


def there(folder: Path) -> list[Result]:
    """The results in a folder; none if there is no folder yet."""
    return read_results([folder]) if any(folder.glob("*.json")) else []


def show(options: argparse.Namespace) -> None:
    """Every run."""
    for trial in design():
        print(trial.experiment, trial.label, trial.recipe.seed, sep="\t")


if __name__ == "__main__":
    main()
