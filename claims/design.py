"""The runs. An experiment has one network, schedule and data set; labels differ in one setting."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from claims.measure import figures_of_run
from poise.protocols import DEFAULT, NO_EXTRACTOR
from poise.recipes import RECIPES
from poise.recipes.settings import Changes, Data, Generation, Network, Recipe, Stage
from poise.runs.run import PriorName
from poise.studies.comparison.experiment import Experiment
from poise.studies.comparison.measuring import Compared, ImageSet

COMPUTED = "computed"
RATCHET = "computed:start=1,monotone=true"  # the released rule: gamma2 never grows
LEARNED = "learned"  # as published: log gamma starts at 0 and has the network's learning rate
FASTER = "learned:rate=100"
OPTIMAL = "optimal"
FIXED = "fixed:gamma2=1"
BALANCES = (COMPUTED, RATCHET, LEARNED, FASTER, OPTIMAL, FIXED)
TWICE_LEARNED = "learned, both stages"  # the two-stage VAE of Dai & Wipf
# The published MNIST settings, converted to 784 values and 32 latents.
RAE = "rae-l2:latent=0.005,decoder=8e-5"
WAE = "wae-mmd"
RIVALS = ("autoencoder", RAE, "rae-gp", WAE)
# Standardised latents: once after training, or also every 100 steps of it.
STANDARDISED = {f"computed, latents standardised {how}": how for how in ("after", "during")}

MNIST, FASHION, DIGITS = "claims-mnist", "claims-fashion", "claims-digits"
COLOUR = "claims-colour"
# Epochs beside the full length. They equal the full run stopped earlier: no rate is halved by then.
LENGTHS = (1, 3)
BATCHES = (20, 60, 200)
# Steps and width of stage 2, beside (3_000, 128).
SECOND_STAGES = (
    (300, 128),
    (1_000, 128),
    (3_000, 16),
    (3_000, 32),
    (3_000, 64),
)

Reference = Literal["train", "test"]

SEEDS = 5
# FD-light takes a second for 60 images on one core, so it is measured only for these labels, and
# for the labels of C9.
JUDGED_BY_LIGHT = {
    MNIST: (COMPUTED, LEARNED, *STANDARDISED),
    FASHION: (COMPUTED, LEARNED, FASTER, OPTIMAL, FIXED, *STANDARDISED),
}
# Number of images from which a distance to all test images qualifies (`benchmarks/distances.py`).
QUALIFIED = {"light": 500, "pixels": 2_000}

# Names of sets of images, and the prior and generation settings of each.
BASIC = ("REC", "GEN-1", "GEN-2", "GEN-mixture")
FIRST_STAGE = ("REC", "GEN-1", "GEN-mixture")
BY_CODES = ("REC", "GEN-mixture")
PLAIN, NOISELESS = "GEN-2", "GEN-2 without noise"
RENORMALISED, NOISELESS_RENORMALISED = f"{PLAIN}, renormalised", f"{NOISELESS}, renormalised"
EVERY_SET = (*BASIC, RENORMALISED, NOISELESS, NOISELESS_RENORMALISED)
WAYS: dict[str, tuple[PriorName | None, Generation]] = {
    "REC": (None, Generation()),
    "GEN-1": ("normal", Generation()),
    "GEN-2": ("second-stage", Generation()),
    "GEN-mixture": ("mixture", Generation()),
    RENORMALISED: ("second-stage", Generation(renormalise="always")),
    NOISELESS: ("second-stage", Generation(second_stage_noise=False)),
    NOISELESS_RENORMALISED: (
        "second-stage",
        Generation(second_stage_noise=False, renormalise="always"),
    ),
}
KEPT = ("FD-", "KID-")  # other metrics would be most of the results' size


IMAGES = Recipe(
    name="claims",
    data=Data("mnist"),
    # 1.38 million parameters in stage 1.
    network=Network("mlp", latent_dim=32, hidden=(512, 512), second_hidden=256),
    first=Stage(epochs=5, batch_size=100, learning_rate=1e-3, halve_every=3),
    second=Stage(epochs=5, batch_size=100, learning_rate=1e-3, halve_every=2),
)
# With another balance, stage 2 of the digits stays near KL = 0 in so few steps (a pilot run).
PATIENT = "computed:start=0.001,decay=0.999"
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
ONE = {"stages": 1}
# For each label its changes of the recipe, and the sets to compare.
Labels = dict[str, tuple[dict[str, Any], tuple[Compared, ...]]]


def design() -> list[Experiment]:
    """Return all experiments."""
    return [*_pictures(), *_digits()]


def experiment(name: str, base: Recipe, labels: Labels) -> Experiment:
    """Return an experiment that is evaluated on every test image."""
    changes = {label: changed for label, (changed, _) in labels.items()}
    compared = {label: sets for label, (_, sets) in labels.items()}
    return Experiment(
        name,
        base,
        changes,
        SEEDS,
        (DEFAULT,),
        (),
        NO_EXTRACTOR,
        compared=compared,
        pages={"claims": figures_of_run},
        keep=False,
    )


def _pictures() -> Iterator[Experiment]:
    fashion = replace(IMAGES, data=Data("fashion-mnist"))
    labels: Labels = {
        label: ({"balance": label}, _sets(MNIST, label)) for label in (COMPUTED, LEARNED, FIXED)
    }
    labels |= _standardised(MNIST)
    yield experiment(MNIST, IMAGES, labels)
    labels = {
        label: ({"balance": label}, _sets(FASHION, label))
        for label in (COMPUTED, LEARNED, FASTER, OPTIMAL, FIXED)
    }
    labels |= _standardised(FASHION)
    both = {"balance": LEARNED, "second_balance": LEARNED}
    labels[TWICE_LEARNED] = both, (_light(BASIC), _pixels(EVERY_SET))
    for objective in RIVALS:  # one stage each; only WAE has a prior to sample from
        sets = FIRST_STAGE if objective == WAE else BY_CODES
        labels[objective] = {"objective": objective} | ONE, (_light(sets), _pixels(FIRST_STAGE))
    yield experiment(FASHION, fashion, labels)
    for epochs in LENGTHS:
        shorter = replace(fashion, first=replace(fashion.first, epochs=epochs))
        compared = (_light(BASIC), _pixels(BASIC))
        labels = {label: ({"balance": label}, compared) for label in (COMPUTED, LEARNED)}
        yield experiment(f"{FASHION}-epochs-{epochs}", shorter, labels)


def _standardised(experiment: str) -> Labels:
    return {
        label: ({"balance": COMPUTED, "standardise": how}, _sets(experiment, label))
        for label, how in STANDARDISED.items()
    }


def _sets(experiment: str, label: str) -> tuple[Compared, ...]:
    more = (NOISELESS,) if label == COMPUTED else ()
    light = (_light((*BASIC, *more)),) if label in JUDGED_BY_LIGHT[experiment] else ()
    return (*light, _pixels(EVERY_SET))


def _light(sets: tuple[str, ...]) -> Compared:
    return compared("light", sets, QUALIFIED["light"])


def _pixels(sets: tuple[str, ...]) -> Compared:
    return compared("pixels", sets, QUALIFIED["pixels"])


def compared(
    extractor: str, sets: tuple[str, ...], number: int, reference: Reference = "test"
) -> Compared:
    """Return the comparison of sets of images with real ones.

    Args:
        extractor: see `poise.features.make_extractor`.
        sets: names of sets, keys of `WAYS`.
        number: number of generated images.
        reference: the split of the real images. All test images are compared, or `number` training
            images.
    """
    protocol = replace(
        DEFAULT,
        name="claims",
        reference=reference,
        real=None if reference == "test" else number,
        generated=number,
        kid_subsets=1,
        kid_subset_size=number,
        extractor=extractor,
    )
    return Compared(protocol, tuple(ImageSet(name, *WAYS[name]) for name in sets), KEPT)


def _digits() -> Iterator[Experiment]:
    every, first = _all_digits(EVERY_SET), _all_digits(FIRST_STAGE)
    labels: Labels = {
        label: ({"balance": label}, every) for label in (*BALANCES, "computed:kl_weight=4")
    }
    for label, how in STANDARDISED.items():
        labels[label] = {"balance": COMPUTED, "standardise": how}, every
    for label in (
        "learned:rate=10",
        "learned:start=0.05",
        "computed:decay=0.9",
        "computed:decay=0.999",
        *(f"fixed:gamma2={gamma2}" for gamma2 in (0.3, 0.1, 0.03, 0.01, 0.003)),
    ):
        labels[label] = {"balance": label} | ONE, first
    yield experiment(DIGITS, SMALL, labels)
    for batch in BATCHES:
        labels = {label: ({"balance": label}, ()) for label in (COMPUTED, RATCHET)}
        yield experiment(f"{DIGITS}-batch-{batch}", _batched(batch), labels)
    for steps, hidden in SECOND_STAGES:
        labels = {COMPUTED: ({"balance": COMPUTED}, every)}
        yield experiment(second_stages(steps, hidden), _seconded(steps, hidden), labels)


def _all_digits(sets: tuple[str, ...]) -> tuple[Compared, ...]:
    return (compared("pixels", sets, 1_600, "train"),)  # of 1,617; the 180 test images are too few


def _batched(batch: int) -> Recipe:
    """Return the recipe with 3,000 steps, for every batch size."""
    stage = Stage(steps=3_000, batch_size=batch, learning_rate=1e-3, halve_every=1_200)
    return replace(ONE_STAGE, first=stage)


def second_stages(steps: int, hidden: int) -> str:
    """Return the name of the experiment with a second stage of this length and width."""
    return f"{DIGITS}-second-{steps}-{hidden}"


def _seconded(steps: int, hidden: int) -> Recipe:
    assert SMALL.second is not None
    second = replace(SMALL.second, steps=steps, halve_every=steps * 2 // 5)
    network = replace(SMALL.network, second_hidden=hidden)
    shorter = replace(SMALL.first, epochs=50, halve_every=20)
    return replace(SMALL, network=network, first=shorter, second=second)


def colour() -> Experiment:
    """Return the experiment on colour images, which is not part of the design.

    It has two seeds and no verdicts, takes longer than the whole design on two cores, and needs the
    2015 Inception.
    """
    base = Changes(network="infogan", epochs=10, second_epochs=20).apply(RECIPES["cifar10"])
    labels = {label: {"balance": label} for label in (COMPUTED, LEARNED, FASTER, OPTIMAL)}
    protocol, priors = replace(DEFAULT, real=5_000), ("normal", "second-stage", "mixture")
    return Experiment(COLOUR, base, labels, 2, (protocol,), priors, "inception")


def quick() -> list[Experiment]:
    """Return a small experiment on the digits that takes seconds and tests the pipeline only."""
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
    sets = (compared("pixels", EVERY_SET, 200, "train"),)
    labels: Labels = {label: ({"balance": label}, sets) for label in (COMPUTED, LEARNED)}
    return [experiment(DIGITS, recipe, labels)]
