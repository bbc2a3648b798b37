"""Open image files with Pillow: name the file in every error and warning.

The plugin for HEIC files is loaded when the first such file is opened.
"""

import io
import math
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.errors import InputError, MissingInputError

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from PIL.Image import Image as Picture
else:
    Picture = Any  # the functions that need Pillow import it

_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")
_PILLOWS_FACTOR = 2  # Pillow warns above MAX_IMAGE_PIXELS, and refuses above twice as many


class RefusedError(InputError):
    """Raised for an intact image file that needs an option or a library to be read."""


class _Current(threading.local):
    """The file that a thread has opened, and the remarks on files by name."""

    label: str | None = None
    remarks: dict[str, str] | None = None


_current = _Current()
_changing_the_process = threading.RLock()


@contextmanager
def opened(
    file: Path | io.BytesIO, label: str, remarks: dict[str, str] | None = None
) -> Iterator[Picture]:
    """Open an image file for the block, which may decode it.

    Args:
        file: path, or the content of a file.
        label, remarks: see `named`.

    Raises:
        MissingInputError: the file does not exist, or is a link to a file that does not exist.
        RefusedError, InputError: see `named`.
    """
    with named(label, remarks):
        try:
            image = _open(file, label)
        except FileNotFoundError as error:
            where = ""
            if isinstance(file, Path) and file.is_symlink():
                where = f", the target of a link ({shown(file.readlink())})"
            raise MissingInputError(f"{label} does not exist{where}") from error
        with image:
            yield image


@contextmanager
def named(label: str, remarks: dict[str, str] | None = None) -> Iterator[None]:
    """Turn any error in the block into an `InputError` that names a file.

    Args:
        label: name of the file in messages.
        remarks: receives warnings about the file, by label. See `collecting_warnings`.

    Raises:
        RefusedError: the file is larger than the limit, or is HEIC and the extra is not installed.
        InputError: the file cannot be opened or decoded.
    """
    from PIL import Image

    before = _current.label, _current.remarks
    _current.label, _current.remarks = label, remarks
    try:
        yield
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise RefusedError(f"{label} cannot be decoded: {_too_large(error)}") from error
    except Exception as error:  # a decoder can raise anything on a damaged file
        raise InputError(f"{label} cannot be decoded: {_reason(error)}") from error
    finally:
        _current.label, _current.remarks = before


def _open(file: Path | io.BytesIO, label: str) -> Picture:
    from PIL import Image, UnidentifiedImageError

    if isinstance(file, Path) and file.is_fifo():  # opening it would wait for its writer
        raise InputError(f"{label} cannot be decoded: it is a named pipe")
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        brand = _brand(file)
        if brand in _AVIF_BRANDS:
            raise RefusedError(
                f"{label} cannot be decoded: AVIF needs Pillow 11.3 or newer, with AVIF: "
                "pip install --upgrade pillow"
            ) from None
        if brand not in _HEIC_BRANDS:
            raise
        _add_heic(label)
        return Image.open(file)


def _brand(file: Path | io.BytesIO) -> bytes:
    """Return the brand of an HEIC or AVIF file; for other files an empty or another text."""
    with nullcontext(file) if isinstance(file, io.BytesIO) else file.open("rb") as content:
        content.seek(0)
        start = content.read(12)
        content.seek(0)
    return start[8:12] if start[4:8] == b"ftyp" else b""


def _add_heic(label: str) -> None:
    try:
        import pillow_heif
    except ImportError:
        raise RefusedError(
            f"{label} cannot be decoded: HEIC needs an optional dependency: "
            'pip install "poise[heic]"'
        ) from None
    pillow_heif.register_heif_opener()


def _too_large(error: Exception) -> str:
    from PIL import Image

    limit = _PILLOWS_FACTOR * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
    found = re.search(r"\d+", str(error))
    if found is None:
        return f"it has more than {limit:.4g} megapixels, the limit; pass --max-megapixels N"
    megapixels = math.ceil(int(found[0]) / 1e6)
    return (
        f"it has {megapixels} megapixels, over the limit of {limit:.4g}; "
        f"pass --max-megapixels {megapixels} if you trust it"
    )


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split()).rstrip(".")  # callers append text


def remark(text: str) -> None:
    """Record a remark on the file that this thread has opened."""
    if _current.label is not None and _current.remarks is not None:
        _current.remarks.setdefault(_current.label, " ".join(text.split()))


def allow_megapixels(limit: int | None) -> None:
    """Let Pillow open larger images from now on, in the whole process. None: change nothing."""
    from PIL import Image

    if limit is not None:
        Image.MAX_IMAGE_PIXELS = max(
            Image.MAX_IMAGE_PIXELS or 0, limit * 1_000_000 // _PILLOWS_FACTOR
        )


@contextmanager
def collecting_warnings(max_megapixels: int | None) -> Iterator[None]:
    """Turn Pillow's warnings in the block into remarks on the opened files, in all threads.

    This changes settings of the whole process, so a block waits until that of another thread ends.

    Args:
        max_megapixels: refuse larger images. None: Pillow's limit, 179 megapixels.
    """
    from PIL import Image

    with _changing_the_process, warnings.catch_warnings():
        show, limit = warnings.showwarning, Image.MAX_IMAGE_PIXELS

        def collect(message: Warning | str, *others: Any, **options: Any) -> None:
            if _current.remarks is None:
                show(message, *others, **options)
            else:
                remark(str(message))

        warnings.filterwarnings(
            "always", category=UserWarning, module=r"(.*\W)?(PIL|pillow_heif)\W"
        )
        # Only the larger limit counts, at which Pillow raises an error.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.showwarning = collect
        try:
            if max_megapixels is not None:
                Image.MAX_IMAGE_PIXELS = max_megapixels * 1_000_000 // _PILLOWS_FACTOR
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def shown(path: Path | str) -> str:
    r"""Return a path as text that can be printed, with escapes for bytes that are not UTF-8.

    Example:
        >>> shown(os.fsdecode(b"caf\xe9.png"))
        'caf\\xe9.png'
    """
    return os.fsencode(path).decode(errors="backslashreplace")
