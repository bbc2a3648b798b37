"""Test two processes that train one model: same numbers as one, same end, one writer.

Stage 1's network computes in double precision. In float32 the gradient of a bias before BatchNorm
is only rounding error. Adam moves that bias in an arbitrary direction, so no tolerance would be
meaningful.
"""

import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import forking
import poise
from poise import training
from poise.errors import InputError, RunError
from poise.flow import Flow
from poise.latent import DiagonalGaussian
from poise.recipes import Data, Network, Recipe, Stage
from poise.runs import checkpoint
from poise.runs.options import Options
from poise.runs.pipeline import train
from poise.training import CodeBatches
from poise.training.distributed import GlobalBatchNorm

WORLD = 2
IMAGES = np.random.default_rng(0).integers(0, 256, (100, 8, 8), dtype=np.uint8)
SHARED = Recipe(
    name="shared",
    data=Data("array", validation=0.1),  # of 90 images
    network=Network("resnet", latent_dim=3, second_hidden=8),
    first=Stage(
        epochs=3,
        batch_size=21,
        learning_rate=1e-3,
        ema_decay=0.9,
        standardise="during",
        standardise_every=4,
    ),  # 81 images: 3 steps per epoch; shares of 10 and 11
    second=Stage(epochs=2, batch_size=20, learning_rate=1e-3, balance="learned"),  # 4 steps
)
NORM_SHARES = (2, 5)


class Double(nn.Module):
    """Run a network in double precision."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, *values):
        return self.network(*(value.double() for value in values))


class Exploding(nn.Module):
    """A decoder that overflows after some batches."""

    def __init__(self, decoder: nn.Module, after: int) -> None:
        super().__init__()
        self.decoder, self.left = decoder, after

    def forward(self, latents):
        self.left -= self.training
        return self.decoder(latents) * (1 if self.left >= 0 else torch.inf)


def network(seed: int = 0) -> poise.VAE:
    torch.manual_seed(seed)
    return poise.VAE(*map(Double, poise.networks.resnet(8, 1, 3, norm_decay=0.9)))


class Stopper(poise.Callback):
    """Ends stage 1 at its fourth step. Only the first process calls it."""

    def on_log(self, entry):
        if (entry["stage"], entry["step"]) == (1, 4):
            raise poise.StopStage


def run(out: Path, vae: poise.VAE | None = None, *callbacks: poise.Callback, **changes: Any):
    options = Options(device="cpu", quiet=True, save_seconds=0.0)
    recipe = replace(SHARED, **changes)
    vae = vae or network()
    return train(IMAGES, recipe=recipe, vae=vae, out=out, options=options, callbacks=callbacks)


def error_of(call: Callable[[], Any]) -> str:
    """Return the type and message of the error that a call raises."""
    try:
        call()
    except (RunError, InputError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def at_step(step: int, act: Callable[[], None]) -> None:
    """Call `act` in this process before the given step, counted from now."""
    left = iter(range(step))

    def acting(*arguments: Any) -> None:
        if next(left, None) is None:
            training.engines.training_step = real
            act()
        real(*arguments)

    real, training.engines.training_step = training.engines.training_step, acting


def interrupted(out: Path, rank: int) -> list[str]:
    """Train, and stop once in each stage by SIGTERM to one of the processes."""
    stops = []
    for asked, step in ((1, 4), (0, 6)):
        if rank == asked:
            at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stops.append(error_of(lambda: run(out)))
    run(out)
    return stops


def norm_outcome(layer: nn.Module, rows: slice) -> list[torch.Tensor]:
    """Return output, gradients and state of a BatchNorm layer after two batches.

    `rows` selects this process's rows of each batch.
    """
    source = torch.Generator().manual_seed(0)
    shape = (sum(NORM_SHARES), 3, *[4] * (2 * isinstance(layer, nn.BatchNorm2d)))
    layer = layer.double().train()
    layer = layer if rows == slice(None) else GlobalBatchNorm.of(layer)
    outcome = []
    for _ in range(2):
        values, weight = (
            torch.randn(shape, generator=source, dtype=torch.float64)[rows] for _ in range(2)
        )
        output = layer(values.requires_grad_())
        (output * weight).square().sum().backward()
        outcome += [output.detach(), values.grad]
    return [*outcome, *(parameter.grad for parameter in layer.parameters()), *layer.buffers()]


def flow_outcome() -> dict[str, torch.Tensor]:
    """Return the averaged weights of a flow of latent maps after some steps."""
    torch.manual_seed(0)
    shape = (2, 2, 2)
    flow = Flow(Double(poise.networks.flow(shape, width=8, blocks=3)), shape)
    codes = CodeBatches(
        torch.randn(30, 8), torch.randn(30, 8), torch.device("cpu"),
        mirrored=DiagonalGaussian(torch.randn(30, 8), torch.randn(30, 8)),
    )  # fmt: skip
    stage = Stage(steps=5, batch_size=7, learning_rate=1e-2, objective="flow", ema_decay=0.5)
    state = training.new_state(flow, poise.ComputedBalance(), stage, torch.device("cpu"))
    training.fit(state, codes, stage, number=2, seed=0, watch=training.Watch(quiet=True))
    return state.trained.state_dict()


LAYERS = {
    "plain": lambda: nn.BatchNorm1d(3),
    "images": lambda: nn.BatchNorm2d(3, momentum=None, affine=False),
}


def place_of(rank: int, world: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets for a process."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def work(rank: int, port: int, folder: str) -> None:
    """Train in one of the processes and record what happens, without type checks."""
    torch.set_num_threads(1)
    os.environ.update(place_of(rank, WORLD, port))
    runs, seen = Path(folder), {}
    trained = run(runs / "whole", network(seed=rank))
    seen["sample"] = trained.sample(3)
    seen["stops"] = interrupted(runs / "interrupted", rank)
    if rank == 1:
        at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    seen["cut"] = error_of(lambda: run(runs / "cut"))
    run(runs / "ended", None, Stopper(), second=None)
    seen["disagree"] = error_of(lambda: run(runs / "seeds", seed=rank))
    seen["occupied"] = error_of(lambda: run(runs / "whole", seed=5))
    broken = network()
    broken.decoder = Exploding(broken.decoder, after=5) if rank == 1 else broken.decoder
    seen["nonfinite"] = error_of(lambda: run(runs / "nonfinite", broken))
    seen["few"] = error_of(
        lambda: run(runs / "few", second=None, first=Stage(steps=1, batch_size=2))
    )
    with poise.training.distributed.processes(torch.device("cpu")):
        start = sum(NORM_SHARES[:rank])
        rows = slice(start, start + NORM_SHARES[rank])
        seen["norms"] = {name: norm_outcome(make(), rows) for name, make in LAYERS.items()}
        seen["flow"] = flow_outcome()
    if rank == 1:
        torch.save(seen, runs / "1.pt")
        at_step(3, lambda: os._exit(0))
    began = time.monotonic()
    seen["death"] = error_of(lambda: run(runs / "death"))
    seen["seconds"] = time.monotonic() - began
    torch.save(seen, runs / "0.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the runs and records of two processes."""
    folder = tmp_path_factory.mktemp("several")
    torch.multiprocessing.start_processes(
        work, (free_port(), str(folder)), nprocs=WORLD, start_method="forkserver"
    )
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved, _ = checkpoint.newest_intact_checkpoint(folder / "checkpoints")
    assert saved is not None and saved.meta["finished"]
    return saved.tensors


def curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_equal_one(folder, tmp_path):
    one = run(tmp_path / "one")
    torch.testing.assert_close(
        weights(folder / "whole"), weights(tmp_path / "one"), rtol=1e-6, atol=1e-7
    )
    for entry, expected in zip(curve(folder / "whole"), curve(tmp_path / "one"), strict=True):
        assert entry | {"images_per_second": 0} == pytest.approx(
            expected | {"images_per_second": 0}, rel=1e-5
        )
    codes = poise.load(folder / "whole", vae=network(), device="cpu").codes
    torch.testing.assert_close(codes.mean, one.codes.mean, rtol=1e-5, atol=1e-6)


def test_one_process_resumes_what_two_began(folder, seen):
    assert all("stopped at step" in rank["cut"] for rank in seen)
    run(folder / "cut")
    expected = weights(folder / "whole")
    torch.testing.assert_close(weights(folder / "cut"), expected, rtol=1e-6, atol=1e-7)


def test_a_flow_is_the_same_in_two_processes_and_in_one(seen):
    one = flow_outcome()
    for rank in seen:
        torch.testing.assert_close(rank["flow"], one, rtol=1e-6, atol=1e-7)


def test_processes_stop_together_whichever_was_asked_and_go_on_bit_identically(folder, seen):
    for rank in seen:
        expected = ["step 6 of stage 1", "step 5 of stage 2"]
        assert [text.split(",")[0] for text in rank["stops"]] == [
            f"Interrupted: stopped at {place}" for place in expected
        ]
    again, whole = weights(folder / "interrupted"), weights(folder / "whole")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    steps = [(entry["stage"], entry["step"]) for entry in curve(folder / "interrupted")]
    assert steps == [(1, k) for k in range(1, 10)] + [(2, k) for k in range(1, 9)]


def test_a_callback_of_one_process_ends_the_stage_of_all(folder):
    assert [entry["step"] for entry in curve(folder / "ended")] == [1, 2, 3, 4]


def test_every_process_returns_the_run(folder, seen):
    assert torch.equal(seen[0]["sample"], seen[1]["sample"])
    assert torch.equal(
        seen[0]["sample"], poise.load(folder / "whole", vae=network(), device="cpu").sample(3)
    )


def test_a_loss_that_is_not_finite_on_one_process_stops_all_before_weights_change(folder, seen):
    assert seen[0]["nonfinite"] == seen[1]["nonfinite"]
    assert "not finite at step 5 of stage 1" in seen[0]["nonfinite"]
    saved, _ = checkpoint.newest_intact_checkpoint(folder / "nonfinite" / "checkpoints")
    assert saved is not None and saved.meta["step"] == 5


def test_an_error_of_one_process_reaches_all(seen):
    for rank in seen:
        assert (
            "processes 1 were started with settings or images other than process 0's"
            in rank["disagree"]
        )
        assert "seed: 0 -> 5" in rank["occupied"]
        assert rank["few"] == "no error"


def test_a_process_that_dies_brings_the_others_down(seen):
    assert seen[0]["death"].startswith("RunError: lost contact with another process")
    assert seen[0]["seconds"] < 60


def resume(rank: int, port: int, folder: str) -> None:
    """Train in one of three processes, without and with an interruption."""
    torch.set_num_threads(1)
    os.environ.update(place_of(rank, 3, port))
    cpu, stage = torch.device("cpu"), Stage(steps=8, batch_size=30, learning_rate=1e-3)
    data = training.ImageBatches(IMAGES[:, None], cpu)

    def trained(state: training.TrainingState, steps: int) -> dict[str, torch.Tensor]:
        how: dict[str, Any] = {"number": 1, "seed": 0, "watch": training.Watch(quiet=True)}
        training.fit(state, data, replace(stage, steps=steps), **how)
        return {name: value.clone() for name, value in training.state_tensors(state).items()}

    def new() -> training.TrainingState:
        torch.manual_seed(0)
        vae = poise.VAE(
            *poise.networks.mlp((1, 8, 8), 4, hidden=(700, 600))
        )  # several buckets of gradients
        return training.new_state(vae, poise.ComputedBalance(), stage, cpu)

    with poise.training.distributed.processes(cpu):
        whole, halves = trained(new(), 8), new()
        training.restore_state(halves, trained(new(), 4))
        torch.save([whole, trained(halves, 8)], Path(folder) / f"{rank}.pt")


@pytest.mark.slow
def test_three_processes_resume_bit_identically(tmp_path):
    """A sum of three depends on its order, which must not depend on the interruption."""
    torch.multiprocessing.start_processes(
        resume, (free_port(), str(tmp_path)), nprocs=3, start_method="forkserver"
    )
    for rank in range(3):
        whole, resumed = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def torchrun(out: Path) -> forking.Forked:
    """Start `poise train digits` in two processes and wait until training has begun."""
    options = ["--epochs", "300", "--stages", "1", "--device", "cpu", "--out", str(out)]
    launch = ["torchrun", "--standalone", "--nproc-per-node", str(WORLD)]
    command = [*launch, "-m", "poise", "train", "digits", *options]
    written = len(curve(out)) if (out / "metrics.jsonl").exists() else 0
    code = "from torch.distributed.run import main; main()"
    launched = forking.start(code, command, out.parent)
    while launched.process.is_alive() and not (
        (out / "metrics.jsonl").exists() and len(curve(out)) > written
    ):
        time.sleep(0.1)
    return launched


@pytest.mark.slow
def test_under_torchrun_a_signal_saves_and_a_death_ends_all(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    launched = torchrun(tmp_path / "run")
    launched.process.terminate()
    code, complaints = launched.end(), launched.err.read_text()
    stopped = re.search(r"poise: stopped at step (\d+) of stage 1, and saved", complaints)
    assert code != 0 and stopped is not None, complaints
    assert [
        int(path.name) for path in checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    ] == [int(stopped[1])]
    launched = torchrun(tmp_path / "run")
    pid = launched.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if not children.exists():
        launched.end(seconds=0)
        pytest.skip("finds its processes in /proc")
    os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    code, complaints = launched.end(), launched.err.read_text()
    assert code != 0 and "exitcode  : -9" in complaints, complaints


@pytest.mark.parametrize("name", LAYERS)
def test_batch_norm_over_processes_equals_batch_norm(name, seen):
    whole = norm_outcome(LAYERS[name](), slice(None))
    first, second = (rank["norms"][name] for rank in seen)
    torch.testing.assert_close(
        [torch.cat(pair) for pair in zip(first[:4], second[:4], strict=True)], whole[:4]
    )
    shared = len(list(LAYERS[name]().parameters()))
    summed = [a + b for a, b in zip(first[4 : 4 + shared], second[4 : 4 + shared], strict=True)]
    torch.testing.assert_close(summed, whole[4 : 4 + shared])
    for rank in (first, second):
        torch.testing.assert_close(rank[4 + shared :], whole[4 + shared :])
