"""Options that several commands have in common, each a type with its help.

No torch here: help is instant.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from poise.recipes import RECIPES
from poise.recipes.settings import Recipe
from poise.variants import BALANCES as NAMED_BALANCES
from poise.variants import PRIORS

ANY_IMAGES = "a folder, an .npz or .npy array, hf:OWNER/NAME, or a data set's name"
RECIPES_OWN = "(default: the recipe's)"
BALANCES = ", ".join(text for balance in NAMED_BALANCES.values() for text in balance.examples)
OBJECTIVES = (
    "vae, or a deterministic rival: autoencoder, rae-l2, rae-gp, wae-mmd:weight=10, ... (balance "
    "then fixed:gamma2=0.5)"
)
ENGINES = (
    "how a step is taken. auto: captured on one GPU, else eager; captured: replay a recorded CUDA graph, the same numbers as "
    "eager; compiled: machine code made for the network, for long runs; compiled-captured: both"
)
RATES = "resnet 110 at 32 pixels and 27 at 64, infogan 360 and 91, wae 13 and 3, mlp 2,700 and 930"  # 2026-11-26
SHOWN = ("batch_size", "learning_rate")
if TYPE_CHECKING:
    PriorChoice = str
else:
    PriorChoice = Literal[tuple(PRIORS)]


def recipes_own(text: str) -> Any:
    """Help for an option that the recipe decides where it is not given."""
    return arg(help=text, help_behavior_hint=RECIPES_OWN)


def values(recipe: Recipe) -> str:
    """What a recipe says of the options that it decides, in a line."""
    stages = [stage for stage in (recipe.first, recipe.second) if stage]
    units = " + ".join(
        f"{stage.epochs} epochs" if stage.epochs else f"{stage.steps:,} steps" for stage in stages
    )
    both = {
        name: " and ".join(dict.fromkeys(f"{getattr(stage, name):g}" for stage in stages))
        for name in SHOWN
    }
    network = f"{recipe.network.kind}, {recipe.network.latent_dim} latents"
    return f"{recipe.name} ({network}, {units}, batch {both['batch_size']}, rate {both['learning_rate']})"


RunFolder = Annotated[
    Positional[Path], arg(metavar="RUN", help="the folder that `poise train` wrote")
]
Images = Annotated[
    Positional[str | None],
    arg(
        help="a folder, an image file or an array",
        help_behavior_hint="(default: the run's test images)",
    ),
]
RecipeName = Annotated[
    str | None,
    arg(
        help=f"complete settings by name: {'; '.join(map(values, RECIPES.values()))}. Those called released keep the authors' "
        "initial weights, with which the first steps may explode at 64 pixels",
        help_behavior_hint="(default: DATA's own, or images)",
    ),
]
Size = Annotated[
    int | None, recipes_own("crop to the centre square and resize to this side, in pixels")
]
Network = Annotated[
    Literal["resnet", "infogan", "wae", "mlp"] | None,
    recipes_own(
        f"architecture of stage 1; images/s on one core, two give up to 1.6 times as many: {RATES}"
    ),
]
LatentDim = Annotated[int | None, recipes_own("number of latents")]
Minutes = Annotated[
    float | None,
    arg(
        help="a budget: both stages get lengths that fit, pictures included",
        help_behavior_hint="(default: the recipe's lengths)",
    ),
]
Epochs = Annotated[
    int | None,
    recipes_own(
        "length of stage 1, passes over the training images; stage 2 and the learning rates keep their proportions"
    ),
]
SecondEpochs = Annotated[
    int | None,
    arg(
        help="length of stage 2, passes over the training codes",
        help_behavior_hint="(default: in the recipe's proportion)",
    ),
]
Stages = Annotated[Literal[1, 2], arg(help="1 leaves out the second stage")]
BatchSize = Annotated[int | None, recipes_own("images per step, both stages")]
Channels = Annotated[Literal[1, 3] | None, recipes_own("convert to grey (1) or RGB (3)")]
EmaDecay = Annotated[
    float | None,
    recipes_own("of a running average of the weights, used in their place, both stages"),
]
Precision = Annotated[
    Literal["float32", "ieee", "bfloat16"] | None,
    recipes_own(
        "of the networks' arithmetic, both stages; float32 allows TF32 on a GPU, ieee does not"
    ),
]
StopAfter = Annotated[
    float | None,
    arg(
        help="stop after so many minutes, with all saved: the same command goes on",
        help_behavior_hint="(default: never)",
    ),
]
LearningRate = Annotated[float | None, recipes_own("Adam's, at the start of both stages")]
Device = Annotated[str, arg(help="auto, cpu, cuda, cuda:1, mps")]
Engine = Annotated[
    Literal["auto", "eager", "compiled", "captured", "compiled-captured"], arg(help=ENGINES)
]
Threads = Annotated[
    int,
    arg(
        help="of the CPU",
        help_behavior_hint="(default: what some steps show to be fastest; kept in config.json)",
    ),
]
SaveSeconds = Annotated[float, arg(help="time between checkpoints, seconds")]
Jobs = Annotated[
    int | None,
    arg(
        help="runs at the same time",
        help_behavior_hint="(default: cores of the CPU; on cuda one for each GPU)",
    ),
]
