"""Files of weights: their checksums, and the two formats they come in.

By torch.hub's convention a name may end in "-" and the first digits of the file's SHA-256; such a file is held to them.
"""

import hashlib
import re
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from poise.errors import InputError, MissingInputError

NOT_LOADABLE = (
    RuntimeError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    EOFError,
    UnpicklingError,
)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    Raises:
        MissingInputError: no such file.
        InputError: it cannot be read, or its name promises another checksum.
    """
    try:
        with open(path, "rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file of weights") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    named = re.search(r"-([0-9a-f]{8,})\.pth?$", path.name)
    if named and not checksum.startswith(named[1]):
        raise InputError(
            f"{path} is damaged or cut off: its SHA-256 does not begin with {named[1]}; delete it and download it again"
        )
    return checksum


def load_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a state dict that torch.save wrote. Nothing else is unpickled, so that no code in the file can run.

    Raises:
        InputError: it is no such file.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except NOT_LOADABLE as error:
        raise InputError(f"{path}: not a file of weights ({first_line(error)})") from error
    if not isinstance(tensors, dict):
        raise InputError(f"{path}: not a file of weights (it holds a {type(tensors).__name__})")
    return tensors


def load_torchscript(path: Path) -> torch.nn.Module | None:
    """The network in a TorchScript file, on the CPU; None: it is no such file."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", r"`torch\.jit\.load` is"
            )  # deprecated or unsupported, yet the file has no other form
            return torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError:
        return None


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    return str(error).partition("\n")[0] or type(error).__name__
