"""Layers that PyTorch lacks: TensorFlow's "same" padding, wide dense layers, spectral norm."""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.shapes import Scalar

SMALLEST_NORM = 1e-12
FIRST_ITERATIONS = 15  # power iterations at construction


class SameConv2d(nn.Conv2d):
    """Convolve with TensorFlow's "same" padding: the output size is ceil(size / stride).

    An odd number of padding zeros has its extra zero at the bottom and right.
    """

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
    """Apply a transposed convolution of stride 2 that exactly doubles the size.

    It is the adjoint of `SameConv2d` for even sizes.
    """

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
    """Apply a dense layer for a large number n of inputs: y = W x / sqrt(n) + b.

    W and b have the initial distribution of `nn.Linear`. Division by sqrt(n) limits how far one
    step of Adam moves an output. At learning rate r, in `nn.Linear`:

    - each weight moves by about r, which moves an output by up to r |x|_1. This grows like n.
    - each input moves too, along its weight of about 1 / sqrt(n). These moves sum to about sqrt(n).

    Here the first is r |x|_1 / sqrt(n), and the second does not grow with n.

    Source: the output layer of muP, Yang et al. 2022, arXiv 2203.03466.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input / math.sqrt(self.in_features), self.weight, self.bias)


class SpectrallyNormalised(nn.Module):
    """Divide the weight W of a dense layer or convolution by its spectral norm sigma.

    W is taken as a matrix with one row per output. Each training step does one power iteration,

        u <- W v / |W v|,        v <- W^T u / |W^T u|,        sigma = u^T W v.

    Gradients pass through sigma. The input of the layer is divided by sigma in place of the weight.
    For a linear map this is the same except for rounding, and no divided copy of 6 million weights
    is made in the forward or backward pass.

    Args:
        layer: the layer to normalise.

    Source: Miyato et al. 2018, algorithm 1.
    """

    u: Tensor
    v: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        weight = self._weight().detach()
        self.register_buffer("u", F.normalize(torch.randn_like(weight[:, 0]), dim=0))
        self.register_buffer("v", F.normalize(torch.randn_like(weight[0]), dim=0))
        for _ in range(FIRST_ITERATIONS):
            self._iterate()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs / self.spectral_norm())

    def spectral_norm(self) -> Scalar:
        """Return sigma, in the precision of the weight also under autocast.

        In training mode this updates u and v.
        """
        kind = self.u.device.type  # device type "meta" has no autocast
        with (
            torch.autocast(kind, enabled=False)
            if torch.amp.is_autocast_available(kind)
            else nullcontext()
        ):
            return self._iterate() if self.training else self.u @ (self._weight() @ self.v)

    def _iterate(self) -> Scalar:
        """Do one power iteration and return sigma, the norm of its last product, sigma v."""
        weight = self._weight()
        with torch.no_grad():
            u = F.normalize(weight @ self.v, dim=0)
        # The gradient of weight.T @ u would have the transposed layout and be slow to add.
        product = u @ weight
        sigma = product.norm()
        self.u.copy_(u)
        self.v.copy_((product / sigma.clamp_min(SMALLEST_NORM)).detach())
        return sigma

    def _weight(self) -> Tensor:
        return self.layer.weight.flatten(1)


def normalise_spectrally(network: nn.Module) -> None:
    """Replace dense layers and convolutions by spectrally normalised ones, in place.

    Args:
        network: the module whose layers are replaced, at any depth.
    """
    for name, child in network.named_children():
        if isinstance(child, (nn.Linear, nn.Conv2d)):
            setattr(network, name, SpectrallyNormalised(child))
        else:
            normalise_spectrally(child)
