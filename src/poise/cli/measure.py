"""`poise evaluate` and `diagnose`: measure a run, and find what is wrong with it."""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from poise.cli.options import (
    ANY_IMAGES,
    Device,
    ReadingGroup,
    ReadingOptions,
    RunFolder,
    refuse_reading,
)
from poise.cli.showing import load_run, print_notes, show_cells, show_table
from poise.errors import InputError
from poise.protocols import ORIGINS, PROTOCOLS, table
from poise.recipes import RECIPES

if TYPE_CHECKING:
    from poise.evaluation import Evaluation
    from poise.runs.run import Run


@dataclass(frozen=True)
class Evaluate:
    """Measure a run on its test images, or compare two sets of images.

    Of a run, the error, the ELBO and the latents are measured, and with --nll-samples the
    likelihood. Its reconstructions and the samples of each prior are compared with real images:
    FID (or another distance, by --extractor), KID, precision, recall, density and coverage. Every
    number has its protocol. The output is a table on a terminal, and JSON in a file or a pipe.
    """

    run_folder: Annotated[
        Positional[Path | None],
        arg(
            metavar="RUN",
            help="the folder that `poise train` wrote",
            help_behavior_hint="(or --real and --generated)",
        ),
    ] = None
    real: Annotated[
        str | None,
        arg(
            metavar="DATA",
            help=f"real images: {ANY_IMAGES}; or reference statistics, an .npz with mu and sigma "
            "or a .pt of torch-fidelity",
            help_behavior_hint="(instead of a run; beside it only statistics)",
        ),
    ] = None
    generated: Annotated[
        str | None,
        arg(
            metavar="DATA",
            help="images to compare with the real ones, given in the same way",
            help_behavior_hint="",
        ),
    ] = None
    statistics_by: Annotated[
        str | None,
        arg(
            help=f"who computed the statistics in --real: {', '.join(ORIGINS)}",
            help_behavior_hint="(default: the file or its name says it)",
        ),
    ] = None
    statistics_images: Annotated[
        int | None,
        arg(
            help="number of images behind the statistics in --real",
            help_behavior_hint="(default: the file says it)",
        ),
    ] = None
    write_statistics: Annotated[
        Path | None,
        arg(
            help="write the statistics of the images in --real to this .npz file, for later calls",
            help_behavior_hint="(instead of --generated)",
        ),
    ] = None
    size: Annotated[
        int | None,
        arg(
            help="crop all images to the centre square and resize to this side, in pixels",
            help_behavior_hint="(default: keep the size)",
        ),
    ] = None
    protocol: Annotated[
        str | None,
        arg(
            help=f"{', '.join(PROTOCOLS)} (see docs/metrics.md)",
            help_behavior_hint="(default: default; every-image for two sets)",
        ),
    ] = None
    extractor: Annotated[
        str,
        arg(
            help="network whose features are compared: inception (FID; downloaded once), light, "
            "dinov2, pixels, FILE.pt:range=-1..1. auto: inception if its weights are on this "
            "machine, else light. none: no comparison"
        ),
    ] = "auto"
    images: Annotated[
        int | None,
        arg(
            help="number of real images, and of generated ones",
            help_behavior_hint="(default: the protocol's)",
        ),
    ] = None
    infinity: Annotated[
        bool, arg(help="also extrapolate Frechet distances to infinitely many images")
    ] = False
    nll_samples: Annotated[
        int, arg(help="importance samples per image for the log likelihood. 0: do not estimate it")
    ] = 0
    seed: Annotated[int, arg(help="seed of the generated images")] = 0
    json: Annotated[bool, arg(help="print JSON even on a terminal")] = False
    device: Device = "auto"
    reading: ReadingGroup = field(default_factory=ReadingOptions)

    def run(self) -> None:
        if self.run_folder is not None and (self.generated or self.write_statistics):
            raise InputError("give a run, or --real and --generated, not both")
        if self.write_statistics is not None:
            self._write_statistics(self.write_statistics)
        elif self.run_folder is not None:
            self._measure(self.run_folder)
        elif not (self.real and self.generated):
            raise InputError(
                "give a run's folder, or two sets of images with --real and --generated"
            )
        else:
            self._compare()

    def _reference(self) -> Any:
        """Return --real: reference statistics if it is a file of them, else its text."""
        from poise.metrics.reference_statistics import is_statistics, read_statistics

        declared = self.statistics_by, self.statistics_images
        if self.real and is_statistics(self.real):
            return read_statistics(self.real, by=declared[0], images=declared[1])
        if declared != (None, None):
            raise InputError(
                "--statistics-by and --statistics-images are for a --real that is a file of "
                "statistics: an .npz with mu and sigma, or a .pt of torch-fidelity"
            )
        return self.real

    def _write_statistics(self, out: Path) -> None:
        if not self.real or self.generated:
            raise InputError("--write-statistics takes --real, and no --generated")
        if self.infinity or self.nll_samples:
            raise InputError("--infinity and --nll-samples are no part of statistics: leave it out")
        from poise.evaluation import save_statistics

        written = save_statistics(
            self._reference(),
            out,
            protocol=self.protocol or "every-image",
            extractor=self.extractor,
            size=self.size,
            count=self.images,
            device=self.device,
            quiet=False,
            **asdict(self.reading),
        )
        print(f"mean and covariance of {written.images} images by {written.extractor}: {out}")

    def _compare(self) -> None:
        if self.nll_samples:
            raise InputError("--nll-samples needs a run: two sets of images have no likelihood")
        from poise.evaluation import evaluate

        evaluation = evaluate(
            self._reference(),
            self.generated,
            protocol=self.protocol or "every-image",
            extractor=self.extractor,
            size=self.size,
            count=self.images,
            infinity=self.infinity,
            device=self.device,
            quiet=False,
            **asdict(self.reading),
        )
        self._show(evaluation, f"{self.generated} against {self.real}")

    def _measure(self, folder: Path) -> None:
        if self.size is not None:
            raise InputError("--size is for --real and --generated: a run has its own size")
        refuse_reading(self.reading, "--real and --generated")
        from poise.metrics.reference_statistics import ReferenceStatistics
        from poise.support.files import write_json

        statistics = self._reference()
        if statistics is not None and not isinstance(statistics, ReferenceStatistics):
            raise InputError(
                "give a run, or --real and --generated, not both; beside a run, --real can only be "
                "a file of statistics"
            )
        run = load_run(folder, self.device)
        evaluation = run.evaluate(
            statistics=statistics,
            protocol=self.protocol or "default",
            extractor=self.extractor,
            count=self.images,
            infinity=self.infinity,
            nll_samples=self.nll_samples,
            seed=self.seed,
            quiet=False,
        )
        try:
            write_json(run.folder / "evaluation.json", evaluation.to_json())
        finally:  # show the results even if the disk is full
            self._show(
                evaluation, f"{folder}: {evaluation.pages['reconstruction']['images']} images"
            )
            if self._for_people:
                print_notes(run.data.get("notes", []))
                self._show_published(run)

    @property
    def _for_people(self) -> bool:
        return sys.stdout.isatty() and not self.json

    def _show(self, evaluation: "Evaluation", title: str) -> None:
        if not self._for_people:
            print(json.dumps(evaluation.to_json(), indent=2))
            return
        if evaluation.pages:
            from poise.metrics.listed import figures_table

            show_table(title, figures_table(evaluation.pages))
        from poise.metrics.listed import is_tabulated

        compared = [m for m in evaluation.measurements if is_tabulated(m.metric)]
        if compared:
            show_cells("" if evaluation.pages else title, table(compared, mixed=True))
        for protocol in {m.protocol.hash: m.protocol for m in evaluation.measurements}.values():
            print(f"protocol {protocol}")
        print_notes(evaluation.notes)

    def _show_published(self, run: "Run") -> None:
        recipe = RECIPES.get(run.recipe.name)
        if recipe is not None and recipe.data == run.recipe.data:
            for line in recipe.published:
                print(f"published: {line}")


@dataclass(frozen=True)
class Diagnose:
    """Explain in plain words what is wrong with a run.

    Each sentence has its figure and one thing to try. The diagnosis is written to the run's
    diagnosis.json. `poise sample` reads there which prior is best.
    """

    run_folder: RunFolder
    json: Annotated[bool, arg(help="print JSON instead of sentences")] = False
    device: Device = "auto"

    def run(self) -> None:
        run = load_run(self.run_folder, self.device)
        from poise.diagnosis import diagnose
        from poise.runs.run import DIAGNOSIS
        from poise.support.files import write_json

        diagnosis = diagnose(run, quiet=False)
        found = diagnosis.to_json()
        try:
            write_json(run.folder / DIAGNOSIS, found | {"checkpoint": run.position})
        finally:
            print(json.dumps(found, indent=2) if self.json else diagnosis)
