"""`poise compare`, `reproduce` and `report`: train, measure and show several runs."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from tyro.conf import Positional, arg

from poise.cli.options import (
    ANY_IMAGES,
    BALANCES,
    RECIPES_OWN,
    Device,
    Jobs,
    PriorChoice,
    RecipeName,
    SecondBalance,
    StopAfter,
    TrainingCommand,
)
from poise.errors import RunError
from poise.protocols import PROTOCOLS
from poise.recipes import CHANGES, EXPERIMENTS
from poise.recipes.settings import OF_ONE_RUN

if TYPE_CHECKING:
    from poise.studies.comparison import Comparison


OF_WORKERS = frozenset({"threads", "tensorboard"})  # chosen by the workers of a study


@dataclass(frozen=True)
class Compare(TrainingCommand):
    """Train and measure several balances or models under the same conditions, with several seeds.

    The result is one table and one page of plots. The labels differ only in the balance or the
    objective of stage 1. Images, network, order, noise, length and protocol are the same. To
    resume an interrupted comparison, run the same command again.
    """

    leaves_out = OF_ONE_RUN | OF_WORKERS

    data: Annotated[
        Positional[str | None],
        arg(
            metavar="[DATA]",
            help=ANY_IMAGES,
            help_behavior_hint="(default: the recipe's own, or digits)",
        ),
    ] = None
    balances: Annotated[
        tuple[str, ...] | None,
        arg(
            metavar="NAME [NAME ...]",
            help=f"balances of stage 1; the first is the reference: {BALANCES}",
            help_behavior_hint="(default: computed learned optimal fixed; with --models computed)",
        ),
    ] = None
    models: Annotated[
        tuple[str, ...],
        arg(
            metavar="NAME [NAME ...]",
            help="objectives of stage 1: autoencoder, rae-l2, rae-gp, wae-mmd:weight=10, ...",
            help_behavior_hint="(default: none)",
        ),
    ] = ()
    priors: Annotated[
        tuple[PriorChoice, ...] | None,
        arg(
            metavar="NAME [NAME ...]",
            help=f"priors whose samples are compared: {', '.join(get_args(PriorChoice))}. "
            "Without second-stage and flow, no stage 2 is trained",
            help_behavior_hint="(default: all of the recipe)",
        ),
    ] = None
    seeds: Annotated[int, arg(help="number of seeds; they are 0, 1, ...")] = 3
    recipe: RecipeName = None
    out: Annotated[
        Path | None,
        arg(help="the comparison's folder", help_behavior_hint="(default: runs/compare-DATA)"),
    ] = None
    second_balance: SecondBalance = None
    protocol: Annotated[str, arg(help=f"{', '.join(PROTOCOLS)} (see docs/metrics.md)")] = "default"
    images: Annotated[
        int | None,
        arg(
            help="number of real images, and of images to compare with them",
            help_behavior_hint="(default: the protocol's)",
        ),
    ] = None
    extractor: Annotated[
        str,
        arg(
            help="see `poise evaluate --help`. auto: pixels for images of at most 16x16, else the "
            "first of inception, light and pixels that is available"
        ),
    ] = "auto"
    stop_after: StopAfter = None
    jobs: Jobs = None

    def run(self) -> None:
        from poise.studies.comparison import compare

        own: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Compare)}
        options = self.options()
        comparison = compare(**own, options=options, **self.changes())
        if comparison.results or comparison.failed:
            print(comparison)
            page = f"; page: {write_page(comparison, options.device)}" if comparison.results else ""
            print(
                f"table: {comparison.folder}/table.md{page}; runs: {comparison.folder}/LABEL-SEED"
            )
        say_if_late(comparison, self.stop_after)
        fail_if_any(comparison)


@dataclass(frozen=True)
class Reproduce(TrainingCommand):
    """Run a published experiment and show the results beside the published numbers.

    All priors and protocols of the publication are used. To resume after an interruption or
    --stop-after, run the same command again.
    """

    leaves_out = frozenset(CHANGES) | OF_WORKERS

    name: Annotated[Positional[str], arg(metavar="NAME", help=", ".join(EXPERIMENTS))]
    data: Annotated[
        str | None,
        arg(
            help="path of its images, if they are not in ./data or POISE_DATA",
            help_behavior_hint="(default: by name)",
        ),
    ] = None
    balances: Annotated[
        tuple[str, ...] | None,
        arg(
            metavar="NAME [NAME ...]",
            help="balances of stage 1, for example: computed learned optimal",
            help_behavior_hint=RECIPES_OWN,
        ),
    ] = None
    second_balance: SecondBalance = None
    seeds: Annotated[int, arg(help="number of seeds; they are 0, 1, ...")] = 1
    length: Annotated[
        float, arg(help="fraction of the full length, for a trial. Labels in tables show it")
    ] = 1.0
    stop_after: StopAfter = None
    out: Annotated[
        Path | None,
        arg(help="folder of the runs", help_behavior_hint="(default: runs/reproduce-NAME)"),
    ] = None
    results: Annotated[Path, arg(help="folder of the results, one JSON file per run")] = Path(
        "results"
    )
    extractor: Annotated[str, arg(help="see `poise evaluate --help`")] = "auto"
    jobs: Jobs = None

    def run(self) -> None:
        from poise.studies.reproduction import reproduce, text

        own: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Reproduce)}
        comparison = reproduce(**own, options=self.options())
        if comparison.results or comparison.failed:
            print(text(comparison))
            print(f"results: {self.results}/{self.name}-LABEL-SEED.json; runs: {comparison.folder}")
        say_if_late(comparison, self.stop_after)
        fail_if_any(comparison)


@dataclass(frozen=True)
class Report:
    """Write a self-contained HTML page about runs.

    It shows curves, images, latents, diagnosis, numbers with their protocols, and settings.
    """

    folders: Annotated[
        Positional[tuple[Path, ...]],
        arg(
            metavar="PATHS...",
            help="folders of runs, folders that contain runs (comparisons), or results "
            "(.json files or folders of them)",
            help_behavior_hint="(one or more)",
        ),
    ]
    out: Annotated[Path, arg(help="the page, an .html file")] = Path("report.html")
    device: Device = "auto"

    def run(self) -> None:
        from poise.report import write_report

        out = write_report(self.folders, self.out, device=self.device, quiet=False)
        print(f"report: {out}")


def write_page(comparison: "Comparison", device: str) -> Path:
    """Write the comparison's page of plots and return its path."""
    from poise.report import write_report

    return write_report(
        [comparison.folder], comparison.folder / "report.html", device=device, quiet=False
    )


def say_if_late(comparison: "Comparison", stop_after: float | None) -> None:
    """Print how to resume, if --stop-after ended the comparison before all runs finished."""
    if comparison.late:
        print(f"stopped after {stop_after:g} minutes; run the same command again to go on")


def fail_if_any(comparison: "Comparison") -> None:
    """Raise an error if a run has failed.

    Raises:
        RunError: a run has failed.
    """
    if comparison.failed:
        count = len(comparison.failed)
        raise RunError(
            f"{count} of {count + len(comparison.results)} runs failed: see the end of the table"
        )
