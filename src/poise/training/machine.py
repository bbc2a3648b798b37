"""How a network runs on this machine: threads, memory, layout. What is computed stays the same, but for rounding.

Each part holds inside a block and leaves everything as it was (of memory: as it usually is).
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.errors import InputError

SMALL_PARAMETERS = 500_000
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's mallopt(3)
KEEP_ALL = {M_TRIM_THRESHOLD: 2**31 - 1, M_MMAP_MAX: 0}
AS_GROWN = {M_TRIM_THRESHOLD: 2**26, M_MMAP_THRESHOLD: 2**25, M_MMAP_MAX: 65_536}


@contextmanager
def tuned(network: nn.Module, device: torch.device, count: int | None = None) -> Iterator[None]:
    """Everything of this module that pays for a network on a device; `count` CPU threads, None: `usual_threads`."""
    with ExitStack() as block:
        if has_convolutions(network):
            block.enter_context(images_in_channels_last(network))
        if device.type == "cpu":
            block.enter_context(threads(count or usual_threads(network)))
            block.enter_context(denormals_as_zero())
            block.enter_context(kept_memory())
            block.enter_context(pixels_as_products(network))
        yield


def has_convolutions(network: nn.Module) -> bool:
    return any(parameter.dim() == 4 for parameter in network.parameters())


def usual_threads(network: nn.Module) -> int:
    """One CPU thread for a small dense network, whose products are too short to share; as many as torch has for others.

    On two cores that other processes kept busy, a step of a dense network of 256 took 2 ms with one thread and 18 with two,
    which wait for each other (2026-11-22). At 0.8 million parameters two quiet ones save a quarter (2026-11-24).
    """
    small = sum(parameter.numel() for parameter in network.parameters()) < SMALL_PARAMETERS
    return 1 if small and not has_convolutions(network) else torch.get_num_threads()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many CPU threads share what this Python thread computes inside the block.

    The number is OpenMP's, which each thread has for itself. torch.set_num_threads would set it for all threads that
    begin later as well: of two fits in two threads each would leave its own number to the other.
    """
    from threadpoolctl import threadpool_limits

    torch.get_num_threads()  # torch sets its own number when a thread first asks: before the block, not inside it
    with threadpool_limits(count, user_api="openmp"):
        yield


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Inside the block this thread, and the threads that it starts, take numbers below 1e-38 for zero.

    Adam's averages of the gradients of dead units fade to such numbers, which processors handle a hundred times slower: after
    2,000 steps on the digits a step took 4.6 ms with them and 2.8 without, with the same weights to the last bit (2026-11-24).
    """
    before = float(torch.tensor(5e-324, dtype=torch.float64) * 1) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Freed memory stays with the process inside the block, where the C library is glibc.

    By default an array above 32 MiB goes back to the system when it is freed, and every step fetches it again, page by page:
    62,000 page faults and 90 of 1,330 ms in a step of a network with 17 million weights (2026-11-24).

    glibc raises its thresholds as arrays are freed, until somebody sets one. They cannot be read; after the block they are what
    they have grown to once an array of 32 MiB was freed, for their first values would fetch every array above 128 KiB anew.
    """
    mallopt, malloc_trim = _of_c_library("mallopt"), _of_c_library("malloc_trim")
    for name, value in KEEP_ALL.items():
        mallopt(name, value)
    try:
        yield
    finally:
        for name, value in AS_GROWN.items():
            mallopt(name, value)
        malloc_trim(0)


def _of_c_library(name: str) -> Any:
    """The C library's function of this name; one that does nothing where there is none."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, name, lambda *arguments: 0)


@contextmanager
def images_in_channels_last(network: nn.Module) -> Iterator[None]:
    """Inside the block images enter every module with convolutions in channels_last.

    A decoder makes its first image by reshaping, in PyTorch's own layout. Added to what a convolution gives, it would bring
    that layout into every later block, and each operation there would pay for two layouts: 20 of 150 ms in a step of a ResNet
    without BatchNorm (2026-11-24).
    """
    hooks = [
        module.register_forward_pre_hook(_to_channels_last)
        for module in network.modules()
        if has_convolutions(module)
    ]
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
def pixels_as_products(network: nn.Module) -> Iterator[None]:
    """Inside the block a convolution that gives a single pixel is computed as the matrix product that it is.

    Encoders often end in one. oneDNN rearranges the weights at every step: for 512 to 1,024 channels, 4x4, on a batch of 64,
    forward and backward took 235 ms, of which the product needs a quarter (2026-11-24).
    """
    layers = [layer for layer in network.modules() if type(layer) is nn.Conv2d and _is_plain(layer)]
    for layer in layers:
        layer.forward = partial(_convolve, layer)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_plain(layer: nn.Conv2d) -> bool:
    own = "forward" in vars(layer)  # somebody has changed this layer, and keeps what he put there
    zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return not own and layer.groups == 1 and layer.dilation == (1, 1) and zeros


def _convolve(layer: nn.Conv2d, images: Tensor) -> Tensor:
    pairs = list(
        zip(images.shape[-2:], layer.kernel_size, layer.stride, layer.padding, strict=True)
    )
    if images.dim() != 4 or any(
        (side + 2 * int(pad) - kernel) // stride for side, kernel, stride, pad in pairs
    ):
        return nn.Conv2d.forward(layer, images)
    (bottom, right), (top, left) = (
        [kernel - int(pad) - side for side, kernel, _, pad in pairs],
        layer.padding,
    )
    padded = F.pad(images, (int(left), right, int(top), bottom))
    columns, weights = (
        padded.permute(0, 2, 3, 1).flatten(1),
        layer.weight.permute(0, 2, 3, 1).flatten(1),
    )
    return F.linear(columns, weights, layer.bias)[:, :, None, None]


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is the first of cuda, mps and cpu that is there.

    Raises:
        InputError: no such device here.
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
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        remedy = 'use --device cpu (device="cpu") or auto'
        if reason.startswith("Expected one of"):
            reason, remedy = "there is no such kind", "give auto, cpu, cuda, cuda:1 or mps"
        if name.startswith("cuda") and torch.version.cuda is None and torch.version.hip is None:
            reason = f"this PyTorch ({torch.__version__}) is a build without CUDA"
            remedy += ", or install a build with it (pytorch.org)"
        raise InputError(f"device {name!r} is not available: {reason}; {remedy}") from None
