"""Set PyTorch's process-wide settings for a block: its kernels and its global random generators.

The settings are restored after the block. A lock keeps threads from changing them at the same time.
So each of several runs in one process gets the kernels and the numbers that it would get alone.

TF32 rounds the inputs of a product to 10 bits of mantissa and sums in float32. It makes tensor
cores available for float32 data. Its effect on results is in docs/log.md (2026-11-27).
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch

LOCK = threading.RLock()
CHOOSING = {"cuda"}  # types of devices that have a choice of kernels


@contextmanager
def kernels(device: torch.device, *, tf32: bool, deterministic: bool = True) -> Iterator[None]:
    """Choose the kernels of convolutions and matrix products that are launched inside the block.

    Other threads that enter such a block wait. So launch kernels inside the block, and wait for
    results outside. A recorded CUDA graph keeps the kernels of its recording. Has no effect on
    other devices than CUDA.

    Args:
        device: where the block computes.
        tf32: allow TF32 for float32 data.
        deterministic: use only cuDNN kernels that give bit-identical results each time.
    """
    if device.type not in CHOOSING:
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    flags = cudnn.flags(enabled=True, benchmark=False, deterministic=deterministic, allow_tf32=tf32)
    with LOCK, flags:
        before = matmul.allow_tf32
        matmul.allow_tf32 = tf32
        try:
            yield
        finally:
            matmul.allow_tf32 = before


def own_kernels(device: torch.device) -> AbstractContextManager[object]:
    """Launch kernels with the process's own settings: threads in blocks of `kernels` wait."""
    return LOCK if device.type in CHOOSING else nullcontext()


def load_linear_algebra(device: torch.device) -> None:
    """Load PyTorch's linear algebra for a device, once and before several threads need it.

    PyTorch loads it at its first use. If two threads are first at the same time, one of them gets
    "RuntimeError: lazy wrapper should be called at most once" (PyTorch's issue 90613).
    """
    if device.type in CHOOSING:
        with LOCK:
            _inverted(device.type)


@cache
def _inverted(device: str) -> torch.Tensor:
    return torch.linalg.inv(torch.ones(1, 1, device=device))


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Restore the state of torch's global random generators after the block.

    Inside the block, hold `LOCK` from seeding a generator to its last draw.
    """
    cuda = device.type == "cuda"
    with LOCK:
        on_host, on_device = (
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if cuda else None,
        )
    try:
        yield
    finally:
        with LOCK:
            torch.set_rng_state(on_host)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device, device)
