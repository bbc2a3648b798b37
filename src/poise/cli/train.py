"""`poise train`: train a run."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from poise.cli.options import RecipeName, TrainingCommand
from poise.cli.showing import print_notes, show_table
from poise.recipes import RECIPES
from poise.variants import DATA_SETS

DATA_NAMES = [
    name
    for name in {**RECIPES, **DATA_SETS}
    if name not in RECIPES or RECIPES[name].data.source != "images"
]


@dataclass(frozen=True)
class Train(TrainingCommand):
    """Train a two-stage VAE whose balance is computed.

    The same command continues an interrupted run. --more-epochs and --more-minutes continue a
    finished one, and need --out only. `poise train DATA --help` shows the values of
    DATA's recipe. Without DATA and --recipe, the 8x8 digits of scikit-learn are used, which takes
    about a minute.
    """

    data: Annotated[
        Positional[str | None],
        arg(
            metavar="[DATA]",
            help="a folder of images, a .tar file, an .npz or .npy array, hf:OWNER/NAME, "
            f"or one of {', '.join(DATA_NAMES)}",
            help_behavior_hint="(default: the recipe's own, or digits)",
        ),
    ] = None
    out: Annotated[
        Path | None, arg(help="the run's folder", help_behavior_hint="(default: runs/RECIPE)")
    ] = None
    recipe: RecipeName = None
    more_epochs: Annotated[
        int | None,
        arg(
            help="continue the finished run in --out: so many epochs that stage 1 is longer. "
            "Stage 2 is trained anew",
            help_behavior_hint="(default: none)",
        ),
    ] = None
    more_minutes: Annotated[
        float | None,
        arg(
            help="the same, as time for the rest of stage 1, stage 2, codes and pictures",
            help_behavior_hint="(default: none)",
        ),
    ] = None
    start_from: Annotated[
        Path | None,
        arg(
            name="from",
            aliases=["--start-from"],
            metavar="RUN",
            help="start from the weights of this run, with its settings. config.json says what is "
            "kept",
            help_behavior_hint="(default: initial weights)",
        ),
    ] = None

    def run(self) -> None:
        from poise.metrics.listed import figures_table
        from poise.runs.pipeline import train
        from poise.support.files import read_json
        from poise.training import distributed

        run = train(
            self.data,
            recipe=self.recipe,
            out=self.out,
            options=self.options(),
            more_epochs=self.more_epochs,
            more_minutes=self.more_minutes,
            start_from=self.start_from and str(self.start_from),
            **self.changes(),
        )
        if distributed.rank() > 0:
            return
        summary = read_json(run.folder / "summary.json", dict[str, Any])
        show_table(
            f"{run.recipe.name}: {run.data['train']} training images, "
            f"{run.data['test']} test images",
            figures_table(summary),
        )
        print_notes([*run.data["notes"], *summary.get("notes", [])])
        names = ("samples.png", "reconstructions.png", "training.png", "progress.png")
        pictures = [name for name in names if (run.folder / name).exists()]
        print(f"pictures: {run.folder}/{', '.join(pictures)}")
        folder = shlex.quote(str(run.folder))
        print(f"next: poise sample {folder} -n 64 --out grid.png; poise evaluate {folder}")
