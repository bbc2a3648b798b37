"""Images into the page: one PNG for each grid, as a data URI."""

import base64

import torch

from poise.data.decoding import grid, to_png
from poise.shapes import ByteImages, Images

PAIRS_IN_A_ROW = 8


def data_uri(png: bytes) -> str:
    """A PNG as an address that needs no file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def contact_sheet(images: Images | ByteImages, columns: int) -> str:
    """A grid of images as a data URI."""
    return data_uri(to_png(grid(images, columns=columns), effort=9))


def paired_sheet(originals: Images, restored: Images, columns: int = PAIRS_IN_A_ROW) -> str:
    """Rows of originals, each with the row of their reconstructions below it, as a data URI; a short last row ends white."""
    columns = min(columns, len(originals))
    white = originals.new_ones(-len(originals) % columns, *originals.shape[1:])
    rows = zip(
        torch.cat([originals, white]).split(columns),
        torch.cat([restored, white]).split(columns),
        strict=True,
    )
    return contact_sheet(torch.cat([row for pair in rows for row in pair]), columns)
