"""TensorFlow 1's bilinear resize, which the 2015 Inception of the reference FID was measured with.

Output pixel i lies at source coordinate s = i * in / out: corners are not aligned and there are no half-pixel centres, so the
picture shifts by up to half a source pixel. With k = floor(s) and k' = min(k + 1, in - 1),

    y[i] = x[k] + (x[k'] - x[k]) * (s - k),

along each row, then along each column. No antialiasing: a large picture is sampled, not averaged.
"""

import torch
from torch import Tensor


def resize_like_tensorflow1(images: Tensor, height: int, width: int) -> Tensor:
    """Images of any value range, (n, channels, height, width); those of that size come back as they are."""
    if images.shape[2:] == (height, width):
        return images
    return _along(_along(images, 3, width), 2, height)


def _along(images: Tensor, dim: int, size: int) -> Tensor:
    """One dimension resized. Coordinates are float32, as in the original, whatever the images are."""
    given = images.shape[dim]
    position = torch.arange(size, dtype=torch.float32, device=images.device) * torch.tensor(
        given / size
    )
    below = position.long()
    above = (below + 1).clamp_max(given - 1)
    share = (position - below).view([size if k == dim else 1 for k in range(4)])
    left = images.index_select(dim, below)
    return left + (images.index_select(dim, above) - left) * share
