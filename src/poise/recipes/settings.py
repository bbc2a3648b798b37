"""The settings of a run: frozen, typed, complete. Two runs with equal settings and equal data are the same run.

No torch here: the command reads these for its help.
"""

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from poise.errors import InputError

NetworkKind = Literal["resnet", "infogan", "wae", "mlp", "custom"]
VarianceLaw = Literal["second-moment", "released"]
Renormalise = Literal["never", "always", "when-lost"]
Precision = Literal["float32", "ieee", "bfloat16"]
INITIALISED = ("resnet", "wae")  # networks whose initialisation is a setting
VAE_OBJECTIVE = "vae"
RIVALS_BALANCE = "fixed:gamma2=0.5"  # squared error / (2 gamma2) is then the squared error, as the rivals were published


def check_words(settings: Any) -> None:
    """Raises InputError for a field that takes one of some words (or numbers) and holds another."""
    for name, hint in get_type_hints(type(settings)).items():
        allowed = [
            word
            for part in (hint, *get_args(hint))
            if get_origin(part) is Literal
            for word in get_args(part)
        ]
        value = getattr(settings, name)
        if (
            allowed
            and value not in allowed
            and not (value is None and type(None) in get_args(hint))
        ):
            raise InputError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")


@dataclass(frozen=True)
class Data:
    """Which images, and how they are prepared.

    Attributes:
        source: a data set's name, a path, or hf:owner/name.
        size: side in pixels that images are cropped and resized to; None: as they are.
        channels: 1 (grey) or 3 (RGB); None: as they are.
        jpeg_quality: send every image through JPEG at this quality, as the released CIFAR-10 loader did (75); None: never.
        file_order: CelebA's split: "sorted" (official), or "listing", the order in which the file system lists the files,
            as released.
        skip_unreadable: leave out files that cannot be decoded, and list them.
    """

    source: str
    size: int | None = None
    channels: Literal[1, 3] | None = None
    jpeg_quality: int | None = None
    file_order: Literal["sorted", "listing"] = "sorted"
    skip_unreadable: bool = False

    def __post_init__(self) -> None:
        check_words(self)


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
    latent_dim: int = 64
    hidden: tuple[int, ...] = ()
    norm_decay: float = 0.99
    second_hidden: int = 1024
    initialisation: Literal["pytorch", "released"] = "released"

    def __post_init__(self) -> None:
        check_words(self)
        if bool(self.hidden) != (self.kind == "mlp"):
            raise InputError(
                f"hidden widths are for network mlp, which needs them; network {self.kind} has {self.hidden}"
            )
        if self.latent_dim < 1:
            raise InputError(f"latent_dim must be at least 1, not {self.latent_dim}")


@dataclass(frozen=True)
class Stage:
    """How one stage is trained: Adam (0.9, 0.999, 1e-8).

    Attributes:
        epochs: length in passes over the training images; or
        steps: length in batches. One of the two is given.
        batch_size: images per step.
        learning_rate: Adam's, at the start.
        halve_every: the learning rate is halved after so many epochs (or steps, where the length is in steps), which need not
            be a whole number; None: never.
        balance: see `poise.balance.make_balance`.
        objective: what the loss is made of: see `poise.objectives.make_objective`. Of stage 1; stage 2 is a VAE.
        ema_decay: of a running average of the weights, used in place of them afterwards; None: no average.
        precision: of the networks' arithmetic; weights, balance and sums are float32 in any case. "float32": on a GPU products
            may round their inputs to TF32 (10 bits of mantissa). "ieee": float32 throughout, on a GPU too. "bfloat16": products
            and convolutions under autocast.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 100
    learning_rate: float = 1e-4
    halve_every: float | None = None
    balance: str = "computed"
    objective: str = VAE_OBJECTIVE
    ema_decay: float | None = None
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_words(self)
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
        check_words(self)


@dataclass(frozen=True)
class Recipe:
    """A complete run.

    Attributes:
        name: of the recipe.
        data, network, generation: see there.
        first: stage 1, which learns images.
        second: stage 2, which learns the latents of stage 1; None: one stage only.
        seed: of weights, order and noise.
        cost: what a run takes, in words, with the machine it was measured on.
        published: numbers from the literature to stand beside, each with its protocol.
        minutes: a budget for the whole run. The lengths of both stages are then chosen to fit into it on the machine where
            the run starts, and kept in its config.json (see `poise.runs.timing`). None: the lengths are as they are.
    """

    name: str
    data: Data
    network: Network
    first: Stage
    second: Stage | None
    generation: Generation = Generation()
    seed: int = 0
    cost: str = ""
    published: tuple[str, ...] = field(default=())
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"minutes must be greater than 0, not {self.minutes}")
        if self.second is not None and self.second.objective != VAE_OBJECTIVE:
            raise InputError(
                f"stage 2 is a VAE: its objective is {VAE_OBJECTIVE}, not {self.second.objective!r}"
            )


@dataclass(frozen=True)
class Changes:
    """What users most often change in a recipe; None: as the recipe has it.

    Attributes:
        size, channels, skip_unreadable: see `Data`.
        network, latent_dim: see `Network`; the kind of network and its latents.
        balance, second_balance: of stage 1 and of stage 2; see `poise.balance.make_balance`.
        objective: of stage 1; see `poise.objectives.make_objective`. Where it is another than vae and no balance is given, the
            balance of stage 1 is "fixed:gamma2=0.5", with which the objective is the published one.
        epochs: length of stage 1, passes over the training images. Stage 2 becomes as many times longer or shorter, and both
            learning rates are halved at the same shares of the length as in the recipe.
        second_epochs: length of stage 2, likewise; None: as `epochs` makes it.
        minutes: see `Recipe`; in place of lengths.
        stages: 1 leaves out the second stage.
        batch_size, learning_rate, ema_decay, precision: of both stages; see `Stage`.
        seed: of weights, order and noise.
    """

    size: int | None = None
    channels: Literal[1, 3] | None = None
    skip_unreadable: bool | None = None
    network: NetworkKind | None = None
    latent_dim: int | None = None
    balance: str | None = None
    second_balance: str | None = None
    objective: str | None = None
    epochs: int | None = None
    second_epochs: int | None = None
    minutes: float | None = None
    stages: Literal[1, 2] | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    ema_decay: float | None = None
    precision: Precision | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_words(self)
        if self.stages == 1 and (self.second_epochs is not None or self.second_balance is not None):
            raise InputError(
                "a length or balance of the second stage makes no sense with one stage: leave one of them out"
            )
        if self.minutes is not None and (self.epochs is not None or self.second_epochs is not None):
            raise InputError(
                "a budget in minutes chooses the lengths: leave out either it or the epochs"
            )

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with these changes. Its cost is dropped where they change it."""
        data = given(
            recipe.data,
            size=self.size,
            channels=self.channels,
            skip_unreadable=self.skip_unreadable,
        )
        network = given(self._kind(recipe.network), latent_dim=self.latent_dim)
        rival = self.objective not in (None, VAE_OBJECTIVE)
        balance = RIVALS_BALANCE if rival and self.balance is None else self.balance
        first, second = self._lengths(recipe)
        first = given(self._stage(first, balance), objective=self.objective)
        second = second and self._stage(second, self.second_balance)
        as_costed = (data, network, first, second) == (
            recipe.data,
            recipe.network,
            recipe.first,
            recipe.second,
        )
        recipe = replace(recipe, data=data, network=network, first=first, second=second)
        return given(recipe, seed=self.seed, minutes=self.minutes, cost=None if as_costed else "")

    def _lengths(self, recipe: Recipe) -> tuple[Stage, Stage | None]:
        """Both stages at the lengths asked for: stage 2 keeps its proportion to stage 1 unless it has a length of its own."""
        first, second = recipe.first, None if self.stages == 1 else recipe.second
        if self.epochs is not None:
            first = first.lasting(epochs=self.epochs)
        if second is not None and self.second_epochs is not None:
            return first, second.lasting(epochs=self.second_epochs)
        if second is None or self.epochs is None:
            return first, second
        if recipe.first.epochs is not None:
            share = self.epochs / recipe.first.epochs
            name, length = ("epochs", second.epochs) if second.epochs else ("steps", second.steps)
            return first, second.lasting(**{name: max(1, round(share * (length or 0)))})
        if second.steps is None or recipe.first.steps is None:
            raise InputError(
                "stage 1 of this recipe has a length in steps and stage 2 in epochs: give second_epochs too"
            )
        passes = second.steps * second.batch_size / (recipe.first.steps * recipe.first.batch_size)
        return first, second.lasting(epochs=max(1, round(self.epochs * passes)))

    def _kind(self, network: Network) -> Network:
        if self.network is None or self.network == network.kind:
            return network
        initialisation = "pytorch" if self.network in INITIALISED else "released"
        hidden = (512, 512) if self.network == "mlp" else ()
        return replace(network, kind=self.network, hidden=hidden, initialisation=initialisation)

    def _stage(self, stage: Stage, balance: str | None) -> Stage:
        both = {
            name: getattr(self, name)
            for name in ("batch_size", "learning_rate", "ema_decay", "precision")
        }
        return given(stage, balance=balance, **both)


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
