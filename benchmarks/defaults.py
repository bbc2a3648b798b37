"""Compare candidates for the default recipe of photographs, at equal time.

    python benchmarks/defaults.py list
    python benchmarks/defaults.py train FOLDER UNIT...
    python benchmarks/defaults.py measure FOLDER UNIT...
    python benchmarks/defaults.py table

FOLDER holds cifar10.npz and celeba64.npz. A unit is SET-CANDIDATE-MINUTES-SEED, for example
faces-flow-10-0; shell patterns such as 'faces-*-10-?' name several, and floor-SET compares training
images with test images. Times are those of two cores: with `--threads 1` a unit trains twice as
long on one core, so that two units can run side by side, each pinned to a core of its own. `train`
must be the only work on its cores. `measure` needs no quiet machine: it compares reconstructions
and samples of each prior with the first test images (5,000 of CIFAR-10, 1,000 faces at 64 pixels),
and searches the nearest training image of samples and of reconstructed test images. It writes
results/defaults-UNIT.json and, beside the run, a grid of samples. Finished parts are not repeated.
`table` prints the means over seeds.

The candidates are four recipes; each variant changes one thing in the one with a flow. faces60 and
faces500 are the first faces only.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measuring import write_report

import poise
from poise.data import Dataset, head, load
from poise.networks.convolutional import ConvDecoder, ConvEncoder
from poise.recipes import RECIPES, Recipe
from poise.recipes.settings import Changes
from poise.report.copies import nearest
from poise.runs.options import Options
from poise.studies.comparison.tables import markdown, table
from poise.studies.results import provenance, read_results, result_of, write_result
from poise.variants import PriorName

EXPERIMENT = "defaults"
CORES = 2  # of the machine whose minutes are compared
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


@dataclass(frozen=True)
class Candidate:
    """A recipe and the priors that its samples are measured with.

    Attributes:
        recipe: the recipe.
        priors: the priors.
        map_side: side of the latent map, if it is not the network's own.
    """

    recipe: Recipe
    priors: tuple[PriorName, ...] = ("normal", "flow")
    map_side: int | None = None


MAPS = RECIPES["images"]


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


def shared(of_flow: float) -> Recipe:
    """Return the recipe with another share of the time for the flow, which is 0.72 as it is.

    The recipe's lengths were chosen for 450 and 1,150 seconds.
    """
    return changed(first={"steps": round(6_100 * 1_150 / 450 * (1 - of_flow) / of_flow)})


CANDIDATES = {
    "resnet": Candidate(RECIPES["images-resnet"], ("normal", "second-stage", "mixture")),
    "second-stage": Candidate(Changes(second="vae").apply(MAPS), ("normal", "second-stage")),
    "mixture": Candidate(Changes(stages=1).apply(MAPS), ("normal", "mixture")),
    "flow": Candidate(MAPS),
}
VARIANTS = {
    "share-30": Candidate(shared(0.3)),
    "share-50": Candidate(shared(0.5)),
    "share-85": Candidate(shared(0.85)),
    "channels-2": Candidate(changed(network={"latent_channels": 2})),
    "channels-8": Candidate(changed(network={"latent_channels": 8})),
    "map-4": Candidate(MAPS, map_side=4),
    "average": Candidate(changed(first={"ema_decay": 0.999, "ema_warmup": True})),
    "linear": Candidate(changed(first={"decay": 1.0}, second={"decay": 1.0})),
    "wide": Candidate(changed(network={"conv_width": 192, "flow_width": 144})),
    "deep": Candidate(changed(network={"flow_blocks": 14})),
    "standard": Candidate(changed(first={"standardise": "during"})),
}
LENGTHS = ((10, 2), (60, 1))  # minutes and seeds
UNITS = [
    *(
        f"{name}-{candidate}-{minutes}-{seed}"
        for name, candidate, (minutes, seeds) in product(("cifar10", "faces"), CANDIDATES, LENGTHS)
        for seed in range(seeds)
    ),
    *(f"{n}-{v}-10-{s}" for n, v, s in product(("faces", "cifar10"), VARIANTS, range(2))),
    *(f"{n}-{c}-10-0" for n, c in product(("faces60", "faces500"), CANDIDATES)),
    *(f"faces-flow-{minutes}-0" for minutes in (5, 20)),
]
FLOORS = [f"floor-{name}" for name in ("cifar10", "faces")]


def chosen(patterns: list[str]) -> Iterator[str]:
    """Yield the units that match one of the patterns, in the order of `UNITS`."""
    for pattern in patterns:
        if not any(fnmatch(unit, pattern) for unit in (*UNITS, *FLOORS)):
            raise SystemExit(f"no unit matches {pattern}: see `defaults.py list`")
    for unit in (*UNITS, *FLOORS):
        if any(fnmatch(unit, pattern) for pattern in patterns):
            yield unit


def parts(unit: str) -> tuple[str, Candidate, float, int]:
    """Return the set, the candidate, the minutes and the seed of a unit."""
    name, rest = unit.split("-", 1)
    candidate, minutes, seed = rest.rsplit("-", 2)
    return name, (CANDIDATES | VARIANTS)[candidate], float(minutes), int(seed)


def images_of(folder: Path, name: str) -> Dataset:
    """Return the images of a set."""
    chosen = SETS[name]
    data = load(str(folder / chosen.file), size=chosen.side)
    if chosen.training is None:
        return data
    return replace(data, train=head(data.train, chosen.training))


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


def train(folder: Path, unit: str, runs: Path, threads: int) -> None:
    name, candidate, minutes, seed = parts(unit)
    data = images_of(folder, name)
    torch.manual_seed(seed)  # of the weights of a network of our own
    poise.train(
        data,
        recipe=replace(candidate.recipe, minutes=minutes * CORES / threads, seed=seed),
        vae=autoencoder(candidate, data),
        out=runs / unit,
        options=Options(device="cpu", threads=threads),
    )


def copying(run: poise.Run, data: Dataset, prior: PriorName) -> dict[str, float]:
    """Return the distance of samples, and of reconstructed test images, to the training images.

    Samples that are much nearer than reconstructions of images that were not trained on are copies.
    """
    searched = partial(nearest, training=data.train, mirrored=run.recipe.data.flips)
    sets = {
        "samples": run.sample(COPIES, prior=prior),
        "test": run.reconstruct(head(data.test, COPIES)),
    }
    return {name: float(searched(images).distances.median()) for name, images in sets.items()}


def measure(folder: Path, unit: str, runs: Path, results: Path) -> None:
    name, candidate, *_ = parts(unit)
    data = images_of(folder, name)
    run = poise.load(runs / unit, device="cpu", vae=autoencoder(candidate, data))
    found = run.evaluate(data.test, count=SETS[name].compared, priors=candidate.priors)
    run.grid(64).save(runs / f"{unit}.png")
    label = "-".join(unit.split("-")[:-1])
    page = found.to_json() | {"copies": copying(run, data, candidate.priors[-1])}
    write_result(result_of(run, page, experiment=EXPERIMENT, label=label), results)


def measure_floor(folder: Path, unit: str, path: Path) -> None:
    """Compare training images with test images: no model is expected below that."""
    name = unit.removeprefix("floor-")
    data, number = images_of(folder, name), SETS[name].compared
    found = poise.evaluate(data.test[:number], data.train[:number])
    report = {"provenance": provenance(torch.device("cpu")), "data": data.checksum}
    write_report(path, report | {"evaluation": found.to_json()})


def tabulate(results: Path) -> None:
    """Print the mean and spread over seeds of each set, candidate and budget, and the floors."""
    found = [result for result in read_results([results]) if result.experiment == EXPERIMENT]
    print(markdown(table(found)))
    for path in sorted(results.glob(f"{EXPERIMENT}-floor-*.json")):
        evaluation = json.loads(path.read_text())["evaluation"]
        rows = [[m["metric"], f"{m['value']:.4g}"] for m in evaluation["measurements"]]
        print(f"\n{markdown([[path.stem, ''], *rows])}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("list", "train", "measure", "table"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("units", nargs="*")
    parser.add_argument("--threads", type=int, default=CORES)
    parser.add_argument("--runs", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    if options.action == "table":
        tabulate(options.results)
    elif options.action == "list":
        print(*UNITS, *FLOORS, sep="\n")
    elif not options.units:
        parser.error("name a folder and units")
    for unit in chosen(options.units):
        if unit in FLOORS:
            path = options.results / f"{EXPERIMENT}-{unit}.json"
            if options.action == "measure" and not path.exists():
                measure_floor(options.folder, unit, path)
        elif options.action == "train":
            train(options.folder, unit, options.runs, options.threads)
        elif not (options.results / f"{EXPERIMENT}-{unit}.json").exists():
            measure(options.folder, unit, options.runs, options.results)


if __name__ == "__main__":
    main()
