"""Measure samples of a flow by the number of evaluations of its network: distance and images/s.

    python benchmarks/flow_steps.py RUN OUT.json [--images 1000] [--extractor auto] [--steps 3 5 7]

RUN is a finished run whose second stage is a flow (`poise train DATA --recipe maps`). For each
number of steps, samples are compared with the first test images, by Heun's method (2n - 1
evaluations for n steps) and by Euler's method with as many evaluations. The other sets of the same
protocol (REC, GEN-1) stand beside them. `floor` compares as many training images, so no model is
expected below it. The rates are of one process, so run this on a quiet machine.
"""

import argparse
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

from measuring import machine, write_report

from poise.data import head
from poise.evaluation import Produced, choose_extractor, chunks_of, compare
from poise.priors.flow_prior import evaluations
from poise.protocols import find_protocol, with_count
from poise.recipes import Generation
from poise.recipes.settings import Solver
from poise.runs.run import Run, load
from poise.studies.results import provenance

SHOWN = ("FID", "KID", "FD-light", "KID-light", "FD-pixels", "KID-pixels")


def rate(run: Run, count: int, generation: Generation) -> float:
    """Return images per second of `run.sample_chunks`."""
    next(iter(run.sample_chunks(1, generation=generation)))
    began = time.monotonic()
    for _ in run.sample_chunks(count, generation=generation):
        pass
    return round(count / (time.monotonic() - began), 2)


def measured(run: Run, count: int, extractor: str, steps: list[int]) -> dict[str, Any]:
    """Return distances and rates by name of the set of images."""
    protocol = with_count(find_protocol("default"), count)
    protocol = replace(protocol, generation=run.recipe.generation, reference="test")
    protocol, network, _ = choose_extractor(protocol, extractor, run.device)
    assert network is not None
    real, train = run.images_for(protocol), run.dataset().train
    sets = {
        "floor": lambda n: chunks_of(head(train, n), n),
        "REC": lambda n: run.reconstruct_chunks(head(real, n)),
        "GEN-1": lambda n: run.sample_chunks(n, prior="normal"),
    }
    rates: dict[str, float] = {}
    for solver, number in product(get_args(Solver), steps):
        taken = number if solver == "heun" else evaluations(number, "heun")
        chosen = replace(run.recipe.generation, flow_solver=solver, flow_steps=taken)
        name = f"GEN-flow, {solver}, {evaluations(taken, solver)} evaluations"
        sets[name] = lambda n, chosen=chosen: run.sample_chunks(n, prior="flow", generation=chosen)
        rates[name] = rate(run, min(count, 200), chosen)
    produced = [Produced(name, chunks, count) for name, chunks in sets.items()]
    found: dict[str, Any] = {name: {} for name in sets}
    for measurement in compare(real, produced, protocol, network):
        if measurement.metric in SHOWN:
            found[measurement.of][measurement.metric] = measurement.value
    for name, value in rates.items():
        found[name]["images_per_second"] = value
    return {"protocol": asdict(protocol), "sets": found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--extractor", default="auto")
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 5, 7, 13, 25])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    run = load(options.run, device=options.device)
    if run.flow is None:
        parser.error(f"{options.run} has no trained flow")
    report = machine(run.device) | {"provenance": provenance(run.device)}
    report |= {"recipe": run.recipe.name, "seed": run.recipe.seed, "data": run.data}
    report |= measured(run, options.images, options.extractor, options.steps)
    write_report(options.out, report)


if __name__ == "__main__":
    main()
