"""Which runs there are: an experiment has one network, schedule and data set; its labels differ in one thing."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from poise.recipes.settings import Data, Network, Recipe, Stage

COMPUTED = "computed"
RATCHET = "computed:start=1,monotone=true"  # the released rule: gamma2 never grows
LEARNED = "learned"  # as published: log gamma starts at 0 and moves at the network's rate
FASTER = "learned:rate=100"
OPTIMAL = "optimal"
FIXED = "fixed:gamma2=1"
BALANCES = (COMPUTED, RATCHET, LEARNED, FASTER, OPTIMAL, FIXED)
TWICE_LEARNED = "learned, both stages"  # the two-stage VAE of Dai & Wipf
RAE = (
    "rae-l2:latent=0.005,decoder=8e-5"  # the published MNIST settings, at 784 values and 32 latents
)
WAE = "wae-mmd"
RIVALS = ("autoencoder", RAE, "rae-gp", WAE)
PUBLISHED_BALANCE = "fixed:gamma2=0.5"  # of the rivals: squared error + penalty, as published

MNIST, FASHION, DIGITS = "claims-mnist", "claims-fashion", "claims-digits"
LENGTHS = (
    1,
    3,
)  # epochs, beside the whole length: the same run stopped earlier, since the rate is not yet halved
BATCHES = (20, 60, 200)
SECOND_STAGES = (
    (300, 128),
    (1_000, 128),
    (3_000, 16),
    (3_000, 32),
    (3_000, 64),
)  # steps and width, beside 3,000 and 128

Reference = Literal["train", "test"]

# FD-light takes a second for 70 images on one core, as long as stage 1 for a run's sets: only where a claim needs it.
JUDGED_BY_LIGHT = {MNIST: (COMPUTED, LEARNED), FASHION: (COMPUTED, LEARNED, FASTER, OPTIMAL, FIXED)}

# Sets of images, and how each is made: see `measure`.
BASIC = ("REC", "GEN-1", "GEN-2")
FIRST_STAGE = ("REC", "GEN-1", "GEN-mixture")
BY_CODES = ("REC", "GEN-mixture")
PLAIN, NOISELESS = "GEN-2", "GEN-2 without noise"
RENORMALISED, NOISELESS_RENORMALISED = f"{PLAIN}, renormalised", f"{NOISELESS}, renormalised"
EVERY_SET = (*BASIC, "GEN-mixture", RENORMALISED, NOISELESS, NOISELESS_RENORMALISED)


@dataclass(frozen=True)
class Compared:
    """Sets of images compared with real ones.

    Attributes:
        extractor: see `poise.features.make_extractor`.
        sets: which.
        number: real images, and as many produced ones.
        reference: the side of the data that real images are from.
    """

    extractor: str
    sets: tuple[str, ...]
    number: int
    reference: Reference = "test"


@dataclass(frozen=True)
class Trial:
    """One run: what is trained, and what is measured of it."""

    experiment: str
    label: str
    recipe: Recipe
    compared: tuple[Compared, ...]

    @property
    def key(self) -> tuple[str, str, int]:
        return self.experiment, self.label, self.recipe.seed


IMAGES = Recipe(
    name="claims",
    data=Data("mnist"),
    network=Network(
        "mlp", latent_dim=32, hidden=(512, 512), second_hidden=256
    ),  # 1.38 million parameters in stage 1
    first=Stage(epochs=5, batch_size=100, learning_rate=1e-3, halve_every=3),
    second=Stage(epochs=5, batch_size=100, learning_rate=1e-3, halve_every=2),
)
PATIENT = "computed:start=0.001,decay=0.999"  # otherwise the digits' stage 2 stays near KL = 0 for so few steps (a pilot run)
SMALL = Recipe(
    name="claims",
    data=Data("digits"),
    network=Network("mlp", latent_dim=10, hidden=(256, 256), second_hidden=128),
    first=Stage(epochs=100, batch_size=50, learning_rate=1e-3, halve_every=40),
    second=Stage(
        steps=3_000, batch_size=64, learning_rate=2e-3, halve_every=1_200, balance=PATIENT
    ),
)
ONE_STAGE = replace(SMALL, second=None)


def design() -> list[Trial]:
    """Every run, the first seed of all experiments first, so that a set that is stopped early says something already."""
    return sorted(_trials(), key=lambda trial: trial.recipe.seed)


def _trials() -> Iterator[Trial]:
    yield from _pictures()
    yield from _digits()


def _pictures() -> Iterator[Trial]:
    fashion = replace(IMAGES, data=Data("fashion-mnist"))
    for seed in range(3):
        for label in (COMPUTED, LEARNED, FIXED):
            yield Trial(MNIST, label, balanced(IMAGES, label, seed), _sets(MNIST, label))
        for label in (COMPUTED, LEARNED, FASTER, OPTIMAL, FIXED):
            yield Trial(FASHION, label, balanced(fashion, label, seed), _sets(FASHION, label))
        both = balanced(fashion, LEARNED, seed, second=LEARNED)
        yield Trial(FASHION, TWICE_LEARNED, both, (_light(BASIC), _pixels(EVERY_SET)))
        for objective in RIVALS:
            sets = (
                FIRST_STAGE if objective == WAE else BY_CODES
            )  # the only one of them that has a prior to draw from
            yield Trial(
                FASHION,
                objective,
                rival(fashion, objective, seed),
                (_light(sets), _pixels(FIRST_STAGE)),
            )
        for epochs in LENGTHS:
            shorter = replace(fashion, first=replace(fashion.first, epochs=epochs), second=None)
            for label in (COMPUTED, LEARNED):
                compared = (_light(BY_CODES), _pixels(FIRST_STAGE))
                yield Trial(
                    f"{FASHION}-epochs-{epochs}", label, balanced(shorter, label, seed), compared
                )


def _sets(experiment: str, label: str) -> tuple[Compared, ...]:
    more: tuple[str, ...] = (
        ("GEN-mixture",) if experiment == FASHION and label in (COMPUTED, LEARNED) else ()
    )
    more += (NOISELESS,) if label == COMPUTED else ()
    light = (_light((*BASIC, *more)),) if label in JUDGED_BY_LIGHT[experiment] else ()
    return (*light, _pixels(EVERY_SET))


def _light(sets: tuple[str, ...]) -> Compared:
    return Compared("light", sets, 500)


def _pixels(sets: tuple[str, ...]) -> Compared:
    return Compared("pixels", sets, 2_000)


def _digits() -> Iterator[Trial]:
    every, first = _all_digits(EVERY_SET), _all_digits(FIRST_STAGE)
    for seed in range(3):
        for label in (*BALANCES, "computed:kl_weight=4"):
            yield Trial(DIGITS, label, balanced(SMALL, label, seed), every)
        for label in (
            "learned:rate=10",
            "learned:start=0.05",
            "computed:decay=0.9",
            "computed:decay=0.999",
        ):
            yield Trial(DIGITS, label, balanced(ONE_STAGE, label, seed), first)
        for gamma2 in (0.3, 0.1, 0.03, 0.01, 0.003):
            label = f"fixed:gamma2={gamma2}"
            yield Trial(DIGITS, label, balanced(ONE_STAGE, label, seed), first)
        for batch in BATCHES:
            for label in (COMPUTED, RATCHET):
                yield Trial(
                    f"{DIGITS}-batch-{batch}", label, balanced(_batched(batch), label, seed), ()
                )
        for steps, hidden in SECOND_STAGES:
            yield Trial(
                second_stages(steps, hidden), COMPUTED, _seconded(steps, hidden, seed), every
            )


def _all_digits(sets: tuple[str, ...]) -> tuple[Compared, ...]:
    return (Compared("pixels", sets, 1_600, "train"),)  # of 1,617: the test side's 180 are too few


def _batched(batch: int) -> Recipe:
    """3,000 steps for every size of batch."""
    stage = Stage(steps=3_000, batch_size=batch, learning_rate=1e-3, halve_every=1_200)
    return replace(ONE_STAGE, first=stage)


def second_stages(steps: int, hidden: int) -> str:
    """The experiment of a second stage of this length and width."""
    return f"{DIGITS}-second-{steps}-{hidden}"


def _seconded(steps: int, hidden: int, seed: int) -> Recipe:
    assert SMALL.second is not None
    second = replace(SMALL.second, steps=steps, halve_every=steps * 2 // 5)
    network = replace(SMALL.network, second_hidden=hidden)
    shorter = replace(SMALL.first, epochs=50, halve_every=20)
    return replace(SMALL, network=network, first=shorter, second=second, seed=seed)


def balanced(recipe: Recipe, balance: str, seed: int, *, second: str | None = None) -> Recipe:
    """The recipe with a balance of stage 1, and perhaps of stage 2, whose own is otherwise the recipe's for every label."""
    stage = recipe.second and replace(recipe.second, balance=second or recipe.second.balance)
    return replace(recipe, first=replace(recipe.first, balance=balance), second=stage, seed=seed)


def rival(recipe: Recipe, objective: str, seed: int) -> Recipe:
    """Another model on the same network and schedule: one stage, a mixture fitted to its codes afterwards."""
    first = replace(recipe.first, balance=PUBLISHED_BALANCE, objective=objective)
    return replace(recipe, first=first, second=None, seed=seed)


def quick() -> list[Trial]:
    """The same pipeline in seconds, on the digits: it shows that everything runs, and nothing else."""
    assert SMALL.second is not None
    first, second = (
        replace(SMALL.first, epochs=2, halve_every=None),
        replace(SMALL.second, steps=20, halve_every=None),
    )
    recipe = replace(
        SMALL,
        first=first,
        second=second,
        network=replace(SMALL.network, hidden=(32,), second_hidden=16),
    )
    compared = (Compared("pixels", EVERY_SET, 200, "train"),)
    labels = (COMPUTED, LEARNED)
    return [
        Trial(DIGITS, label, balanced(recipe, label, seed), compared)
        for seed in range(3)
        for label in labels
    ]
