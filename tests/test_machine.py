"""What makes a step fast leaves what it computes alone: layouts, products, memory, compiled code."""

import resource
import shutil
import sys

import pytest
import torch
from torch import nn

from poise.training import denormals_as_zero
from poise.training.machine import (
    images_in_channels_last,
    kept_memory,
    pixels_as_products,
    tuned,
    usual_threads,
)

CPU = torch.device("cpu")
SINGLE_PIXEL = {  # kernel, stride, padding, side of the image
    "the whole image": (4, 1, 0, 4),
    "pythae's last convolution for MNIST": (4, 2, 1, 3),
    "a kernel that leaves out the last row": (3, 2, 0, 4),
    "a kernel beyond the image": (5, 3, 1, 4),
}


def outcome(layer: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of a loss that weighs every value differently."""
    layer.zero_grad()
    images = images.clone().requires_grad_()
    given = layer(images)
    (given * torch.arange(given.numel(), dtype=given.dtype).view(given.shape)).sum().backward()
    gradients = [parameter.grad for parameter in layer.parameters()]
    return [given.detach(), images.grad, *gradients]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", SINGLE_PIXEL)
def test_a_convolution_to_one_pixel_is_the_product_that_torch_computes(case, layout, bias):
    kernel, stride, padding, side = SINGLE_PIXEL[case]
    layer = nn.Conv2d(3, 5, kernel, stride, padding, bias=bias).double().to(memory_format=layout)
    images = torch.randn(7, 3, side, side, dtype=torch.float64).contiguous(memory_format=layout)
    expected = outcome(layer, images)
    assert expected[0].shape == (7, 5, 1, 1)
    with pixels_as_products(layer):
        for mine, theirs in zip(outcome(layer, images), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 4, groups=2),
        nn.Conv2d(4, 6, 2, dilation=3),
        nn.Conv2d(4, 6, 4, padding="valid"),
        nn.Conv2d(4, 6, 5, padding=1, padding_mode="reflect"),
    ],
    ids=str,
)
def test_any_other_convolution_is_torchs_own(layer):
    images = torch.randn(2, 4, 4, 4)
    expected = layer(images)
    with pixels_as_products(layer):
        assert torch.equal(layer(images), expected)


def test_a_convolution_without_a_batch_is_torchs_own():
    layer, image = nn.Conv2d(4, 6, 4), torch.randn(4, 4, 4)
    with pixels_as_products(layer):
        assert torch.equal(layer(image), nn.Conv2d.forward(layer, image))


def test_a_layer_that_somebody_has_changed_stays_as_it_is():
    layer = nn.Conv2d(4, 6, 4)
    layer.forward = lambda input: input.sum()
    with pixels_as_products(layer), pixels_as_products(nn.Sequential(layer)):
        assert layer(torch.ones(1, 4, 4, 4)) == 64
    assert layer(torch.ones(1, 4, 4, 4)) == 64


class Reshaping(nn.Module):
    """Makes an image of a vector, and adds to it what convolutions make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.layers = nn.ModuleList([Residual(self.block)])

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.layers[0](latents.reshape(-1, 8, 4, 4))


class Residual(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + self.block(images)


def test_a_reshaped_vector_enters_convolutions_in_channels_last_with_the_same_values():
    network, latents = (
        Reshaping().double().to(memory_format=torch.channels_last),
        torch.randn(5, 128, dtype=torch.float64),
    )
    before = network(latents)
    with images_in_channels_last(network):
        inside = network(latents)
    assert inside.is_contiguous(memory_format=torch.channels_last)
    assert not before.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(inside, before, rtol=1e-12, atol=1e-12)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_the_network_is_as_it_was_after_an_error():
    network, before = Reshaping(), torch.get_num_threads()
    with pytest.raises(KeyError), tuned(network, CPU):
        raise KeyError
    assert torch.get_num_threads() == before
    assert not any(
        module._forward_pre_hooks or "forward" in vars(module) for module in network.modules()
    )


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


def faults(mib: int = 80) -> int:
    """Pages that making five arrays one after another fetches from the system."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(mib * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_arrays_of_usual_size_are_as_cheap_after_the_block_as_before_it():
    with kept_memory():
        pass
    faults(4)
    assert faults(4) < 500  # of 5,120 pages


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_large_arrays_are_not_fetched_from_the_system_again_and_again():
    before = faults()
    with kept_memory():
        faults()  # the process grows to what it needs
        inside = faults()
    assert inside < 0.01 * before
    assert faults() > 0.1 * before


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

def other():  # begins before the first block ends, and ends after it
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
def test_a_number_of_threads_is_this_threads_alone_and_inside_the_block_alone(run_python):
    run_python(THREADS)


COMPILED = """
import math, sys, torch, poise
from poise.recipes import Stage
from poise.training import CodeBatches, ImageBatches, Watch, fit, new_state

cpu = torch.device("cpu")

def trained(engine, kind, steps):
    torch.manual_seed(0)
    if kind == "first":
        vae = poise.VAE(*poise.networks.mlp((1, 8, 8), latent_dim=10, hidden=(64, 64)))
        data = ImageBatches(torch.randint(0, 256, (300, 1, 8, 8), dtype=torch.uint8).numpy(), cpu)
    else:
        vae = poise.VAE(*poise.networks.second_stage(8, 64))
        data = CodeBatches(torch.randn(300, 8), torch.full((300, 8), -3.0), cpu)
    stage = Stage(steps=steps, batch_size=50, learning_rate=1e-3, halve_every=60)
    state = new_state(vae, poise.ComputedBalance(), stage, cpu)
    fit(state, data, stage, number=1, seed=0, watch=Watch(quiet=True), engine=engine)
    return state.trained.state_dict() | state.balance.state_dict()
"""
TWINS = """
eager, compiled = trained("eager", sys.argv[1], 200), trained("compiled", sys.argv[1], 200)
for name, expected in eager.items():
    difference = (compiled[name].double() - expected.double()).norm()
    assert difference <= 1e-5 * expected.double().norm().clamp_min(1e-3), (name, difference)
assert any(not torch.equal(compiled[name], eager[name]) for name in eager), "it was not compiled"
"""
MANY = """
import functools
from torch._dynamo import config
from poise.training.engines import CompiledStep

torch.compile = functools.partial(torch.compile, backend="eager")
stage = Stage(steps=1, batch_size=4)
with config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):  # each may be compiled once
    for width in (8, 9, 10):
        vae = poise.VAE(*poise.networks.mlp((1, 8, 8), latent_dim=3, hidden=(width,))).train()
        state, step = new_state(vae, poise.ComputedBalance().train(), stage, cpu), CompiledStep(stage)
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
@pytest.mark.parametrize("kind", ["first", "second"])
def test_200_compiled_steps_equal_200_eager_ones(kind, run_python):
    run_python(COMPILED + TWINS, kind)


def test_a_network_that_cannot_be_compiled_is_said_in_one_line(run_python):
    run_python(COMPILED + NO_COMPILER)


def test_networks_trained_one_after_another_are_all_compiled(run_python):
    run_python(COMPILED + MANY)
