"""A recorded step against its eager twin: on a machine with a GPU (`pytest -m gpu`), elsewhere with a stand-in for graphs."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import poise
from poise.errors import InputError
from poise.pipeline import Options, train
from poise.recipes import Data, Network, Recipe, Stage
from poise.training import CodeBatches, ImageBatches, Watch, captured, fit, loop, new_state
from poise.training.step import training_step

NETWORKS = {"resnet": poise.networks.resnet, "infogan": poise.networks.infogan}
IMAGES = torch.randint(0, 256, (300, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_captured_step_is_refused_where_it_cannot_be(tmp_path):
    recipe = Recipe("tiny", Data("array"), Network("mlp", latent_dim=2, hidden=(4,)), Stage(steps=1, batch_size=4), None)
    with pytest.raises(InputError, match="one process on cuda, not for cpu"):
        train(IMAGES.numpy(), recipe=recipe, out=tmp_path / "run", options=Options(device="cpu", engine="captured"))


class Graph:
    """Stands for a CUDA graph: keeps the arguments of the steps it records, and takes those steps when replayed."""

    def replay(self) -> None:
        for arguments in self.steps:
            training_step(*arguments)


@pytest.fixture
def stand_in(monkeypatch):
    """In place of torch.cuda, in the module under test alone."""
    graphs = []  # that record now

    @contextmanager
    def recording(graph, stream, capture_error_mode):
        graph.steps = []
        graphs.append(graph)
        yield
        graphs.pop()

    def taken_or_recorded(*arguments):
        if graphs:
            graphs[-1].steps.append(arguments)
        else:
            training_step(*arguments)

    monkeypatch.setattr(loop, "training_step", taken_or_recorded)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(Stream=lambda: stream, current_stream=lambda: stream, stream=lambda stream: nullcontext())
    cuda.CUDAGraph, cuda.graph = Graph, recording
    monkeypatch.setattr(captured, "torch", SimpleNamespace(cuda=cuda, empty_like=torch.empty_like))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["resnet", "second_stage"])
def test_every_step_is_taken_once_with_its_own_batch_and_noise(kind, precision, stand_in):
    stage = Stage(steps=7, batch_size=10, learning_rate=1e-3, halve_every=2, ema_decay=0.9, precision=precision)
    eager, replayed = (trained(engine, kind, stage, device="cpu") for engine in ("eager", "captured"))
    assert all(torch.equal(eager[name], replayed[name]) for name in eager)


def trained(engine, kind, stage, halves=(1.0,), device="cuda") -> dict[str, torch.Tensor]:
    """The weights after training in as many parts as `halves` has, each to that share of the stage."""
    torch.manual_seed(0)
    device = torch.device(device)
    if kind == "second_stage":
        vae = poise.VAE(*poise.networks.second_stage(8, 64))
        data = CodeBatches(torch.randn(300, 8), torch.randn(300, 8), device)
    else:
        vae, data = poise.VAE(*NETWORKS[kind](16, 3, 8)), ImageBatches(IMAGES.numpy(), device)
    state = new_state(vae, poise.ComputedBalance(), stage, device)
    for share in halves:
        part = replace(stage, steps=int(share * stage.steps))
        fit(state, data, part, number=1, seed=0, watch=Watch(quiet=True), engine=engine)
    return state.trained.state_dict() | state.balance.state_dict()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["resnet", "infogan", "second_stage"])
def test_200_captured_steps_equal_200_eager_ones(kind, precision):
    stage = Stage(steps=200, batch_size=50, learning_rate=1e-3, halve_every=60, ema_decay=0.9, precision=precision)
    eager, captured = trained("eager", kind, stage), trained("captured", kind, stage)
    for name, expected in eager.items():
        difference = (captured[name].double() - expected.double()).norm()
        assert difference <= 1e-5 * expected.double().norm().clamp_min(1e-3), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_captured_run_resumed_is_bit_identical():
    stage = Stage(steps=60, batch_size=50, learning_rate=1e-3)
    whole, resumed = trained("captured", "resnet", stage), trained("captured", "resnet", stage, halves=(0.5, 1.0))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
