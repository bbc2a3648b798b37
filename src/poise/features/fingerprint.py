"""Recognise the 2015 Inception by its features of one test picture.

The picture has 64x64 pixels, so the features also depend on the resize. Its pixel (c, y, x) is

    127.5 + 127.5 sin(y (c + 1) / 5 + x (c + 2) / 7).

The expected features, every 128th, were measured with the TorchScript file that holds the weights
of the original graph.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from poise.shapes import Images

TOLERANCE = 1e-3
EXPECTED = torch.tensor(  # features 0, 128, 256, ...
    [
        [0.067886, 0.512549, 0.622783, 0.006725, 0.105920, 0, 0.093955, 0],
        [0, 0, 0.009551, 0.396934, 0, 0.059921, 0.093790, 0.870619],
    ]
).flatten()


@torch.no_grad()
def is_inception(network: Callable[[Tensor], Tensor]) -> bool:
    """Return whether a network computes the features of the 2015 Inception.

    Args:
        network: maps RGB (n, 3, height, width) in 0..255 to features (n, d), on the CPU.
    """
    features = network(picture())
    if features.shape != (1, 2048):
        return False
    return bool((features[0, ::128] - EXPECTED).abs().max() < TOLERANCE)


def picture() -> Images:
    """Return the test picture, (1, 3, 64, 64), in 0..255."""
    c, y, x = (torch.arange(n, dtype=torch.float64) for n in (3, 64, 64))
    phase = y[:, None] * (c + 1)[:, None, None] / 5 + x * (c + 2)[:, None, None] / 7
    return (127.5 + 127.5 * phase.sin())[None].float()
