"""Load the 2015 Inception of the original FID, or another network from a file.

A file is TorchScript, or torch-fidelity's conversion of Inception's weights.

Images are resized to 299x299 as TensorFlow 1 did. Inception takes images scaled to
(bytes - 128) / 128; another network takes the range that the user declares. The features of one
test picture (`fingerprint`), not the file name, decide whether a network is the 2015 Inception. So
no other distance is ever called FID.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import InputError, MissingExtraError, MissingInputError
from poise.features.extractor import Extractor
from poise.features.fingerprint import is_inception
from poise.features.prepared import Prepared
from poise.features.resize import resize_like_tensorflow1
from poise.features.weights import NOT_LOADABLE, first_line, load_tensors, load_torchscript, sha256
from poise.support.progress import SafeStream, say

WEIGHTS_VARIABLE = "POISE_INCEPTION"
WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_ADDRESS = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_NAME}"
)
SIDE = 299
TAKEN_NAMES = ("inception", "light", "dinov2", "pixels")


def available_inception() -> Path | None:
    """Return the path of local Inception weights, or None if there are none.

    The file is that in the environment variable POISE_INCEPTION, otherwise an earlier download.

    Raises:
        MissingInputError: POISE_INCEPTION does not name a file.
    """
    if named := os.environ.get(WEIGHTS_VARIABLE):
        path = Path(named).expanduser()
        if not path.is_file():
            raise MissingInputError(
                f"{WEIGHTS_VARIABLE} names {named}, which is no file: correct or unset it"
            )
        return path
    return _downloaded() if _downloaded().exists() else None


def _downloaded() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME


def inception(weights: Path | None = None, device: str | torch.device = "cpu") -> Extractor:
    """Return the extractor of the 2015 Inception: the 2048 features of its last pooling layer.

    Verifies that the network is the 2015 Inception.

    Args:
        weights: a file of torch-fidelity's weights, or a TorchScript file. TorchScript maps images
            (n, 3, 299, 299), scaled to (bytes - 128) / 128, to (n, 2048). None: torch-fidelity's
            weights, downloaded once.
        device: where to compute.

    Raises:
        MissingExtraError: the weights are torch-fidelity's, which is not installed.
        MissingInputError: the file does not exist, or the download failed.
        InputError: the file is damaged, has another format, or holds another network.
    """
    if weights is None:
        _fidelity_class()  # fails before the download if torch-fidelity is missing
        weights = _downloaded() if _downloaded().exists() else _download()
    extractor = network_file(weights, device=device)
    if extractor.name != "inception":
        raise _not_inception(weights, f"it can be used under its own name, {weights}")
    return extractor


def _download() -> Path:
    path = _downloaded()
    digits = path.stem.rpartition("-")[2]
    say(f"downloading {WEIGHTS_ADDRESS}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            WEIGHTS_ADDRESS, str(path), hash_prefix=digits, progress=SafeStream(sys.stderr).isatty()
        )
    except (OSError, RuntimeError) as error:  # RuntimeError: the checksum differs
        raise MissingInputError(
            f"Inception's weights could not be downloaded ({first_line(error)}); "
            f"set {WEIGHTS_VARIABLE} to a local file"
        ) from error
    return path


def network_file(
    path: Path, bounds: tuple[float, float] | None = None, *, device: str | torch.device = "cpu"
) -> Extractor:
    """Return the extractor of a network in a file.

    Its name is "inception" if the network is the 2015 Inception, otherwise the stem of the file.

    Args:
        path: a TorchScript file that maps (n, 3, 299, 299) to (n, features), or torch-fidelity's
            Inception weights.
        bounds: input range of a TorchScript network: the values for the levels 0 and 255. None: the
            network must be the 2015 Inception, which has its own scaling. With (-1, 1), too, the
            2015 Inception is recognised and gets its own scaling.
        device: where to compute.

    Raises:
        MissingInputError: the file does not exist.
        InputError: see `inception`; or bounds are missing, or given for torch-fidelity's weights.
    """
    checksum, scripted = sha256(path), load_torchscript(path)
    if scripted is None:
        return _fidelity_extractor(path, checksum, bounds, device)
    if bounds in (None, (-1, 1)) and _is_original(path, original := _centred(scripted)):
        return _extractor("inception", checksum, original, device)
    if bounds is None:
        raise _not_inception(
            path,
            "to use it under its own name, declare its inputs' range, "
            f"for example {path}:range=-1..1",
        )
    low, high = bounds
    levels = 255 / (high - low)
    network = Prepared(scripted, _resize, shift=-low * levels, divisor=levels)
    _is_original(path, network)  # raises if the network cannot take such images
    return _extractor(
        _own_name(path), checksum, network, device, scale=f", scaled to {low:g}..{high:g}"
    )


def _not_inception(path: Path, remedy: str) -> InputError:
    return InputError(
        f"{path} is not the 2015 Inception of the FID "
        f"(its features of a test picture differ); {remedy}"
    )


def _own_name(path: Path) -> str:
    return path.name if path.stem in TAKEN_NAMES else path.stem


def _centred(network: nn.Module) -> Prepared:
    return Prepared(network, _resize, shift=128.0, divisor=128.0)


def _resize(levels: Tensor) -> Tensor:
    return resize_like_tensorflow1(levels, SIDE, SIDE)


def _is_original(path: Path, network: Prepared) -> bool:
    try:
        return is_inception(network)
    except NOT_LOADABLE as error:
        raise InputError(
            f"{path}: the network cannot take images (n, 3, {SIDE}, {SIDE}) ({first_line(error)})"
        ) from error


def _extractor(
    name: str,
    checksum: str,
    network: Prepared,
    device: str | torch.device,
    classifier: Tensor | None = None,
    scale: str = "",
) -> Extractor:
    placed = network.to(device=torch.device(device))
    return Extractor(
        name, checksum, f"TF1 bilinear to {SIDE}{scale}", placed, torch.device(device), classifier
    )


def _fidelity_extractor(
    path: Path, checksum: str, bounds: tuple[float, float] | None, device: str | torch.device
) -> Extractor:
    network = _fidelity_network(path)
    if bounds is not None:
        raise InputError(
            f"{path} holds weights of Inception, which has its own input range: leave the range out"
        )
    classifier = network.fc.weight.detach().clone()
    layers = nn.Sequential(
        *[layer for name, layer in network.named_children() if name != "fc"], nn.Flatten()
    )
    prepared = _centred(_folded(layers))
    name = "inception" if _is_original(path, prepared) else _own_name(path)
    return _extractor(name, checksum, prepared, device, classifier)


def _folded(network: nn.Module) -> nn.Module:
    """Fold each batch normalisation into its convolution (a tenth faster), in channels_last."""
    pairs: list[Any] = [
        layer for layer in network.modules() if hasattr(layer, "conv") and hasattr(layer, "bn")
    ]
    for layer in pairs:
        layer.conv, layer.bn = torch.nn.utils.fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _fidelity_network(path: Path) -> Any:
    """Return torch-fidelity's network. Its own `forward` resizes too, but takes only uint8."""
    try:
        load_tensors(path)  # refuses all but tensors: torch-fidelity would unpickle anything
        return _fidelity_class()("inception-v3-compat", ["2048"], str(path))
    except MissingExtraError:
        raise
    except (InputError, *NOT_LOADABLE) as error:
        reason = first_line(error)
        raise InputError(
            f"{path}: neither a TorchScript file nor torch-fidelity's Inception weights ({reason})"
        ) from error


def _fidelity_class() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError(f"FID (module {error.name})", "eval") from None
    return FeatureExtractorInceptionV3
