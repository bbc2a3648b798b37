"""Compare training with two processes and with one: logged curves, and seconds per step.

    python benchmarks/processes.py [--only mlp mlp-float64 ...] [--rounds 3] [--epochs-factor 1]

Trains stage 1 on the 8x8 digits, on CPUs by torchrun and gloo, every process with one thread. "mlp"
is the digits' recipe. "resnet" is the small ResNet, whose BatchNorm takes its statistics over both
processes. "-float64" is the same in double precision: there the difference shows the computation,
not the growth of rounding errors. One and two processes take turns.

The difference of a curve is the largest over the entries of metrics.jsonl, divided by the mean size
of the values of the single process (a loss in nats passes through zero). The largest difference of
a weight shows that the two runs did not do exactly the same. Exits with 1 if the loss differs by
more than the tolerance.

Two processes are faster than one only if each has its own core and a step takes longer than an
exchange of gradients: on the digits, the ratio shows the cost of the exchange. Gradients are
averaged during backward; each BatchNorm layer adds two exchanges.

    python benchmarks/processes.py --time [digits mnist cifar10-released]
        [--other OTHER_CHECKOUT/src]

measures only the seconds per step, of larger networks on random images, in processes that take
turns. With `--other`, it also measures the package of another checkout.
"""

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from measuring import Turns, Worker, machine, over, show, summary, take_turns, write_report
from torch import nn

import poise
from poise.recipes import RECIPES, Network, Recipe, Stage
from poise.runs.build import first_stage
from poise.runs.checkpoint import newest_intact_checkpoint
from poise.runs.options import Options
from poise.training import ImageBatches, Watch, distributed, fit, new_state, under

CURVES = ("loss", "reconstruction_nats", "kl_nats", "mse", "gamma2")


@dataclass(frozen=True)
class Case:
    """A network to train, and the largest allowed difference of the losses.

    In double precision the tolerance covers the balance's float32. In float32 it covers the growth
    of a difference in the last bit over all steps. That growth is largest where BatchNorm follows a
    bias: the exact gradient is zero, and Adam takes full steps along the rounding error.
    """

    network: Network | None
    epochs: int
    tolerance: float
    double: bool = False


RESNET = Network("resnet", latent_dim=10, norm_decay=0.9)
CASES = {
    "mlp": Case(None, 8, 1e-2),
    "mlp-float64": Case(None, 8, 1e-5, double=True),
    "resnet": Case(RESNET, 2, 5e-2),
    "resnet-float64": Case(RESNET, 2, 1e-5, double=True),
}


class Double(nn.Module):
    """Run a network in double precision."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, values: torch.Tensor) -> Any:
        return self.network(values.double())


def recipe_of(case: Case) -> Recipe:
    digits = RECIPES["digits"]
    return replace(digits, network=case.network or digits.network, second=None)


TIMED = {
    "digits": ([1, 8, 8], 50),
    "mnist": ([1, 28, 28], 64),
    "cifar10-released": ([3, 32, 32], 100),
}
TRIAL = 3  # steps that determine the length of a turn


def serve_steps(name: str) -> None:
    """Serve turns of training steps in one of the processes."""
    torch.set_num_threads(1)
    (shape, batch_size), cpu = TIMED[name], torch.device("cpu")
    images = np.random.default_rng(0).integers(0, 256, (1_000, *shape), dtype=np.uint8)
    stage = Stage(steps=10**9, batch_size=batch_size)
    with distributed.processes(cpu):
        vae = first_stage(RECIPES[name], shape)
        state = new_state(vae, poise.ComputedBalance(), stage, cpu)
        watch = Watch(stop=Turns(state, cpu), quiet=True, save_seconds=math.inf)
        fit(state, ImageBatches(images, cpu), stage, number=1, seed=0, watch=watch, threads=1)


class Ranks:
    """A group of processes that train one model and take their turns together."""

    def __init__(self, name: str, count: int, source: Path | None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        path = os.pathsep.join(filter(None, [source and str(source), os.environ.get("PYTHONPATH")]))
        place |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [__file__, "--serve", name]
        self.workers = [
            Worker(command, place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)
        ]

    def turn(self, steps: float) -> float:
        """Train for `steps` steps; return the seconds per step of the slowest process."""
        for worker in self.workers:
            worker.begin(steps)
        return max(worker.answer() for worker in self.workers) / steps

    def end(self) -> None:
        for worker in self.workers:
            assert worker.process.stdin is not None
            worker.process.stdin.close()
        for worker in self.workers:
            worker.process.wait()


def measure_steps(name: str, rounds: int, seconds: float, other: Path | None) -> dict[str, Any]:
    """Measure milliseconds per step with one process and with two, in turns."""
    groups = {"one process": Ranks(name, 1, None), "two processes": Ranks(name, 2, None)}
    if other is not None:
        groups["two processes, other"] = Ranks(name, 2, other.resolve())
    steps = {label: max(2, round(seconds / ranks.turn(TRIAL))) for label, ranks in groups.items()}
    times = take_turns(groups, steps, rounds)
    for ranks in groups.values():
        ranks.end()
    return {label: summary([1000 * value for value in values]) for label, values in times.items()}


def train(name: str, epochs: int, out: Path) -> None:
    """Train one case in this process."""
    torch.set_num_threads(1)
    case = CASES[name]
    recipe = recipe_of(case)
    vae = first_stage(recipe, [1, 8, 8]) if case.double else None
    vae = vae and poise.VAE(Double(vae.encoder), Double(vae.decoder))
    options = Options(device="cpu", quiet=True, save_seconds=1e9)
    poise.train("digits", recipe=recipe, vae=vae, out=out, epochs=epochs, options=options)


def run(name: str, epochs: int, out: Path, processes: int) -> list[dict[str, float]]:
    """Train with a number of processes and return the run's log."""
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes > 1
        else []
    )
    command = [
        sys.executable,
        *launch,
        __file__,
        "--train",
        name,
        "--epochs",
        str(epochs),
        "--out",
        str(out),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{name} with {processes} processes failed: {done.stderr[-2000:]}")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def difference(one: list[dict[str, float]], two: list[dict[str, float]], curve: str) -> float:
    """Return the relative difference of two curves, as the module docstring defines it."""
    values = [(first[curve], second[curve]) for first, second in zip(one, two, strict=True)]
    return float(f"{max(abs(a - b) for a, b in values) / fmean(abs(a) for a, _ in values):.3g}")


def weights_apart(one: Path, two: Path) -> float:
    """Return the largest difference of a weight or buffer in the newest checkpoints."""
    first, second = (under("stage1.vae", newest(folder)) for folder in (one, two))
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def newest(folder: Path) -> dict[str, torch.Tensor]:
    saved, _ = newest_intact_checkpoint(folder / "checkpoints")
    assert saved is not None
    return saved.tensors


def step_ms(log: list[dict[str, float]], batch_size: int) -> float:
    """Return the median milliseconds per step of a run's log, without the first entry."""
    return median(1000 * batch_size / entry["images_per_second"] for entry in log[1:])


def measure(name: str, rounds: int, factor: float) -> dict[str, Any]:
    """Train one case with one process and with two, in turns, and compare."""
    case, size = CASES[name], recipe_of(CASES[name]).first.batch_size
    epochs = max(1, round(factor * case.epochs))
    times: dict[int, list[float]] = {1: [], 2: []}
    logs: dict[int, list[dict[str, float]]] = {}
    folders: dict[int, Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for processes in (1, 2) if number % 2 == 0 else (2, 1):
                folders[processes] = Path(folder, f"{number}-{processes}")
                logs[processes] = run(name, epochs, folders[processes], processes)
                times[processes].append(step_ms(logs[processes], size))
        weights = weights_apart(folders[1], folders[2])
    differences = {curve: difference(logs[1], logs[2], curve) for curve in CURVES}
    return {
        "steps": int(logs[1][-1]["step"]),
        "entries": len(logs[1]),
        "batch_size": size,
        "largest_difference": differences,
        "largest_difference_of_a_weight": float(f"{weights:.3g}"),
        "largest_difference_in_the_first_20_steps": {
            curve: difference(logs[1][:20], logs[2][:20], curve) for curve in CURVES
        },
        "tolerance_of_the_loss": case.tolerance,
        "within": differences["loss"] <= case.tolerance,
        "ms_per_step": {"one process": summary(times[1]), "two processes": summary(times[2])},
        "one_over_two": over(times[1], times[2]),
    }


def table(reports: dict[str, dict[str, Any]]) -> list[list[Any]]:
    head = [
        "network",
        "steps",
        "loss differs by",
        "allowed",
        "in 20 steps",
        "ms per step, one",
        "two",
        "two as fast as one",
    ]
    rows: list[list[Any]] = [head]
    for name, report in reports.items():
        differs, times = report["largest_difference"], report["ms_per_step"].values()
        allowed, early = (
            report["tolerance_of_the_loss"],
            report["largest_difference_in_the_first_20_steps"]["loss"],
        )
        rows.append(
            [name, report["steps"], differs["loss"], allowed, early, *times, report["one_over_two"]]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--epochs-factor", type=float, default=1.0, help="factor on the number of epochs"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--time", nargs="*", choices=TIMED, metavar="RECIPE")
    parser.add_argument("--seconds", type=float, default=3.0, help="approximate seconds of a turn")
    parser.add_argument("--other", type=Path, help="the src folder of another checkout")
    for hidden, kind in (("--train", str), ("--epochs", int), ("--out", Path), ("--serve", str)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train, options.epochs, options.out)
        return
    if options.serve:
        serve_steps(options.serve)
        return
    if options.time is not None:
        how = (options.rounds, options.seconds, options.other)
        figures = {name: measure_steps(name, *how) for name in options.time or TIMED}
        loops = list(next(iter(figures.values())))
        show([["ms per step", *loops], *([n, *f.values()] for n, f in figures.items())])
        path = options.json or Path("results/bench-processes-steps.json")
        write_report(path, {**machine(torch.device("cpu")), "ms_per_step": figures})
        return
    reports = {name: measure(name, options.rounds, options.epochs_factor) for name in options.only}
    show(table(reports))
    path = options.json or Path("results/bench-processes.json")
    write_report(path, {**machine(torch.device("cpu")), "rounds": options.rounds, "cases": reports})
    sys.exit(0 if all(report["within"] for report in reports.values()) else 1)


if __name__ == "__main__":
    main()
