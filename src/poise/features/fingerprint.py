"""Whether a network is the 2015 Inception, told by what it does: its features of one picture that a formula draws.

The picture is 64x64, so that the resize is in it too; pixel (c, y, x) is 127.5 + 127.5 sin(y (c + 1) / 5 + x (c + 2) / 7).
The features below, every 128th, were measured with the TorchScript file that holds the weights of the original graph.
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
    """Whether a network from RGB in 0..255 to features, on the CPU, gives the 2015 Inception's features."""
    features = network(picture())
    if features.shape != (1, 2048):
        return False
    return bool((features[0, ::128] - EXPECTED).abs().max() < TOLERANCE)


def picture() -> Images:
    """The picture, (1, 3, 64, 64), in 0..255."""
    c, y, x = (torch.arange(n, dtype=torch.float64) for n in (3, 64, 64))
    phase = y[:, None] * (c + 1)[:, None, None] / 5 + x * (c + 2)[:, None, None] / 7
    return (127.5 + 127.5 * phase.sin())[None].float()
