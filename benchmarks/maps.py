"""Train latent maps and a flow for some minutes, and compare samples with the training images.

    python benchmarks/maps.py DATA RUN OUT.json [--minutes 8 | --steps 6500 6500] [--seed 0]
        [--engine auto] [--images 50000] [--few 10000] [--network NAME=VALUE ...]
        [--first NAME=VALUE ...] [--second NAME=VALUE ...] [--labels] [--device auto]
    python benchmarks/maps.py DATA RUN OUT.json --pace [--engines captured compiled-captured]

The recipe is images-large, for one GPU. All sets are compared with the training images:

- `test images`: a check of the extractor, 3.15 for CIFAR-10 (10,000 against 50,000 images).
- `REC`: reconstructions of the test images.
- `GEN-flow`: --images samples by the recipe's solver, and --few samples by each other one (0: by
  no other).

--network, --first and --second change settings of the recipe, such as --network latent_channels=8
--first learning_rate=5e-4. To compare changes, give --steps: in a time budget, a change that makes
a step slower also takes time from the other stage. With --labels the flow learns the classes, and
--few samples are drawn with each of several guidances too, by 14 evaluations of the network.

`--pace` only measures the seconds per step of both stages with each engine.
"""

import argparse
import ast
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from flow_steps import by_flow
from measuring import machine, parameters, write_report
from pace import timing_of

import poise
from poise.data import head, load
from poise.evaluation import Produced, choose_extractor, chunks_of, compare
from poise.features import Extractor, make_extractor
from poise.metrics import reconstruction
from poise.protocols import find_protocol
from poise.recipes import RECIPES, Recipe
from poise.recipes.settings import Solver, to_json
from poise.runs.run import Run
from poise.studies.results import provenance
from poise.training.machine import choose_device

RECIPE = RECIPES["images-large"]
SOLVERS: tuple[tuple[Solver, int], ...] = (
    *(("heun", 8), ("heun", 3), ("heun", 5), ("heun", 12), ("heun", 25)),
    ("euler", 15),
)
GUIDANCES = (1.25, 1.5, 2.0)
GUIDED_STEPS = 4  # of Heun's method: 7 evaluations, each with and without the class
PARTS = ("network", "first", "second")  # of a recipe


def seconds_since(began: float) -> float:
    return round(time.monotonic() - began, 1)


def changes_of(words: list[str]) -> dict[str, Any]:
    """Return settings by name from words such as learning_rate=5e-4 and balance=learned."""
    changes = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            changes[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[name] = value
    return changes


def paces(data: str, engines: list[str], device: torch.device) -> dict[str, Any]:
    """Return the first seconds and the milliseconds per step of both stages, by engine."""
    dataset = load(data)
    found: dict[str, Any] = {}
    for engine in engines:
        try:
            timing = timing_of(RECIPE, dataset, device, engine)
            found[engine] = {
                f"stage {number}": {"start_s": pace.start, "step_ms": 1000 * pace.step}
                for number, pace in enumerate(timing.stages, 1)
            }
        except Exception as error:  # the other engines are still worth a figure
            found[engine] = {"error": repr(error)}
        print(engine, found[engine], flush=True)
    return found


def measured(run: Run, images: int, few: int, network: Extractor) -> dict[str, Any]:
    """Return the distances of each set of images to the training images."""
    protocol = replace(
        find_protocol("50k-train"), generation=run.recipe.generation, real=images, generated=images
    )
    protocol, _, _ = choose_extractor(protocol, network, run.device)
    test = run.dataset().test
    sets = {
        "test images": (lambda n: chunks_of(head(test, n), n), len(test)),
        "REC": (lambda n: run.reconstruct_chunks(head(test, n)), len(test)),
    }
    own = run.recipe.generation
    ways = [by_flow(run, solver, steps) for solver, steps in SOLVERS]
    if run.classes:
        ways += [
            (f"GEN-flow, guidance {g}", replace(own, guidance=g, flow_steps=GUIDED_STEPS))
            for g in GUIDANCES
        ]
    for name, chosen in ways:
        number = images if chosen == own else few
        if number:
            sets[name] = (
                lambda n, chosen=chosen: run.sample_chunks(n, prior="flow", generation=chosen),
                number,
            )
    found: dict[str, Any] = {name: {"images": number} for name, (_, number) in sets.items()}
    produced = [Produced(name, chunks, number) for name, (chunks, number) in sets.items()]
    for measurement in compare(run.images_for(protocol), produced, protocol, network):
        found[measurement.of][measurement.metric] = measurement.value
    return {"protocol": asdict(protocol), "sets": found}


def trained(recipe: Recipe, options: argparse.Namespace) -> tuple[Run, dict[str, Any]]:
    """Train the recipe and return the run and its seconds."""
    began = time.monotonic()
    recipe = replace(recipe, minutes=options.minutes, seed=options.seed)
    if options.steps:
        assert recipe.second is not None
        first, second = options.steps
        recipe = replace(
            recipe,
            minutes=None,
            first=recipe.first.lasting(steps=first),
            second=recipe.second.lasting(steps=second),
        )
    run = poise.train(
        options.data,
        recipe=recipe,
        out=options.run,
        labels=options.labels or None,
        options=poise.Options(device=options.device, engine=options.engine),
    )
    second, flow = run.recipe.second, run.flow
    assert second is not None and flow is not None
    return run, {
        "minutes": None if options.steps else options.minutes,
        "seconds": seconds_since(began),
        "engine": options.engine,
        "labels": options.labels,
        "steps": [run.recipe.first.steps, second.steps],
        "parameters": [parameters(run.first.vae), parameters(flow.velocity)],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, nargs=2, metavar=("FIRST", "SECOND"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--few", type=int, default=10_000)
    for part in PARTS:
        parser.add_argument(f"--{part}", nargs="+", default=[], metavar="NAME=VALUE")
    parser.add_argument("--labels", action="store_true")
    parser.add_argument("--extractor", default="inception")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pace", action="store_true")
    parser.add_argument("--engines", nargs="+", default=["captured", "compiled-captured"])
    options = parser.parse_args()
    device, started = choose_device(options.device), time.monotonic()
    report = machine(device) | {"recipe": RECIPE.name}
    if options.pace:
        report |= {"provenance": provenance(device)}
        write_report(options.out, report | {"pace": paces(options.data, options.engines, device)})
        return
    # A missing file of weights is an error before the minutes of training.
    network = make_extractor(options.extractor, device)
    changes = {part: changes_of(getattr(options, part)) for part in PARTS}
    run, training = trained(
        replace(
            RECIPE, **{part: replace(getattr(RECIPE, part), **changes[part]) for part in PARTS}
        ),
        options,
    )
    training |= {"changes": changes}
    report |= {"data": run.data, "seed": options.seed, "training": training}
    began = time.monotonic()
    figures = reconstruction(run.first.vae, run.first.balance, run.dataset().test)
    report["test"] = asdict(figures)
    report["settings"] = to_json(run.recipe)
    write_report(options.out, report | {"provenance": provenance(device)})
    report |= measured(run, options.images, options.few, network)
    report["evaluation_seconds"] = seconds_since(began)
    report |= {"device_seconds": seconds_since(started), "provenance": provenance(device)}
    write_report(options.out, report)


if __name__ == "__main__":
    main()
