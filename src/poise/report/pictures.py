"""Images into the page: one PNG for each grid, as a data URI."""

import base64
from collections.abc import Sequence

import torch

from poise.images import grid, to_png
from poise.shapes import ByteImages, Images

ENLARGED = 8  # columns of pairs


def data_uri(png: bytes) -> str:
    """A PNG as an address that needs no file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def contact_sheet(images: Images | ByteImages, columns: int) -> str:
    """A grid of images as a data URI."""
    return data_uri(to_png(grid(images, columns=columns), effort=9))


def paired_sheet(originals: Images, restored: Images, columns: int = ENLARGED) -> str:
    """Rows of originals, each with the row of their reconstructions below it, as a data URI."""
    rows: Sequence[Images] = [
        part
        for start in range(0, len(originals), columns)
        for part in (originals[start : start + columns], restored[start : start + columns])
    ]
    return contact_sheet(torch.cat(list(rows)), min(columns, len(originals)))
