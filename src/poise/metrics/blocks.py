"""Check features and read them in blocks of rows.

Only one block at a time is converted to float64, which saves memory.
"""

import torch
from torch import Tensor

from poise.errors import InputError
from poise.shapes import Features

ROWS = 2048  # 2,048 rows of 2,048 features are 32 MiB in float64


def checked(features_a: Features, features_b: Features) -> tuple[Tensor, Tensor]:
    """Check two sets of features and move them to one device.

    The device is the second set's, or the CPU if that device has no float64.

    Args:
        features_a, features_b: (n, d) each, floats; n may differ, but not d.

    Returns:
        Both sets, (n, d) each, in their own dtypes.

    Raises:
        InputError: a set does not have two dimensions, at least two samples and finite values, or
            the sets differ in d.
    """
    a, b = (torch.as_tensor(features).detach() for features in (features_a, features_b))
    if not (a.dim() == b.dim() == 2 and a.shape[1] == b.shape[1] > 0 and min(len(a), len(b)) >= 2):
        raise InputError(
            "features must be (n, d), n >= 2 and equal d in both sets, "
            f"not {tuple(a.shape)} and {tuple(b.shape)}: "
            "take both from one extractor, one row per image"
        )
    for name, features in (("first", a), ("second", b)):
        if not all(block.isfinite().all() for block in features.split(ROWS)):
            raise InputError(
                f"features must be finite; the {name} set has NaN or infinite values: "
                "find the images they come from"
            )
    device = torch.device("cpu") if b.device.type == "mps" else b.device
    return a.to(device), b.to(device)


def mean_of(features: Tensor) -> Tensor:
    """Return the mean over samples, (d,), float64."""
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for block in features.split(ROWS):
        total += block.double().sum(0)
    return total / len(features)
