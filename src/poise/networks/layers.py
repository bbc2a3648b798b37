"""Layers that TensorFlow has and PyTorch lacks, a dense layer for very many inputs, and spectral normalisation."""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.shapes import Scalar

SMALLEST_NORM = 1e-12


class SameConv2d(nn.Conv2d):
    """Convolution whose output is ceil(size / stride): zeros are added, the odd one at the bottom and right."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride)

    def forward(self, input: Tensor) -> Tensor:
        (top, bottom), (left, right) = (
            _same_padding(input.shape[k], self.kernel_size[0], self.stride[0]) for k in (2, 3)
        )
        if (top, left) == (bottom, right):
            return F.conv2d(input, self.weight, self.bias, self.stride, (top, left))
        return F.conv2d(
            F.pad(input, (left, right, top, bottom)), self.weight, self.bias, self.stride
        )


class SameConvTranspose2d(nn.ConvTranspose2d):
    """Transposed convolution of stride 2 to exactly twice the size: the adjoint of `SameConv2d` on an even size."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, stride=2, padding=(kernel - 2) // 2)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        output = super().forward(input)
        surplus = output.shape[2] - 2 * input.shape[2]
        return F.pad(output, (0, -surplus, 0, -surplus)) if surplus else output


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class WideLinear(nn.Linear):
    """A dense layer for very many inputs n: y = W x / sqrt(n) + b, with W and b drawn as nn.Linear draws them.

    A step of Adam at rate r moves each weight by about r, and so an output of nn.Linear by up to r |x|_1, which grows like n;
    the inputs move too, each along its own weight of about 1 / sqrt(n), which adds up to sqrt(n). Here the first is
    r |x|_1 / sqrt(n), and the second does not grow with n (the output layer of muP: Yang et al. 2022, arXiv 2203.03466).
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input / math.sqrt(self.in_features), self.weight, self.bias)


class SpectrallyNormalised(nn.Module):
    """A dense layer or convolution whose weight W, as a matrix of one row per output, is divided by its spectral norm.

    The norm comes from one power iteration per training step, u <- W v / |W v|, v <- W^T u / |W^T u|, as sigma = u^T W v,
    through which gradients pass (Miyato et al. 2018, algorithm 1). The layer's input is divided by sigma in place of its
    weight, which is the same for a linear map, but for rounding: of 6 million weights no divided copy is made, forward or
    backward.

    Args:
        layer: with a `weight`.
    """

    u: Tensor
    v: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, *, first_iterations: int = 15) -> None:
        super().__init__()
        self.layer = layer
        weight = self._weight().detach()
        self.register_buffer("u", F.normalize(torch.randn_like(weight[:, 0]), dim=0))
        self.register_buffer("v", F.normalize(torch.randn_like(weight[0]), dim=0))
        for _ in range(first_iterations):
            self._iterate()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs / self.spectral_norm())

    def spectral_norm(self) -> Scalar:
        """sigma, in the weight's precision also under autocast; moves u and v in training mode."""
        kind = self.u.device.type  # "meta" has no autocast
        with (
            torch.autocast(kind, enabled=False)
            if torch.amp.is_autocast_available(kind)
            else nullcontext()
        ):
            return self._iterate() if self.training else self.u @ (self._weight() @ self.v)

    def _iterate(self) -> Scalar:
        """One power iteration. Its last product is sigma v, so that sigma needs none of its own."""
        weight = self._weight()
        with torch.no_grad():
            u = F.normalize(weight @ self.v, dim=0)
        product = (
            u @ weight
        )  # not weight.T @ u, whose gradient would be of the transposed layout, and slow to add
        sigma = product.norm()
        self.u.copy_(u)
        self.v.copy_((product / sigma.clamp_min(SMALLEST_NORM)).detach())
        return sigma

    def _weight(self) -> Tensor:
        return self.layer.weight.flatten(1)


def normalise_spectrally(network: nn.Module) -> None:
    """Replace the layers with weights inside a network, in place."""
    for name, child in network.named_children():
        if isinstance(child, (nn.Linear, nn.Conv2d)):
            setattr(network, name, SpectrallyNormalised(child))
        else:
            normalise_spectrally(child)
