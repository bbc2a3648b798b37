"""Resize images as TensorFlow 1 did (bilinear), as the reference FID's 2015 Inception requires.

Output pixel i lies at source coordinate s = i * in / out. Corners are not aligned, and the formula
has no half-pixel centres, so the picture shifts by up to half a source pixel. With k = floor(s) and
k' = min(k + 1, in - 1),

    y[i] = x[k] + (x[k'] - x[k]) * (s - k),

along each row, then along each column. No antialiasing: a large picture is sampled, not averaged.
"""

import torch
from torch import Tensor


def resize_like_tensorflow1(images: Tensor, height: int, width: int) -> Tensor:
    """Return images resized to (n, channels, height, width); images of that size are unchanged.

    Args:
        images: (n, channels, any height, any width), of any value range.
        height, width: of the result, in pixels.
    """
    if images.shape[2:] == (height, width):
        return images
    return _resize_along(_resize_along(images, 3, width), 2, height)


def _resize_along(images: Tensor, dim: int, size: int) -> Tensor:
    """Resize one dimension. Coordinates are float32 for images of any dtype, as in TensorFlow."""
    given = images.shape[dim]
    position = torch.arange(size, dtype=torch.float32, device=images.device) * torch.tensor(
        given / size
    )
    below = position.long()
    above = (below + 1).clamp_max(given - 1)
    share = (position - below).view([size if k == dim else 1 for k in range(4)])
    left = images.index_select(dim, below)
    return left + (images.index_select(dim, above) - left) * share
