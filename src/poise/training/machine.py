"""Choose the device, the CPU threads, the layout of images and the handling of denormal numbers.

All settings hold inside a block and are restored after it. `new_state` and `ImageBatches` put
weights and batches into `torch.channels_last`; a network may lose this layout on the way.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.support.kernels import load_linear_algebra

SMALL_PARAMETERS = 500_000


@contextmanager
def tuned(network: nn.Module, device: torch.device, count: int | None = None) -> Iterator[None]:
    """Keep images in channels_last inside the block; on a CPU set threads and zero denormals.

    Args:
        network: the network to train.
        device: the device of the network.
        count: number of CPU threads. None: see `usual_threads`.
    """
    on_cpu = device.type == "cpu"
    with (
        images_in_channels_last(network),
        threads(count or usual_threads(network)) if on_cpu else nullcontext(),
        denormals_as_zero() if on_cpu else nullcontext(),
    ):
        yield


def has_convolutions(network: nn.Module) -> bool:
    """Return whether a network has convolutions: parameters of four dimensions."""
    return any(parameter.dim() == 4 for parameter in network.parameters())


def usual_threads(network: nn.Module) -> int:
    """Return the number of CPU threads for a network: one if it is small and dense, else torch's.

    Matrix products of a small network are too short to share among threads. On two busy cores a
    dense network of width 256 took 2 ms a step with one thread, 18 ms with two (2026-11-22).
    With 0.8 million parameters and two idle cores, a second thread saves a quarter (2026-11-24).
    """
    small = sum(parameter.numel() for parameter in network.parameters()) < SMALL_PARAMETERS
    return 1 if small and not has_convolutions(network) else torch.get_num_threads()


@contextmanager
def images_in_channels_last(network: nn.Module) -> Iterator[None]:
    """Pass images to every module with convolutions in channels_last inside the block, by hooks.

    A decoder reshapes its first image from a vector, in PyTorch's own layout. If its output is
    added to that of a convolution, all later layers compute with two layouts. On pythae's ResNet
    for CIFAR-10, training runs at 0.92 of the rate without the hooks (AMD EPYC, two cores,
    2026-11-26). Values differ by rounding.
    """
    modules = [module for module in network.modules() if has_convolutions(module)]
    hooks = [module.register_forward_pre_hook(_to_channels_last) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _to_channels_last(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.contiguous(memory_format=torch.channels_last)
        if isinstance(value, Tensor) and value.dim() == 4
        else value
        for value in inputs
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Limit OpenMP to `count` threads inside the block, for the calling Python thread only.

    torch.set_num_threads would also set the number for all Python threads that start later. Two
    fits in two threads would overwrite each other's number.
    """
    from threadpoolctl import threadpool_limits

    # The first call in a thread sets torch's own number, so call it before the limit is set.
    torch.get_num_threads()
    with threadpool_limits(count, user_api="openmp"):
        yield


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Treat numbers below 1e-38 as zero inside the block, in this thread and those it starts.

    Adam's running averages of the gradients of dead units decay to denormal numbers. Processors
    compute with these about a hundred times slower. After 2,000 steps on the digits, a step took
    4.6 ms with denormals and 2.8 ms without, with bit-identical weights (2026-11-24).
    """
    before = float(torch.tensor(5e-324, dtype=torch.float64) * 1) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is the first available of cuda, mps and cpu.

    Raises:
        InputError: the device does not exist or is not available.
    """
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        remedy = 'use --device cpu (device="cpu") or auto'
        if reason.startswith("Expected one of"):
            reason, remedy = "there is no such kind", "give auto, cpu, cuda, cuda:1 or mps"
        if name.startswith("cuda") and torch.version.cuda is None and torch.version.hip is None:
            reason = f"this PyTorch ({torch.__version__}) is a build without CUDA"
            remedy += ", or install a build with it (pytorch.org)"
        raise InputError(f"device {name!r} is not available: {reason}; {remedy}") from None
    device = torch.device(name)
    load_linear_algebra(device)
    return device
