"""Pixels: bytes to [0, 1] and back, reading, cropping and resizing pictures, grids of images.

Tensors are NCHW: float in [0, 1], or bytes (uint8, 0 to 255) at the edges. A byte b is the float b/255, and a float x is
the byte floor(255 x + 1/2) after clipping to [0, 1], so that bytes survive the way there and back unchanged.
"""

import io
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from poise.errors import InputError, MissingInputError
from poise.shapes import ByteImages, Images, Values
from poise.support.files import write_file

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from PIL.Image import Image as Picture
else:
    Picture = Any  # Pillow is imported by the functions that need it

Mode = Literal["L", "RGB"]  # Pillow's names of grey and colour

TILE_PIXELS = 64  # smaller images are enlarged to about this side in a grid
SEPARATOR_PIXELS = 2
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")


def to_float(images: ByteImages) -> Images:
    """Float32 images in [0, 1] from bytes: b/255."""
    return images.to(torch.float32).div_(255)


def to_bytes(images: Images) -> ByteImages:
    """Bytes from float images: clipped to [0, 1], then rounded to the nearest of 256 levels, halves upwards.

    Raises:
        InputError: NaN among the values (this looks at every value, and so waits for the device).
    """
    if images.isnan().any():
        raise InputError(
            "the images hold NaN, which no byte can represent: the network that made them has diverged"
        )
    return images.detach().float().clamp(0, 1).mul_(255).add_(0.5).floor_().to(torch.uint8)


def stretch_each(images: Images) -> Images:
    """Each image mapped so that its least value becomes 0 and its greatest 1, as Dai & Wipf's evaluation does.

    An image of one value becomes 0.
    """
    flat = images.flatten(1)
    least, most = flat.amin(1)[:, None], flat.amax(1)[:, None]
    return ((flat - least) / (most - least).clamp_min(1e-12)).reshape(images.shape)


def grid(images: Images | ByteImages, columns: int | None = None) -> np.ndarray:
    """One picture of all images, row by row: uint8 (height, width, channels), with white lines of 2 pixels between.

    Images smaller than 64 pixels are enlarged by a whole factor, each pixel becoming a square.

    Args:
        images: at least one; float in [0, 1], or bytes.
        columns: images in a row; by default as many as make the picture about square.

    Example:
        >>> grid(torch.zeros(6, 1, 8, 8), columns=3).shape
        (130, 196, 1)
    """
    if len(images) == 0 or (columns is not None and columns < 1):
        raise InputError(
            f"a grid needs at least one image and one column, not {len(images)} images in {columns} columns"
        )
    tiles = (
        (images if images.dtype == torch.uint8 else to_bytes(images))
        .cpu()
        .permute(0, 2, 3, 1)
        .numpy()
    )
    factor = max(1, TILE_PIXELS // min(tiles.shape[1:3]))
    tiles = tiles.repeat(factor, 1).repeat(factor, 2)
    columns = min(columns or math.ceil(math.sqrt(len(tiles))), len(tiles))
    rows = math.ceil(len(tiles) / columns)
    height, width = tiles.shape[1] + SEPARATOR_PIXELS, tiles.shape[2] + SEPARATOR_PIXELS
    picture = np.full((rows * height, columns * width, tiles.shape[3]), 255, np.uint8)
    for k, tile in enumerate(tiles):
        top, left = k // columns * height, k % columns * width
        picture[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return picture[:-SEPARATOR_PIXELS, :-SEPARATOR_PIXELS]


def save_png(path: str | Path, pixels: np.ndarray) -> None:
    """Writes a picture, whole or not at all: see `files.write_file`.

    Args:
        path: of the file; its folder is made if need be.
        pixels: uint8 (height, width, channels) with 1 or 3 channels, as `grid` gives them.

    Raises:
        RunError: the file cannot be written.
    """
    write_file(Path(path), to_png(pixels))


def to_png(pixels: np.ndarray, *, effort: int = 6) -> bytes:
    """The bytes of a PNG file.

    Args:
        pixels: see `save_png`.
        effort: of the compression, 0 to 9; the pixels are the same.
    """
    file = io.BytesIO()
    to_picture(pixels).save(file, "PNG", compress_level=effort)
    return file.getvalue()


def to_picture(pixels: np.ndarray) -> Picture:
    """A PIL image of what `grid` gives."""
    from PIL import Image

    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


class Header(NamedTuple):
    """What a file says of its image before any pixel is decoded."""

    width: int
    height: int
    grey: bool


def read_header(file: Path | io.BytesIO, label: str | None = None) -> Header:
    """Size and colour of an image file; `grey` speaks of the file's pixel format, or of its palette.

    Raises:
        InputError: see `read_image`.
    """
    from PIL import Image

    with _decoding(label or str(file)), Image.open(file) as image:
        palette = (image.getpalette("RGB") or [0]) if image.mode == "P" else []
        grey_palette = bool(palette) and palette[0::3] == palette[1::3] == palette[2::3]
        return Header(*image.size, grey=image.mode in _GREY_MODES or grey_palette)


def read_image(file: Path | io.BytesIO, mode: Mode, label: str | None = None) -> Picture:
    """A fully decoded image file as 8-bit grey ("L") or colour ("RGB"), upright by its EXIF orientation.

    16-bit greys are scaled to 8 bits (65535 becomes 255); transparent pixels are laid on white; of an animation, the first
    frame is taken.

    Args:
        file: path, or the bytes of a file.
        mode: "L" or "RGB".
        label: what error messages call the file; by default its path.

    Raises:
        MissingInputError: no such file.
        InputError: not an image, damaged, cut off, or of 32-bit pixels.
    """
    from PIL import Image, ImageOps

    with _decoding(label or str(file)), Image.open(file) as image:
        sixteen_bit = image.mode.startswith("I;16") or (
            image.mode == "I" and image.format in ("PNG", "PPM")
        )
        if image.mode in ("I", "F") and not sixteen_bit:
            raise ValueError(
                "32-bit pixels, whose range is not known; save as 8 or 16 bit, or give an array"
            )
        image.load()  # every pixel: a cut-off file fails here
        upright = ImageOps.exif_transpose(image)
        if sixteen_bit:
            levels = np.asarray(upright).astype(np.uint32)
            upright = Image.fromarray(((levels + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257
        if upright.has_transparency_data:
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright.convert("RGBA"))
        return upright.convert(mode)


@contextmanager
def _decoding(label: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise MissingInputError(f"{label} does not exist") from error
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise InputError(f"{label} cannot be decoded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split()).rstrip(".")  # more is said after it


def center_square_resize(image: Picture, size: int) -> Picture:
    """The largest centred square of a picture, upright by its EXIF orientation, resized to (size, size).

    Bicubic with antialiasing (Pillow's BICUBIC, whose support grows with the reduction), as FID studies recommend (Parmar
    et al. 2022). Where the margin is odd, the extra row or column is cut at the bottom or right.
    """
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    side = min(upright.size)
    left, top = (upright.width - side) // 2, (upright.height - side) // 2
    square = upright.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def crop_and_resize(
    image: Picture,
    rows: tuple[int, int] = (45, 173),
    cols: tuple[int, int] = (25, 153),
    *,
    size: int = 64,
) -> Picture:
    """The usual cut of CelebA's aligned 178x218 faces: rows 45 to 172, columns 25 to 152, bilinear to (size, size).

    Bilinear as Pillow does it, with antialiasing; so did the scipy.misc.imresize of Dai & Wipf's code.

    Raises:
        InputError: the picture is smaller than the cut.
    """
    from PIL import Image

    if image.width < cols[1] or image.height < rows[1]:
        raise InputError(
            f"an image of {image.width}x{image.height} pixels has no rows {rows[0]}:{rows[1]} and columns "
            f"{cols[0]}:{cols[1]}: the cut is for CelebA's aligned images of 178x218"
        )
    face = image.crop((cols[0], rows[0], cols[1], rows[1]))
    return face.resize((size, size), Image.Resampling.BILINEAR)


def jpeg_round_trip(images: ByteImages, quality: int = 75) -> ByteImages:
    """Each image as it comes back from a JPEG file of this quality (1 to 95; colours at half resolution, Pillow's default).

    The released CIFAR-10 loader stores its images so, at Pillow's default quality of 75, for training and for testing.
    """
    pixels = images.cpu().permute(0, 2, 3, 1).numpy()
    stored = np.empty_like(pixels)
    for k, image in enumerate(pixels):
        stored[k] = _through_jpeg(image, quality)
    return torch.from_numpy(stored).permute(0, 3, 1, 2).contiguous()


def _through_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    from PIL import Image

    file = io.BytesIO()
    to_picture(pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as stored:
        return np.asarray(stored).reshape(pixels.shape)


class PixelMoments:
    """Mean and variance of every dimension over a stream of batches, float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.total_squares = torch.zeros((), dtype=torch.float64)

    def add(self, batch: Values) -> None:
        """Take in a batch (n, ...)."""
        values = batch.cpu().double()  # in this order: not every device has float64
        self.count += len(values)
        self.total = self.total + values.sum(0)
        self.total_squares = self.total_squares + values.square().sum(0)

    def variance(self) -> torch.Tensor:
        """Of each dimension, over all batches."""
        return (self.total_squares / self.count - (self.total / self.count).square()).clamp_min(0)

    def std(self) -> float:
        """Standard deviation of each dimension, averaged over dimensions."""
        return float(self.variance().sqrt().mean())
