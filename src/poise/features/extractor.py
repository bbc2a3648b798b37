"""Define feature extractors, and run one over any number of images.

An `Extractor` is a network with a name, a checksum and a resize, which together define its numbers.
The network gets every image as RGB float32 in 0..255. Bytes do not change; floats in [0, 1] are
multiplied by 255 and not rounded. Features are float32 (n, d), on the CPU.

On a CPU a network computes in float32. On a GPU it may use TF32. For Inception on an H200, TF32 is
2.4 times faster and changes features by 7e-4 (root mean square). The FID of CIFAR-10's test images
against its training images is 3.151 with TF32 and without.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError, RunError
from poise.shapes import Features
from poise.support.kernels import kernels
from poise.support.progress import progress

EXTRACTION_BATCH = 50
CUDA_BATCH = 500  # 1.2 times as fast as 50 for Inception on an H200 (2026-11-26)
AHEAD = 2  # prefetched batches for a GPU
# 26 to 35 % faster than 50 (2026-11, two cores): glibc reuses the memory of arrays below 32 MiB and
# allocates larger ones again each time.
CPU_BATCH = 5


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network that computes features of images.

    Attributes:
        name: "inception" (only the 2015 Inception of the FID), "light", "dinov2", "pixels", or the
            stem of a file.
        checksum: SHA-256, in hexadecimal digits, of what defines the features: the weights, or for
            "pixels" the definition in words.
        resize: description of the resize, in words.
        network: maps RGB float32 (n, 3, height, width) in 0..255 on `device` to (n, features).
        device: the device of the network.
        classifier: (classes, features), on the CPU. The logits of the Inception Score are
            features @ classifier.T. None: the network has no classifier.
        tf32: allow TF32 on a GPU.
    """

    name: str
    checksum: str
    resize: str
    network: Callable[[Tensor], Tensor]
    device: torch.device
    classifier: Tensor | None = None
    tf32: bool = True

    @property
    def precision(self) -> str:
        """The precision of matrix products and convolutions: "float32" or "TF32"."""
        return "TF32" if self.tf32 and self.device.type == "cuda" else "float32"

    @property
    def batch_size(self) -> int:
        """The number of images in a batch."""
        return CUDA_BATCH if self.device.type == "cuda" else EXTRACTION_BATCH

    @property
    def distance(self) -> str:
        """The name of the Frechet distance: "FID" only for the 2015 Inception, else FD-<name>."""
        return self.metric_name("FID")

    def metric_name(self, metric: str) -> str:
        """Return the name of a metric of these features, for example "KID" or "KID-light".

        Args:
            metric: its name with the features of Inception: "FID", "KID", "IS", ...
        """
        if self.name == "inception":
            return metric
        return f"{'FD' if metric == 'FID' else metric}-{self.name}"

    @torch.no_grad()
    def __call__(self, images: Any) -> Features:
        """Return the features (n, d) of images, float32 on the CPU, computed in batches.

        Args:
            images: (n, 1 or 3, height, width), array or tensor: uint8, or floats in [0, 1]. Grey is
                repeated to three channels.

        Raises:
            InputError: there are no images, their shape, type or range differs, or the network does
                not return (n, d).
            RunError: a feature is not finite.
        """
        images = _checked(
            images if isinstance(images, Tensor) else torch.from_numpy(np.ascontiguousarray(images))
        )
        size = CPU_BATCH if self.device.type == "cpu" else self.batch_size
        return torch.cat([self._features(part) for part in images.split(size)])

    def _features(self, images: Tensor) -> Features:
        images = images.to(self.device)
        levels = images.float() if images.dtype == torch.uint8 else images.float() * 255
        with kernels(self.device, tf32=self.tf32, deterministic=False):
            launched = self.network(levels.expand(-1, 3, -1, -1)).float()
        features = launched.cpu()
        if features.ndim != 2 or len(features) != len(images):
            raise InputError(
                f"extractor {self.name} gives {tuple(features.shape)} for {len(images)} images, "
                "not (images, features)"
            )
        if not features.isfinite().all():
            raise RunError(
                f"extractor {self.name} gives features that are not finite: "
                "its weights or its input range are wrong"
            )
        return features


def _checked(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError(
            f"images must have shape (n, 1 or 3, height, width), not {tuple(images.shape)}"
        )
    if images.numel() == 0:
        raise InputError(f"there are no images: their shape is {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise InputError(f"images must be bytes or floats in [0, 1], not {images.dtype}")
    least, most = images.aminmax()
    if not (least >= 0 and most <= 1):
        raise InputError(
            f"images must be bytes or floats in [0, 1], not floats from {least:g} to {most:g}"
        )
    return images


def extract(
    extractor: Extractor,
    images: Any,
    *,
    total: int | None = None,
    title: str = "features",
    quiet: bool = True,
) -> Features:
    """Return the features of all images, (n, features), float32 on the CPU, in their order.

    Memory holds all features, but only a few batches of images. The batch size changes features by
    less than 1e-5. For a GPU, batches of an iterable are joined to batches of the extractor's size,
    and a thread prefetches them.

    Args:
        extractor: from `make_extractor`.
        images: (n, 1 or 3, height, width), an array, tensor or `poise.data.Rows`; or an iterable of
            such batches, for example a generator. uint8, or floats in [0, 1].
        total: number of images in an iterable, for the progress bar. None: unknown; no progress
            bar.
        title: shown beside the progress bar.
        quiet: show no progress.

    Raises:
        InputError: see `Extractor`; or an iterable yields no image, or not `total` images.
        RunError: a feature is not finite.
    """
    total = len(images) if hasattr(images, "shape") else total
    with progress(title, total or 0, quiet=quiet or total is None) as display:
        batches = _batches(images, extractor.batch_size)
        if extractor.device.type == "cuda":
            batches = _in_background(_regrouped(batches, extractor.batch_size), extractor.device)
        return _joined(map(extractor, batches), total, lambda done: display.update(done, {}))


def _batches(images: Any, size: int) -> Iterator[Any]:
    if not hasattr(images, "shape"):
        yield from images
        return
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _regrouped(parts: Iterable[Any], size: int) -> Iterator[Tensor]:
    """Join parts to batches of at least `size` images; the last batch may be smaller."""
    held: list[Tensor] = []
    for part in parts:
        held.append(
            part if isinstance(part, Tensor) else torch.from_numpy(np.ascontiguousarray(part))
        )
        if sum(map(len, held)) >= size:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def _in_background(batches: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Prefetch batches in a background thread, in order, on a separate CUDA stream."""
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    if side is not None:
        side.wait_stream(torch.cuda.current_stream(device))

    def make() -> Tensor | None:
        with torch.cuda.stream(side) if side is not None else nullcontext():
            return next(batches, None)

    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(make) for _ in range(AHEAD))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(make))
            yield batch


def _joined(parts: Iterable[Tensor], total: int | None, report: Callable[[int], None]) -> Features:
    """Concatenate all parts. If the total is known, the result is allocated only once."""
    features, done, kept = torch.empty(0), 0, []
    for part in parts:
        if total is None:
            kept.append(part)
        elif done + len(part) <= total:
            features = features if done else torch.empty(total, part.shape[1])
            features[done : done + len(part)] = part
        done += len(part)
        report(done)
    if done == 0 or done != (total or done):
        raise InputError(
            f"the batches held {done} images, not {'one or more' if total is None else total}: "
            "give all images, and their number as total"
        )
    return features if total is not None else torch.cat(kept)
