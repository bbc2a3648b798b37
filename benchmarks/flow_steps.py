"""Measure samples of a flow by the number of evaluations of its network: distance and images/s.

    python benchmarks/flow_steps.py RUN OUT.json [--images 1000] [--extractor auto]
        [--steps 3 5 7] [--solvers heun euler]
    python benchmarks/flow_steps.py --table results/bench-flow-faces-*.json

RUN is a finished run whose second stage is a flow (`poise train DATA`). For each
number of steps, samples are compared with the first test images, by Heun's method (2n - 1
evaluations for n steps) and by Euler's method with as many evaluations. The other sets of the same
protocol (REC, GEN-1, GEN-mixture) stand beside them. `floor` compares as many training images, so
no model is expected below it. The rates are of one process, so run this on a quiet machine.
`--table` prints the means and standard deviations of several seeds.
"""

import argparse
import json
import statistics
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
from poise.studies.comparison.tables import markdown
from poise.studies.results import provenance

SHOWN = ("FID", "KID", "FD-light", "KID-light", "FD-pixels", "KID-pixels")


def rate(run: Run, count: int, generation: Generation) -> float:
    """Return images per second of `run.sample_chunks`."""
    next(iter(run.sample_chunks(1, generation=generation)))
    began = time.monotonic()
    for _ in run.sample_chunks(count, generation=generation):
        pass
    return round(count / (time.monotonic() - began), 2)


def by_flow(run: Run, solver: Solver, steps: int) -> tuple[str, Generation]:
    """Return the name of the samples by a solver, and how they are generated."""
    chosen = replace(run.recipe.generation, flow_solver=solver, flow_steps=steps)
    return f"GEN-flow, {solver}, {evaluations(steps, solver)} evaluations", chosen


def measured(
    run: Run, count: int, extractor: str, steps: list[int], solvers: list[Solver]
) -> dict[str, Any]:
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
        "GEN-mixture": lambda n: run.sample_chunks(n, prior="mixture"),
    }
    rates: dict[str, float] = {}
    for solver, number in product(solvers, steps):
        taken = number if solver == "heun" else evaluations(number, "heun")
        name, chosen = by_flow(run, solver, taken)
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


def tables(reports: list[dict[str, Any]]) -> str:
    """Return a table with a row for each set of images, over seeds."""
    rows = [["images", "seeds", "FID", "KID", "samples/s"]]
    for name in reports[0]["sets"]:
        found = [report["sets"][name] for report in reports if name in report["sets"]]
        cells = [
            spread([figures[figure] for figures in found if figure in figures], digits)
            for figure, digits in (("FID", 1), ("KID", 4), ("images_per_second", 0))
        ]
        rows.append([name, str(len(found)), *cells])
    return markdown(rows)


def spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--extractor", default="auto")
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 5, 7, 13, 25])
    parser.add_argument("--solvers", nargs="+", default=get_args(Solver), choices=get_args(Solver))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.table:
        print(tables([json.loads(path.read_text()) for path in options.table]))
        return
    if options.run is None or options.out is None:
        parser.error("give RUN and OUT.json, or --table")
    run = load(options.run, device=options.device)
    second = run.recipe.second
    if run.flow is None or second is None:
        parser.error(f"{options.run} has no trained flow")
    report = machine(run.device) | {"provenance": provenance(run.device)}
    report |= {"recipe": run.recipe.name, "seed": run.recipe.seed, "data": run.data}
    report["steps"] = [run.recipe.first.steps, second.steps]
    report |= measured(run, options.images, options.extractor, options.steps, options.solvers)
    write_report(options.out, report)


if __name__ == "__main__":
    main()
