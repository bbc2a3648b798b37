"""Convert, read, crop and resize images; arrange images in a grid; write PNG files.

Tensors are NCHW: float in [0, 1] in networks, uint8 (0 to 255) in data sets and files. A byte b
becomes the float b/255. A float x, clipped to [0, 1], becomes the byte floor(255 x + 1/2). A byte
that is converted to float and back does not change.
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
    Picture = Any  # the functions that need Pillow import it

Mode = Literal["L", "RGB"]  # Pillow's names of grey and RGB

TILE_PIXELS = 64  # a grid enlarges smaller images to about this side
SEPARATOR_PIXELS = 2
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")


def to_float(images: ByteImages) -> Images:
    """Convert uint8 images to float32 in [0, 1]: b/255."""
    return images.to(torch.float32).div_(255)


def to_bytes(images: Images) -> ByteImages:
    """Convert float images to uint8: clip to [0, 1], round to the nearest of 256 levels, halves up.

    Raises:
        InputError: a value is NaN. The check reads every value and waits for the device.
    """
    if images.isnan().any():
        raise InputError(
            "the images hold NaN, which no byte can represent: "
            "the network that made them has diverged"
        )
    return images.detach().float().clamp(0, 1).mul_(255).add_(0.5).floor_().to(torch.uint8)


def stretch_each(images: Images) -> Images:
    """Rescale each image so that its minimum is 0 and its maximum 1.

    A constant image becomes 0. Source: the evaluation of Dai & Wipf.
    """
    flat = images.flatten(1)
    least, most = flat.amin(1)[:, None], flat.amax(1)[:, None]
    return ((flat - least) / (most - least).clamp_min(1e-12)).reshape(images.shape)


def grid(images: Images | ByteImages, columns: int | None = None) -> np.ndarray:
    """Arrange images in a grid, row by row, with white lines of 2 pixels between them.

    Images smaller than 64 pixels are enlarged by an integer factor, without interpolation.

    Args:
        images: at least one; float in [0, 1], or uint8.
        columns: number of images in a row, at least 1; None: about the square root of their number.

    Returns:
        One picture, uint8 (height, width, channels).

    Raises:
        InputError: there are no images, `columns` is less than 1, or a value is NaN.

    Example:
        >>> grid(torch.zeros(6, 1, 8, 8), columns=3).shape
        (130, 196, 1)
    """
    if len(images) == 0 or (columns is not None and columns < 1):
        raise InputError(
            "a grid needs at least one image and one column, "
            f"not {len(images)} images in {columns} columns"
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
    """Write a picture as a PNG file. The write is atomic; see `files.write_file`.

    Args:
        path: of the file; its folder is created if necessary.
        pixels: uint8 (height, width, channels) with 1 or 3 channels, such as the result of `grid`.

    Raises:
        RunError: the file cannot be written.
    """
    write_file(Path(path), to_png(pixels))


def to_png(pixels: np.ndarray, *, effort: int = 6) -> bytes:
    """Encode a picture as PNG and return the content of the file.

    Args:
        pixels: see `save_png`.
        effort: compression level, 0 to 9; does not change the pixels.
    """
    file = io.BytesIO()
    to_picture(pixels).save(file, "PNG", compress_level=effort)
    return file.getvalue()


def to_gif(images: Images, *, seconds_per_image: float = 0.1) -> bytes:
    """Encode images as an animated GIF that runs there and back, for ever.

    Small images are enlarged as in a `grid`. A GIF has 256 colours for each image.

    Args:
        images: (n, channels, height, width), n >= 2; float in [0, 1], or uint8.
        seconds_per_image: duration of each image, in steps of 0.01 s.

    Returns:
        The content of the file.
    """
    there = [to_picture(grid(image[None])) for image in images]
    first, *others = there + there[-2:0:-1]
    file = io.BytesIO()
    duration = round(1000 * seconds_per_image)
    first.save(file, "GIF", save_all=True, append_images=others, duration=duration, loop=0)
    return file.getvalue()


def to_picture(pixels: np.ndarray) -> Picture:
    """Convert an array (height, width, channels), such as a `grid`, to a PIL image."""
    from PIL import Image

    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


class Header(NamedTuple):
    """Size and colour of an image file, read without decoding pixels."""

    width: int
    height: int
    grey: bool


def read_header(file: Path | io.BytesIO, label: str | None = None) -> Header:
    """Return the size and colour of an image file.

    `grey` is true if the pixel format of the file is grey, or all colours of its palette are grey.

    Raises:
        InputError: see `read_image`.
    """
    from PIL import Image

    with _decoding(label or str(file)), Image.open(file) as image:
        palette = (image.getpalette("RGB") or [0]) if image.mode == "P" else []
        grey_palette = bool(palette) and palette[0::3] == palette[1::3] == palette[2::3]
        return Header(*image.size, grey=image.mode in _GREY_MODES or grey_palette)


def read_image(file: Path | io.BytesIO, mode: Mode, label: str | None = None) -> Picture:
    """Decode an image file to 8-bit grey ("L") or RGB, rotated by its EXIF orientation.

    16-bit grey is scaled to 8 bits (65535 becomes 255). Transparent pixels are blended with white.
    Of an animation only the first frame is read.

    Args:
        file: path, or the content of a file.
        mode: "L" or "RGB".
        label: the name of the file in error messages; None: its path.

    Raises:
        MissingInputError: the file does not exist.
        InputError: the file is no image, is damaged or truncated, or has 32-bit pixels.
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
        image.load()  # decodes every pixel: a truncated file fails here
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
    except Exception as error:  # a decoder can raise anything on a damaged file
        raise InputError(f"{label} cannot be decoded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split()).rstrip(".")  # callers append text


def center_square_resize(image: Picture, size: int) -> Picture:
    """Crop the largest centred square of a picture and resize it to (size, size).

    The picture is first rotated by its EXIF orientation. If a margin is odd, the bottom or the
    right loses one row or column more.

    The resize is Pillow's BICUBIC, which has antialiasing: its support grows with the reduction.
    Parmar et al. 2022 recommend this for the FID.
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
    """Crop one of CelebA's aligned 178x218 faces and resize it to (size, size).

    The resize is Pillow's BILINEAR, which has antialiasing, as has the scipy.misc.imresize of
    Dai & Wipf's code.

    Args:
        image: the aligned face.
        rows, cols: first and last + 1 of the crop; by default rows 45 to 172 and columns 25 to 152,
            as is usual for CelebA.
        size: side of the result in pixels.

    Raises:
        InputError: the picture is smaller than the crop.
    """
    from PIL import Image

    if image.width < cols[1] or image.height < rows[1]:
        raise InputError(
            f"an image of {image.width}x{image.height} pixels has no rows {rows[0]}:{rows[1]} "
            f"and columns {cols[0]}:{cols[1]}: the crop is for CelebA's aligned images of 178x218"
        )
    face = image.crop((cols[0], rows[0], cols[1], rows[1]))
    return face.resize((size, size), Image.Resampling.BILINEAR)


def jpeg_round_trip(images: ByteImages, quality: int = 75) -> ByteImages:
    """Encode each image as JPEG and decode it again.

    The released CIFAR-10 loader stores its training and test images as JPEG, at Pillow's default
    quality of 75. Pillow's default for colours is half resolution.

    Args:
        images: uint8 (n, channels, height, width).
        quality: of the JPEG, 1 to 95.
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
    """Variance of every dimension over a stream of batches, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.total_squares = torch.zeros((), dtype=torch.float64)

    def add(self, batch: Values) -> None:
        """Add a batch (n, ...)."""
        values = batch.cpu().double()  # first to the CPU: not every device has float64
        self.count += len(values)
        self.total = self.total + values.sum(0)
        self.total_squares = self.total_squares + values.square().sum(0)

    def variance(self) -> torch.Tensor:
        """Return the variance of each dimension over all batches."""
        return (self.total_squares / self.count - (self.total / self.count).square()).clamp_min(0)

    def std(self) -> float:
        """Return the mean over dimensions of the standard deviation of each dimension."""
        return float(self.variance().sqrt().mean())
