"""The settings of a run: frozen, typed, complete. Two runs with equal settings and equal data are the same run.

A setting is declared once: its field has the type and the default, and its line under "Attributes" is the help of the
command. A field marked with `Option` is an option of `poise train` and a keyword of `poise.train`. `to_json` writes every
field to config.json.

No torch here: the command reads these for its help.
"""

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from poise.errors import InputError

Engine = Literal["auto", "eager", "compiled", "captured", "compiled-captured"]
BuiltNetwork = Literal["resnet", "infogan", "wae", "mlp"]
NetworkKind = Literal[BuiltNetwork, "custom"]
VarianceLaw = Literal["second-moment", "released"]
Renormalise = Literal["never", "always", "when-lost"]
Precision = Literal["float32", "ieee", "bfloat16"]
INITIALISED = ("resnet", "wae")  # networks whose initialisation is a setting
VAE_OBJECTIVE = "vae"
RIVALS_BALANCE = "fixed:gamma2=0.5"  # squared error / (2 gamma2) is then the squared error, as the rivals were published


@dataclass(frozen=True)
class Option:
    """Marks a field that the command and the keywords of `poise.train` can set.

    Attributes:
        group: the group of the command's help that lists it.
        first_only: for a field of `Stage`: the option sets it in stage 1 only, not in both stages.
    """

    group: Literal["data", "model", "training", "run"]
    first_only: bool = False


def options_of(declared: type) -> dict[str, Option]:
    """Return the fields of a class that are options, by name."""
    return {
        name: mark
        for name, hint in get_type_hints(declared, include_extras=True).items()
        for mark in getattr(hint, "__metadata__", ())
        if isinstance(mark, Option)
    }


def check_values(settings: Any) -> None:
    """Check the fields of a dataclass against their types.

    Raises:
        InputError: a value has another type, or is not among the allowed ones.
    """
    for name, hint in get_type_hints(type(settings)).items():
        check_value(name, hint, getattr(settings, name))


def check_value(name: str, hint: Any, value: Any) -> None:
    """Raise InputError if a value of a setting does not have the setting's type."""
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    allowed = [
        word for choice in choices if get_origin(choice) is Literal for word in get_args(choice)
    ]
    if (value is None and NoneType in choices) or value in allowed:
        return
    if allowed:
        raise InputError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
    kind = next((kind for kind in PLAIN if kind in choices), None)
    if kind is None:  # a part of a recipe, or a tuple
        return
    plain, words = PLAIN[kind]
    if not isinstance(value, plain) or isinstance(value, bool) != (kind is bool):
        raise InputError(f"{name} must be {words}, not {value!r}")


PLAIN: dict[type, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
}


@dataclass(frozen=True)
class Data:
    """Which images, and how they are prepared.

    Attributes:
        source: a data set's name, a path, or hf:owner/name.
        size: crop images to the centre square and resize to this side, in pixels. None: keep the size.
        channels: convert images to grey (1) or RGB (3). None: keep the channels.
        jpeg_quality: send every image through JPEG at this quality, as the released CIFAR-10 loader did (75); None: never.
        file_order: CelebA's split: "sorted" (official), or "listing", the order in which the file system lists the files,
            as released.
        skip_unreadable: leave out files that cannot be decoded, and list them.
    """

    source: str
    size: Annotated[int | None, Option("data")] = None
    channels: Annotated[Literal[1, 3] | None, Option("data")] = None
    jpeg_quality: int | None = None
    file_order: Literal["sorted", "listing"] = "sorted"
    skip_unreadable: Annotated[bool, Option("data")] = False

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class Network:
    """Encoder and decoder of stage 1, and the width of stage 2.

    Attributes:
        kind: see `poise.networks`; "custom": modules given to `poise.train`.
        latent_dim: number of latents.
        hidden: widths of the hidden layers ("mlp" only).
        norm_decay: of BatchNorm's running averages. The released 0.999 needs thousands of steps to settle.
        second_hidden: width of stage 2's three layers on each side.
        initialisation: of the weights of "resnet" and "wae": "pytorch", or "released", Glorot's, with which the first steps
            may explode at 64 pixels and more (see `poise.networks.factories`). The others have one each. The default is what
            runs have whose config.json does not name it.
    """

    kind: NetworkKind = "resnet"
    latent_dim: Annotated[int, Option("model")] = 64
    hidden: tuple[int, ...] = ()
    norm_decay: float = 0.99
    second_hidden: int = 1024
    initialisation: Literal["pytorch", "released"] = "released"

    def __post_init__(self) -> None:
        check_values(self)
        if bool(self.hidden) != (self.kind == "mlp"):
            raise InputError(
                f"hidden widths are for network mlp, which needs them; network {self.kind} has {self.hidden}"
            )
        if self.latent_dim < 1:
            raise InputError(f"latent_dim must be at least 1, not {self.latent_dim}")


@dataclass(frozen=True)
class Stage:
    """How one stage is trained, by Adam (0.9, 0.999, 1e-8).

    Attributes:
        epochs: length in passes over the training images; or
        steps: length in batches. One of the two is given.
        batch_size: images per step.
        learning_rate: Adam's learning rate at the start.
        halve_every: halve the learning rate after so many epochs, or steps if the length is in steps. It need not be a whole
            number. None: never.
        balance: balance of reconstruction and KL (see `poise.balance.make_balance`).
        objective: what the loss is made of (see `poise.objectives.make_objective`).
        ema_decay: decay of a running average of the weights, which replaces them after training. None: no average.
        precision: arithmetic of the networks. float32 allows TF32 on a GPU, ieee does not. bfloat16: products and
            convolutions under autocast. Weights, balance and sums are always float32.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: Annotated[int, Option("training")] = 100
    learning_rate: Annotated[float, Option("training")] = 1e-4
    halve_every: float | None = None
    balance: Annotated[str, Option("model", first_only=True)] = "computed"
    objective: Annotated[str, Option("model", first_only=True)] = VAE_OBJECTIVE
    ema_decay: Annotated[float | None, Option("training")] = None
    precision: Annotated[Precision, Option("training")] = "float32"

    def __post_init__(self) -> None:
        check_values(self)
        if (self.epochs is None) == (self.steps is None):
            raise InputError("a stage's length is given in epochs or in steps, one of them")
        if self.batch_size < 2:
            raise InputError(
                f"batch_size must be at least 2, not {self.batch_size}: one image has no batch statistics"
            )
        for name in ("epochs", "steps", "learning_rate", "halve_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} must be greater than 0, not {value}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError(f"ema_decay must be between 0 and 1, not {self.ema_decay}")

    def steps_per_epoch(self, num_images: int) -> int:
        """Batches in a pass. The last, smaller one is left out: BatchNorm's statistics would differ in it."""
        return max(1, num_images // self.batch_size)

    def total_steps(self, num_images: int) -> int:
        return (
            self.steps
            if self.steps is not None
            else (self.epochs or 0) * self.steps_per_epoch(num_images)
        )

    def learning_rate_at(self, step: int, num_images: int) -> float:
        if self.halve_every is None:
            return self.learning_rate
        passed = step if self.steps is not None else step / self.steps_per_epoch(num_images)
        return self.learning_rate * 0.5 ** (passed // self.halve_every)

    def lasting(self, *, epochs: int | None = None, steps: int | None = None) -> "Stage":
        """This stage with another length. Its learning rate is halved at the same shares of it.

        Example:
            >>> Stage(epochs=100, halve_every=40).lasting(steps=50).halve_every
            20.0
        """
        length, mine = epochs or steps or 0, self.epochs or self.steps or 0
        halve_every = self.halve_every and self.halve_every * length / mine
        return replace(self, epochs=epochs, steps=steps, halve_every=halve_every)


@dataclass(frozen=True)
class Generation:
    """How images are drawn and compared. Each departure from Dai & Wipf's two-stage VAE has its switch.

    Attributes:
        second_stage_noise: add noise of stage 2's decoder variance to its latents (Dai & Wipf do, the release does not).
        renormalise: scale latents to the variance law: "never", "always", or "when-lost", the released rule: if stage 2 lost
            more variance than a quarter of its MSE.
        variance_law: Var(mu) + E[s^2] ("second-moment"), or E[s] in place of E[s^2] ("released").
        adjust_variance: scale generated images about their mean image to the real images' standard deviation.
        adjust_reconstructions: the same for reconstructions, before their MSE and FID (the release does).
        reconstruct_from: the posterior's "mean", or a "sample" (the release).
    """

    second_stage_noise: bool = True
    renormalise: Renormalise = "never"
    variance_law: VarianceLaw = "second-moment"
    adjust_variance: bool = False
    adjust_reconstructions: bool = False
    reconstruct_from: Literal["mean", "sample"] = "mean"

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class Recipe:
    """A complete run.

    Attributes:
        name: of the recipe.
        data, network, generation: see there.
        first: stage 1, which learns images.
        second: stage 2, which learns the latents of stage 1; None: one stage only.
        seed: seed of weights, order and noise.
        cost: what a run takes, in words, with the machine it was measured on.
        published: numbers from the literature to stand beside, each with its protocol.
        minutes: budget of the whole run, pictures included. The run chooses lengths of its stages that fit, and keeps them in
            config.json (see `poise.runs.timing`). None: the lengths of the stages.
    """

    name: str
    data: Data
    network: Network
    first: Stage
    second: Stage | None
    generation: Generation = Generation()
    seed: Annotated[int, Option("training")] = 0
    cost: str = ""
    published: tuple[str, ...] = field(default=())
    minutes: Annotated[float | None, Option("training")] = None

    def __post_init__(self) -> None:
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"minutes must be greater than 0, not {self.minutes}")
        if self.second is not None and self.second.objective != VAE_OBJECTIVE:
            raise InputError(
                f"stage 2 is a VAE: its objective is {VAE_OBJECTIVE}, not {self.second.objective!r}"
            )


class Overall:
    """Options that change several fields of a recipe at once.

    Attributes:
        network: architecture of stage 1. Images/s on one CPU core: resnet 110 at 32 pixels and 27 at 64, infogan 360 and
            91, wae 13 and 3, mlp 2,700 and 930.
        second_balance: balance of stage 2, with the same names as that of stage 1.
        stages: number of stages; 1 leaves out the second stage.
        epochs: length of stage 1 in passes over the training images. Stage 2 and the learning rates keep their proportions.
        second_epochs: length of stage 2 in passes over the training codes.
    """

    network: Annotated[BuiltNetwork, Option("model")]
    second_balance: Annotated[str, Option("model")]
    stages: Annotated[Literal[1, 2], Option("training")]
    epochs: Annotated[int, Option("training")]
    second_epochs: Annotated[int, Option("training")]


DECLARED = (Data, Overall, Network, Stage, Generation, Recipe)
CHANGES: dict[str, Any] = {
    name: get_type_hints(declared)[name] for declared in DECLARED for name in options_of(declared)
}
"""What `poise.train(**changes)` and the command can change in a recipe: names and types."""
OF_ONE_RUN = frozenset({"balance", "second_balance", "objective", "seed", "minutes"})
"""Changes that are not the same for all runs of a comparison."""


class Changes:
    """Changes of a recipe, by the names and types of `CHANGES`.

    A change of the objective to a rival of the VAE also sets the balance "fixed:gamma2=0.5", with which the rivals were
    published, unless a balance is given. A change of `epochs` makes stage 2 as many times longer or shorter, and halves the
    learning rates at the same shares of the length.

    Args:
        values: by name; None: as the recipe has it.

    Raises:
        InputError: an unknown name, a wrong value, or changes that exclude each other.

    Example:
        >>> from poise.recipes import RECIPES
        >>> changed = Changes(epochs=50, batch_size=100).apply(RECIPES["digits"])
        >>> changed.first.epochs, changed.second.epochs, changed.second.batch_size
        (50, 200, 100)
    """

    def __init__(self, **values: Any) -> None:
        if unknown := values.keys() - CHANGES.keys():
            raise InputError(
                f"a recipe has no setting {', '.join(sorted(unknown))}; there are {', '.join(CHANGES)}"
            )
        self.values = {name: value for name, value in values.items() if value is not None}
        for name, value in self.values.items():
            check_value(name, CHANGES[name], value)
        of_second = self.values.keys() & {"second_epochs", "second_balance"}
        if self.values.get("stages") == 1 and of_second:
            raise InputError(
                "a length or balance of the second stage makes no sense with one stage: leave one of them out"
            )
        if "minutes" in self.values and self.values.keys() & {"epochs", "second_epochs"}:
            raise InputError(
                "a budget in minutes chooses the lengths: leave out either it or the epochs"
            )

    def apply(self, recipe: Recipe) -> Recipe:
        """Return the recipe with these changes. Its cost is dropped if they change it."""
        first, second = self._lengths(recipe)
        first = self._put(first)
        objective = self.values.get("objective", VAE_OBJECTIVE)
        if objective != VAE_OBJECTIVE and "balance" not in self.values:
            first = replace(first, balance=RIVALS_BALANCE)
        if second is not None:
            second = self._put(second, first=False)
            second = given(second, balance=self.values.get("second_balance"))
        changed = replace(
            recipe,
            data=self._put(recipe.data),
            network=self._put(self._kind(recipe.network)),
            first=first,
            second=second,
            generation=self._put(recipe.generation),
        )
        cost = recipe.cost if changed == recipe else ""
        return replace(self._put(changed), cost=cost)

    def _put(self, part: Any, *, first: bool = True) -> Any:
        """A part of a recipe with the changes of its fields. Of stage 2, not those of stage 1 only."""
        names = [
            name for name, mark in options_of(type(part)).items() if first or not mark.first_only
        ]
        return given(part, **{name: self.values.get(name) for name in names})

    def _lengths(self, recipe: Recipe) -> tuple[Stage, Stage | None]:
        """Both stages at the lengths asked for: stage 2 keeps its proportion to stage 1 unless it has a length of its own."""
        epochs, second_epochs = self.values.get("epochs"), self.values.get("second_epochs")
        first = recipe.first if epochs is None else recipe.first.lasting(epochs=epochs)
        second = None if self.values.get("stages") == 1 else recipe.second
        if second is not None and second_epochs is not None:
            return first, second.lasting(epochs=second_epochs)
        if second is None or epochs is None:
            return first, second
        if recipe.first.epochs is not None:
            share = epochs / recipe.first.epochs
            name, length = ("epochs", second.epochs) if second.epochs else ("steps", second.steps)
            return first, second.lasting(**{name: max(1, round(share * (length or 0)))})
        if second.steps is None or recipe.first.steps is None:
            raise InputError(
                "stage 1 of this recipe has a length in steps and stage 2 in epochs: give second_epochs too"
            )
        passes = second.steps * second.batch_size / (recipe.first.steps * recipe.first.batch_size)
        return first, second.lasting(epochs=max(1, round(epochs * passes)))

    def _kind(self, network: Network) -> Network:
        kind = self.values.get("network", network.kind)
        if kind == network.kind:
            return network
        initialisation = "pytorch" if kind in INITIALISED else "released"
        hidden = (512, 512) if kind == "mlp" else ()
        return replace(network, kind=kind, hidden=hidden, initialisation=initialisation)


def given(settings: Any, **values: Any) -> Any:
    """The settings with those values put in that are not None."""
    return replace(settings, **{name: value for name, value in values.items() if value is not None})


def to_json(settings: Any) -> dict[str, Any]:
    """The settings as plain values. Texts that do not change the run (cost, published) are left out."""
    return {
        key: value for key, value in asdict(settings).items() if key not in ("cost", "published")
    }


def from_json(cls: type, values: dict[str, Any], where: str = "config") -> Any:
    """The settings that `to_json` wrote.

    Raises:
        InputError: a key that the settings do not have, or one that is missing.
    """
    known = {f.name: f for f in fields(cls)}
    unknown = set(values) - set(known)
    if unknown:
        raise InputError(f"{where} has unknown keys {sorted(unknown)}; known are {sorted(known)}")
    try:
        return cls(
            **{
                key: _restore(get_type_hints(cls)[key], value, f"{where}.{key}")
                for key, value in values.items()
            }
        )
    except TypeError as error:
        raise InputError(f"{where}: {error}") from None


def _restore(hint: Any, value: Any, where: str) -> Any:
    if isinstance(value, dict):
        inner = next(t for t in (hint, *get_args(hint)) if is_dataclass(t))
        assert isinstance(inner, type)
        return from_json(inner, value, where)
    return tuple(value) if isinstance(value, list) else value
