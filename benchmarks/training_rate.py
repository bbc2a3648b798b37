"""Measure images per second of training, compared with bare loops, pythae and the matrix rate.

    POISE_DATA=... python benchmarks/training_rate.py [--only digits pythae-mlp ...] [--rounds 10]
        [--seconds 3] [--loops "poise, eager" bare ...] [--other OTHER_CHECKOUT/src]
    python benchmarks/training_rate.py --balance [--other OTHER_CHECKOUT/src]
        [--json results/bench-balance.json]

Each loop runs in the main thread of its own process, on its own copy of the network. The processes
take turns, round by round. Printed are each loop's median images per second, the spread over
rounds, and the ratio of Poise's loop to each other loop, round by round.

- "poise, eager" and "poise, compiled": `poise.training.fit` with these engines.
- "other, eager" and "other, compiled": the same with the package of another checkout (`--other`).
- "bare": reads uint8 from memory, scales, runs forward, loss, backward and Adam. It does not log,
  save or check anything. "bare, channels_last": the same in that layout.
- "pythae": pythae's trainer on pythae's own networks, in batches of 64, its default:
  `BaseTrainer.train_step`, one epoch of as many images as the other loops see in a turn. Without
  pythae (`pip install pythae`) its networks are left out, with a note.
- `--balance` measures the loss alone, without a network: microseconds of the computed balance's
  forward and backward on batches of 100 rows of 100 values, without groups, with a mask and with a
  group per column, beside the balance of another checkout.
- "matrix": large float32 matrix products. The share of the matrix rate is the step's FLOPs (counted
  by torch, a multiply-add as two) times steps per second, over the products' FLOPs per second.
"""

import argparse
import contextlib
import copy
import io
import itertools
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measuring import (
    Turns,
    Worker,
    machine,
    matrix_products,
    over,
    parameters,
    send,
    serve,
    show,
    summary,
    take_turns,
    write_report,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from poise import data as datasets
from poise.balance import ComputedBalance
from poise.recipes import RECIPES, Stage
from poise.runs.build import first_stage
from poise.training import Engine, ImageBatches, Watch, fit, new_state
from poise.vae import VAE

# Loops of `--balance`: options of `ComputedBalance`, and whether there is a mask.
BALANCES: dict[str, tuple[dict[str, Any], bool]] = {
    "balance": ({}, False),
    "balance, mask": ({}, True),
    "balance, 100 groups": ({"groups": 100, "per": "channel"}, False),
    "balance, 100 groups, mask": ({"groups": 100, "per": "channel"}, True),
    "balance, other": ({}, False),
}
Steps = Callable[[int], None]  # trains for the given number of steps
LEARNING_RATE = 1e-4
PYTHAE_LATENTS = 16
TRIAL = 3  # steps that determine the length of a turn
LOOPS = (
    "poise, eager",
    "poise, compiled",
    "other, eager",
    "other, compiled",
    "bare",
    "bare, channels_last",
    "pythae",
    "matrix",
)


@dataclass(frozen=True)
class Subject:
    """A network and the data set that it is trained on.

    Attributes:
        data: name of the data set.
        batch_size: images per step.
        recipe: the recipe that has the network, or None for pythae's.
        warm_up_seconds: seconds of training before the clock starts, for each loop. A step of the
            digits' network takes longer once some of its units are dead.
    """

    data: str
    batch_size: int
    recipe: str | None = None
    warm_up_seconds: float = 0.0


SUBJECTS = {
    "digits": Subject("digits", 50, "digits", warm_up_seconds=5),
    "cifar10-released": Subject("cifar10", 100, "cifar10-released"),
    "mnist": Subject("mnist", 64, "mnist"),
    "pythae-mlp": Subject("mnist", 64),
    "pythae-mnist-conv": Subject("mnist", 64),
    "pythae-cifar-resnet": Subject("cifar10", 64),
}


# In a worker process


def work(name: str, loop: str, device: torch.device, turn_seconds: float) -> None:
    """Serve the turns of one loop on one subject. The first report has facts about the loop."""
    if loop == "matrix":
        products, flops = matrix_products(device, turn_seconds)
        send({"flops": flops})
        serve(lambda amount: products, device)
        return
    torch.manual_seed(0)
    if loop in BALANCES:
        send({})
        run = balance_steps(*BALANCES[loop], device)
        serve(lambda steps: lambda: run(steps), device)
        return
    subject = SUBJECTS[name]
    data, size = datasets.load(subject.data), subject.batch_size
    if loop == "pythae":
        model = pythae_model(name, data.shape)
        send({"images": len(data.train)})
        with tempfile.TemporaryDirectory() as folder:
            serve(
                lambda steps: pythae_epoch(
                    model, datasets.gather(data.train, range(steps * size)), size, device, folder
                ),
                device,
            )
        return
    vae = network(name, data.shape)
    if loop.startswith("bare"):
        layout = torch.channels_last if "channels_last" in loop else torch.contiguous_format
        flops = step_flops(vae, datasets.gather(data.train, range(size)))
        run = bare_steps(vae, data, size, device, layout)
        send({"shape": data.shape, "parameters": parameters(vae), "flops": flops})
        serve(lambda steps: lambda: run(steps), device)
        return
    engine: Any = loop.split(", ")[1]
    train(vae, data, size, device, engine)


def balance_steps(options: dict[str, Any], masked: bool, device: torch.device) -> Steps:
    balance = ComputedBalance(**options).to(device)
    target = torch.rand(100, 100, device=device)
    reconstruction = (target + 0.1 * torch.randn_like(target)).requires_grad_()
    mean, logvar = (torch.randn(100, 16, device=device, requires_grad=True) for _ in range(2))
    mask = torch.rand(100, 100, device=device) < 0.8 if masked else None

    def run(steps: int) -> None:
        for _ in range(steps):
            balance(reconstruction, target, mean, logvar, mask=mask).loss.backward()

    return run


def network(name: str, shape: tuple[int, ...]) -> VAE:
    if recipe := SUBJECTS[name].recipe:
        return first_stage(RECIPES[recipe], list(shape))
    model = pythae_model(name, shape)
    return VAE(PythaeEncoder(model.encoder), PythaeDecoder(model.decoder))


class PythaeEncoder(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output = self.encoder(images)
        return output.embedding, output.log_covariance


class PythaeDecoder(nn.Module):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(latents).reconstruction


def pythae_model(name: str, shape: tuple[int, ...]) -> Any:
    """Return pythae's VAE with the network of a subject."""
    from pythae import models  # pyright: ignore[reportMissingImports]
    from pythae.models.nn.benchmarks import cifar, mnist  # pyright: ignore[reportMissingImports]

    config = models.VAEConfig(input_dim=shape, latent_dim=PYTHAE_LATENTS)
    if name == "pythae-mlp":
        return models.VAE(config)
    if name == "pythae-mnist-conv":
        return models.VAE(
            config, mnist.Encoder_Conv_VAE_MNIST(config), mnist.Decoder_Conv_AE_MNIST(config)
        )
    return models.VAE(
        config, cifar.Encoder_ResNet_VAE_CIFAR(config), cifar.Decoder_ResNet_AE_CIFAR(config)
    )


def pythae_epoch(
    model: Any, images: Tensor, batch_size: int, device: torch.device, folder: str
) -> Callable[[], None]:
    """Return a function that runs one epoch of pythae's trainer over the images."""
    from pythae.data.datasets import BaseDataset  # pyright: ignore[reportMissingImports]
    from pythae.trainers import BaseTrainer, BaseTrainerConfig  # pyright: ignore[reportMissingImports]

    logging.disable(logging.INFO)  # it logs every folder it creates
    config = BaseTrainerConfig(
        output_dir=folder,
        per_device_train_batch_size=batch_size,
        learning_rate=LEARNING_RATE,
        no_cuda=device.type == "cpu",
    )
    trainer = BaseTrainer(
        model, BaseDataset(images, torch.zeros(len(images))), training_config=config
    )
    trainer.prepare_training()

    def run() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            trainer.train_step(1)

    return run


def train(
    vae: VAE, data: datasets.Dataset, batch_size: int, device: torch.device, engine: Engine
) -> None:
    """Serve turns by one call of `poise.training.fit`, which waits between turns."""
    stage = Stage(steps=10**9, batch_size=batch_size, learning_rate=LEARNING_RATE)
    state = new_state(vae, ComputedBalance(), stage, device)
    watch = Watch(stop=Turns(state, device), quiet=True, save_seconds=math.inf)
    fit(
        state, ImageBatches(data.train, device), stage, number=1, seed=0, watch=watch, engine=engine
    )


def bare_steps(
    vae: VAE,
    data: datasets.Dataset,
    batch_size: int,
    device: torch.device,
    layout: torch.memory_format,
) -> Steps:
    vae = vae.to(device=device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE)
    images = torch.from_numpy(data.train[:])
    num_dims = images[0].numel()
    gamma2 = 1.0
    order = shuffled(len(images), batch_size)

    def run(steps: int) -> None:
        nonlocal gamma2
        vae.train()
        for indices in itertools.islice(order, steps):
            x = (images[indices].to(device).float() / 255).contiguous(memory_format=layout)
            mean, logvar = vae.encoder(x)
            z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
            error = (x - vae.decoder(z)).square().sum((1, 2, 3))
            kl = 0.5 * (mean.square() + logvar.exp() - logvar - 1).sum(1)
            loss = (
                error / (2 * gamma2) + num_dims / 2 * math.log(2 * math.pi * gamma2) + kl
            ).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            gamma2 = 0.99 * gamma2 + 0.01 * error.mean().item() / num_dims

    return run


def shuffled(count: int, batch_size: int) -> Iterator[Tensor]:
    """Yield batches of row indices without end."""
    while True:
        yield from torch.randperm(count)[: count // batch_size * batch_size].split(batch_size)


def step_flops(vae: VAE, images: Tensor) -> float:
    """Return the FLOPs of one forward and backward pass of a batch."""
    with FlopCounterMode(display=False) as counter:
        reconstruction, posterior = copy.deepcopy(vae)(images)
        (reconstruction.sum() + posterior.mean.sum() + posterior.logvar.sum()).backward()
    return float(counter.get_total_flops())


# In the main process


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all loops on one subject, in turns."""
    subject, size = SUBJECTS[name], SUBJECTS[name].batch_size
    workers = {loop: worker(name, loop, options) for loop in chosen_loops(name, options)}
    facts: dict[str, Any] = next((w.ready for n, w in workers.items() if n.startswith("bare")), {})
    warm_up = subject.warm_up_seconds if options.warm_up is None else options.warm_up
    loops = [loop for loop in workers if loop != "matrix"]
    poise = [loop for loop in loops if loop.startswith("poise")]
    # A turn of pythae is one epoch of so many images.
    most = workers["pythae"].ready["images"] // size if "pythae" in workers else sys.maxsize
    trial = workers[loops[0]].turn(TRIAL) / TRIAL
    for loop in loops:
        workers[loop].turn(min(most, max(TRIAL, round(warm_up / trial))))
    steps = min(most, max(2, round(options.seconds * TRIAL / workers[loops[-1]].turn(TRIAL))))
    times = take_turns(workers, dict.fromkeys(workers, steps), options.rounds)
    result = {
        "data": subject.data,
        "batch_size": size,
        "steps_of_each": steps * options.rounds,
        **{fact: value for fact, value in facts.items() if fact != "flops"},
        "images_per_second": {
            loop: summary([steps * size / second for second in times[loop]]) for loop in loops
        },
        "poise_over": {
            mine: {loop: over(times[loop], times[mine]) for loop in loops if loop not in poise}
            for mine in poise
        },
    }
    if facts:
        result["gflop_per_step"] = round(facts["flops"] / 1e9, 4)
    if facts and "matrix" in workers:
        rates = [workers["matrix"].ready["flops"] / second for second in times["matrix"]]
        result["matrix_gflop_per_second"] = summary([rate / 1e9 for rate in rates])
        result["share_of_matrix_rate"] = {
            loop: over([steps * facts["flops"] / second for second in times[loop]], rates)
            for loop in loops
        }
    for process in workers.values():
        process.end()
    return result


def measure_balance(options: argparse.Namespace) -> dict[str, Any]:
    """Measure microseconds per step of the balance alone, in turns."""
    chosen = [loop for loop in BALANCES if "other" not in loop or options.other is not None]
    workers = {loop: worker("digits", loop, options) for loop in chosen}
    trial = workers["balance"].turn(100) and workers["balance"].turn(100) / 100
    steps = max(10, round(options.seconds / trial))
    times = take_turns(workers, dict.fromkeys(chosen, steps), options.rounds)
    base = "balance, other" if options.other else "balance"
    for process in workers.values():
        process.end()
    return {
        "steps_of_each": steps * options.rounds,
        "microseconds": {
            loop: summary([1e6 * second / steps for second in times[loop]], 1) for loop in chosen
        },
        f"over_{base.replace(', ', '_')}": {
            loop: over(times[loop], times[base]) for loop in chosen if loop != base
        },
    }


def chosen_loops(name: str, options: argparse.Namespace) -> list[str]:
    return [
        loop
        for loop in options.loops
        if (loop != "pythae" or SUBJECTS[name].recipe is None)
        and (not loop.startswith("other") or options.other is not None)
    ]


def worker(name: str, loop: str, options: argparse.Namespace) -> Worker:
    command = [__file__, "--work", loop, "--only", name, "--device", options.device]
    path = [str(options.other.resolve())] if "other" in loop else []
    path += filter(None, [os.environ.get("PYTHONPATH")])
    return Worker(
        [*command, "--seconds", str(options.seconds)], {"PYTHONPATH": os.pathsep.join(path)}
    )


def table(reports: dict[str, dict[str, Any]]) -> list[list[Any]]:
    rows: list[list[Any]] = [
        [
            "network",
            "loop",
            "images per second",
            "Poise, eager, over it",
            "Poise, compiled, over it",
            "share of the matrix rate",
        ]
    ]
    for name, figures in reports.items():
        for loop, rate in figures["images_per_second"].items():
            ratios = [
                figures["poise_over"].get(f"poise, {engine}", {}).get(loop, "")
                for engine in ("eager", "compiled")
            ]
            share = figures.get("share_of_matrix_rate", {}).get(loop, "")
            rows.append([name, loop, rate, *ratios, share])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = {"choices": SUBJECTS, "metavar": "NETWORK", "help": ", ".join(SUBJECTS)}
    parser.add_argument("--only", nargs="*", default=list(SUBJECTS), **names)
    names = {"choices": LOOPS, "metavar": "LOOP", "help": "; ".join(LOOPS)}
    parser.add_argument("--loops", nargs="*", default=list(LOOPS), **names)
    parser.add_argument("--other", type=Path, help="the src folder of another checkout")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0, help="approximate seconds of a turn")
    parser.add_argument(
        "--warm-up",
        type=float,
        help="seconds of training before the clock starts (default: depends on the network)",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=Path("results/bench-training-rate.json"))
    parser.add_argument("--balance", action="store_true", help="measure the balance alone")
    parser.add_argument("--work", choices=[*LOOPS, *BALANCES], help=argparse.SUPPRESS)
    options = parser.parse_args()
    device, chosen = torch.device(options.device), options.only
    if options.work:
        with contextlib.redirect_stdout(sys.stderr):
            work(chosen[0], options.work, device, options.seconds)
        return
    if options.balance:
        figures = measure_balance(options)
        write_report(options.json, {**machine(device), "rounds": options.rounds, **figures})
        rows = [list(row) for row in figures["microseconds"].items()]
        show([["loop", "microseconds per step"], *rows])
        return
    if find_spec("pythae") is None:
        chosen = [name for name in chosen if SUBJECTS[name].recipe]
        print(
            "note: pythae is not installed (pip install pythae): its networks are left out",
            file=sys.stderr,
        )
    reports: dict[str, dict[str, Any]] = {}
    for name in chosen:
        reports[name] = measure(name, options)
        write_report(
            options.json, {**machine(device), "rounds": options.rounds, "networks": reports}
        )
    show(table(reports))


if __name__ == "__main__":
    main()
