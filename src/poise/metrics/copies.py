"""Find the nearest training image of generated images: does a model copy its training images?

The distance of two images is the root mean squared difference of their pixel values, in [0, 1]:

    d(x, y) = sqrt(mean over pixels and channels of (x - y)^2).

Pixels need no other network, and an exact copy has d = 0. This distance does not find copies that
are shifted. Mirror images are searched if the run was trained on them. Blurred images are nearer to
all others. So samples are compared with reconstructions of held-out images, which are as blurred.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.data import gather
from poise.shapes import Images
from poise.support.seeds import drawn

MOST_VALUES = 2**29  # pixel values searched: 5 to 7 s for 216 images on one core (2026-11-26)
BLOCK_VALUES = 2**24  # of training images in memory at a time: 64 MiB
# A sample is a near copy if its distance is below this share of the median distance of
# reconstructions. Of 64 samples, 61 were after 5 minutes on 60 faces, 37 after 2 minutes, and none
# after 10 minutes on 500 or 9,000 (docs/log.md, 2026-11-28).
COPIED = 0.5
FEW = 0.1  # share of samples of which nothing is said


@dataclass(frozen=True)
class Nearest:
    """Nearest training images.

    Attributes:
        images: the nearest training image of each image, (n, channels, height, width).
        distances: their distances, (n,).
    """

    images: Images
    distances: Tensor


def most_searched(training: Any) -> int:
    """Return how many training images `nearest` searches."""
    return min(len(training), max(1, MOST_VALUES // training[0].size))


def nearest(
    images: Images, training: Any, device: str | torch.device = "cpu", *, mirrored: bool = False
) -> Nearest:
    """Return the training image with the smallest distance from each image.

    Of a very large data set, `most_searched` images that a fixed seed draws are searched. Needs
    memory for a block of `BLOCK_VALUES` pixel values only.

    Args:
        images: (n, channels, height, width), float in [0, 1], on the CPU.
        training: (m, channels, height, width), training images of a `Dataset`.
        device: where the distances are computed.
        mirrored: also search the mirror images, left to right, of the training images.
    """
    searched = torch.tensor(drawn(len(training), most_searched(training)))
    sides = torch.cat([images, images.flip(3)]) if mirrored else images
    queries = sides.flatten(1).to(device) - 0.5  # centred: smaller products, less rounding
    least = torch.full((len(queries),), torch.inf, device=device)
    where = torch.zeros(len(queries), dtype=torch.long)
    for part in searched.split(max(1, BLOCK_VALUES // queries.shape[1])):
        block = gather(training, part).flatten(1).to(device) - 0.5
        # |q - x|^2 without |q|^2, which is the same for all x
        squared, column = (block.square().sum(1) - 2 * queries @ block.T).min(1)
        closer = (squared < least).cpu()
        where[closer] = part[column.cpu()][closer]
        least = torch.minimum(least, squared)
    side = least.cpu().view(-1, len(images)).argmin(0)
    found = gather(training, where.view(-1, len(images)).gather(0, side[None])[0])
    found[side == 1] = found[side == 1].flip(3)
    return Nearest(found, (images - found).square().flatten(1).mean(1).sqrt())


def copies_note(
    samples: Images,
    reconstructed: Tensor,
    training: Any,
    device: str | torch.device = "cpu",
    *,
    mirrored: bool = False,
) -> str | None:
    """Return a sentence that says that samples are copies of training images. None: they are not.

    Args:
        samples: generated images, (n, channels, height, width), float in [0, 1].
        reconstructed: reconstructions of images that were not trained on, any number of them.
        training, device, mirrored: see `nearest`.
    """
    images = torch.cat([samples, reconstructed])
    distances = nearest(images, training, device, mirrored=mirrored).distances
    of_samples, of_others = distances.split([len(samples), len(reconstructed)])
    usual = float(of_others.median())
    copied = int((of_samples < COPIED * usual).sum())
    if copied <= FEW * len(samples):
        return None
    return (
        f"{copied} of {len(samples)} samples are near copies of training images, at less than "
        f"{COPIED:g} of the distance of reconstructed test images ({usual:.3f}): train on more "
        "images, or for a shorter time"
    )
