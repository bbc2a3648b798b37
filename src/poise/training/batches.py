"""Where batches come from: pictures, or codes of stage 1; and which images are in which batch."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from poise.data.storage import Rows, blocks, gather_rows, scale
from poise.recipes.settings import Stage
from poise.shapes import Features, Latents, Values
from poise.support.seeds import generator

READ_AHEAD = 2  # batches
Draw = Callable[
    [int], Tensor
]  # standard normal noise of so many columns, one row per image of the batch


@runtime_checkable
class Batches(Protocol):
    """Where batches come from.

    `fetch` gets from memory or disk what a batch of these indices needs; it draws nothing, and so may run in a thread,
    `ahead` batches before they are needed. `place` makes the batch of it, on the device.
    """

    @property
    def ahead(self) -> int: ...

    def __len__(self) -> int: ...
    def fetch(self, indices: Tensor) -> Tensor: ...
    def place(self, fetched: Tensor, draw: Draw) -> Tensor: ...


@final
class ImageBatches:
    """Batches of images: uint8 in memory or on disk, float32 in [0, 1] when used.

    On a GPU the images lie in its memory if they take less than a quarter of what is free. Otherwise, and wherever images are
    read from a mapped file, a thread reads ahead; bytes, not floats, cross to the GPU.

    Args:
        images: uint8 (or float32 in [0, 1]) array (n, channels, height, width), perhaps memory-mapped.
        device: where batches are wanted.
    """

    def __init__(self, images: Any, device: torch.device) -> None:
        self.images = images
        self.device = device

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def resident(self) -> Tensor | None:
        """All images on the GPU, if they fit."""
        return to_device(self.images, self.device) if fits(self.images, self.device) else None

    @property
    def ahead(self) -> int:
        mapped = isinstance(self.images, (np.memmap, Rows))
        return READ_AHEAD if self.resident is None and (mapped or self.device.type == "cuda") else 0

    def fetch(self, indices: Tensor) -> Tensor:
        if self.resident is not None:
            return indices
        rows = gather_rows(self.images, indices.numpy())
        return (
            rows.pin_memory() if self.device.type == "cuda" else scale(rows)
        )  # on a CPU the thread may as well scale

    def place(self, fetched: Tensor, draw: Draw) -> Values:
        moved = fetched.to(self.device, non_blocking=True)
        return scale(moved if self.resident is None else self.resident[moved]).contiguous(
            memory_format=torch.channels_last
        )


def fits(images: Any, device: torch.device) -> bool:
    """Whether images may lie in the memory of a GPU, beside the networks."""
    if device.type != "cuda":
        return False
    size = math.prod(images.shape) * images.dtype.itemsize
    return 4 * size < torch.cuda.mem_get_info(device)[0]


def to_device(images: Any, device: torch.device) -> Tensor:
    """All images as they are, on a device; copied block by block."""
    moved = torch.empty(images.shape, dtype=gather_rows(images, [0]).dtype, device=device)
    for rows in blocks(images):
        moved[rows] = torch.from_numpy(np.array(images[rows]))
    return moved


@final
class CodeBatches:
    """Batches of latents z = mean + s * noise, drawn afresh at every visit from the stored codes of stage 1.

    Args:
        mean, logvar: (n, latents).
        device: where batches are wanted.
    """

    def __init__(self, mean: Latents, logvar: Latents, device: torch.device) -> None:
        self.mean = mean.to(device)
        self.std = (0.5 * logvar).exp().to(device)

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def ahead(self) -> int:
        return 0

    def fetch(self, indices: Tensor) -> Tensor:
        return indices

    def place(self, fetched: Tensor, draw: Draw) -> Latents:
        chosen = fetched.to(self.mean.device, non_blocking=True)
        return self.mean[chosen] + self.std[chosen] * draw(self.mean.shape[1])


@final
class VectorBatches:
    """Batches of vectors as they are.

    Args:
        rows: (n, features), float32.
        device: where batches are wanted.
    """

    def __init__(self, rows: Features, device: torch.device) -> None:
        self.rows = rows.to(device)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ahead(self) -> int:
        return 0

    def fetch(self, indices: Tensor) -> Tensor:
        return indices

    def place(self, fetched: Tensor, draw: Draw) -> Features:
        return self.rows[fetched.to(self.rows.device, non_blocking=True)]


@contextmanager
def fetched_ahead(
    data: Batches, wanted: Iterator[Tensor], share: slice
) -> Iterator[Iterator[Tensor]]:
    """What `data` fetches for a share of each batch wanted, by a thread that ends with the block where that pays."""
    if data.ahead == 0:
        yield (data.fetch(indices[share]) for indices in wanted)
        return
    pool = ThreadPoolExecutor(1)
    try:
        yield _in_turn(data.ahead, (pool.submit(data.fetch, indices[share]) for indices in wanted))
    finally:
        pool.shutdown(cancel_futures=True)


def _in_turn(ahead: int, reading: Iterator[Future[Tensor]]) -> Iterator[Tensor]:
    """The results, each when `ahead` more are on their way."""
    waiting = deque(islice(reading, ahead))
    while waiting:
        waiting.extend(islice(reading, 1))
        yield waiting.popleft().result()


def global_batches(
    stage: Stage, num_images: int, *, number: int, seed: int, start: int
) -> Iterator[Tensor]:
    """The indices of the images in each batch, over all processes, from step `start` to the end of the stage.

    Every epoch has an order of its own, a function of (seed, number of the stage, epoch).
    """
    size, per_epoch = min(stage.batch_size, num_images), stage.steps_per_epoch(num_images)
    order, order_epoch = torch.empty(0), -1
    for step in range(start, stage.total_steps(num_images)):
        epoch, position = divmod(step, per_epoch)
        if epoch != order_epoch:
            order = torch.randperm(num_images, generator=generator("order", seed, number, epoch))
            order_epoch = epoch
        yield order[position * size : (position + 1) * size]
