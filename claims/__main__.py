"""The command: see the package."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch

import poise
from claims.design import design, quick
from claims.measure import is_finished
from claims.page import PAGE, README, RESULTS, in_readme, page, short_table, with_table
from poise.errors import InputError, Interrupted, RunError
from poise.studies.comparison.experiment import Experiment, conduct_all
from poise.studies.results import Result, read_results
from poise.support.files import write_file

RUNS, QUICK = Path("runs/claims"), Path("runs/claims-quick")


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    options = parser().parse_args(arguments)
    try:
        options.action(options)
    except (InputError, Interrupted, RunError) as error:
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
    runs.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
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
    trial.add_argument("--jobs", type=int, default=1, help="two need longer to start than it takes")
    pages = actions.add_parser("page", help="write docs/claims.md and the table in README.md")
    pages.set_defaults(action=write)
    pages.add_argument("--results", type=Path, default=RESULTS)
    listed = actions.add_parser("list", help="the runs, one a line")
    listed.set_defaults(action=show)
    return made


def run(options: argparse.Namespace) -> None:
    """The design's runs, or some of them."""
    wanted = [
        experiment
        for experiment in design()
        if not options.only or any(fnmatch(experiment.name, pattern) for pattern in options.only)
    ]
    if not wanted:
        raise InputError(
            f"no experiment is called {' or '.join(options.only)}: python -m claims list shows them"
        )
    work(wanted, options.runs, options.results, jobs=options.jobs, keep=options.keep)


def work(
    experiments: Sequence[Experiment], runs: Path, results: Path, *, jobs: int, keep: bool = False
) -> None:
    """Do what is not finished. The data of experiments that are finished need not be here.

    Args:
        experiments: what is done.
        runs: folder of the runs until they are measured.
        results: folder of the results.
        jobs: runs at a time.
        keep: keep the runs.

    Raises:
        RunError: some failed.
    """
    torch.set_num_threads(1)  # also of other processes: see `crew_for`
    written = there(results)
    left = {
        runs / experiment.name: replace(experiment, keep=keep)
        for experiment in experiments
        if not is_finished(experiment, written)
    }
    print(f"{len(experiments) - len(left)} of {len(experiments)} experiments are finished")
    options = poise.Options(device="cpu")
    done = conduct_all(left, title="claims", results=results, jobs=jobs, options=options)
    failed = [
        f"{comparison.name} {label} {seed}: {message}"
        for comparison in done
        for (label, seed), message in comparison.failed.items()
    ]
    if failed:
        raise RunError("\n".join(["some runs failed; the others are done", *failed]))


def run_quickly(options: argparse.Namespace) -> None:
    """A few small runs, and a page of them."""
    experiments = quick()
    work(experiments, options.out / "runs", options.out / "results", jobs=options.jobs)
    results = read_results([options.out / "results"])
    write_file(options.out / "claims.md", page(results, experiments).encode())
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
    for experiment in design():
        for label, recipe in experiment.planned():
            print(experiment.name, label, recipe.seed, sep="\t")


if __name__ == "__main__":
    main()
