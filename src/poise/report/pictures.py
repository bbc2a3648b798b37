"""Encode images as data URIs, so that the page needs no other file."""

import io
from pathlib import Path

import torch

from poise.data.decoding import grid, read_image, to_png
from poise.errors import InputError
from poise.shapes import ByteImages, Images
from poise.support.files import read_regular
from poise.support.html import data_uri

PAIRS_IN_A_ROW = 8
LARGEST_PNG = 500_000  # bytes of a file that is embedded as it is
WIDEST = 1_200  # pixels of a picture that is reduced
JPEG_QUALITY = 90


def picture_uri(path: Path) -> str:
    """Return a PNG file as a data URI. A large one is reduced and becomes a JPEG.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        content = read_regular(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(content) < LARGEST_PNG:
        return data_uri(content)
    picture, file = read_image(io.BytesIO(content), "RGB", str(path)), io.BytesIO()
    picture.thumbnail((WIDEST, picture.height))
    picture.save(file, "JPEG", quality=JPEG_QUALITY)
    return data_uri(file.getvalue(), "jpeg")


def contact_sheet(images: Images | ByteImages, columns: int) -> str:
    """Return a grid of images as a data URI."""
    return data_uri(to_png(grid(images, columns=columns), effort=9))


def paired_sheet(originals: Images, restored: Images, columns: int = PAIRS_IN_A_ROW) -> str:
    """Return a data URI of rows of originals, each above the row of their reconstructions.

    White tiles fill the last row.
    """
    columns = min(columns, len(originals))
    white = originals.new_ones(-len(originals) % columns, *originals.shape[1:])
    rows = zip(
        torch.cat([originals, white]).split(columns),
        torch.cat([restored, white]).split(columns),
        strict=True,
    )
    return contact_sheet(torch.cat([row for pair in rows for row in pair]), columns)
