"""Measure the released CIFAR-10 experiment on one GPU: seconds per step of each engine.

    python benchmarks/gpu.py [--minutes 7.5] [--seconds 6] [--only matrix tf32 ...]
        [--json results/bench-gpu-steps.json]
    python benchmarks/gpu.py --device cpu --quick    # only checks that it runs

Needs no files: 50,000 random images of bytes, and random codes, lie in GPU memory. Batches of 100,
the released networks (stage 1: the ResNet; stage 2: hidden 2048), balances and schedules. The parts
run in order of importance. The report is written after each part, with its error if it failed. No
part starts after `--minutes`.

matrix: FLOPs per second of large matrix products in each precision.
tf32, bfloat16, ieee / stage / loop: milliseconds per step. "bare" is a hand-written eager loop
    without logging, checks and synchronisation, with PyTorch's default Adam ("bare, channels_last":
    in that layout). The other loops are `poise.training.fit` with its engines. Each is timed with a
    synchronised clock in three laps, after the first steps. tf32 and ieee are float32 with and
    without TF32, in convolutions and matrix products.
side by side: milliseconds of one captured step of each of five models, each on its own stream, and
    of a single model's step.
syncs: how often each engine makes the CPU wait for the GPU, per step, and where
    (torch.cuda.set_sync_debug_mode).
equality: 200 steps of each engine against 200 eager steps from the same weights; relative
    difference of each tensor.

The time of the whole experiment is extrapolated for each engine and precision: 350,000 + 700,000
steps, and an evaluation. The evaluation is an estimate, not a measurement: four sets of 10,000
images through Inception, 11.5 GFLOP each, at a quarter of the matrix rate.
"""

import argparse
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from measuring import machine, seconds, show, summary, synchronise, write_report
from torch import Tensor
from training_rate import step_flops

from poise.recipes import RECIPES, Stage
from poise.runs.build import first_stage, second_stage, stage_balance
from poise.support.kernels import kernels
from poise.training import (
    Batches,
    CodeBatches,
    Engine,
    ImageBatches,
    TrainingState,
    Watch,
    fit,
    new_state,
)
from poise.training.engines import EAGER_STEPS, CapturedStep
from poise.training.machine import tuned
from poise.training.step import training_step
from poise.vae import VAE

RECIPE = RECIPES["cifar10-released"]
SHAPE = [3, 32, 32]
LAPS = 3
# "tf32" is the meaning of a stage's precision "float32" on a GPU.
PRECISIONS = ("tf32", "bfloat16", "ieee")
SIDE_BY_SIDE = 5
EVALUATION_FLOPS, EVALUATION_SHARE = 4 * 10_000 * 11.5e9, 0.25


@dataclass(frozen=True)
class Scale:
    """Amount of work of a benchmark.

    Attributes:
        images: number of images on the device.
        batch_size: images per step.
        warm_up: steps before the clock starts.
        compared: steps of the equality check.
        matrix_side: rows and columns of the large matrices.
    """

    images: int = 50_000
    batch_size: int = 100
    warm_up: int = 30
    compared: int = 200
    matrix_side: int = 8192


QUICK = Scale(images=200, batch_size=4, warm_up=1, compared=2, matrix_side=256)


@dataclass(frozen=True)
class Bench:
    """Device, amount of work and lap length, shared by all parts."""

    device: torch.device
    scale: Scale
    lap_seconds: float

    def engines(self) -> list[str]:
        """Return the engines of this version of the package that the device can run."""
        return [
            name
            for name in get_args(Engine)
            if name == "eager" or (name != "auto" and self.device.type == "cuda")
        ]

    def stage(self, number: int, precision: str) -> Stage:
        stage = RECIPE.stages[number - 1]
        word = "float32" if precision == "tf32" else precision
        return replace(stage, batch_size=self.scale.batch_size, precision=word)

    def vae(self, number: int) -> VAE:
        first = first_stage(RECIPE, SHAPE)
        second = second_stage(RECIPE, first)
        assert isinstance(second, VAE)
        return first if number == 1 else second

    def data(self, number: int) -> Batches:
        source = np.random.default_rng(0)
        if number == 1:
            return ImageBatches(
                source.integers(0, 256, (self.scale.images, *SHAPE), dtype=np.uint8), self.device
            )
        mean = torch.from_numpy(
            source.standard_normal((self.scale.images, RECIPE.network.latent_dim), dtype=np.float32)
        )
        return CodeBatches(mean, torch.full_like(mean, -3.0), self.device)

    def state(self, number: int, stage: Stage) -> TrainingState:
        return new_state(self.vae(number), stage_balance(stage, RECIPE, SHAPE), stage, self.device)


def allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def matrix_rate(bench: Bench, precision: str) -> dict[str, float]:
    """Return the TFLOP per second of large square matrix products."""
    allow_tf32(precision != "ieee")
    side, dtype = (
        bench.scale.matrix_side,
        torch.bfloat16 if precision == "bfloat16" else torch.float32,
    )
    matrix = torch.randn(side, side, device=bench.device).to(dtype)
    once = min(seconds(lambda: torch.mm(matrix, matrix), bench.device) for _ in range(3))
    number = math.ceil(bench.lap_seconds / once)
    laps = [
        seconds(lambda: [torch.mm(matrix, matrix) for _ in range(number)] and None, bench.device)
        for _ in range(LAPS)
    ]
    return summary([2e-12 * number * side**3 / lap for lap in laps])


class Clock:
    """Time the laps of a training loop through `Watch.stop`; stop it after the last lap."""

    def __init__(
        self, bench: Bench, state: TrainingState, begun: Callable[[], None] = lambda: None
    ) -> None:
        self.bench, self.state, self.begun = bench, state, begun
        self.step, self.at = -1, 0.0
        self.seconds_per_step: list[float] = []

    def stop(self) -> bool:
        if len(self.seconds_per_step) == LAPS:
            return True
        if self.state.step < self.bench.scale.warm_up or (self.step >= 0 and not self._over()):
            return False
        synchronise(self.bench.device)
        now = time.perf_counter()
        if self.step >= 0:
            self.seconds_per_step.append((now - self.at) / (self.state.step - self.step))
        else:
            self.begun()
        self.step, self.at = self.state.step, time.perf_counter()
        return len(self.seconds_per_step) == LAPS

    def _over(self) -> bool:
        return (
            self.state.step > self.step and time.perf_counter() - self.at > self.bench.lap_seconds
        )


def time_engine(bench: Bench, number: int, precision: str, engine: Any) -> dict[str, Any]:
    """Measure milliseconds per step of `fit`, and the seconds before the first lap."""
    stage = bench.stage(number, precision)
    state, began = bench.state(number, stage), time.perf_counter()
    clock = Clock(bench, state)
    watch = Watch(stop=clock.stop, quiet=True, save_seconds=math.inf)
    fit(state, bench.data(number), stage, number=number, seed=0, watch=watch, engine=engine)
    whole = time.perf_counter() - began
    before = whole - sum(clock.seconds_per_step) / LAPS * (state.step - bench.scale.warm_up)
    return {
        "ms_per_step": milliseconds(clock.seconds_per_step),
        # data to the device, first steps, graph capture, compilation
        "seconds_before": round(max(0.0, before), 2),
    }


def time_side_by_side(bench: Bench, number: int, precision: str) -> dict[str, Any]:
    """Measure milliseconds of one captured step of each model, for one and for five models."""
    stage, times = bench.stage(number, precision), dict[str, Any]()
    for count in (1, SIDE_BY_SIDE):
        made = [recorded(bench, number, stage) for _ in range(count)]

        def rounds(repeats: int, made: list[tuple[CapturedStep, TrainingState]] = made) -> None:
            for _ in range(repeats):
                for step, _ in made:
                    assert step.graph is not None and step.stream is not None
                    with torch.cuda.stream(step.stream):
                        step.graph.replay()

        once = seconds(lambda r=rounds: r(bench.scale.warm_up), bench.device) / bench.scale.warm_up
        repeats = max(1, round(bench.lap_seconds / once))
        laps = [
            seconds(lambda r=rounds, n=repeats: r(n), bench.device) / repeats for _ in range(LAPS)
        ]
        times[f"ms_per_round_of_{count}"] = milliseconds(laps)
    return times


def recorded(bench: Bench, number: int, stage: Stage) -> tuple[CapturedStep, TrainingState]:
    """Return the captured step of a new model, and the state that its graph uses.

    Keep the state as long as the step: the graph has its addresses.
    """
    state, data, step = bench.state(number, stage), bench.data(number), CapturedStep(training_step)
    latents = RECIPE.network.latent_dim
    noise = torch.randn(stage.batch_size, latents, device=bench.device)
    batch = data.place(data.fetch(torch.arange(stage.batch_size)), lambda columns: noise)
    with tuned(state.network, bench.device), kernels(bench.device, tf32=stage.precision != "ieee"):
        for _ in range(EAGER_STEPS + 1):
            step(state, batch, noise, stage)
    return step, state


def milliseconds(values: list[float]) -> dict[str, float]:
    return summary([1000 * value for value in values], 4)


def time_bare(
    bench: Bench, number: int, precision: str, layout: torch.memory_format
) -> dict[str, Any]:
    allow_tf32(precision != "ieee")
    run = bare_loop(bench, number, precision, layout)
    run(bench.scale.warm_up)
    once = seconds(lambda: run(bench.scale.warm_up), bench.device) / bench.scale.warm_up
    steps = max(1, round(bench.lap_seconds / once))
    return {
        "ms_per_step": milliseconds(
            [seconds(lambda: run(steps), bench.device) / steps for _ in range(LAPS)]
        )
    }


def bare_loop(
    bench: Bench, number: int, precision: str, layout: torch.memory_format
) -> Callable[[int], None]:
    """Return a hand-written eager training loop, which never waits for the GPU."""
    vae = bench.vae(number).to(bench.device).train()
    vae = vae.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-4)
    batch = bare_batches(bench, number, layout)
    gamma2 = torch.ones((), device=bench.device)
    mixed = precision == "bfloat16"

    def run(steps: int) -> None:
        nonlocal gamma2
        for _ in range(steps):
            x = batch()
            with torch.autocast(bench.device.type, torch.bfloat16) if mixed else nullcontext():
                mean, logvar = vae.encoder(x)
                reconstruction = vae.decoder(mean + (0.5 * logvar).exp() * torch.randn_like(mean))
            error = (x - reconstruction.float()).square().flatten(1).sum(1)
            kl = 0.5 * (mean.float().square() + logvar.float().exp() - logvar.float() - 1).sum(1)
            num_dims = x[0].numel()
            loss = (
                error / (2 * gamma2) + num_dims / 2 * torch.log(2 * math.pi * gamma2) + kl
            ).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            gamma2 = torch.minimum(gamma2, 0.99 * gamma2 + 0.01 * error.detach().mean() / num_dims)

    return run


def bare_batches(bench: Bench, number: int, layout: torch.memory_format) -> Callable[[], Tensor]:
    """Return a function that gives shuffled batches from device memory, without end."""
    data, size, order = bench.data(number), bench.scale.batch_size, iter(())
    images = (
        torch.from_numpy(data.images).to(bench.device) if isinstance(data, ImageBatches) else None
    )

    def batch() -> Tensor:
        nonlocal order
        chosen = next(order, None)
        if chosen is None:
            order = iter(torch.randperm(len(data), device=bench.device).split(size))
            chosen = next(order)
        if images is not None:
            return (images[chosen].float() / 255).contiguous(memory_format=layout)
        assert isinstance(data, CodeBatches)
        return data.mean[chosen] + data.std[chosen] * torch.randn_like(data.mean[chosen])

    return batch


def count_syncs(bench: Bench, number: int, engine: Any) -> dict[str, Any]:
    """Count synchronising calls per step after the first steps, by torch's debug mode."""
    if bench.device.type != "cuda":
        return {"note": "for cuda only"}
    stage = bench.stage(number, "tf32")
    state = bench.state(number, stage)
    clock = Clock(bench, state, begun=lambda: torch.cuda.set_sync_debug_mode("warn"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(
                state,
                bench.data(number),
                stage,
                number=number,
                seed=0,
                watch=Watch(stop=clock.stop, quiet=True, save_seconds=math.inf),
                engine=engine,
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{Path(w.filename).name}:{w.lineno}"
        for w in caught
        if "synchroniz" in str(w.message).lower()
    )
    steps = state.step - bench.scale.warm_up
    return {
        "steps": steps,
        "per_step": round(sum(places.values()) / steps, 4),
        "places": dict(places.most_common(8)),
    }


def compare_engines(bench: Bench, number: int, engine: Any) -> dict[str, Any]:
    """Compare weights and balance after equal steps of an engine and of the eager loop."""
    once, again, other = (trained(bench, number, name) for name in ("eager", "eager", engine))
    return {
        "steps": bench.scale.compared,
        "eager_is_bit_identical_to_itself": all(
            torch.equal(once[name], again[name]) for name in once
        ),
        "bit_identical": all(torch.equal(once[name], other[name]) for name in once),
        "largest_relative_difference": max(relative(once[name], other[name]) for name in once),
    }


def trained(bench: Bench, number: int, engine: Any) -> dict[str, Tensor]:
    stage = replace(
        bench.stage(number, "tf32"), epochs=None, halve_every=None, steps=bench.scale.compared
    )
    state = bench.state(number, stage)
    fit(
        state,
        bench.data(number),
        stage,
        number=number,
        seed=0,
        watch=Watch(quiet=True, save_seconds=math.inf),
        engine=engine,
    )
    return state.network.state_dict() | state.balance.state_dict()


def relative(expected: Tensor, given: Tensor) -> float:
    return float(
        (given.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-3)
    )


def parts(bench: Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return all parts by name, most important first; compiled engines, the slowest, come last."""
    bare = {"bare": torch.contiguous_format, "bare, channels_last": torch.channels_last}
    slow = [name for name in bench.engines() if name.startswith("compiled")]
    quick = [name for name in bench.engines() if name not in slow]
    todo: dict[str, Callable[[], dict[str, Any]]] = {}
    for precision in PRECISIONS:
        todo[f"matrix / {precision}"] = lambda p=precision: {
            "tflop_per_second": matrix_rate(bench, p)
        }

    def add(precision: str, engines: list[str]) -> None:
        for number in (1, 2):
            for engine in engines:
                name = f"{precision} / stage {number} / {engine}"
                todo[name] = lambda n=number, p=precision, e=engine: time_engine(bench, n, p, e)

    for precision in PRECISIONS:
        for number in (1, 2):
            for name, layout in list(bare.items())[: 3 - number]:
                todo[f"{precision} / stage {number} / {name}"] = (
                    lambda n=number, p=precision, f=layout: time_bare(bench, n, p, f)
                )
        add(precision, quick)
        if bench.device.type == "cuda" and precision != "ieee":
            for number in (1, 2):
                todo[f"side by side / stage {number} / {precision}"] = (
                    lambda n=number, p=precision: time_side_by_side(bench, n, p)
                )
        if precision == "tf32":
            for number in (1, 2):
                for engine in quick:
                    todo[f"syncs / stage {number} / {engine}"] = lambda n=number, e=engine: (
                        count_syncs(bench, n, e)
                    )
                for engine in quick[1:]:
                    todo[f"equality / stage {number} / {engine}"] = lambda n=number, e=engine: (
                        compare_engines(bench, n, e)
                    )
    for precision in PRECISIONS:
        add(precision, sorted(slow))
    for number in (1, 2):
        for engine in sorted(slow):
            todo[f"equality / stage {number} / {engine}"] = lambda n=number, e=engine: (
                compare_engines(bench, n, e)
            )
    return todo


def rates(
    bench: Bench, done: dict[str, dict[str, Any]], flops: dict[int, float]
) -> list[list[Any]]:
    """Return a table row for each timed loop: speed, ratio to the bare loop, matrix share."""
    rows: list[list[Any]] = [
        [
            "precision",
            "stage",
            "loop",
            "ms per step",
            "images/s",
            "times the bare loop",
            "share of matrix rate",
        ]
    ]
    for name, result in done.items():
        if "ms_per_step" not in result:
            continue
        precision, stage, loop = name.split(" / ")
        step = result["ms_per_step"]["median"] / 1000
        bare, peak = (
            median(done, f"{precision} / {stage} / bare", "ms_per_step"),
            matrix_flops(done, precision),
        )
        faster = bare and round(bare / 1000 / step, 3)
        share = peak and round(flops[int(stage[-1])] / step / peak, 4)
        rows.append(
            [
                precision,
                stage,
                loop,
                result["ms_per_step"],
                bench.scale.batch_size / step,
                faster,
                share,
            ]
        )
    return rows


def median(done: dict[str, dict[str, Any]], part: str, figure: str) -> float | None:
    """Return the median of a figure, or None if the part was not measured."""
    return done.get(part, {}).get(figure, {}).get("median")


def matrix_flops(done: dict[str, dict[str, Any]], precision: str) -> float | None:
    tera = median(done, f"matrix / {precision}", "tflop_per_second")
    return tera and 1e12 * tera


def whole(done: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Extrapolate the minutes of the released experiment, for loops timed in both stages."""
    minutes: dict[str, dict[str, float]] = {}
    for name in done:
        first, second = (
            median(done, name, "ms_per_step"),
            median(done, name.replace("stage 1", "stage 2"), "ms_per_step"),
        )
        if "stage 1" not in name or first is None or second is None:
            continue
        precision, _, loop = name.split(" / ")
        each = {"stage 1": 350_000 * first / 60_000, "stage 2": 700_000 * second / 60_000}
        if rate := matrix_flops(done, precision):
            each["evaluation (estimate)"] = EVALUATION_FLOPS / (EVALUATION_SHARE * rate) / 60
        minutes[f"{precision} / {loop}"] = {
            part: round(value, 2) for part, value in (each | {"all": sum(each.values())}).items()
        }
    return minutes


def attempt(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of a part, or its error, so that the other parts still run."""
    began = time.perf_counter()
    try:
        result = part()
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    return result | {"took_seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="no part starts after this many minutes"
    )
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="approximate seconds of each loop"
    )
    parser.add_argument(
        "--only",
        nargs="*",
        metavar="WORD",
        help="run only parts whose name contains one of these, for example: stage 1",
    )
    parser.add_argument(
        "--quick", action="store_true", help="run a few steps of everything, as a check"
    )
    parser.add_argument("--json", type=Path, default=Path("results/bench-gpu-steps.json"))
    options = parser.parse_args()
    began, device = time.perf_counter(), torch.device(options.device)
    bench = Bench(
        device,
        QUICK if options.quick else Scale(),
        0.01 if options.quick else options.seconds / LAPS,
    )
    flops = {
        1: step_flops(bench.vae(1), torch.rand(1, *SHAPE)),
        2: step_flops(bench.vae(2), torch.rand(1, RECIPE.network.latent_dim)),
    }
    flops = {number: value * bench.scale.batch_size for number, value in flops.items()}
    done: dict[str, dict[str, Any]] = {}
    report = {**machine(device), "cuda": torch.version.cuda, "quick": options.quick, "parts": done}
    report["notes"] = [
        f"{name}: for cuda only" for name in get_args(Engine) if name not in bench.engines()
    ]
    report["gflop_per_step"] = {
        f"stage {number}": round(value / 1e9, 3) for number, value in flops.items()
    }
    for name, part in parts(bench).items():
        if options.only and not any(word in name for word in options.only):
            continue
        late = time.perf_counter() - began > 60 * options.minutes
        done[name] = {"left_out": "out of time"} if late else attempt(part)
        print(f"{time.perf_counter() - began:6.1f} s  {name}: {done[name]}", flush=True)
        report["rates"], report["minutes_of_the_experiment"] = (
            rates(bench, done, flops),
            whole(done),
        )
        write_report(options.json, report)
    show(report["rates"])


if __name__ == "__main__":
    main()
