"""Test that machine settings hold inside a block, and that compiled steps equal eager ones."""

import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import poise
from poise.recipes import RECIPES, Stage
from poise.support import kernels as chosen
from poise.training import ImageBatches, denormals_as_zero, new_state
from poise.training.machine import choose_device, images_in_channels_last, tuned, usual_threads

CPU = torch.device("cpu")
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


@pytest.mark.parametrize("kind", ["resnet", "infogan", "wae"])
def test_images_stay_in_channels_last_from_the_first_layer_of_a_network_to_the_last(kind):
    def check(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert output.is_contiguous(memory_format=torch.channels_last), module

    vae = poise.VAE(*getattr(poise.networks, kind)(16, 3, 4))
    state = new_state(vae, poise.ComputedBalance(), Stage(steps=1), CPU)
    convolutions = [m for m in state.network.modules() if isinstance(m, CONVOLUTIONS)]
    for layer in convolutions:
        layer.register_forward_hook(check)
    images = ImageBatches(torch.rand(5, 3, 16, 16).numpy(), CPU)
    state.network(
        images.place(images.fetch(torch.arange(5)), lambda columns: torch.zeros(5, columns))
    )
    assert len(convolutions) > 3


class Reshaping(nn.Module):
    """A decoder that reshapes a vector to its first image, and has a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        images = latents.unflatten(1, (8, 4, 4))
        return images + self.block(images)


def test_a_reshaped_vector_enters_convolutions_in_channels_last_with_the_same_values():
    network = Reshaping().double().to(memory_format=torch.channels_last)
    latents, layouts = torch.randn(5, 128, dtype=torch.float64), list[bool]()

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    before = network(latents)
    with images_in_channels_last(network):
        noted = network.block[0].register_forward_pre_hook(note)
        inside = network(latents)
        noted.remove()
    assert layouts == [True]
    torch.testing.assert_close(inside, before, rtol=1e-12, atol=1e-12)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_settings_are_as_they_were_after_an_error():
    network, before = nn.Conv2d(1, 1, 3), torch.get_num_threads()
    with pytest.raises(KeyError), tuned(network, CPU, before + 1):
        raise KeyError
    assert torch.get_num_threads() == before and not network._forward_pre_hooks


@pytest.mark.parametrize("before", [True, False])
def test_denormals_are_zero_inside_the_block_and_as_before_after_it(before):
    tiny = torch.full((1,), 1e-40)
    try:
        torch.set_flush_denormal(before)
        with denormals_as_zero():
            assert float(tiny * 1) == 0
        assert (float(tiny * 1) == 0) == before
    finally:
        torch.set_flush_denormal(False)


def test_small_dense_networks_run_on_one_thread_and_others_on_all(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert usual_threads(nn.Linear(10, 10)) == 1
    assert usual_threads(nn.Linear(1000, 1001)) == usual_threads(nn.Conv2d(1, 1, 3)) == 5


THREADS = """
import threading, torch
from poise.training import threads

def in_another_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

torch.set_num_threads(3)
began, ended, seen = threading.Event(), threading.Event(), {}

def other():  # starts inside the first block and ends after it
    with threads(4):
        seen["other"] = torch.get_num_threads()
        began.set()
        ended.wait()

with threads(2):
    thread = threading.Thread(target=other)
    thread.start()
    began.wait()
    seen["mine"] = torch.get_num_threads()
    in_another_thread(lambda: seen.update(idle=torch.get_num_threads()))
ended.set()
thread.join()
in_another_thread(lambda: seen.update(later=torch.get_num_threads()))
seen["after"] = torch.get_num_threads()
assert seen == {"other": 4, "mine": 2, "idle": 3, "later": 3, "after": 3}, seen
"""


@pytest.mark.skipif(
    not torch.backends.openmp.is_available(), reason="threads of another kind than OpenMP's"
)
def test_a_number_of_threads_is_this_threads_alone_and_inside_the_block_alone(run_forked):
    run_forked(THREADS)


COMPILED = """
import math, sys, torch, poise
from poise.flow import Flow
from poise.recipes import Stage
from poise.training import CodeBatches, ImageBatches, Watch, fit, new_state

cpu = torch.device("cpu")

def trained(engine, kind, steps):
    torch.manual_seed(0)
    if kind == "first":
        vae = poise.VAE(*poise.networks.mlp((1, 8, 8), latent_dim=10, hidden=(64, 64)))
        data = ImageBatches(torch.randint(0, 256, (300, 1, 8, 8), dtype=torch.uint8).numpy(), cpu)
    elif kind == "maps":
        vae = poise.VAE(*poise.networks.conv(16, 3, 2, width=16))
        images = torch.randint(0, 256, (300, 3, 16, 16), dtype=torch.uint8).numpy()
        data = ImageBatches(images, cpu, flips=True)
    else:
        vae = poise.VAE(*poise.networks.second_stage(8, 64))
        if kind == "flow":
            vae = Flow(poise.networks.flow((2, 2, 2), width=16, blocks=3), (2, 2, 2))
        data = CodeBatches(torch.randn(300, 8), torch.full((300, 8), -3.0), cpu)
    objective = "flow" if kind == "flow" else "vae"
    stage = Stage(
        steps=steps, batch_size=50, learning_rate=1e-3, halve_every=60, objective=objective
    )
    state = new_state(vae, poise.ComputedBalance(), stage, cpu)
    fit(state, data, stage, number=1, seed=0, watch=Watch(quiet=True), engine=engine)
    found = state.trained.state_dict() | state.balance.state_dict()
    if kind in ("maps", "flow"):
        # Adam takes full steps along rounding errors where a gradient is nearly 0, so weights may
        # differ. The function of the network may not.
        network = state.trained.eval()
        torch.manual_seed(1)
        with torch.no_grad():
            if kind == "maps":
                items = torch.rand(9, 3, 16, 16)
                outputs = [network.reconstruct(items), network.encode(items).mean]
            else:
                outputs = [network(torch.randn(9, 8), torch.rand(9))]
        found = {"gamma2": found["gamma2"]} | dict(enumerate(outputs))
    return found
"""
TWINS = """
kind, steps = sys.argv[1], int(sys.argv[2])
eager, compiled = (trained(e, kind, steps) for e in ("eager", "compiled"))
# After step 27 of "second", rounding decides on one machine whether a ReLU is 0 for an item.
tolerance = 1e-5 if kind in ("first", "second") else 1e-3
for name, expected in eager.items():
    difference = (compiled[name].double() - expected.double()).norm()
    assert difference <= tolerance * expected.double().norm().clamp_min(1e-3), (name, difference)
assert any(not torch.equal(compiled[name], eager[name]) for name in eager), "it was not compiled"
"""
MANY = """
import functools
from torch._dynamo import config
from poise.training.engines import CompiledStep

torch.compile = functools.partial(torch.compile, backend="eager")
stage = Stage(steps=1, batch_size=4)
# Each network may be compiled once.
with config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
    for width in (8, 9, 10):
        vae = poise.VAE(*poise.networks.mlp((1, 8, 8), latent_dim=3, hidden=(width,))).train()
        state = new_state(vae, poise.ComputedBalance().train(), stage, cpu)
        step = CompiledStep(stage)
        for _ in range(3):
            step(state, torch.rand(4, 1, 8, 8), torch.randn(4, 3), stage)
"""
NO_COMPILER = """
from poise.errors import RunError
from torch._inductor import config

with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
    try:
        trained("compiled", "first", 1)
    except RunError as error:
        assert str(error).startswith("this network cannot be compiled here (") and "use the engine eager" in str(error), error
        assert len(str(error).splitlines()) == 1
    else:
        raise AssertionError("compiled without a compiler")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)
@pytest.mark.parametrize(
    ("kind", "steps"),
    [("first", 200), ("second", 20), ("maps", 10), ("flow", 10)],
)
def test_compiled_steps_equal_eager_ones(kind, steps, run_forked):
    run_forked(COMPILED + TWINS, kind, str(steps))


def test_a_network_that_cannot_be_compiled_is_said_in_one_line(run_forked):
    run_forked(COMPILED + NO_COMPILER)


def test_networks_trained_one_after_another_are_all_compiled(run_forked):
    run_forked(COMPILED + MANY)


def test_linear_algebra_is_loaded_once_however_many_threads_choose_a_device(monkeypatch):
    loaded, here = list[torch.Tensor](), threading.Barrier(8)

    def note(matrix: torch.Tensor) -> torch.Tensor:
        loaded.append(matrix)
        time.sleep(0.05)  # the other threads come while it loads
        return matrix

    def choose() -> None:
        here.wait()
        choose_device("cpu")

    monkeypatch.setattr(chosen, "CHOOSING", {"cpu"})
    monkeypatch.setattr(torch.linalg, "inv", note)
    chosen._inverted.cache_clear()
    threads = [threading.Thread(target=choose) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    chosen._inverted.cache_clear()
    assert len(loaded) == 1


@pytest.fixture
def others_choose_kernels(monkeypatch):
    """Let another thread take kernels with TF32 in turns, as a run beside this one does."""
    monkeypatch.setattr(chosen, "CHOOSING", {"cpu"})  # the flags exist without a GPU
    over = threading.Event()

    def choose():
        while not over.is_set():
            with chosen.kernels(CPU, tf32=True):
                time.sleep(0.002)

    thread = threading.Thread(target=choose)
    thread.start()
    yield
    over.set()
    thread.join()


def test_a_run_is_measured_with_the_settings_of_the_process_whatever_others_choose(
    others_choose_kernels, tmp_path
):
    seen = set[bool]()

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if not module.training:
            time.sleep(0.003)  # the other thread takes its turn, if it can
            seen.add(torch.backends.cuda.matmul.allow_tf32)

    images = torch.rand(60, 1, 8, 8)
    vae = poise.VAE(*poise.networks.mlp((1, 8, 8), latent_dim=2, hidden=(8,)))
    for part in (vae.encoder, vae.decoder):
        part.register_forward_pre_hook(note)
    short = Stage(steps=20, batch_size=20, precision="ieee")
    recipe = replace(RECIPES["digits"], first=short, second=short)
    options = poise.Options(quiet=True, device="cpu")
    run = poise.train(images.numpy(), recipe=recipe, vae=vae, out=tmp_path, options=options)
    run.evaluate(images[:40], extractor="pixels", nll_samples=8)
    run.sample(200)
    list(run.reconstruct_chunks(images))
    run.interpolate(images[0], images[1], 4)
    assert seen == {False}  # PyTorch's default
