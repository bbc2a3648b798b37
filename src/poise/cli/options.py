"""Options that several commands share. Options of training come from the recipe's settings.

This module imports no torch, so that help is fast.
"""

from dataclasses import asdict, dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

import docstring_parser
from tyro.conf import OmitArgPrefixes, Positional, arg

from poise.errors import InputError
from poise.recipes import CHANGES, RECIPES
from poise.recipes.settings import DECLARED, Option, Recipe, Stage, options_of
from poise.runs.options import Options
from poise.variants import BALANCES as NAMED_BALANCES
from poise.variants import PRIORS

ANY_IMAGES = "a folder, a .tar file, an .npz or .npy array, hf:OWNER/NAME, or a data set's name"
RECIPES_OWN = "(default: the recipe's)"
BALANCES = ", ".join(text for balance in NAMED_BALANCES.values() for text in balance.examples)
OBJECTIVES = (
    "vae, or a deterministic rival: autoencoder, rae-l2, rae-gp, wae-mmd:weight=10, ... "
    "(rivals use the balance fixed:gamma2=0.5)"
)
NAMES = {"balance": BALANCES, "objective": OBJECTIVES}
COMMANDS_OWN = Options(threads=0)  # 0: measure which number is fastest
if TYPE_CHECKING:
    PriorChoice = str
else:
    PriorChoice = Literal[tuple(PRIORS)]

RunFolder = Annotated[
    Positional[Path],
    arg(metavar="RUN", help="the folder that `poise train` wrote, or hf:OWNER/NAME"),
]
Images = Annotated[
    Positional[str | None],
    arg(
        metavar="[IMAGES]",
        help="a folder, an image file or an array",
        help_behavior_hint="(default: the run's test images)",
    ),
]
RecipeName = Annotated[
    str | None,
    arg(
        help=f"complete settings by name: {', '.join(RECIPES)}. `poise train NAME --help` shows "
        "them. Recipes called released use the authors' initial weights: the first steps may "
        "explode at 64 pixels",
        help_behavior_hint="(default: DATA's own, or images)",
    ),
]
SecondBalance = Annotated[
    str | None,
    arg(
        help="balance of stage 2, for all labels. same: each label's balance of stage 1",
        help_behavior_hint=RECIPES_OWN,
    ),
]
StopAfter = Annotated[
    float | None,
    arg(
        help="save everything and stop after so many minutes. The same command continues",
        help_behavior_hint="(default: never)",
    ),
]
Jobs = Annotated[
    int | None,
    arg(
        help="number of runs at the same time",
        help_behavior_hint="(default: the number of CPU cores; on cuda, of GPUs)",
    ),
]
Device = Annotated[str, arg(help="auto, cpu, cuda, cuda:1 or mps")]


@dataclass(frozen=True)
class ReadingOptions:
    """Options for reading images that are not the run's own."""

    skip_unreadable: Annotated[
        bool, arg(help="skip image files that cannot be decoded, and list them")
    ] = False
    levels: Annotated[
        int | None,
        arg(
            help="the value that becomes white, such as 4095 for 12 bits, or 1 for masks",
            help_behavior_hint="(default: the run's, or as in poise train)",
        ),
    ] = None
    max_megapixels: Annotated[
        int | None,
        arg(help="refuse image files of more megapixels", help_behavior_hint="(default: 179)"),
    ] = None


def refuse_reading(reading: ReadingOptions, images: str) -> None:
    """Raise InputError if options for reading are given for a run's own images.

    Args:
        reading: the options.
        images: the images that they are for, in words.
    """
    if reading != ReadingOptions():
        raise InputError(
            f"--skip-unreadable, --levels and --max-megapixels are for {images}: "
            "the images of a run are read as in its training"
        )


ReadingGroup = Annotated[ReadingOptions, OmitArgPrefixes, arg(name="reading")]


@dataclass(frozen=True)
class TrainingCommand:
    """A command that trains. Its options are the settings of a recipe and of `Options`.

    Attributes:
        leaves_out: names of settings that are not options of this command.
    """

    leaves_out: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def with_options(cls, recipe: Recipe | None) -> type:
        """Return this command with its options as fields, in groups.

        Args:
            recipe: its values are the defaults in the help. None: show only defaults that all
                recipes share.
        """
        groups: dict[str, list[tuple[str, Any, Any]]] = {}
        defaults = default_texts(recipe)
        for declared in (*DECLARED, Options):
            hints, helps = get_type_hints(declared), help_texts(declared)
            for name, mark in options_of(declared).items():
                if name not in cls.leaves_out:
                    text = _stages(declared, mark) + helps.get(name, "")
                    shown = arg(help=text, help_behavior_hint=f"(default: {defaults[name]})")
                    option = (name, Annotated[hints[name] | None, shown], None)
                    groups.setdefault(mark.group, []).append(option)
        parts: list[tuple[str, Any, Any]] = []
        for group, options in groups.items():
            made = make_dataclass(group, sorted(options), frozen=True)
            hint = Annotated[made, OmitArgPrefixes, arg(name=group)]
            parts.append((f"{group}_options", hint, field(default_factory=made)))
        described = {"__doc__": cls.__doc__}
        return make_dataclass(cls.__name__, parts, bases=(cls,), namespace=described, frozen=True)

    def changes(self) -> dict[str, Any]:
        """Return the given changes of the recipe, by name."""
        return {name: value for name, value in self._given().items() if name in CHANGES}

    def options(self) -> Options:
        """Return the given options, with the command's own defaults for the others."""
        given = self._given()
        return replace(COMMANDS_OWN, **{name: given[name] for name in given if name not in CHANGES})

    def _given(self) -> dict[str, Any]:
        groups = [value for name, value in vars(self).items() if name.endswith("_options")]
        return {
            name: value
            for group in groups
            for name, value in vars(group).items()
            if value is not None
        }


def _stages(declared: type, mark: Option) -> str:
    if declared is not Stage:
        return ""
    return "stage 1: " if mark.first_only else "both stages: "


def help_texts(declared: type) -> dict[str, str]:
    """Return the help text of each setting, from "Attributes" in the docstring of its class."""
    found = docstring_parser.parse(declared.__doc__ or "").params
    texts = {one.arg_name: " ".join((one.description or "").split()).rstrip(".") for one in found}
    return texts | {name: f"{texts[name]}: {NAMES[name]}" for name in texts.keys() & NAMES.keys()}


def default_texts(recipe: Recipe | None) -> dict[str, str]:
    """Return the default of each option as the help shows it.

    Args:
        recipe: its values are shown. None: show only defaults that all recipes share.
    """
    first, *others = map(recipe_texts, [recipe] if recipe else RECIPES.values())
    texts = {
        name: text if all(other[name] == text for other in others) else "the recipe's"
        for name, text in first.items()
    }
    return texts | {name: str(value) for name, value in asdict(COMMANDS_OWN).items()}


def recipe_texts(recipe: Recipe) -> dict[str, str]:
    """Return a recipe's value of each setting in `CHANGES`, as text.

    Values that differ between the stages are joined with "and".
    """
    stages = recipe.stages
    lengths = [str(stage.epochs) if stage.epochs else f"{stage.steps:,} steps" for stage in stages]
    values: dict[str, list[Any]] = {
        "network": [recipe.network.kind],
        "stages": [len(stages)],
        "second": [recipe.second_stage or "none"],
        "epochs": lengths[:1],
        "second_epochs": lengths[1:],
        "second_balance": [stage.balance for stage in stages[1:]],
    }
    for part in (recipe.data, recipe.network, *stages, recipe.generation, recipe):
        for name, mark in options_of(type(part)).items():
            if not (mark.first_only and part is recipe.second):
                values.setdefault(name, []).append(getattr(part, name))
    if recipe.network.kind == "conv":
        values["latent_dim"] = ["that of the latent map"]
    return {name: " and ".join(dict.fromkeys(map(str, found))) for name, found in values.items()}
