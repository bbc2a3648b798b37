"""Resize and scale images before a network.

The features are network((resize(levels) - shift) / divisor), for levels in 0..255.
"""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn


@final
class Prepared(nn.Module):
    """A network with its preprocessing; takes RGB (n, 3, height, width) in 0..255 of any size.

    Args:
        network: maps resized and scaled images to features (n, features).
        resize: maps images of any size, in 0..255, to the network's size.
        shift: the level that becomes 0; one number, or one per channel.
        divisor: levels per unit of the network's input; one number, or one per channel.
    """

    def __init__(
        self,
        network: nn.Module,
        resize: Callable[[Tensor], Tensor],
        *,
        shift: float | tuple[float, float, float],
        divisor: float | tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.shift: Tensor
        self.divisor: Tensor
        self.network, self.resize = network, resize
        self.register_buffer("shift", torch.tensor(shift).view(-1, 1, 1))
        self.register_buffer("divisor", torch.tensor(divisor).view(-1, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, levels: Tensor) -> Tensor:
        scaled = (self.resize(levels) - self.shift) / self.divisor
        return self.network(scaled.contiguous(memory_format=torch.channels_last))
