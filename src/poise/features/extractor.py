"""What turns images into features, and the loop that runs it over any number of them.

An `Extractor` is a network with the name, checksum and resize that say which numbers it makes. It sees every image as RGB
float32 in 0..255: bytes as they are, floats in [0, 1] times 255 and never rounded. Features are float32 (n, d), on the CPU.

On a CPU a network computes in float32. On a GPU it may use TF32, which is 2.4 times faster for Inception on an H200 and moves
its features by 7e-4 (root mean square); the FID of CIFAR-10's test against its training images is 3.151 either way.
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
AHEAD = 2  # batches for a GPU that are made before they are asked for
CPU_BATCH = 5  # 26 to 35 % faster than 50 (2026-11, two cores): glibc reuses arrays below 32 MiB and has larger ones made anew


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network that describes images by features.

    Attributes:
        name: "inception" (the 2015 Inception of the FID, and nothing else), "light", "dinov2", "pixels", or the stem of a file.
        checksum: SHA-256, in hexadecimal digits, of what defines its numbers: the weights.
        resize: in words.
        network: from RGB float32 (n, 3, height, width) in 0..255 on `device` to (n, features).
        device: where it computes.
        tf32: allow TF32 on a GPU.
        classifier: (classes, features), on the CPU: its logits are features @ classifier.T, which the Inception Score needs.
            None: it has none.
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
        """What its arithmetic is: "float32", or "TF32"."""
        return "TF32" if self.tf32 and self.device.type == "cuda" else "float32"

    @property
    def batch_size(self) -> int:
        """How many images are best given to it at a time."""
        return CUDA_BATCH if self.device.type == "cuda" else EXTRACTION_BATCH

    @property
    def distance(self) -> str:
        """What the Frechet distance of these features is called: FID for the 2015 Inception alone, else FD-<name>."""
        return self.metric_name("FID")

    def metric_name(self, metric: str) -> str:
        """A metric's name that says whose features it is of: of "KID" for example "KID", "KID-light".

        Args:
            metric: its name under Inception: "FID", "KID", "IS", ...
        """
        if self.name == "inception":
            return metric
        return f"{'FD' if metric == 'FID' else metric}-{self.name}"

    @torch.no_grad()
    def __call__(self, images: Any) -> Features:
        """Features (n, d) of images, float32 on the CPU, computed some images at a time.

        Args:
            images: (n, 1 or 3, height, width), array or tensor: bytes, or floats in [0, 1]; grey is repeated to three channels.

        Raises:
            InputError: another shape, type or range, or no image at all; or the network does not give (n, d).
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
                f"extractor {self.name} gives {tuple(features.shape)} for {len(images)} images, not (images, features)"
            )
        if not features.isfinite().all():
            raise RunError(
                f"extractor {self.name} gives features that are not finite: its weights or its input range are wrong"
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
    """Features of every image, (n, features), float32 on the CPU, in the order of the images.

    Only a few batches of images and all features are in memory. The batch size moves features by less than 1e-5. For a GPU
    images that come in parts are joined to its batches, and a thread gets the next ones while it computes.

    Args:
        extractor: from `make_extractor`.
        images: (n, 1 or 3, height, width), an array, tensor or `poise.data.Rows`; or an iterable of such batches, which
            may be generated while it runs. Bytes, or floats in [0, 1].
        total: how many images an iterable gives, for the progress bar; None: as many as come, without one.
        title: shown beside the progress bar.
        quiet: no progress display.

    Raises:
        InputError: see `Extractor`; or an iterable gave no image, or not `total` of them.
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
    """Join parts to batches of at least `size` images; the last one may be smaller."""
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
    """Make batches in a thread, some ahead of the one that is asked for, in the same order; on a CUDA stream of its own."""
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
    """All parts in one tensor, which is allocated once where the total is known."""
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
            f"there were {done} images, not {'any' if total is None else total}: no features of them can be given"
        )
    return features if total is not None else torch.cat(kept)
