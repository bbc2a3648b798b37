"""Train the paper's balances side by side, with every way to sample, and measure each run.

    python benchmarks/balances.py OUT [--data cifar10] [--epochs 30] [--device cuda]
        [--extractor inception] [--images 10000]

The recipe is the data set's own, the released network, for --epochs epochs and twice as many of
stage 2. Seven runs with one seed: five balances; `computed` with latents that are standardised
after training; and `computed` with a flow instead of the second VAE, on the same codes. All run at
once in one process (`--jobs`). OUT/results has one JSON per run, OUT/table.md the table. The same
command resumes. OUT/check.json has the distance of all training images to the test images, which
is 3.15 for CIFAR-10 and checks the extractor.

On one H200 a round of five runs took 15.8 ms in stage 1 and 1.9 ms in stage 2. By these rates 30 +
60 epochs of seven runs take 7 minutes. With an evaluation of about two more it was not run yet.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import poise
from poise.data import load
from poise.protocols import DEFAULT, with_count
from poise.recipes import find_recipe
from poise.studies.comparison import Experiment, conduct
from poise.studies.comparison.measuring import Compared, ImageSet
from poise.support.files import write_file, write_json

BALANCES = ("computed", "released", "learned", "learned:rate=100", "optimal")
STANDARD, FLOW = "computed, standard latents", "computed, flow"
LABELS: dict[str, dict[str, Any]] = {
    **{balance: {"balance": balance} for balance in BALANCES},
    STANDARD: {"balance": "computed", "standardise": "after"},
    FLOW: {"balance": "computed", "second": "flow"},
}
OF_BOTH = (ImageSet("REC", None), ImageSet("GEN-1", "normal"), ImageSet("GEN-mixture", "mixture"))
LAST = {FLOW: ImageSet("GEN-flow", "flow")}


def experiment(data: str, epochs: int, images: int, extractor: str) -> Experiment:
    recipe = find_recipe(None, data)
    assert recipe.second is not None
    recipe = replace(
        recipe,
        data=replace(recipe.data, source=data),
        first=replace(recipe.first, epochs=epochs),
        second=replace(recipe.second, epochs=2 * epochs),
    )
    protocol = replace(with_count(DEFAULT, images), extractor=extractor)
    compared = {
        label: (Compared(protocol, (*OF_BOTH, LAST.get(label, ImageSet("GEN-2", "second-stage")))),)
        for label in LABELS
    }
    return Experiment(
        f"{recipe.name}-epochs-{epochs}",
        recipe,
        LABELS,
        seeds=1,
        protocols=(protocol,),
        priors=(),
        extractor="none",
        compared=compared,
    )


def extractor_check(data: str, extractor: str, device: str) -> dict[str, Any]:
    """Return the distance of all training images to the test images."""
    dataset = load(data)
    found = poise.evaluate(dataset.test, dataset.train, extractor=extractor, device=device)
    distance = found.measurements[0]
    counts = {"test": len(dataset.test), "train": len(dataset.train)}
    return counts | {distance.metric: distance.value}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--extractor", default="inception")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=len(LABELS))
    options = parser.parse_args()
    comparison = conduct(
        experiment(options.data, options.epochs, options.images, options.extractor),
        folder=options.out,
        jobs=options.jobs,
        options=poise.Options(device=options.device),
    )
    write_file(options.out / "table.md", str(comparison).encode())
    print(comparison)
    check = extractor_check(options.data, options.extractor, options.device)
    write_json(options.out / "check.json", check)


if __name__ == "__main__":
    main()
