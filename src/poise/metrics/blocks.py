"""Features as the metrics take them: checked once, and read in float64 blocks of rows, so that no set is ever copied whole."""

import torch
from torch import Tensor

from poise.errors import InputError
from poise.shapes import Features

ROWS = 2048  # 2,048 rows of 2,048 features are 32 MiB in float64


def checked(features_a: Features, features_b: Features) -> tuple[Tensor, Tensor]:
    """Two sets of features, fit to be compared, on one device: the second's, or the CPU where that one has no float64.

    Args:
        features_a, features_b: (n, d) each, floats; n may differ, but not d.

    Raises:
        InputError: not two dimensions, differing d, fewer than two samples, or values that are not finite.
    """
    a, b = (torch.as_tensor(features).detach() for features in (features_a, features_b))
    if not (a.dim() == b.dim() == 2 and a.shape[1] == b.shape[1] > 0 and min(len(a), len(b)) >= 2):
        raise InputError(
            f"features must be (n, d), n >= 2 and equal d in both sets, not {tuple(a.shape)} and {tuple(b.shape)}: "
            "take both from one extractor, one row per image"
        )
    for name, features in (("first", a), ("second", b)):
        if not all(block.isfinite().all() for block in features.split(ROWS)):
            raise InputError(
                f"features must be finite; the {name} set has NaN or infinite values: find the images they come from"
            )
    device = torch.device("cpu") if b.device.type == "mps" else b.device
    return a.to(device), b.to(device)


def mean_of(features: Tensor) -> Tensor:
    """Mean over samples, (d,), float64."""
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for block in features.split(ROWS):
        total += block.double().sum(0)
    return total / len(features)
