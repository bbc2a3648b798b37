"""What PyTorch keeps for the whole process and runs of several threads share: choices of kernels, and the global generators.

Here they are set for a block and restored after it. A lock keeps two threads from doing so at the same time, so that several
runs in one process get the kernels and the numbers that each would get alone.

TF32 rounds the inputs of a product to 10 bits of mantissa and adds up in float32. It is what makes tensor cores usable for
float32 data; what it changes is measured in docs/log.md (2026-11-26).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

LOCK = threading.RLock()


@contextmanager
def kernels(device: torch.device, *, tf32: bool, deterministic: bool = True) -> Iterator[None]:
    """Choose the kernels of convolutions and matrix products that are launched inside the block.

    Other threads that ask for kernels wait until the block ends, so launch inside it and wait for results outside. A recorded
    CUDA graph keeps the kernels it was recorded with. On devices other than CUDA nothing happens.

    Args:
        device: where the block computes.
        tf32: allow TF32 for float32 data.
        deterministic: use only those cuDNN kernels that give the same bits each time.
    """
    if device.type != "cuda":
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


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Restore torch's global generators after the block. Inside it, hold `LOCK` from seeding them to the last draw."""
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
