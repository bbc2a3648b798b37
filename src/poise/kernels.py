"""Which kernels a GPU computes with: deterministic or not, in full float32 or in TF32.

PyTorch keeps these choices in flags of the whole process. Here they are set for a block and restored after it. A lock keeps
two threads from setting them at the same time, so that several runs can share a process and each gets the kernels it asked for.

TF32 rounds the inputs of a product to 10 bits of mantissa and adds up in float32. It is what makes tensor cores usable for
float32 data; what it changes is measured in docs/log.md (2026-11-26).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

LOCK = threading.RLock()  # held while the flags are changed; also while something else that threads share is


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
