"""Compare a captured step with an eager one.

With a GPU (`pytest -m gpu`) the step uses CUDA graphs, elsewhere a stand-in for them.
"""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

import poise
from poise.errors import InputError, RunError
from poise.flow import Flow
from poise.priors import NormalPrior
from poise.recipes import Data, Network, Recipe, Stage
from poise.runs import pipeline
from poise.runs.growth import ProgressPicture
from poise.runs.options import Options
from poise.runs.pipeline import train
from poise.training import CodeBatches, ImageBatches, Watch, engines, fit, loop, new_state
from poise.training.step import training_step

NETWORKS = {"resnet": poise.networks.resnet, "infogan": poise.networks.infogan}
IMAGES = torch.randint(
    0, 256, (300, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def test_a_captured_step_is_refused_where_it_cannot_be(tmp_path):
    recipe = Recipe(
        "tiny",
        Data("array"),
        Network("mlp", latent_dim=2, hidden=(4,)),
        Stage(steps=1, batch_size=4),
        None,
    )
    with pytest.raises(InputError, match="one process on cuda, not for cpu"):
        train(
            IMAGES.numpy(),
            recipe=recipe,
            out=tmp_path / "run",
            options=Options(device="cpu", engine="captured"),
        )


class Graph:
    """A stand-in for a CUDA graph: it records the arguments of steps and replays the steps."""

    def replay(self) -> None:
        for arguments in self.steps:
            training_step(*arguments)

    def reset(self) -> None:
        self.steps = []


@pytest.fixture
def stand_in(monkeypatch):
    """Replace torch.cuda in the module under test.

    Returns a list; append the text of an error to make captures fail.
    """
    graphs, errors = [], []  # graphs: those that are recording now

    @contextmanager
    def recording(graph, stream, capture_error_mode):
        graph.steps = []
        graphs.append(graph)
        yield
        graphs.pop()
        if errors:
            raise RuntimeError(errors[0])

    def taken_or_recorded(*arguments):
        if graphs:
            graphs[-1].steps.append(arguments)
        else:
            training_step(*arguments)

    monkeypatch.setattr(engines, "training_step", taken_or_recorded)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        Stream=lambda device: stream,
        current_stream=lambda device: stream,
        stream=lambda stream: nullcontext(),
    )
    cuda.CUDAGraph, cuda.graph = Graph, recording
    cuda.get_rng_state = lambda device: None
    # A CPU's generator has no mode of a recording.
    monkeypatch.setattr(engines, "renew_generator", lambda device, state: None)
    monkeypatch.setattr(engines.distributed, "launched", lambda: False)
    monkeypatch.setattr(
        loop, "choose_engine", lambda engine, device: "captured" if engine == "auto" else engine
    )
    monkeypatch.setattr(pipeline, "choose_engine", loop.choose_engine)
    stand_in = SimpleNamespace(
        cuda=cuda, empty_like=torch.empty_like, OutOfMemoryError=torch.OutOfMemoryError
    )
    monkeypatch.setattr(engines, "torch", stand_in)
    return errors


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["resnet", "second_stage", "flow"])
def test_every_step_is_taken_once_with_its_own_batch_and_noise(
    kind, precision, stand_in, monkeypatch
):
    stage = Stage(
        steps=7,
        batch_size=10,
        learning_rate=1e-3,
        halve_every=2,
        objective="flow" if kind == "flow" else "vae",
        ema_decay=0.9,
        ema_warmup=kind == "flow",
        precision=precision,
    )
    eager = trained("eager", kind, stage, device="cpu")
    replay = Mock(side_effect=Graph.replay)
    monkeypatch.setattr(Graph, "replay", lambda graph: replay(graph))  # noqa: PLW0108
    replayed = trained("captured", kind, stage, device="cpu")
    assert replay.call_count == 7 - engines.EAGER_STEPS
    assert all(torch.equal(eager[name], replayed[name]) for name in eager)


REFUSED = "operation not permitted when stream is capturing\nand more lines"
TINY = Recipe(
    "tiny",
    Data("array"),
    Network("mlp", latent_dim=2, hidden=(4,)),
    Stage(steps=6, batch_size=4),
    Stage(steps=6, batch_size=4),
)


def test_auto_goes_on_with_eager_steps_where_a_recording_fails(stand_in, tmp_path, capsys):
    options = Options(device="cpu", quiet=True)
    recorded = train(IMAGES.numpy(), recipe=TINY, out=tmp_path / "recorded", options=options)
    stand_in.append(REFUSED)
    fallen = train(IMAGES.numpy(), recipe=TINY, out=tmp_path / "fallen", options=options)
    engines = [
        json.loads((run.folder / "config.json").read_text())["engine"] for run in (recorded, fallen)
    ]
    assert engines == ["captured", "eager"]
    (line,) = capsys.readouterr().err.splitlines()  # one warning for both stages
    assert (
        "cannot be recorded as a CUDA graph "
        "(operation not permitted when stream is capturing); taking them" in line
    )
    for stage in ("first", "second"):
        weights = [getattr(run, stage).vae.state_dict() for run in (recorded, fallen)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_captured_step_that_was_asked_for_and_fails_is_an_error(stand_in, tmp_path):
    stand_in.append(REFUSED)
    with pytest.raises(
        RunError, match=r"cannot be recorded as a CUDA graph .*: use the engine eager"
    ):
        train(
            IMAGES.numpy(),
            recipe=TINY,
            out=tmp_path / "run",
            options=Options(device="cpu", quiet=True, engine="captured"),
        )


def test_auto_is_eager_off_cuda_and_is_written_down(tmp_path):
    run = train(
        IMAGES.numpy(), recipe=TINY, out=tmp_path / "run", options=Options(device="cpu", quiet=True)
    )
    assert json.loads((run.folder / "config.json").read_text())["engine"] == "eager"
    assert loop.choose_engine("auto", torch.device("cuda")) == "captured"


def trained(
    engine, kind, stage, halves=(1.0,), device="cuda", **watched
) -> dict[str, torch.Tensor]:
    """Return the weights after training that stops and resumes at the shares `halves`."""
    torch.manual_seed(0)
    device = torch.device(device)
    if kind in NETWORKS:
        network, data = poise.VAE(*NETWORKS[kind](16, 3, 8)), ImageBatches(IMAGES.numpy(), device)
    else:
        shape = (2, 2, 2)
        network = (
            Flow(poise.networks.flow(shape, width=16, blocks=3), shape)
            if kind == "flow"
            else poise.VAE(*poise.networks.second_stage(8, 64))
        )
        data = CodeBatches(torch.randn(300, 8), torch.randn(300, 8), device)
    state = new_state(network, poise.ComputedBalance(), stage, device)
    for share in halves:
        part = replace(stage, steps=int(share * stage.steps))
        watch = Watch(quiet=True, **watched)
        fit(state, data, part, number=1, seed=0, watch=watch, engine=engine)
    return state.trained.state_dict() | state.balance.state_dict()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["resnet", "infogan", "second_stage", "flow"])
def test_200_captured_steps_equal_200_eager_ones(kind, precision):
    stage = Stage(
        steps=200,
        batch_size=50,
        learning_rate=1e-3,
        halve_every=60,
        objective="flow" if kind == "flow" else "vae",
        ema_decay=0.9,
        ema_warmup=kind == "flow",
        precision=precision,
    )
    eager, captured = trained("eager", kind, stage), trained("captured", kind, stage)
    for name, expected in eager.items():
        difference = (captured[name].double() - expected.double()).norm()
        assert difference <= 1e-5 * expected.double().norm().clamp_min(1e-3), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_captured_run_resumed_is_bit_identical():
    stage = Stage(steps=60, batch_size=50, learning_rate=1e-3)
    whole, resumed = (
        trained("captured", "resnet", stage),
        trained("captured", "resnet", stage, halves=(0.5, 1.0)),
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class Deciding(torch.nn.Module):
    """A decoder that reads a value from the device, so that it cannot be captured."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, latents):
        return self.decoder(latents) if float(latents.detach().sum()) < 1e9 else latents


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_network_that_cannot_be_recorded_trains_as_the_eager_engine_does(tmp_path, capsys):
    weights = []
    for engine in ("eager", "auto"):
        torch.manual_seed(0)
        encoder, decoder = poise.networks.mlp([3, 16, 16], 4, hidden=(16,))
        vae = poise.VAE(encoder, Deciding(torch.nn.Sequential(torch.nn.Dropout(0.1), decoder)))
        options = Options(device="cuda", quiet=True, engine=engine)
        stages = replace(
            TINY, first=Stage(steps=40, batch_size=50), second=Stage(steps=40, batch_size=50)
        )
        run = train(IMAGES.numpy(), recipe=stages, vae=vae, out=tmp_path / engine, options=options)
        weights.append(run.first.vae.state_dict())
        assert json.loads((run.folder / "config.json").read_text())["engine"] == "eager"
    assert "taking them one by one" in capsys.readouterr().err
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_rows_of_the_progress_between_replays_change_no_bit(tmp_path):
    def show(state, tenth):
        picture.add(1, tenth, state.trained, NormalPrior(8))

    images = IMAGES[:8].float() / 255
    picture = ProgressPicture(tmp_path / "p.png", images, seed=0, priors=["N(0, I)"])
    stage = Stage(steps=60, batch_size=50, learning_rate=1e-3)
    plain, watched = (trained("captured", "resnet", stage, **more) for more in ({}, {"show": show}))
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    picture.write()
    with Image.open(tmp_path / "p.png") as file:
        assert file.height == 24 + 11 * 66
