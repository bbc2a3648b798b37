"""Settings of a run, as frozen and typed dataclasses.

Two runs with equal settings and equal data give the same result. Each setting is declared once. Its
field has the type and the default. Its line under "Attributes" is the help text of the command.
A field marked with `Option` is an option of `poise train` and a keyword of `poise.train`.
`to_json` writes every field to config.json.

This module imports no torch, because the command reads it for its help.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from math import inf
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from poise.errors import InputError
from poise.support.files import convert
from poise.variants import SecondStage

Engine = Literal["auto", "eager", "compiled", "captured", "compiled-captured"]
BuiltNetwork = Literal["resnet", "infogan", "wae", "mlp", "conv"]
NetworkKind = Literal[BuiltNetwork, "custom"]
VarianceLaw = Literal["second-moment", "released"]
Renormalise = Literal["never", "always", "when-lost"]
Standardise = Literal["never", "after", "during"]
Solver = Literal["heun", "euler"]
Precision = Literal["float32", "ieee", "bfloat16"]
ErrorName = Literal["squared", "absolute", "features"]
INITIALISED = ("resnet", "wae")  # networks whose initialisation is a setting
VAE_OBJECTIVE, FLOW_OBJECTIVE = "vae", "flow"
# With gamma2 = 0.5, squared error / (2 gamma2) is the squared error, as the rivals were published.
RIVALS_BALANCE = "fixed:gamma2=0.5"


@dataclass(frozen=True)
class Option:
    """Marks a field as an option of the command and a keyword of `poise.train`.

    Attributes:
        group: group of the command's help that lists the option.
        first_only: for a field of `Stage`: the option applies to stage 1 only, not to both stages.
    """

    group: Literal["data", "model", "training", "run"]
    first_only: bool = False


def options_of(declared: type) -> dict[str, Option]:
    """Return the fields of a class that are marked with `Option`, by name."""
    return {
        name: mark
        for name, hint in get_type_hints(declared, include_extras=True).items()
        for mark in getattr(hint, "__metadata__", ())
        if isinstance(mark, Option)
    }


hints_of = cache(get_type_hints)
"""Return the types of the fields of a class. Cached, because Python evaluates them slowly."""


def check_values(settings: Any) -> None:
    """Check the fields of a dataclass against their types. Numbers become Python's own.

    Raises:
        InputError: a value has the wrong type, or is not one of the allowed values.
    """
    for name, hint in hints_of(type(settings)).items():
        value = getattr(settings, name)
        plain = check_value(name, hint, value)
        if plain is not value:
            object.__setattr__(settings, name, plain)  # the dataclass is frozen


def check_value(name: str, hint: Any, value: Any) -> Any:
    """Check the value of one setting against the setting's type, and return it.

    Numbers of NumPy become Python's own, which JSON can hold.

    Raises:
        InputError: the value has the wrong type, or is not one of the allowed values.
    """
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    allowed = [
        word for choice in choices if get_origin(choice) is Literal for word in get_args(choice)
    ]
    if (value is None and NoneType in choices) or value in allowed:
        return value
    if allowed:
        raise InputError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
    kind = next((kind for kind in PLAIN if kind in choices), None)
    if kind is None:  # a part of a recipe, or a tuple
        return value
    plain, words = PLAIN[kind]
    if not isinstance(value, plain) or isinstance(value, bool) != (kind is bool):
        raise InputError(f"{name} must be {words}, not {value!r}")
    if isinstance(value, Real) and not isinstance(value, (int, float)):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


PLAIN: dict[type, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
}


@dataclass(frozen=True)
class Data:
    """Which images to load, and how to prepare them.

    Attributes:
        source: a data set's name, a path, or hf:owner/name.
        size: crop images to the centre square and resize to this side, in pixels. None: keep the
            size.
        channels: convert images to grey (1) or RGB (3). None: keep the channels.
        jpeg_quality: compress every image with JPEG at this quality and decode it again. The
            released CIFAR-10 loader does so at 75. None: no JPEG.
        file_order: order of CelebA's files, which decides the split: "sorted" (the official split),
            or "listing" (the order of the file system, as in the released code).
        flips: also train on mirror images. Each image of a batch is mirrored left to right with
            probability 1/2.
        skip_unreadable: skip image files that cannot be decoded, and list them.
        levels: the value that becomes white, such as 4095 for 12 bits, or 1 for masks of 0 and 1.
            None: 255 for bytes; for 16 bits the smallest of 255, 1023, 4095, 16383 and 65535 that
            holds 99.9 % of the values of every image.
        max_megapixels: refuse image files of more megapixels. None: 179.
        stream: for sets larger than the disk: keep decoded images in memory only, in a quarter of
            what is free. The others are decoded again whenever they are read.
        labels: learn the classes of the images: the folders they are in, y_train beside x_train, or
            the labels of the data set. A flow and the mixture then draw images of a class.
        validation: share of the training images to hold out, at most 0.5. Their ELBO is measured
            during stage 1, and the weights of the best one are kept. None: no images.
    """

    source: str
    size: Annotated[int | None, Option("data")] = None
    channels: Annotated[Literal[1, 3] | None, Option("data")] = None
    jpeg_quality: int | None = None
    file_order: Literal["sorted", "listing"] = "sorted"
    skip_unreadable: Annotated[bool, Option("data")] = False
    flips: Annotated[bool, Option("data")] = False
    levels: Annotated[int | None, Option("data")] = None
    max_megapixels: Annotated[int | None, Option("data")] = None
    stream: Annotated[bool, Option("data")] = False
    labels: Annotated[bool, Option("data")] = False
    validation: Annotated[float | None, Option("data")] = None

    def __post_init__(self) -> None:
        check_values(self)
        if self.validation is not None and not 0 < self.validation <= 0.5:
            raise InputError(
                "validation is a share of the training images, greater than 0 and at most 0.5, "
                f"not {self.validation}"
            )


@dataclass(frozen=True)
class Network:
    """Encoder and decoder of stage 1, and the width of stage 2.

    Attributes:
        kind: architecture (see `poise.networks`). "custom": modules passed to `poise.train`.
        latent_dim: number of latent dimensions. The network "conv" sets it: channels, height and
            width of its latent map multiplied.
        latent_channels: number of channels of the latent map ("conv" only). More channels give
            better reconstructions, and the flow learns fewer channels more easily.
        conv_width: channels of "conv" at the resolution of the latent map. None: its default.
        flow_width: width of the hidden layers of a flow. None: the default for maps or vectors.
        flow_blocks: number of residual blocks of a flow. None: the default.
        hidden: widths of the hidden layers ("mlp" only).
        norm_decay: decay of BatchNorm's running averages. The released 0.999 needs thousands of
            steps to settle.
        second_hidden: width of the three hidden layers of the encoder and of the decoder of a VAE
            as stage 2.
        initialisation: initial weights of "resnet" and "wae": "pytorch", or "released" (Glorot).
            With "released" the first steps may explode at 64 pixels and more (see
            `poise.networks.factories`). Other networks have one initialisation each. The default is
            for runs whose config.json has no such key.
    """

    kind: NetworkKind = "resnet"
    latent_dim: Annotated[int, Option("model")] = 64
    hidden: tuple[int, ...] = ()
    norm_decay: float = 0.99
    second_hidden: int = 1024
    initialisation: Literal["pytorch", "released"] = "released"
    latent_channels: Annotated[int, Option("model")] = 4
    conv_width: int | None = None
    flow_width: int | None = None
    flow_blocks: int | None = None

    def __post_init__(self) -> None:
        check_values(self)
        if bool(self.hidden) != (self.kind == "mlp"):
            raise InputError(
                "hidden widths are required for network mlp and not allowed for others; "
                f"network {self.kind} has {self.hidden}"
            )
        if self.latent_dim < 1:
            raise InputError(f"latent_dim must be at least 1, not {self.latent_dim}")
        if self.latent_channels < 1:
            raise InputError(f"latent_channels must be at least 1, not {self.latent_channels}")


@dataclass(frozen=True)
class Stage:
    """Settings of the training of one stage, with Adam (0.9, 0.999, 1e-8).

    Attributes:
        epochs: length in passes over the training images. Give either `epochs` or `steps`.
        steps: length in batches.
        batch_size: images per step.
        learning_rate: initial learning rate of Adam.
        halve_every: halve the learning rate every so many epochs, or steps if the length is in
            steps. May be fractional. None: never.
        warmup: share of the stage, at its start, in which the learning rate rises linearly from 0.
        decay: share of the stage, at its end, in which the learning rate falls linearly to 0.
        balance: balance of reconstruction and KL (see `poise.balance.make_balance`).
        error: error of reconstructions. squared: Gaussian. absolute: Laplace. features: the squared
            error, and that of the features of a random network, each with a gamma2 of its own. The
            last has no ELBO.
        objective: training objective (see `poise.objectives.make_objective`). That of stage 2 is
            "vae", for a second VAE, or "flow", for a flow.
        ema_decay: decay of a running average of the weights. The average replaces the weights after
            training. None: no average.
        ema_warmup: use a smaller decay, (1 + step) / (10 + step), in the first steps, so that the
            average forgets the initial weights.
        standardise: give the latents of the training images mean 0 and variance 1 by a shift and a
            scale, which changes no reconstruction (see `poise.vae`). never; after: once, after
            training; during: also every `standardise_every` steps of training.
        standardise_every: number of steps between two settings of the shift and the scale.
        patience: end the stage after so many evaluations of the held-out images without a better
            ELBO. There are 50 to 100 evaluations in the whole stage. None: train to the end.
        precision: arithmetic of the networks. float32: TF32 is allowed on a GPU. ieee: float32
            without TF32. bfloat16: products and convolutions under autocast. Weights, balance and
            sums are always float32.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: Annotated[int, Option("training")] = 100
    learning_rate: Annotated[float, Option("training")] = 1e-4
    halve_every: float | None = None
    warmup: float = 0.0
    decay: float = 0.0
    balance: Annotated[str, Option("model", first_only=True)] = "computed"
    error: Annotated[ErrorName, Option("model", first_only=True)] = "squared"
    objective: Annotated[str, Option("model", first_only=True)] = VAE_OBJECTIVE
    ema_decay: Annotated[float | None, Option("training")] = None
    ema_warmup: bool = False
    standardise: Annotated[Standardise, Option("model", first_only=True)] = "never"
    standardise_every: int = 100
    patience: Annotated[int | None, Option("training", first_only=True)] = None
    precision: Annotated[Precision, Option("training")] = "float32"

    def __post_init__(self) -> None:
        check_values(self)
        if (self.epochs is None) == (self.steps is None):
            raise InputError("give the length of a stage either in epochs or in steps")
        if self.batch_size < 2:
            raise InputError(
                f"batch_size must be at least 2, not {self.batch_size}: "
                "BatchNorm needs two images for its statistics"
            )
        for name in ("epochs", "steps", "learning_rate", "halve_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} must be greater than 0, not {value}")
            if value == inf:
                raise InputError(f"{name} must be finite, not {value}")
        if self.standardise_every < 1:
            raise InputError(f"standardise_every must be at least 1, not {self.standardise_every}")
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience must be at least 1, not {self.patience}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError(f"ema_decay must be between 0 and 1, not {self.ema_decay}")

    def steps_per_epoch(self, num_images: int) -> int:
        """Return the number of batches in an epoch.

        The last, smaller batch is left out: its BatchNorm statistics would differ.
        """
        return max(1, num_images // self.batch_size)

    def total_steps(self, num_images: int) -> int:
        """Return the length of the stage in steps."""
        return (
            self.steps
            if self.steps is not None
            else (self.epochs or 0) * self.steps_per_epoch(num_images)
        )

    def learning_rate_at(self, step: int, num_images: int) -> float:
        """Return the learning rate of a step."""
        rate, total = self.learning_rate, self.total_steps(num_images)
        if self.halve_every is not None:
            passed = step if self.steps is not None else step / self.steps_per_epoch(num_images)
            rate *= 0.5 ** (passed // self.halve_every)
        if self.warmup:
            rate *= min(1.0, (step + 1) / (self.warmup * total))
        if self.decay:
            rate *= min(1.0, (total - step) / (self.decay * total))
        return rate

    def ema_decay_at(self, step: int) -> float:
        """Return the decay of the averaged weights in a step."""
        decay = self.ema_decay or 0.0
        return min(decay, (1 + step) / (10 + step)) if self.ema_warmup else decay

    def lasting(self, *, epochs: int | None = None, steps: int | None = None) -> "Stage":
        """Return this stage with another length, and `halve_every` scaled in proportion.

        Example:
            >>> Stage(epochs=100, halve_every=40).lasting(steps=50).halve_every
            20.0
        """
        length, mine = epochs or steps or 0, self.epochs or self.steps or 0
        halve_every = self.halve_every and self.halve_every * length / mine
        return replace(self, epochs=epochs, steps=steps, halve_every=halve_every)


@dataclass(frozen=True)
class Generation:
    """Settings of how images are generated, reconstructed and compared.

    Each departure from Dai & Wipf's two-stage VAE has its own switch.

    Attributes:
        second_stage_noise: add noise with the variance of stage 2's decoder to the latents it
            generates. Dai & Wipf do, the released code does not.
        renormalise: scale latents to the variance law: "never", "always", or "when-lost". The last
            is the released rule: scale if stage 2 lost more variance than a quarter of its MSE.
        variance_law: "second-moment": Var(mu) + E[s^2]. "released": E[s] in place of E[s^2].
        adjust_variance: scale generated images about their mean image to the standard deviation of
            the real images.
        adjust_reconstructions: scale reconstructions likewise, before their MSE and FID. The
            released code does.
        reconstruct_from: "mean" of the posterior, or a "sample" from it (the released code).
        flow_solver: solver of the flow's differential equation (see `poise.priors.flow_prior`).
        flow_steps: number of steps of this solver. n steps of "heun" evaluate the flow 2n - 1
            times, n steps of "euler" n times.
        guidance: how much further than the flow of its class an image goes, >= 0 (eq. 4 of
            `poise.flow`). 1: no guidance. Other values need a flow that was trained with labels.
    """

    second_stage_noise: bool = True
    renormalise: Renormalise = "never"
    variance_law: VarianceLaw = "second-moment"
    adjust_variance: bool = False
    adjust_reconstructions: bool = False
    reconstruct_from: Literal["mean", "sample"] = "mean"
    flow_solver: Solver = "heun"
    flow_steps: int = 12
    guidance: float = 1.0

    def __post_init__(self) -> None:
        check_values(self)
        if not 0 <= self.guidance < inf:
            raise InputError(f"guidance must be a number of at least 0, not {self.guidance}")
        if self.flow_steps < 1:
            raise InputError(f"flow_steps must be at least 1, not {self.flow_steps}")


@dataclass(frozen=True)
class Recipe:
    """Complete settings of a run.

    Attributes:
        name: name of the recipe.
        data, network, generation: see `Data`, `Network` and `Generation`.
        first: stage 1, which learns images.
        second: stage 2, which learns the latents of stage 1. None: one stage only.
        seed: seed of weights, image order and noise.
        cost: how long a run takes, in words, and the machine it was measured on.
        published: numbers from the literature to compare with, each with its protocol.
        minutes: time budget of the whole run, pictures included, in minutes. The run chooses stage
            lengths that fit and writes them to config.json (see `poise.runs.timing`). None: use the
            stages' own lengths.
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
        check_values(self)
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"minutes must be greater than 0, not {self.minutes}")
        if self.minutes == inf:
            raise InputError("minutes must be finite, not inf")
        if self.first.patience is not None and self.data.validation is None:
            raise InputError(
                "patience counts evaluations of held-out images: give validation, such as "
                "--validation 0.05, too"
            )
        if self.first.objective == FLOW_OBJECTIVE:
            raise InputError("a flow can only be the second stage: --second flow (second=)")
        if self.second is not None:
            check_value("the objective of stage 2", SecondStage, self.second.objective)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The settings of each stage, one or two."""
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def second_stage(self) -> SecondStage | None:
        """Kind of the second stage, or None."""
        if self.second is None:
            return None
        return "flow" if self.second.objective == FLOW_OBJECTIVE else "vae"


class Overall:
    """Options that change several fields of a recipe at once.

    Attributes:
        network: architecture of stage 1. Images/s on two CPU cores at 32 and at 64 pixels: resnet
            220 and 40, infogan 450 and 120, wae 27 and 9, mlp 4,000 and 1,600. The latents of conv
            are a small image (a latent map), those of the others a vector.
        second: kind of stage 2, which learns the latents of stage 1. vae: a second VAE, with a
            dense network. flow: a flow, trained by flow matching. Latent maps need a flow.
        second_balance: balance of stage 2. The names are those of stage 1.
        stages: number of stages. 1: no second stage.
        epochs: length of stage 1 in passes over the training images. Stage 2 and the learning-rate
            schedules are scaled in proportion.
        second_epochs: length of stage 2 in passes over the training codes.
    """

    network: Annotated[BuiltNetwork, Option("model")]
    second: Annotated[SecondStage, Option("model")]
    second_balance: Annotated[str, Option("model")]
    stages: Annotated[Literal[1, 2], Option("training")]
    epochs: Annotated[int, Option("training")]
    second_epochs: Annotated[int, Option("training")]


DECLARED = (Data, Overall, Network, Stage, Generation, Recipe)
CHANGES: dict[str, Any] = {
    name: get_type_hints(declared)[name] for declared in DECLARED for name in options_of(declared)
}
"""Names and types of the settings that `poise.train(**changes)` and the command can change."""
OF_ONE_RUN = frozenset({"balance", "second_balance", "objective", "seed", "minutes"})
"""Settings that differ between the runs of a comparison."""


OF_SECOND = {"second", "second_epochs", "second_balance"}


def asks_for_second(changes: Mapping[str, Any]) -> bool:
    """Return whether changes name a setting of the second stage, or say that there are two."""
    named = any(changes.get(name) is not None for name in OF_SECOND)
    return named or changes.get("stages") == 2


class Changes:
    """Changes to a recipe, with the names and types of `CHANGES`.

    The rivals of the VAE were published with squared error, which is the balance
    "fixed:gamma2=0.5". An objective other than "vae" therefore sets this balance, unless a balance
    is given. `epochs` scales the length of stage 2 in proportion. The learning rates are halved at
    the same fractions of the length.

    Args:
        values: new values by name. None: keep the recipe's value.

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
                f"a recipe has no setting {', '.join(sorted(unknown))}; "
                f"there are {', '.join(CHANGES)}"
            )
        self.values = {
            name: check_value(name, CHANGES[name], value)
            for name, value in values.items()
            if value is not None
        }
        if self.values.get("stages") == 1 and self.values.keys() & OF_SECOND:
            raise InputError(
                "a kind, length or balance of the second stage makes no sense with one stage: "
                "leave out one of the two"
            )
        if "minutes" in self.values and self.values.keys() & {"epochs", "second_epochs"}:
            raise InputError(
                "minutes chooses the lengths of the stages: leave out either minutes or epochs"
            )

    def apply(self, recipe: Recipe) -> Recipe:
        """Return the changed recipe. If it differs from the given one, its `cost` is dropped."""
        if recipe.second is None and asks_for_second(self.values):
            raise InputError(
                f"recipe {recipe.name!r} has one stage: give a recipe with a second stage, or "
                "leave out its kind, length and balance"
            )
        first, second = self._lengths(recipe)
        first = self._put(first)
        objective = self.values.get("objective", VAE_OBJECTIVE)
        if objective != VAE_OBJECTIVE and "balance" not in self.values:
            first = replace(first, balance=RIVALS_BALANCE)
        if second is not None:
            second = self._put(second, first=False)
            second = given(
                second,
                balance=self.values.get("second_balance"),
                objective=self.values.get("second"),
            )
        changed = replace(
            recipe,
            data=self._put(recipe.data),
            network=self._put(self._kind(recipe.network)),
            first=first,
            second=second,
            generation=self._put(recipe.generation),
        )
        if self.values.keys() & {"epochs", "second_epochs"}:  # they replace a budget of the recipe
            changed = replace(changed, minutes=None)
        cost = recipe.cost if changed == recipe else ""
        return replace(self._put(changed), cost=cost)

    def _put(self, part: Any, *, first: bool = True) -> Any:
        """Return a part of a recipe with new values of its fields.

        `first=False` is for stage 2: options of stage 1 only are then ignored.
        """
        names = [
            name for name, mark in options_of(type(part)).items() if first or not mark.first_only
        ]
        return given(part, **{name: self.values.get(name) for name in names})

    def _lengths(self, recipe: Recipe) -> tuple[Stage, Stage | None]:
        """Return both stages with the new lengths.

        Without `second_epochs`, stage 2 is scaled in proportion to stage 1.
        """
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
                "in this recipe stage 1 has a length in steps and stage 2 in epochs: "
                "give second_epochs too"
            )
        passes = second.steps * second.batch_size / (recipe.first.steps * recipe.first.batch_size)
        return first, second.lasting(epochs=max(1, round(epochs * passes)))

    def _kind(self, network: Network) -> Network:
        kind = self.values.get("network", network.kind)
        other = "latent_dim" if kind == "conv" else "latent_channels"
        if other in self.values:
            own = "latent_channels" if kind == "conv" else "latent_dim"
            raise InputError(f"network {kind} has no setting {other}: give {own} instead")
        if kind == network.kind:
            return network
        initialisation = "pytorch" if kind in INITIALISED else "released"
        hidden = (512, 512) if kind == "mlp" else ()
        return replace(network, kind=kind, hidden=hidden, initialisation=initialisation)


def given(settings: Any, **values: Any) -> Any:
    """Return a copy of the settings with those `values` that are not None."""
    return replace(settings, **{name: value for name, value in values.items() if value is not None})


def to_json(settings: Any) -> dict[str, Any]:
    """Return the settings as plain values, without the texts that do not change the run.

    These texts are `cost` and `published`.
    """
    return {
        key: value for key, value in asdict(settings).items() if key not in ("cost", "published")
    }


def from_json(cls: type, values: dict[str, Any], where: str = "config") -> Any:
    """Return the settings that `to_json` wrote.

    Args:
        cls: class of the settings.
        values: what `to_json` returned.
        where: name of `values` in error messages.

    Raises:
        InputError: an unknown key, a missing one, or a value of another type or out of range.
    """
    _check_keys(cls, values, where)
    convert(values, cls, where)
    return _restored(cls, values)


def _restored(cls: type, values: dict[str, Any]) -> Any:
    """Return settings from checked values. Whole numbers stay whole, unlike those of `convert`."""
    _, parts = _keys_and_parts(cls)
    return cls(
        **{
            name: _restored(parts[name], value)
            if isinstance(value, dict)
            else tuple(value)
            if isinstance(value, list)
            else value
            for name, value in values.items()
        }
    )


def _check_keys(cls: type, values: Any, where: str) -> None:
    if not isinstance(values, dict):
        return
    known, parts = _keys_and_parts(cls)
    if unknown := values.keys() - known:
        raise InputError(f"{where} has unknown keys {sorted(unknown)}; known keys: {sorted(known)}")
    for name, part in parts.items():
        _check_keys(part, values.get(name), f"{where}.{name}")


@cache
def _keys_and_parts(cls: type) -> tuple[set[str], dict[str, type]]:
    """Return the names of the fields of a dataclass, and those that are dataclasses themselves."""
    parts = {
        name: part
        for name, hint in hints_of(cls).items()
        for part in (hint, *get_args(hint))
        if isinstance(part, type) and is_dataclass(part)
    }
    return {f.name for f in fields(cls)}, parts
