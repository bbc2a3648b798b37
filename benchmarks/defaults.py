"""Compare candidates for the default recipe of photographs, at equal time.

    python benchmarks/defaults.py list
    python benchmarks/defaults.py pace FOLDER UNIT...
    python benchmarks/defaults.py train FOLDER UNIT... [--device cuda --jobs 6]
    python benchmarks/defaults.py measure FOLDER UNIT... [--device cuda --jobs 4]

FOLDER holds cifar10.npz and celeba64.npz. A unit is SET-CANDIDATE-MINUTES-SEED, for example
faces-flow-10-0; shell patterns such as 'faces-*-10-?' name several, and floor-SET compares training
images with test images.

Minutes are those of two cores. `pace` measures, on a quiet machine, the seconds of a step of both
stages and of everything else, as `poise train --minutes` does, and adds them to results/
defaults-pace.json. `train` takes the numbers of steps that fit into the minutes at the medians of
these paces. So units of the same minutes are compared at equal time wherever they are trained, on
two cores or, in a small part of the time, on a GPU. With `--measure` it measures each unit at once.

`measure` compares reconstructions and samples of each prior with the first test images (5,000 of
CIFAR-10, 1,000 faces at 64 pixels). It searches the nearest training image of samples and of
reconstructed test images. It writes results/defaults-UNIT.json and, beside the run, a grid of
samples. Finished parts are not repeated. `defaults_page.py` writes the tables and the curve of
docs/defaults.md.

The candidates are four recipes; each variant changes one thing, or several, in the one with a flow.
faces60 and faces500 are the first faces only.
"""

import argparse
import json
import statistics
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measuring import machine, write_report
from pace import timing_of

import poise
from poise.data import Dataset, head, load
from poise.metrics.copies import nearest
from poise.networks.convolutional import ConvDecoder, ConvEncoder
from poise.recipes import RECIPES, Recipe
from poise.recipes.settings import Changes
from poise.runs.options import Options
from poise.runs.timing import MARGIN, Pace, Timing, lengths_within_budget
from poise.studies.comparison.worker import EVALUATED_AT_ONCE
from poise.studies.results import provenance, result_of, source_commit, write_result
from poise.support.seeds import derive, seeded
from poise.training.machine import choose_device
from poise.variants import PriorName

EXPERIMENT = "defaults"
CORES = 2  # of the machine whose minutes are compared
PACE = "defaults-pace.json"
COPIES = 200  # samples whose nearest training image is searched


@dataclass(frozen=True)
class Set:
    """Images to train on and to compare with.

    Attributes:
        file: the file in FOLDER.
        side: side of the images in pixels.
        compared: number of test images to compare with.
        training: number of training images. None: all.
    """

    file: str
    side: int
    compared: int
    training: int | None = None


SETS = {
    "cifar10": Set("cifar10.npz", 32, 5_000),
    "faces": Set("celeba64.npz", 64, 1_000),
    "faces60": Set("celeba64.npz", 64, 1_000, 60),
    "faces500": Set("celeba64.npz", 64, 1_000, 500),
}
LARGE_SETS, SMALL_SETS = ("cifar10", "faces"), ("faces60", "faces500")


@dataclass(frozen=True)
class Candidate:
    """A recipe and the priors that its samples are measured with.

    Attributes:
        recipe: the recipe.
        priors: the priors.
        map_side: side of the latent map, if it is not the network's own.
        pace_of: candidate whose steps take the same time. None: itself.
    """

    recipe: Recipe
    priors: tuple[PriorName, ...] = ("flow",)
    map_side: int | None = None
    pace_of: str | None = None


IMAGES = RECIPES["images"]
assert IMAGES.second is not None
# What each variant changes: the recipe `images` as it was first, with four channels and 72 % of the
# time for the flow. The lengths of its stages were chosen for so many seconds of each.
STEPS, SECONDS, SECONDS_OF_FLOW = 6_100, 450, 1_150
MAPS = replace(
    IMAGES,
    network=replace(IMAGES.network, latent_channels=4),
    first=replace(IMAGES.first, steps=STEPS),
    second=replace(IMAGES.second, steps=10_500),
)


def changed(
    network: dict[str, Any] | None = None,
    first: dict[str, Any] | None = None,
    second: dict[str, Any] | None = None,
) -> Recipe:
    """Return the recipe of latent maps and a flow with other settings."""
    assert MAPS.second is not None
    return replace(
        MAPS,
        network=replace(MAPS.network, **(network or {})),
        first=replace(MAPS.first, **(first or {})),
        second=replace(MAPS.second, **(second or {})),
    )


def steps_for(of_flow: float) -> dict[str, int]:
    """Return the length of stage 1 that gives the flow another share of the time."""
    return {"steps": round(STEPS * SECONDS_OF_FLOW / SECONDS * (1 - of_flow) / of_flow)}


CANDIDATES = {
    "resnet": Candidate(RECIPES["images-resnet"], ("second-stage",)),
    "second-stage": Candidate(Changes(second="vae").apply(MAPS), ("second-stage",)),
    "mixture": Candidate(Changes(stages=1).apply(MAPS), ("mixture",)),
    "flow": Candidate(MAPS),
}
DEFAULT = "eight-50"  # the recipe `images`
AVERAGE = {"ema_decay": 0.999, "ema_warmup": True}
EIGHT = {"latent_channels": 8}
VARIANTS = {
    "channels-2": Candidate(changed({"latent_channels": 2})),
    "channels-8": Candidate(changed(EIGHT)),
    "map-4": Candidate(MAPS, map_side=4),
    "map-4-32": Candidate(
        changed({"latent_channels": 32}, steps_for(0.5)), map_side=4, pace_of="map-4"
    ),
    "linear": Candidate(changed(first={"decay": 1.0}, second={"decay": 1.0}), pace_of="flow"),
    "wide": Candidate(changed({"conv_width": 192, "flow_width": 144})),
    "deep": Candidate(changed({"flow_blocks": 14})),
    "eight-average": Candidate(changed(EIGHT, AVERAGE)),
    "eight-average-50": Candidate(
        changed(EIGHT, AVERAGE | steps_for(0.5)), pace_of="eight-average"
    ),
    DEFAULT: Candidate(IMAGES, pace_of="channels-8"),
    "eight-30": Candidate(changed(EIGHT, steps_for(0.3)), pace_of="channels-8"),
    "small-start": Candidate(
        changed(EIGHT, {"balance": "computed:start=0.001"} | steps_for(0.5)), pace_of="channels-8"
    ),
}
# With one image in ten held out: the weights with the best held-out ELBO, and early stopping.
HELD_OUT = replace(IMAGES, data=replace(IMAGES.data, validation=0.1))
OF_SMALL_SETS = {
    DEFAULT: VARIANTS[DEFAULT],
    "best-weights": Candidate(HELD_OUT, pace_of="channels-8"),
    "patience": Candidate(
        replace(HELD_OUT, first=replace(HELD_OUT.first, patience=5)), pace_of="channels-8"
    ),
}
EVERY = CANDIDATES | VARIANTS | OF_SMALL_SETS
SECOND_BEST = "mixture"  # after 10 minutes, on both large sets
CONFIRMED = (DEFAULT, "channels-2", "channels-8", "map-4", "linear", "wide", "deep")  # on CIFAR-10
ONE_SEED = ("map-4-32", "eight-average", "small-start")  # without a gain over the recipe
MINUTES_OF_SMALL_SETS = 5
UNITS = [
    *(f"{n}-{c}-10-{seed}" for n, c, seed in product(LARGE_SETS, CANDIDATES, range(2))),
    *(f"{n}-{c}-60-0" for n, c in product(LARGE_SETS, (DEFAULT, SECOND_BEST))),
    "cifar10-resnet-60-0",
    *(
        f"faces-{variant}-10-{seed}"
        for variant in VARIANTS
        for seed in range(1 if variant in ONE_SEED else 2)
    ),
    *(f"cifar10-{variant}-10-0" for variant in CONFIRMED),
    f"cifar10-{DEFAULT}-10-1",
    *(f"{n}-{DEFAULT}-{minutes}-0" for n, minutes in product(LARGE_SETS, (2, 5, 20))),
    *(
        f"{n}-{c}-{MINUTES_OF_SMALL_SETS}-0"
        for n, c in product(SMALL_SETS, CANDIDATES | OF_SMALL_SETS)
    ),
    *(f"{n}-{DEFAULT}-{minutes}-0" for n, minutes in product(SMALL_SETS, (2, 20))),
]
FLOORS = [f"floor-{name}" for name in LARGE_SETS]


def is_unit(text: str) -> bool:
    """Return whether a text names a set, a candidate, minutes and a seed. `UNITS` has only some."""
    try:
        name, candidate, *_ = parts(text)
    except ValueError:
        return False
    return name in SETS and candidate in EVERY


def chosen(patterns: list[str]) -> list[str]:
    """Return the units that are named or match a pattern, in the order of the patterns."""
    everything = (*UNITS, *FLOORS)
    found: dict[str, None] = {}
    for pattern in patterns:
        matching = [unit for unit in everything if fnmatch(unit, pattern)]
        if not matching and is_unit(pattern):
            matching = [pattern]
        if not matching:
            raise SystemExit(f"no unit matches {pattern}: see `defaults.py list`")
        found |= dict.fromkeys(matching)
    return list(found)


def parts(unit: str) -> tuple[str, str, float, int]:
    """Return the set, the candidate, the minutes and the seed of a unit."""
    name, rest = unit.split("-", 1)
    candidate, minutes, seed = rest.rsplit("-", 2)
    return name, candidate, float(minutes), int(seed)


def find(name: str) -> Candidate:
    return EVERY[name]


@cache
def images_of(folder: Path, name: str) -> Dataset:
    """Return the images of a set."""
    chosen = SETS[name]
    data = load(str(folder / chosen.file), size=chosen.side)
    data = replace(data, source=chosen.file)  # results have no paths of a machine
    return replace(data, train=head(data.train, chosen.training or len(data.train)))


def autoencoder(candidate: Candidate, data: Dataset) -> poise.VAE | None:
    """Return the convolutional network with another side of the latent map. None: the recipe's."""
    recipe, side = candidate.recipe, candidate.map_side
    if side is None:
        return None
    channels, image_side, _ = data.shape
    shape, levels = (recipe.network.latent_channels, side, side), 3 if image_side < 64 else 4
    widths = tuple(128 >> k for k in reversed(range(levels)))
    patch = image_side // side >> (levels - 1)
    return poise.VAE(
        ConvEncoder(channels, shape, patch, widths, (1,) * levels),
        ConvDecoder(channels, shape, patch, widths, (1,) * (levels - 1) + (2,)),
    )


def measure_pace(folder: Path, name: str, candidate: Candidate) -> Timing:
    """Return the times of a candidate on this machine, as `poise train --minutes` measures them."""
    data = images_of(folder, name)
    return timing_of(
        replace(candidate.recipe, minutes=10.0),
        data,
        torch.device("cpu"),
        "eager",
        vae=autoencoder(candidate, data),
        threads=CORES,
    )


def measured_as(name: str, candidate: str) -> str:
    """Return the candidate whose measured pace counts for a set and candidate.

    On faces a step takes the same time with eight channels as with four, within 2 %. So the pace of
    `flow` counts for both on the small sets.
    """
    own = find(candidate).pace_of or candidate
    return "flow" if name in SMALL_SETS and own == "channels-8" else own


def measure_paces(folder: Path, units: list[str], rounds: int, path: Path) -> None:
    """Measure the pace of each set and candidate, in turns, and add them to a file."""
    pairs = dict.fromkeys(
        (name, measured_as(name, candidate)) for name, candidate, *_ in map(parts, units)
    )
    for _, (name, candidate) in product(range(rounds), pairs):
        found = measure_pace(folder, name, find(candidate))
        report = json.loads(path.read_text()) if path.exists() else {"paces": {}}
        report |= machine(torch.device("cpu")) | {"provenance": provenance(torch.device("cpu"))}
        report["paces"].setdefault(f"{name}-{candidate}", []).append(asdict(found))
        write_report(path, report)
        print(name, candidate, found, flush=True)


def median_timing(report: dict[str, Any], name: str, candidate: str) -> Timing:
    """Return the medians of the measured times of a set and candidate."""
    key = f"{name}-{measured_as(name, candidate)}"
    rounds = report["paces"].get(key)
    if rounds is None:
        raise SystemExit(f"no pace of {key} was measured: see `defaults.py pace`")
    stages = zip(*(entry["stages"] for entry in rounds), strict=True)
    return Timing(
        tuple(
            Pace(*(statistics.median(stage[k] for stage in each) for k in ("start", "step")))
            for each in stages
        ),
        statistics.median(entry["rest"] for entry in rounds),
    )


def at_equal_time(unit: str, num_images: int, results: Path) -> Recipe:
    """Return the recipe of a unit with the lengths that fit into its minutes.

    A GPU rounds as a CPU does ("ieee"), since the comparison is for people without one.
    """
    name, candidate, minutes, seed = parts(unit)
    report = json.loads((results / PACE).read_text())
    timing = median_timing(report, name, candidate)
    recipe = replace(find(candidate).recipe, minutes=minutes, seed=seed)
    seconds = 60 * minutes * (1 - MARGIN)
    recipe = lengths_within_budget(recipe, timing, num_images, seconds)
    first, second = (
        stage and replace(stage, precision="ieee") for stage in (recipe.first, recipe.second)
    )
    return replace(recipe, minutes=None, first=first, second=second)


def train(
    folder: Path, unit: str, runs: Path, results: Path, device: str, threads: int | None
) -> None:
    name, candidate, _, seed = parts(unit)
    data = images_of(folder, name)
    with seeded(derive("weights", seed, 1)):  # of a network of our own
        vae = autoencoder(find(candidate), data)
    poise.train(
        data,
        recipe=at_equal_time(unit, len(data.train), results),
        vae=vae,
        out=runs / unit,
        options=Options(device=device, threads=threads, quiet=device != "cpu"),
    )


def copying(run: poise.Run, data: Dataset, prior: PriorName) -> dict[str, float]:
    """Return the distance of samples, and of reconstructed test images, to the training images.

    Samples that are much nearer than reconstructions of images that were not trained on are copies.
    """
    searched = partial(
        nearest, training=data.train, device=run.device, mirrored=run.recipe.data.flips
    )
    sets = {
        "samples": run.sample(COPIES, prior=prior),
        "test": run.reconstruct(head(data.test, COPIES)),
    }
    return {name: float(searched(images).distances.median()) for name, images in sets.items()}


def measure(folder: Path, unit: str, runs: Path, results: Path, device: str) -> None:
    name, candidate, *_ = parts(unit)
    data, priors = images_of(folder, name), find(candidate).priors
    run = poise.load(runs / unit, device=device, vae=autoencoder(find(candidate), data))
    with EVALUATED_AT_ONCE:
        number = SETS[name].compared
        page = run.evaluate(head(data.test, number), count=number, priors=priors).to_json()
    page["copies"] = copying(run, data, priors[-1])
    run.grid(64, prior=priors[-1]).save(runs / f"{unit}.png")
    label = "-".join(unit.split("-")[:-1])
    write_result(result_of(run, page, experiment=EXPERIMENT, label=label), results)


def measure_floor(folder: Path, unit: str, path: Path, device: str) -> None:
    """Compare training images with test images: no model is expected below that."""
    name = unit.removeprefix("floor-")
    data, number = images_of(folder, name), SETS[name].compared
    found = poise.evaluate(data.test[:number], data.train[:number], device=device)
    report = {"provenance": provenance(choose_device(device)), "data": data.checksum}
    write_report(path, report | {"evaluation": found.to_json()})


def side_by_side(
    units: list[str], work: Callable[[str], None], jobs: int, device: torch.device
) -> None:
    """Do the work of each unit in threads, each with a CUDA stream of its own."""
    source_commit()  # cached now, because the clone may change before the last unit ends

    def guarded(unit: str) -> str | None:
        cuda = device.type == "cuda"
        try:
            with torch.cuda.stream(torch.cuda.Stream(device)) if cuda else nullcontext():
                work(unit)
        except Exception:  # the other units go on
            traceback.print_exc()
            return unit
        print("done:", unit, flush=True)
        return None

    with ThreadPoolExecutor(jobs) as pool:
        failed = [unit for unit in pool.map(guarded, units) if unit]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("list", "pace", "train", "measure"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("units", nargs="*")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="units at a time")
    parser.add_argument("--threads", type=int, help="of each unit on a CPU (default: torch's own)")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each pace")
    parser.add_argument("--measure", action="store_true", help="measure each trained unit")
    parser.add_argument("--runs", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    folder, runs, results, device = options.folder, options.runs, options.results, options.device
    if options.action == "list":
        print(*UNITS, *FLOORS, sep="\n")
        return
    if not options.units:
        parser.error("name a folder and units")
    units = chosen(options.units)
    if options.action == "pace":
        measure_paces(folder, units, options.rounds, results / PACE)
        return

    def work(unit: str) -> None:
        path = results / f"{EXPERIMENT}-{unit}.json"
        if unit in FLOORS:
            if not path.exists():
                measure_floor(folder, unit, path, device)
            return
        if path.exists():
            return
        if options.action == "train":
            train(folder, unit, runs, results, device, options.threads)
        if options.action == "measure" or options.measure:
            measure(folder, unit, runs, results, device)

    side_by_side(units, work, options.jobs, choose_device(device))


if __name__ == "__main__":
    main()
