"""Read files of weights in two formats, and verify their checksums.

By torch.hub's convention, the name of a .pth file may end in "-" and the first digits of the file's
SHA-256. The checksum of such a file must begin with these digits.
"""

import hashlib
import re
import struct
import warnings
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from poise.errors import InputError, MissingInputError

NOT_LOADABLE = (
    OSError,
    RuntimeError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    EOFError,
    UnpicklingError,
    struct.error,
    torch.jit.Error,
)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits.

    Raises:
        MissingInputError: the file does not exist.
        InputError: the file cannot be read, or its name holds the digits of another checksum.
    """
    _refuse_pipe(path)
    try:
        with open(path, "rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file of weights") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    named = re.search(r"-([0-9a-f]{8,})\.pth$", path.name)
    if named and not checksum.startswith(named[1]):
        raise InputError(
            f"{path} is damaged or cut off: its SHA-256 does not begin with {named[1]}; "
            "delete it and download it again"
        )
    return checksum


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict that torch.save wrote.

    Refuses to unpickle anything else, so that no code in the file can run.

    Raises:
        InputError: the file does not hold a state dict.
    """
    _refuse_pipe(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # torch's own text recommends weights_only=False, which would run code in the file.
        raise InputError(
            f"{path}: not a file of weights (it is damaged, or holds other objects than tensors, "
            "which are never loaded)"
        ) from error
    except NOT_LOADABLE as error:
        raise InputError(f"{path}: not a file of weights ({first_line(error)})") from error
    if not isinstance(tensors, dict):
        raise InputError(f"{path}: not a file of weights (it holds a {type(tensors).__name__})")
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{path}: not a file of weights (its {name!r} is a {type(value).__name__})"
            )
    return tensors


def _refuse_pipe(path: Path) -> None:
    if path.is_fifo():  # reading it would wait for its writer
        raise InputError(f"{path} cannot be read: it is a named pipe")


def load_torchscript(path: Path) -> torch.nn.Module | None:
    """Return the network in a TorchScript file, on the CPU; None if the format is another."""
    try:
        with warnings.catch_warnings():
            # torch.jit.load is deprecated, but these files exist in no other format.
            warnings.filterwarnings("ignore", r"`torch\.jit\.load` is")
            return torch.jit.load(str(path), map_location="cpu").eval()
    except NOT_LOADABLE:
        return None


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type if it has no text.

    Of an error that a TorchScript network raises, it is the last line.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if isinstance(error, torch.jit.Error) else 0]
