"""The picture itself as features: area averages over at most 16x16 cells, in [0, 1]. For tests and for quick looks.

Cell i of k along a side of n pixels averages pixels floor(i n / k) to ceil((i + 1) n / k) - 1; k = min(n, 16).
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from poise.features.extractor import Extractor

CELLS = 16
DEFINITION = f"area averages over at most {CELLS}x{CELLS} cells, divided by 255, channel by channel, row by row"


def pixels(device: str | torch.device = "cpu") -> Extractor:
    """Averages over cells: (n, 3 * 16 * 16) features for pictures of at least 16x16 pixels."""
    checksum = hashlib.sha256(DEFINITION.encode()).hexdigest()
    return Extractor(
        "pixels", checksum, f"area average to at most {CELLS}", _averages, torch.device(device)
    )


def _averages(levels: Tensor) -> Tensor:
    rows, columns = (min(side, CELLS) for side in levels.shape[2:])
    return F.adaptive_avg_pool2d(levels, (rows, columns)).flatten(1) / 255
