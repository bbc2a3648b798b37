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
writes results/defaults-UNIT.json and, beside the run, a grid of samples. Finished parts are not
repeated. `table` prints the means over seeds.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measuring import write_report

import poise
from poise.data import load
from poise.runs.options import Options
from poise.studies.comparison.tables import markdown, table
from poise.studies.results import provenance, read_results, result_of, write_result
from poise.variants import PriorName

EXPERIMENT = "defaults"
CORES = 2  # of the machine whose minutes are compared
SETS: dict[str, tuple[str, int, int]] = {  # file, side in pixels, number of compared images
    "cifar10": ("cifar10.npz", 32, 5_000),
    "faces": ("celeba64.npz", 64, 1_000),
}


@dataclass(frozen=True)
class Candidate:
    recipe: str
    changes: dict[str, Any]
    priors: tuple[PriorName, ...]


CANDIDATES = {
    "resnet": Candidate("images", {}, ("normal", "second-stage", "mixture")),
    "second-stage": Candidate("maps", {"second": "vae"}, ("normal", "second-stage")),
    "mixture": Candidate("maps", {"stages": 1}, ("normal", "mixture")),
    "flow": Candidate("maps", {}, ("normal", "flow")),
}
UNITS = [
    f"{name}-{candidate}-{minutes}-{seed}"
    for name, candidate, (minutes, seeds) in product(SETS, CANDIDATES, ((10, 2), (60, 1)))
    for seed in range(seeds)
]
FLOORS = [f"floor-{name}" for name in SETS]


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
    return name, CANDIDATES[candidate], float(minutes), int(seed)


def train(folder: Path, unit: str, runs: Path, threads: int) -> None:
    name, candidate, minutes, seed = parts(unit)
    file, side, _ = SETS[name]
    poise.train(
        folder / file, recipe=candidate.recipe, out=runs / unit, size=side,
        minutes=minutes * CORES / threads, seed=seed,
        options=Options(device="cpu", threads=threads), **candidate.changes,
    )  # fmt: skip


def measure(unit: str, runs: Path, results: Path) -> None:
    name, candidate, *_ = parts(unit)
    run = poise.load(runs / unit, device="cpu")
    found = run.evaluate(count=SETS[name][2], priors=candidate.priors)
    run.grid(64).save(runs / f"{unit}.png")
    label = "-".join(unit.split("-")[:-1])
    write_result(result_of(run, found, experiment=EXPERIMENT, label=label), results)


def measure_floor(folder: Path, unit: str, path: Path) -> None:
    """Compare training images with test images: no model is expected below that."""
    file, side, number = SETS[unit.removeprefix("floor-")]
    data = load(str(folder / file), size=side)
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
            measure(unit, options.runs, options.results)


if __name__ == "__main__":
    main()
