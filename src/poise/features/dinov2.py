"""Load DINOv2 (Oquab et al. 2023), ViT-B/14, which computes 768 features.

They agree better with human judgement of images than the features of Inception (Stein et al. 2023).
torch-fidelity loads the model through torch.hub, which downloads it once (about 350 MB).

As in torch-fidelity, images are resized to 224x224 as TensorFlow 1 did, and normalised by
ImageNet's mean and standard deviation.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import InputError, MissingExtraError, MissingInputError
from poise.features.extractor import Extractor
from poise.features.prepared import Prepared
from poise.features.resize import resize_like_tensorflow1
from poise.features.weights import first_line

MODEL = "dinov2-vit-b-14"
SIDE = 224
MEAN = (255 * 0.485, 255 * 0.456, 255 * 0.406)
STD = (255 * 0.229, 255 * 0.224, 255 * 0.225)


def dinov2(device: str | torch.device = "cpu") -> Extractor:
    """Return the extractor of DINOv2's ViT-B/14: its class token, (n, 768).

    Raises:
        MissingExtraError: torch-fidelity is not installed.
        MissingInputError: the model could not be downloaded.
        InputError: torch.hub's copy of the model cannot be used.
    """
    model = _model()
    checksum = _checksum(model)
    network = Prepared(model, _resize, shift=MEAN, divisor=STD).to(torch.device(device))
    return Extractor("dinov2", checksum, f"TF1 bilinear to {SIDE}", network, torch.device(device))


def _model() -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtraError("the dinov2 extractor", "eval") from None
    try:
        wrapper: Any = FeatureExtractorDinoV2(MODEL, ["dinov2"])
    except OSError as error:
        raise MissingInputError(
            f"DINOv2 could not be downloaded by torch.hub ({first_line(error)}); "
            "use another extractor"
        ) from error
    except RuntimeError as error:
        raise InputError(
            f"torch.hub's copy of DINOv2 in {torch.hub.get_dir()} cannot be used "
            f"({first_line(error)})"
        ) from error
    return wrapper.model


def _resize(levels: Tensor) -> Tensor:
    return resize_like_tensorflow1(levels, SIDE, SIDE)


def _checksum(model: nn.Module) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of the weights."""
    digest = hashlib.sha256()
    for name, values in model.state_dict().items():
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.cpu().contiguous().numpy().data)
    return digest.hexdigest()
