"""Make a feature extractor from its name or from a file."""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from poise.errors import InputError
from poise.features.dinov2 import dinov2
from poise.features.extractor import Extractor
from poise.features.inception import available_inception, inception, network_file
from poise.features.light import light
from poise.features.pixels import pixels

NAMED: dict[str, Callable[[torch.device], Extractor]] = {
    "inception": lambda device: inception(available_inception(), device),
    "light": light,
    "dinov2": dinov2,
    "pixels": pixels,
}


def make_extractor(spec: str, device: str | torch.device = "cpu") -> Extractor:
    """Return the extractor of a name or a file.

    Args:
        spec: one of

            - "inception": the file in the environment variable POISE_INCEPTION, or torch-fidelity's
              weights, downloaded once;
            - "light": EfficientNet-lite0, without a download;
            - "dinov2": DINOv2, downloaded once;
            - "pixels": averages of pixels;
            - "FILE" or "FILE:range=LOW..HIGH": a TorchScript file that maps (n, 3, 299, 299) to
              (n, features). LOW and HIGH are the inputs for the levels 0 and 255. Without a range
              it must be the 2015 Inception.
        device: where to compute.

    Raises:
        MissingExtraError: the extractor needs a package that is not installed.
        MissingInputError: the file does not exist, or a download failed.
        InputError: there is no extractor of that name, or the file cannot be used.

    Example:
        >>> make_extractor("pixels")(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 192])
    """
    if spec in NAMED:
        return NAMED[spec](torch.device(device))
    path, found, bounds = spec.partition(":range=")
    if not Path(path).exists() and not Path(path).suffix:
        raise InputError(
            f"no extractor {spec!r}: give {', '.join(NAMED)}, "
            "or a TorchScript file as FILE.pt:range=-1..1"
        )
    return network_file(Path(path), _bounds(bounds) if found else None, device=device)


def _bounds(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(".."))
    except ValueError:
        low, high = math.nan, math.nan
    if not (-math.inf < low < high < math.inf):
        raise InputError(
            f"range={text} is not LOW..HIGH: "
            "give what the levels 0 and 255 become, for example -1..1 or 0..255"
        )
    return low, high
