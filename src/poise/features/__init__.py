"""Feature extractors for metrics: the 2015 Inception of the original FID, through torch-fidelity or as a TorchScript file.

Weights are torch-fidelity's own (downloaded once by it), or a local file. Images are resized to 299x299 as TensorFlow 1 did
(bilinear, corners not aligned, no half-pixel centres): the resize of the reference FID, which moves features if replaced.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError, MissingExtraError, MissingInputError
from poise.progress import progress
from poise.shapes import Features

Extractor = Callable[[Tensor], Tensor]
EXTRACTION_BATCH = 50
WEIGHTS_VARIABLE = "POISE_INCEPTION"


def available_inception() -> Path | None:
    """Local Inception weights: the file that POISE_INCEPTION names, or the one torch-fidelity downloaded before."""
    named = os.environ.get(WEIGHTS_VARIABLE)
    if named:
        return Path(named)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    return cached if cached.exists() else None


def inception(weights: Path | None = None, device: str | torch.device = "cpu") -> Extractor:
    """A function from RGB bytes (n, 3, height, width) to the 2048 features of Inception's last pooling layer.

    Args:
        weights: torch-fidelity's weights, or a TorchScript file that maps (n, 3, 299, 299) scaled to (bytes - 128) / 128 to
            (n, 2048); None: torch-fidelity's own, downloaded once.
        device: where to compute.

    Raises:
        MissingExtraError: torch-fidelity is not installed.
        MissingInputError: there is no such file, or the download failed.
        InputError: the file is neither.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # pyright: ignore[reportMissingImports]
        from torch_fidelity.interpolate_compat_tensorflow import (  # pyright: ignore[reportMissingImports]
            interpolate_bilinear_2d_like_tensorflow1x as resize,
        )
    except ImportError:
        raise MissingExtraError("FID", "eval") from None
    if weights is not None and not weights.is_file():
        raise MissingInputError(f"{weights}: no such file; Inception weights come from torch-fidelity's download page")
    scripted = _torchscript(weights, device) if weights else None
    if scripted is not None:
        return lambda images: scripted((resize(images.to(device).float(), size=(299, 299), align_corners=False) - 128) / 128)
    try:
        if weights:
            torch.load(weights, weights_only=True)  # torch-fidelity would unpickle anything: this refuses all but tensors
        network: Any = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights) if weights else None)
    except OSError as error:
        raise MissingInputError(
            f"Inception's weights could not be downloaded ({error}); set {WEIGHTS_VARIABLE} to a local file"
        ) from error
    except (RuntimeError, LookupError, TypeError, ValueError, EOFError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{weights}: neither a TorchScript file nor torch-fidelity's Inception weights ({reason})") from error
    network = network.to(device)
    return lambda images: network(images.to(device))[0]


def _torchscript(path: Path, device: str | torch.device) -> Any | None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated")  # the file has no other form
            return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError:
        return None


@torch.no_grad()
def extract(extractor: Extractor, images: Any, *, title: str = "features", quiet: bool = False) -> Features:
    """Features of every image, (n, features), float32 on the CPU.

    Args:
        extractor: from `inception`.
        images: uint8 (n, channels, height, width), array or tensor; grey images are repeated to three channels.
        title: shown beside the progress bar.
        quiet: no progress display.
    """
    parts: list[Tensor] = []
    with progress(title, len(images), quiet=quiet) as display:
        for start in range(0, len(images), EXTRACTION_BATCH):
            batch = images[start : start + EXTRACTION_BATCH]
            batch = batch if isinstance(batch, Tensor) else torch.from_numpy(np.ascontiguousarray(batch))
            parts.append(extractor(_rgb(batch)).float().cpu())
            display.update(min(start + EXTRACTION_BATCH, len(images)), {})
    return torch.cat(parts)


def _rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
