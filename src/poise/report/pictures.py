"""Encode grids of images as data URIs of PNGs, so that the page needs no other file."""

import base64

import torch

from poise.data.decoding import grid, to_png
from poise.shapes import ByteImages, Images

PAIRS_IN_A_ROW = 8


def data_uri(png: bytes) -> str:
    """Return a PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


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
