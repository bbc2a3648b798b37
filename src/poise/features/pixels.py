"""Compute area averages of pixels, in [0, 1], as features, for tests and quick comparisons.

A side of n pixels is divided into k = min(n, 16) cells. Cell i averages pixels floor(i n / k) to
ceil((i + 1) n / k) - 1.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from poise.features.extractor import Extractor

CELLS = 16
# Its hash is the checksum of the extractor: do not change this text.
DEFINITION = (
    f"area averages over at most {CELLS}x{CELLS} cells, "
    "divided by 255, channel by channel, row by row"
)


def pixels(device: str | torch.device = "cpu") -> Extractor:
    """Return the extractor of cell averages: (n, 768) features for images from 16x16 pixels."""
    checksum = hashlib.sha256(DEFINITION.encode()).hexdigest()
    return Extractor(
        "pixels", checksum, f"area average to at most {CELLS}", _averages, torch.device(device)
    )


def _averages(levels: Tensor) -> Tensor:
    rows, columns = (min(side, CELLS) for side in levels.shape[2:])
    return F.adaptive_avg_pool2d(levels, (rows, columns)).flatten(1) / 255
