"""Measure the recipe `images` as images grow: images/s of both stages, samples/s and peak memory.

    python benchmarks/image_sizes.py [--sides 32 64 128 256] [--threads 1] [--epochs 3]
        [--images 200] [--rounds 3] [--json results/bench-image-sizes.json]

Each measurement is a process of its own, which trains both stages on gradients of two colours with
`poise.train` and then draws `--images` samples from the flow. A second run with `second="vae"`
draws them from a second VAE. The rates of training are medians of the run's log without its first
entry, so that they include reading, checking and logging. Memory is the peak of the whole process
in MiB, of which the interpreter and PyTorch take about 250. Times are seconds on a clock, so run
this on a quiet machine.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from first_steps import gradients
from measuring import machine, parameters, summary, write_report

import poise
from poise.runs.options import Options
from poise.runs.run import Run
from poise.studies.comparison.tables import markdown
from poise.studies.results import provenance

TRAINING_IMAGES = 160
FIGURES = ("stage_1", "stage_2", "samples", "samples_of_vae", "peak_mib")


def measured(side: int, threads: int, epochs: int, images: int) -> dict[str, Any]:
    """Return the rates and the peak memory of one run in this process."""
    data = gradients(side, TRAINING_IMAGES).transpose(0, 2, 3, 1)
    options = Options(device="cpu", threads=threads, quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        run = poise.train(
            data, out=Path(folder, "run"), epochs=epochs, second_epochs=2 * epochs,
            options=options,
        )  # fmt: skip
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        logged = [json.loads(line) for line in lines]
        flow_samples = sampled(run, images)
        with_vae = poise.train(
            data, second="vae", out=Path(folder, "vae"), epochs=1, second_epochs=1,
            options=options,
        )  # fmt: skip
        vae_samples = sampled(with_vae, images)
    rates = {
        f"stage_{stage}": statistics.median(
            [entry["images_per_second"] for entry in logged if entry["stage"] == stage][1:]
        )
        for stage in (1, 2)
    }
    second = run.recipe.second
    assert run.flow is not None and second is not None
    return {
        **rates,
        "samples": flow_samples,
        "samples_of_vae": vae_samples,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "latent_shape": list(run.flow.latent_shape),
        "parameters": [parameters(run.first.vae), parameters(run.flow)],
        "batch_sizes": [run.recipe.first.batch_size, second.batch_size],
    }


def sampled(run: Run, images: int) -> float:
    """Return samples per second from the second stage."""
    next(iter(run.sample_chunks(1)))
    began = time.monotonic()
    for _ in run.sample_chunks(images):
        pass
    return images / (time.monotonic() - began)


def tables(report: dict[str, Any]) -> str:
    heads = ["side", "latent map", "stage 1, images/s", "stage 2, codes/s", "flow, samples/s"]
    rows = [[*heads, "second VAE, samples/s", "peak MiB"]]
    for side, row in report["sides"].items():
        values = (row[figure]["median"] for figure in FIGURES)
        cells = (f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in values)
        rows.append([side, "x".join(map(str, row["latent_shape"])), *cells])
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sides", nargs="+", type=int, default=[32, 64, 128, 256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--epochs", type=int, default=3, help="of stage 1; stage 2 has twice as many"
    )
    parser.add_argument("--images", type=int, default=200, help="samples drawn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("results/bench-image-sizes.json"))
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measured(options.side, options.threads, options.epochs, options.images)))
        return
    command = [sys.executable, __file__, "--threads", options.threads]
    command += ["--epochs", options.epochs, "--images", options.images, "--side"]
    runs: dict[int, list[dict[str, Any]]] = {side: [] for side in options.sides}
    for _ in range(options.rounds):
        for side, found in runs.items():
            output = subprocess.check_output([*map(str, command), str(side)], text=True)
            found.append(json.loads(output.splitlines()[-1]))
    sides = {
        str(side): {name: summary([run[name] for run in found], 1) for name in FIGURES}
        | {name: value for name, value in found[0].items() if name not in FIGURES}
        for side, found in runs.items()
    }
    report = machine(torch.device("cpu")) | {"provenance": provenance(torch.device("cpu"))}
    settings = {"threads": options.threads, "epochs": options.epochs, "rounds": options.rounds}
    report |= settings | {"sides": sides}
    print(tables(report))
    write_report(options.json, report)


if __name__ == "__main__":
    main()
