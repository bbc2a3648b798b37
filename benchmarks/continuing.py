"""Compare a run that is continued with a run of the whole length, and time the validation.

    python benchmarks/continuing.py OUT.json [--data digits] [--epochs 50] [--seeds 3]
    python benchmarks/continuing.py --table results/bench-continuing.json
    python benchmarks/continuing.py --validation OUT.json [--data digits] [--epochs 30]

The first form trains stage 1 for EPOCHS, continues it for as many (`more_epochs`), and trains
another run for twice as many. It compares ELBO and MSE of the test images. `constant` runs never
halve the learning rate, so both ways must end with the same numbers.

`--validation` measures the seconds of all evaluations of held-out images in a run of stage 1, over
those of its steps. DATA may be a file of images; the recipe is then "images-resnet".
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import torch
from measuring import machine, write_report

import poise
from poise.data import Dataset, load
from poise.recipes import RECIPES, Recipe
from poise.recipes.settings import Changes
from poise.runs.pipeline import train
from poise.runs.validation import Validation
from poise.studies.comparison.tables import markdown

OPTIONS = poise.Options(device="cpu", quiet=True, threads=1)
HEAD = ["learning rate", "run", "seeds", "ELBO of test images, nats", "MSE"]
NAMES = {"short": "E epochs", "continued": "E epochs, then E more", "long": "2 E epochs"}


def figures(run: poise.Run) -> dict[str, float]:
    page = json.loads((run.folder / "summary.json").read_text())["reconstruction"]
    return {"elbo_nats": page["elbo_nats"], "mse": page["mse"]}


def compared(recipe: Recipe, data: Dataset, epochs: int) -> dict[str, dict[str, float]]:
    """Return the figures of the short, the continued and the long run."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, length in (("short", epochs), ("long", 2 * epochs)):
            lasting = replace(recipe, first=recipe.first.lasting(epochs=length))
            out = Path(folder) / name
            found[name] = figures(train(data, recipe=lasting, out=out, options=OPTIONS))
        again = train(data, out=Path(folder) / "short", options=OPTIONS, more_epochs=epochs)
        found["continued"] = figures(again)
    return found


def table(report: dict[str, Any]) -> str:
    """Return the comparison as Markdown: mean and standard deviation over seeds."""
    rows = []
    for schedule, runs in report["runs"].items():
        for name, words in NAMES.items():
            values = {key: [run[name][key] for run in runs] for key in ("elbo_nats", "mse")}
            shown = [
                f"{statistics.mean(of):{style}} ± {statistics.stdev(of):{style}}"
                for of, style in ((values["elbo_nats"], ".2f"), (values["mse"], ".5f"))
            ]
            said = words.replace("2 E", str(2 * report["epochs"]))
            said = said.replace("E", str(report["epochs"]))
            rows.append([schedule, said, str(len(runs)), *shown])
    return markdown([HEAD, *rows])


def share_of_validation(recipe: Recipe, data: Dataset) -> float:
    """Return the seconds of all evaluations of held-out images over those of the training steps."""
    seconds, measure = [0.0], Validation.measure

    def timed(*arguments: Any) -> dict[str, float]:
        began = time.monotonic()
        found = measure(*arguments)
        seconds[0] += time.monotonic() - began
        return found

    validated = replace(recipe, data=replace(recipe.data, validation=0.05))
    with tempfile.TemporaryDirectory() as folder, patch.object(Validation, "measure", timed):
        log = train(data, recipe=validated, out=Path(folder) / "run", options=OPTIONS).history
    seen = log["images_seen"].to_numpy()
    steps = numpy.diff(seen, prepend=0) / log["images_per_second"].to_numpy()
    # An entry of the log is written before the evaluation at its step, which the next one counts.
    return seconds[0] / (float(steps.sum()) - seconds[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--validation", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(given.file.read_text())))
        return
    known = given.data in RECIPES
    base = Changes(stages=1).apply(RECIPES[given.data if known else "images-resnet"])
    data = load(base.data.source if known else given.data)
    report: dict[str, Any] = {
        "data": given.data,
        "epochs": given.epochs,
        "machine": machine(torch.device("cpu")),
    }
    if given.validation:
        recipe = Changes(epochs=given.epochs).apply(base)
        report["share"] = share_of_validation(recipe, data)
        print(report["share"])
    else:
        schedules = {
            "halved": base,
            "constant": replace(base, first=replace(base.first, halve_every=None)),
        }
        report["runs"] = {
            name: [
                compared(replace(recipe, seed=seed), data, given.epochs)
                for seed in range(given.seeds)
            ]
            for name, recipe in schedules.items()
        }
        print(table(report))
    write_report(given.file, report)


if __name__ == "__main__":
    main()
