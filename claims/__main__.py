"""The command `python -m claims`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch

import poise
from benchmarks.measuring import between
from claims.design import colour, design, quick
from claims.measure import is_finished
from claims.page import BEGIN, END, PAGE, README, RESULTS, in_readme, page, short_table
from poise.errors import InputError, Interrupted, RunError
from poise.studies.comparison.experiment import Experiment, conduct_all
from poise.studies.results import Result, read_results
from poise.support.files import write_file

RUNS, QUICK = Path("runs/claims"), Path("runs/claims-quick")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: words of the command line; None: those of the process.
    """
    options = parser().parse_args(arguments)
    try:
        options.action(options)
    except (InputError, Interrupted, RunError) as error:
        sys.exit(f"claims: {error}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m claims", description="Evidence for the claims of the method."
    )
    actions = made.add_subparsers(required=True)
    runs = actions.add_parser(
        "run", help="train and measure the missing runs, and resume interrupted ones"
    )
    runs.set_defaults(action=run)
    runs.add_argument(
        "--only",
        nargs="+",
        metavar="PATTERN",
        help="names of experiments: claims-digits, claims-digits-batch-*",
    )
    runs.add_argument("--jobs", type=int, default=2, help="runs at a time, with one thread each")
    runs.add_argument(
        "--runs", type=Path, default=RUNS, help="folder of the runs until they are measured"
    )
    runs.add_argument("--results", type=Path, default=RESULTS)
    runs.add_argument("--keep", action="store_true", help="keep the runs' folders after measuring")
    coloured = actions.add_parser(
        "colour", help="do the eight runs on CIFAR-10: 13 hours of a core, or minutes of a GPU"
    )
    coloured.set_defaults(action=run_in_colour)
    coloured.add_argument("--device", default="auto")
    coloured.add_argument("--jobs", type=int, default=2, help="runs at a time")
    coloured.add_argument("--runs", type=Path, default=RUNS)
    coloured.add_argument("--results", type=Path, default=RESULTS)
    trial = actions.add_parser(
        "quick", help="run the same pipeline on the digits, in seconds, as a test"
    )
    trial.set_defaults(action=run_quickly)
    trial.add_argument("--out", type=Path, default=QUICK)
    trial.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at a time; with two, starting takes longer than the work",
    )
    pages = actions.add_parser("page", help="write docs/claims.md and the table in README.md")
    pages.set_defaults(action=write)
    pages.add_argument("--results", type=Path, default=RESULTS)
    listed = actions.add_parser("list", help="list the runs, one per line")
    listed.set_defaults(action=show)
    return made


def run(options: argparse.Namespace) -> None:
    """Do the runs of the design, or those of `--only`."""
    wanted = [
        experiment
        for experiment in design()
        if not options.only or any(fnmatch(experiment.name, pattern) for pattern in options.only)
    ]
    if not wanted:
        raise InputError(
            f"no experiment is called {' or '.join(options.only)}: "
            "python -m claims list shows the names"
        )
    work(wanted, options.runs, options.results, jobs=options.jobs, keep=options.keep)


def run_in_colour(options: argparse.Namespace) -> None:
    """Do the runs on colour images."""
    work([colour()], options.runs, options.results, jobs=options.jobs, device=options.device)


def work(
    experiments: Sequence[Experiment],
    runs: Path,
    results: Path,
    *,
    jobs: int,
    keep: bool = False,
    device: str = "cpu",
) -> None:
    """Do all runs that are not finished. Finished experiments do not need their data.

    Args:
        experiments: the experiments.
        runs: folder of the runs until they are measured.
        results: folder of the results.
        jobs: runs at a time, at least 1.
        keep: keep the runs' folders after measuring.
        device: see `poise.Options`.

    Raises:
        RunError: some runs failed.
    """
    torch.set_num_threads(1)  # also in worker processes: see `crew_for`
    written = there(results)
    left = {
        runs / experiment.name: replace(experiment, keep=keep)
        for experiment in experiments
        if not is_finished(experiment, written)
    }
    print(f"{len(experiments) - len(left)} of {len(experiments)} experiments are finished")
    options = poise.Options(device=device)
    done = conduct_all(left, title="claims", results=results, jobs=jobs, options=options)
    failed = [
        f"{comparison.name} {label} {seed}: {message}"
        for comparison in done
        for (label, seed), message in comparison.failed.items()
    ]
    if failed:
        raise RunError("\n".join(["some runs failed; the others are done", *failed]))


def run_quickly(options: argparse.Namespace) -> None:
    """Do a few small runs, and write a page of them."""
    experiments = quick()
    work(experiments, options.out / "runs", options.out / "results", jobs=options.jobs)
    results = read_results([options.out / "results"])
    write_file(options.out / "claims.md", page(results, experiments).encode())
    write_file(options.out / "table.md", short_table(results).encode())


def write(options: argparse.Namespace) -> None:
    """Write docs/claims.md and the table in README.md."""
    results = there(options.results)
    write_file(PAGE, page(results).encode())
    readme = README.read_text(encoding="utf-8")
    write_file(README, between(readme, BEGIN, END, in_readme(results)).encode())


def there(folder: Path) -> list[Result]:
    """Return the results in a folder, or none if it does not exist yet."""
    return read_results([folder]) if any(folder.glob("*.json")) else []


def show(options: argparse.Namespace) -> None:
    """Print experiment, label and seed of every run."""
    for experiment in design():
        for label, recipe in experiment.planned():
            print(experiment.name, label, recipe.seed, sep="\t")


if __name__ == "__main__":
    main()
