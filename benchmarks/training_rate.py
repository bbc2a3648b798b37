"""Images per second of the training loop beside bare PyTorch loops, the machine's matrix rate, and pythae's trainer.

    POISE_DATA=... python benchmarks/training_rate.py [--only digits pythae-mlp ...] [--rounds 10] [--seconds 3]

For each network the loops take turns, round by round, so that a change of the machine's pace hits all alike. Each has its own
copy of the weights, its own optimiser and balance. Printed are the median rate of each, its spread over rounds, and the ratio
round by round. The bare loop reads uint8 from memory, scales, runs forward, loss and backward and steps Adam; it logs nothing,
saves nothing and checks nothing. Poise's loop runs with the engines eager and compiled, the bare loop twice: with weights and
images as PyTorch makes them (NCHW), and in channels_last.
The share of the matrix rate is the step's FLOPs (counted by torch, a multiply-add as two) times steps per second, over the
FLOPs per second of large float32 matrix products, which take their turn in every round for as long.

The rival is pythae's trainer on pythae's own networks (an MLP, the convolutional one for MNIST, the ResNet for CIFAR-10) in
batches of 64, its default: `BaseTrainer.train_step`, which is an epoch, on as many images as the others see in a round.
Without pythae (`pip install pythae`) its networks are left out, with a note.
"""

import argparse
import contextlib
import copy
import io
import itertools
import logging
import math
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measuring import (
    machine,
    matrix_products,
    over,
    seconds,
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

Steps = Callable[[int], None]  # trains for so many steps
LEARNING_RATE = 1e-4
PYTHAE_LATENTS = 16


@dataclass(frozen=True)
class Subject:
    """What is trained.

    Attributes:
        data: a data set's name.
        batch_size: images per step.
        recipe: whose network it is; None: pythae's.
        warm_up_seconds: of training before the clock starts, for each loop; the digits' net changes its pace when units die.
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
    """pythae's VAE with the network of a subject."""
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


def pythae_steps(
    model: Any, images: Tensor, batch_size: int, device: torch.device, folder: str
) -> Callable[[], None]:
    """An epoch of pythae's trainer over the images."""
    from pythae.data.datasets import BaseDataset  # pyright: ignore[reportMissingImports]
    from pythae.trainers import BaseTrainer, BaseTrainerConfig  # pyright: ignore[reportMissingImports]

    logging.disable(logging.INFO)  # it tells of every folder it makes
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


class PoiseSteps:
    """`poise.training.fit` in a thread of its own, which stands still between turns: it is asked after every step to stop."""

    def __init__(
        self,
        vae: VAE,
        data: datasets.Dataset,
        batch_size: int,
        device: torch.device,
        engine: Engine,
    ) -> None:
        stage = Stage(steps=10**9, batch_size=batch_size, learning_rate=LEARNING_RATE)
        self.state = new_state(vae, ComputedBalance(), stage, device)
        self.until, self.turn, self.rest = 0, threading.Semaphore(0), threading.Semaphore(0)
        watch = Watch(stop=self.stop, quiet=True, save_seconds=math.inf)
        arguments = {"number": 1, "seed": 0, "watch": watch, "engine": engine}
        self.thread = threading.Thread(
            target=fit, args=(self.state, ImageBatches(data.train, device), stage), kwargs=arguments
        )

    def __call__(self, steps: int) -> None:
        self.until += steps
        if self.thread.ident is None:
            self.thread.start()
        else:
            self.turn.release()
        self.rest.acquire()

    def stop(self) -> bool:
        if self.state.step < self.until:
            return False
        self.rest.release()
        self.turn.acquire()
        return self.until < 0

    def end(self) -> None:
        self.until = -1
        self.turn.release()
        self.thread.join()


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
    """Batches of row numbers, for ever."""
    while True:
        yield from torch.randperm(count)[: count // batch_size * batch_size].split(batch_size)


def step_flops(vae: VAE, images: Tensor) -> float:
    """FLOPs of forward and backward of one batch."""
    with FlopCounterMode(display=False) as counter:
        reconstruction, posterior = copy.deepcopy(vae)(images)
        (reconstruction.sum() + posterior.mean.sum() + posterior.logvar.sum()).backward()
    return float(counter.get_total_flops())


def measure(
    name: str, device: torch.device, rounds: int, round_seconds: float, warm_up: float | None
) -> dict[str, Any]:
    """All loops on one subject, after so many seconds of each, or its own."""
    subject = SUBJECTS[name]
    data, size = datasets.load(subject.data), subject.batch_size
    model: Any = None if subject.recipe else pythae_model(name, data.shape)
    if subject.recipe:
        vae = first_stage(RECIPES[subject.recipe], list(data.shape))
    else:
        vae = VAE(PythaeEncoder(model.encoder), PythaeDecoder(model.decoder))
    flops = step_flops(vae, datasets.gather(data.train, range(size)))
    engines: list[Engine] = ["eager", "compiled"]
    mine = {
        f"poise, {engine}": PoiseSteps(copy.deepcopy(vae), data, size, device, engine)
        for engine in engines
    }
    loops: dict[str, Steps] = {
        **mine,
        "bare": bare_steps(copy.deepcopy(vae), data, size, device, torch.contiguous_format),
        "bare, channels_last": bare_steps(
            copy.deepcopy(vae), data, size, device, torch.channels_last
        ),
    }
    for run in loops.values():
        run(2)
    if warm_up := subject.warm_up_seconds if warm_up is None else warm_up:
        number = round(5 * warm_up / seconds(lambda: mine["poise, eager"](5), device))
        for run in loops.values():
            run(number)
    steps = max(
        2,
        min(
            round(5 * round_seconds / seconds(lambda: loops["bare"](5), device)),
            len(data.train) // size,
        ),
    )
    tasks: dict[str, Callable[[], Any]] = {
        name: lambda run=run: run(steps) for name, run in loops.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        if model is not None:
            images = datasets.gather(data.train, range(steps * size))
            tasks["pythae"] = pythae_steps(copy.deepcopy(model), images, size, device, folder)
            take_turns({"pythae": tasks["pythae"]}, 1, device)
        products, products_flops = matrix_products(device, round_seconds)
        times = take_turns({**tasks, "matrix": products}, rounds, device)
    for steps_of_mine in mine.values():
        steps_of_mine.end()
    matrix_rate = [products_flops / second for second in times.pop("matrix")]
    return {
        "data": data.name,
        "shape": data.shape,
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "batch_size": size,
        "steps_of_each": steps * rounds,
        "images_per_second": {
            name: summary([steps * size / second for second in values])
            for name, values in times.items()
        },
        "poise_over": {
            engine: {
                name: over(values, times[engine])
                for name, values in times.items()
                if name not in mine
            }
            for engine in mine
        },
        "gflop_per_step": round(flops / 1e9, 4),
        "matrix_gflop_per_second": summary([rate / 1e9 for rate in matrix_rate]),
        "share_of_matrix_rate": {
            name: over([steps * flops / second for second in values], matrix_rate)
            for name, values in times.items()
        },
    }


def table(reports: dict[str, dict[str, Any]]) -> list[list[Any]]:
    head = [
        "network",
        "loop",
        "images per second",
        "Poise, eager, over it",
        "Poise, compiled, over it",
        "share of the matrix rate",
    ]
    rows: list[list[Any]] = [head]
    for name, report in reports.items():
        for loop, rate in report["images_per_second"].items():
            ratios = [
                report["poise_over"][f"poise, {engine}"].get(loop, "")
                for engine in ("eager", "compiled")
            ]
            rows.append([name, loop, rate, *ratios, report["share_of_matrix_rate"][loop]])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="*",
        choices=SUBJECTS,
        default=list(SUBJECTS),
        metavar="NETWORK",
        help=", ".join(SUBJECTS),
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each loop in a round, about")
    parser.add_argument(
        "--warm-up",
        type=float,
        help="seconds of each loop before the clock starts (default: the network's)",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=Path("results/bench-training-rate.json"))
    options = parser.parse_args()
    device, chosen = torch.device(options.device), options.only
    if find_spec("pythae") is None:
        chosen = [name for name in chosen if SUBJECTS[name].recipe]
        print(
            "note: pythae is not installed (pip install pythae): its networks are left out",
            file=sys.stderr,
        )
    reports = {
        name: measure(name, device, options.rounds, options.seconds, options.warm_up)
        for name in chosen
    }
    show(table(reports))
    write_report(options.json, {**machine(device), "rounds": options.rounds, "networks": reports})


if __name__ == "__main__":
    main()
