"""Load batches of images, of codes of stage 1 or of vectors, and shuffle them in each epoch."""

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
from poise.latent import DiagonalGaussian
from poise.recipes.settings import Stage
from poise.shapes import ClassOfEach, Features, Latents, Values
from poise.support.seeds import generator

READ_AHEAD = 2  # prefetched batches
Draw = Callable[[int], Tensor]  # number of columns -> standard normal noise (batch, columns)


@runtime_checkable
class Batches(Protocol):
    """The training data of a stage, in batches.

    `fetch` reads the rows of a batch from memory or disk. It draws no noise, so a thread may
    prefetch `ahead` batches. `place` makes the batch from these rows, on the device.
    """

    @property
    def ahead(self) -> int: ...

    def __len__(self) -> int: ...
    def fetch(self, indices: Tensor) -> Tensor: ...
    def place(self, fetched: Tensor, draw: Draw) -> Tensor: ...


@final
class ImageBatches:
    """Batches of images: uint8 in memory or on disk, float32 in [0, 1] in a batch.

    All images stay on the GPU if they take less than a quarter of its free memory. Otherwise a
    thread prefetches batches, and copies them to the GPU as uint8. On a CPU a thread prefetches
    only memory-mapped images.

    Batches are in `torch.channels_last`, as are the weights that `new_state` prepares. A bare loop
    of the released CIFAR-10 network is 1.08 times as fast in that layout on an AMD EPYC processor
    (docs/log.md, 2026-11-26). Values differ by rounding.

    Args:
        images: uint8 (or float32 in [0, 1]) array (n, channels, height, width), in memory or
            memory-mapped.
        device: of the batches.
        flips: mirror each image left to right with probability 1/2.
    """

    def __init__(self, images: Any, device: torch.device, *, flips: bool = False) -> None:
        self.images = images
        self.device = device
        self.flips = flips

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def resident(self) -> Tensor | None:
        """Return all images on the GPU, or None if they do not fit."""
        return to_device(self.images, self.device) if fits(self.images, self.device) else None

    @property
    def ahead(self) -> int:
        read = isinstance(self.images, np.memmap) or (
            isinstance(self.images, Rows) and not self.images.in_memory
        )
        return READ_AHEAD if self.resident is None and (read or self.device.type == "cuda") else 0

    def fetch(self, indices: Tensor) -> Tensor:
        if self.resident is not None:
            return indices
        rows = gather_rows(self.images, indices.numpy())
        # Scaled in `place`: torch would start threads for it here, beside those of the step.
        return rows.pin_memory() if self.device.type == "cuda" else rows

    def place(self, fetched: Tensor, draw: Draw) -> Values:
        moved = fetched.to(self.device, non_blocking=True)
        batch = scale(moved if self.resident is None else self.resident[moved])
        if self.flips:
            batch = torch.where(draw(1)[:, :, None, None] > 0, batch.flip(3), batch)
        return batch.contiguous(memory_format=torch.channels_last)


def fits(images: Any, device: torch.device) -> bool:
    """Return whether all images take less than a quarter of a GPU's free memory."""
    if device.type != "cuda":
        return False
    size = math.prod(images.shape) * images.dtype.itemsize
    return 4 * size < torch.cuda.mem_get_info(device)[0]


def to_device(images: Any, device: torch.device) -> Tensor:
    """Copy all images to a device, block by block, in their dtype."""
    moved = torch.empty(images.shape, dtype=gather_rows(images, [0]).dtype, device=device)
    for rows in blocks(images):
        moved[rows] = torch.from_numpy(np.array(images[rows]))
    return moved


@final
class CodeBatches:
    """Batches of latents z = mean + std * noise, sampled again in each epoch from stage 1's codes.

    Args:
        mean, logvar: (n, latents), of the posteriors of stage 1.
        device: of the batches.
        mirrored: posteriors of the mirrored images in the same order. Each of them replaces that of
            its image with probability 1/2. None: none.
        labels: (n,), the class of each image, which becomes the last column of a batch. None: no
            such column.
    """

    def __init__(
        self,
        mean: Latents,
        logvar: Latents,
        device: torch.device,
        *,
        mirrored: DiagonalGaussian | None = None,
        labels: ClassOfEach | None = None,
    ) -> None:
        self.number, self.flips = len(mean), mirrored is not None
        self.labels = None if labels is None else labels.float()[:, None].to(device)
        if mirrored is not None:
            mean, logvar = (
                torch.cat(pair) for pair in ((mean, mirrored.mean), (logvar, mirrored.logvar))
            )
        self.mean = mean.to(device)
        self.std = (0.5 * logvar).exp().to(device)

    def __len__(self) -> int:
        return self.number

    @property
    def ahead(self) -> int:
        return 0

    def fetch(self, indices: Tensor) -> Tensor:
        return indices

    def place(self, fetched: Tensor, draw: Draw) -> Latents:
        rows = chosen = fetched.to(self.mean.device, non_blocking=True)
        if self.flips:
            chosen = torch.where(draw(1)[:, 0] > 0, chosen + self.number, chosen)
        latents = self.mean[chosen] + self.std[chosen] * draw(self.mean.shape[1])
        return latents if self.labels is None else torch.cat([latents, self.labels[rows]], 1)


@final
class VectorBatches:
    """Batches of vectors, such as rows of a table.

    Args:
        rows: (n, features), float32.
        device: of the batches.
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
    """Yield an iterator over the fetched rows of each batch; prefetch if `data.ahead` is not 0.

    Args:
        data: the training data.
        wanted: row numbers of each global batch.
        share: the part of each global batch that this process fetches.
    """
    if data.ahead == 0:
        yield (data.fetch(indices[share]) for indices in wanted)
        return
    pool = ThreadPoolExecutor(1)
    try:
        yield _prefetched(
            data.ahead, (pool.submit(data.fetch, indices[share]) for indices in wanted)
        )
    finally:
        pool.shutdown(cancel_futures=True)


def _prefetched(ahead: int, reading: Iterator[Future[Tensor]]) -> Iterator[Tensor]:
    """Yield the results in order, and keep `ahead` further batches in progress."""
    waiting = deque(islice(reading, ahead))
    while waiting:
        waiting.extend(islice(reading, 1))
        yield waiting.popleft().result()


def global_batches(
    stage: Stage, num_images: int, *, number: int, seed: int, start: int
) -> Iterator[Tensor]:
    """Yield the row numbers of each global batch, from step `start` to the end of the stage.

    The order of an epoch is a function of (seed, number of the stage, epoch).
    """
    size, per_epoch = min(stage.batch_size, num_images), stage.steps_per_epoch(num_images)
    order, order_epoch = torch.empty(0), -1
    for step in range(start, stage.total_steps(num_images)):
        epoch, position = divmod(step, per_epoch)
        if epoch != order_epoch:
            order = torch.randperm(num_images, generator=generator("order", seed, number, epoch))
            order_epoch = epoch
        yield order[position * size : (position + 1) * size]
