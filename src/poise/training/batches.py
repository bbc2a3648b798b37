"""Where batches come from: pictures, or codes of stage 1; and which images are in which batch."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from poise.datasets import gather
from poise.recipes.settings import Stage
from poise.seeds import generator
from poise.shapes import Latents, Values

Draw = Callable[[int], Tensor]  # standard normal noise of so many columns, one row per image of the batch


@runtime_checkable
class Batches(Protocol):
    """Where batches come from.

    `fetch` gets from memory or disk what a batch of these indices needs; it draws nothing. `place` makes the batch of it,
    on the device.
    """

    def __len__(self) -> int: ...
    def fetch(self, indices: Tensor) -> Tensor: ...
    def place(self, fetched: Tensor, draw: Draw) -> Tensor: ...


@final
class ImageBatches:
    """Batches of images: uint8 in memory or on disk, float32 in [0, 1] when used.

    Args:
        images: uint8 (or float32 in [0, 1]) array (n, channels, height, width), perhaps memory-mapped.
        device: where batches are wanted.
    """

    def __init__(self, images: Any, device: torch.device) -> None:
        self.images = images
        self.device = device

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Tensor) -> Values:
        return gather(self.images, indices.numpy())

    def place(self, fetched: Values, draw: Draw) -> Values:
        return fetched.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)


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

    def fetch(self, indices: Tensor) -> Tensor:
        return indices.to(self.mean.device)

    def place(self, fetched: Tensor, draw: Draw) -> Latents:
        return self.mean[fetched] + self.std[fetched] * draw(self.mean.shape[1])


def global_batches(stage: Stage, num_images: int, *, number: int, seed: int, start: int) -> Iterator[Tensor]:
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
