"""`poise train`."""

import json
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from poise.cli.options import (
    BALANCES,
    OBJECTIVES,
    BatchSize,
    Channels,
    Device,
    EmaDecay,
    Engine,
    Epochs,
    LatentDim,
    LearningRate,
    Minutes,
    Network,
    Precision,
    RecipeName,
    SaveSeconds,
    SecondEpochs,
    Size,
    Stages,
    Threads,
    recipes_own,
)
from poise.cli.showing import show_table
from poise.recipes import RECIPES, find_recipe
from poise.recipes.settings import Changes, Recipe
from poise.variants import DATA_SETS

DATA_NAMES = [name for name in {**RECIPES, **DATA_SETS} if name != "images"]


@dataclass(frozen=True)
class Train:
    """Train a two-stage VAE whose balance is computed. Run the same command again to go on after an interruption.

    Without DATA and recipe it trains on the 8x8 digits that come with scikit-learn, in about a minute.
    """

    data: Annotated[
        Positional[str | None],
        arg(
            help=f"a folder of images, an .npz or .npy array, hf:OWNER/NAME, or one of {', '.join(DATA_NAMES)}",
            help_behavior_hint="(default: the recipe's own, or digits)",
        ),
    ] = None
    out: Annotated[
        Path | None, arg(help="the run's folder", help_behavior_hint="(default: runs/RECIPE)")
    ] = None
    recipe: RecipeName = None
    size: Size = None
    channels: Channels = None
    network: Network = None
    latent_dim: LatentDim = None
    balance: Annotated[str | None, recipes_own(f"balance of stage 1: {BALANCES}")] = None
    second_balance: Annotated[str | None, recipes_own("balance of stage 2, likewise")] = None
    objective: Annotated[
        str | None, recipes_own(f"what stage 1's loss is made of: {OBJECTIVES}")
    ] = None
    minutes: Minutes = None
    epochs: Epochs = None
    second_epochs: SecondEpochs = None
    stages: Stages = 2
    batch_size: BatchSize = None
    learning_rate: LearningRate = None
    ema_decay: EmaDecay = None
    precision: Precision = None
    seed: Annotated[int, arg(help="of weights, order and noise")] = 0
    device: Device = "auto"
    skip_unreadable: Annotated[
        bool, arg(help="leave out images that cannot be decoded, and list them")
    ] = False
    save_seconds: SaveSeconds = 60.0
    engine: Engine = "auto"
    threads: Threads = 0
    tensorboard: Annotated[bool, arg(help="write TensorBoard files into the run's folder")] = False

    def settings(self) -> Recipe:
        """The recipe with what was given on the command line put in."""
        recipe = find_recipe(self.recipe or (None if self.data else "digits"), self.data)
        values: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in fields(Changes)
        }
        return Changes(**values).apply(recipe)

    def run(self) -> None:
        recipe = self.settings()
        from poise.balance import make_balance
        from poise.metrics.listed import figures_table
        from poise.objectives import make_objective
        from poise.runs.options import Options
        from poise.runs.pipeline import train
        from poise.training import distributed

        for stage in filter(None, (recipe.first, recipe.second)):
            make_balance(
                stage.balance, image_size=1, latent_dim=1
            )  # a wrong one is said before the data are read
        make_objective(recipe.first.objective)
        options = Options(
            self.device,
            self.save_seconds,
            self.tensorboard,
            engine=self.engine,
            threads=self.threads,
        )
        run = train(self.data, recipe=recipe, out=self.out, options=options)
        if distributed.rank() > 0:
            return
        summary = json.loads((run.folder / "summary.json").read_text())
        show_table(
            f"{recipe.name}: {run.data['train']} training images, {run.data['test']} test images",
            figures_table(summary),
        )
        for note in [*run.data["notes"], *summary.get("notes", [])]:
            print(f"note: {note}")
        print(f"pictures: {run.folder}/samples.png, reconstructions.png, training.png")
        folder = shlex.quote(str(run.folder))
        print(f"next: poise sample {folder} -n 64 --out grid.png; poise evaluate {folder}")
