"""Measure the seconds of each part of an evaluation, and the effect of TF32.

    python benchmarks/evaluation.py [RUN] [--data cifar10] [--images 10000] [--device cuda]
        [--extractor inception] [--against-train 50000] [--json results/bench-evaluation.json]

RUN is a trained run; the benchmark evaluates it on its own test images. Without RUN, a run of a
few steps is trained on --data first: the cost of an evaluation does not depend on the model's
quality.

whole: `Run.evaluate` without cached features, then with the real images' features cached on disk.
parts: each part alone, one after another. The whole takes less where a GPU works on several at
    a time.
precisions: features of real images with and without TF32, and the Frechet distance of test and
    training images with both.
check: the Frechet distance of the test images and --against-train training images. For CIFAR-10
    and 50,000 it is known to be 3.15.
"""

import argparse
import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import machine, seconds, write_report

import poise
from poise.data.decoding import to_bytes
from poise.evaluation import Reference, chunks_of, complete, every_distance
from poise.features import Extractor, extract, make_extractor
from poise.features.cache import CACHE_VARIABLE
from poise.metrics import frechet_distance
from poise.priors import fit_prior
from poise.protocols import DEFAULT
from poise.recipes import find_recipe
from poise.runs.run import Run
from poise.variants import PRIORS, available_priors


def quick_run(data: str, device: str, folder: Path) -> Run:
    """Train the data set's recipe for 20 steps per stage and return the run."""
    recipe = find_recipe(None, data)
    assert recipe.second is not None
    short = {"epochs": None, "halve_every": None, "steps": 20}
    recipe = replace(
        recipe, first=replace(recipe.first, **short), second=replace(recipe.second, **short)
    )
    return poise.train(
        data, recipe=recipe, out=folder, options=poise.Options(device=device, quiet=True)
    )


def timed(parts: dict[str, float], name: str, task: Any, device: torch.device) -> Any:
    """Run a task, add its seconds to `parts` and return its result."""
    result: list[Any] = []
    parts[name] = round(seconds(lambda: result.append(task()), device), 3)
    print(f"{parts[name]:8.2f} s  {name}", flush=True)
    return result[0]


def features_of(extractor: Extractor, images: Any, count: int) -> torch.Tensor:
    return extract(extractor, (to_bytes(part) for part in chunks_of(images, count)), total=count)


def measure(run: Run, extractor: Extractor, count: int) -> dict[str, Any]:
    """Return the seconds of the whole evaluation and of its parts, and its figures."""
    device, whole, parts = run.device, dict[str, float](), dict[str, float]()
    protocol, test = replace(DEFAULT, real=count), run.dataset().test
    with tempfile.TemporaryDirectory() as cache:
        os.environ[CACHE_VARIABLE] = cache
        for name in ("features of real images computed", "features of real images kept"):
            evaluation = timed(
                whole, name, lambda: run.evaluate(protocol=protocol, extractor=extractor), device
            )
    timed(
        parts,
        "figures of the model",
        lambda: run.evaluate(protocol=protocol, extractor="none"),
        device,
    )
    codes = run.codes
    timed(
        parts, "mixture fitted", lambda: fit_prior("mixture", codes, seed=run.recipe.seed), device
    )
    real = timed(
        parts, "features of real images", lambda: features_of(extractor, test, count), device
    ).to(device)
    known = {name: getattr(extractor, name) for name in ("name", "checksum", "resize")}
    conditions = complete(
        replace(
            protocol,
            side=test.shape[-1],
            extractor=known["name"],
            extractor_checksum=known["checksum"],
        ),
        count,
    )
    reference = Reference(real, conditions)
    timed(
        parts, "statistics of real images", lambda: (reference.gaussian, reference.reaches), device
    )
    priors = available_priors(run.second_stage)
    for prior in priors:
        label = PRIORS[prior].label
        images = timed(parts, f"{label} generated", partial(run.sample, count, prior=prior), device)
        found = timed(
            parts, f"{label} features", lambda i=images: features_of(extractor, i, count), device
        ).to(device)
        timed(
            parts,
            f"{label} metrics",
            lambda f=found: list(every_distance(reference, f, conditions, extractor)),
            device,
        )
    figures = {f"{m.metric} of {m.of}": m.value for m in evaluation.measurements}
    return {
        "images": count,
        "sets": 1 + len(priors),
        "whole": whole,
        "parts": parts,
        "figures": figures,
    }


def precisions(run: Run, extractor: Extractor, count: int) -> dict[str, Any]:
    """Compare features and Frechet distances with and without TF32."""
    dataset, device = run.dataset(), run.device
    found = {
        name: [
            features_of(replace(extractor, tf32=tf32), side, count)
            for side in (dataset.test, dataset.train)
        ]
        for name, tf32 in (("TF32", True), ("float32", False))
    }
    difference = found["TF32"][0] - found["float32"][0]
    values = {
        name: frechet_distance(*(side.to(device) for side in sides))
        for name, sides in found.items()
    }
    mixed = frechet_distance(found["TF32"][0].to(device), found["float32"][1].to(device))
    return {
        "images": count,
        "largest difference of a feature": float(difference.abs().max()),
        "root mean square difference": float(difference.square().mean().sqrt()),
        "frechet distance of test and training images": values | {"TF32 against float32": mixed},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--extractor", default="inception")
    parser.add_argument("--against-train", type=int, default=50_000)
    parser.add_argument("--json", type=Path, default=Path("results/bench-evaluation.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = (
            poise.load(options.run, device=options.device)
            if options.run
            else quick_run(options.data, options.device, Path(folder) / "run")
        )
        extractor, dataset = make_extractor(options.extractor, run.device), run.dataset()
        # This also warms up the extractor.
        test = features_of(extractor, dataset.test, min(options.images, len(dataset.test)))
        train = features_of(
            extractor, dataset.train, min(options.against_train, len(dataset.train))
        )
        distance = frechet_distance(test.to(run.device), train.to(run.device))
        report: dict[str, Any] = machine(run.device)
        report |= {
            "extractor": extractor.name,
            "precision": extractor.precision,
            "data": dataset.source,
        }
        report["check"] = {"test": len(test), "train": len(train), "distance": distance}
        print(report["check"], flush=True)
        report["seconds"] = measure(run, extractor, len(test))
        write_report(options.json, report)
        if run.device.type == "cuda":
            report["precisions"] = precisions(run, extractor, len(test))
            write_report(options.json, report)


if __name__ == "__main__":
    main()
