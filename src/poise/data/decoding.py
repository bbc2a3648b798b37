"""Convert, read, crop and resize images; arrange images in a grid; write PNG files.

Tensors are NCHW: float in [0, 1] in networks, uint8 (0 to 255) in data sets and files. A byte b
becomes the float b/255. A float x, clipped to [0, 1], becomes the byte floor(255 x + 1/2). A byte
that is converted to float and back does not change.
"""

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from poise.data.opening import Picture, opened, remark
from poise.errors import InputError
from poise.shapes import ByteImages, Images, Values
from poise.support.files import write_file

Mode = Literal["L", "RGB"]  # Pillow's names of grey and RGB

TILE_PIXELS = 64  # a grid enlarges smaller images to about this side
SEPARATOR_PIXELS = 2
GIF_MILLISECONDS = 100  # that an image of an animation is shown
DEEP = 65535  # the largest value of 16 bits
WHITES = (255, 1023, 4095, 16383, DEEP)  # the largest values of 8, 10, 12, 14 and 16 bits
HOT_SHARE = 0.001  # of the values of an image may exceed white: hot pixels do not decide the scale
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


def to_gif(images: Images) -> bytes:
    """Encode images as an animated GIF that runs there and back, for ever.

    Small images are enlarged as in a `grid`. A GIF has 256 colours for each image.

    Args:
        images: (n, channels, height, width), n >= 2; float in [0, 1], or uint8.

    Returns:
        The content of the file.
    """
    there = [to_picture(grid(image[None])) for image in images]
    first, *others = there + there[-2:0:-1]
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=GIF_MILLISECONDS, loop=0)
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
    with opened(file, label or str(file)) as image:
        return header_of(image)


def header_of(image: Picture) -> Header:
    """Return the size and colour of the current page of an opened image file."""
    palette = (image.getpalette("RGB") or [0]) if image.mode == "P" else []
    grey_palette = bool(palette) and palette[0::3] == palette[1::3] == palette[2::3]
    return Header(*image.size, grey=image.mode in _GREY_MODES or grey_palette)


def read_image(
    file: Path | io.BytesIO, mode: Mode, label: str | None = None, *, levels: int | None = None
) -> Picture:
    """Decode an image file to 8-bit grey ("L") or RGB, rotated by its EXIF orientation.

    Transparent pixels are blended with white. Of a file with several pages or frames the first one
    is read.

    Args:
        file: path, or the content of a file.
        mode: "L" or "RGB".
        label: the name of the file in error messages; None: its path.
        levels: the value that becomes white; see `decoded`.

    Raises:
        MissingInputError: the file does not exist.
        InputError: the file is no image, is damaged, truncated or too large, or has 32-bit pixels.
    """
    with opened(file, label or str(file)) as image:
        picture = decoded(image, mode, levels).picture.copy()
    picture.info.clear()  # the orientation has been applied
    return picture


class Page(NamedTuple):
    """A decoded page: 8-bit grey or RGB, upright, without meaning in its metadata.

    Attributes:
        picture: the opened file itself if nothing had to change.
        clipped: number of values above the one that became white.
    """

    picture: Picture
    clipped: int


def decoded(image: Picture, mode: Mode, levels: int | None = None) -> Page:
    """Decode the current page of an opened file to 8-bit grey ("L") or RGB, upright.

    Transparent pixels are blended with white.

    Args:
        image: an opened image file.
        mode: "L" or "RGB".
        levels: the value that becomes white; larger values become white, too. Pages whose type
            cannot hold the value are not scaled: 4095 is for 16-bit pages. None: 255, or what
            `common_white` chooses for a page of more than 8 bits.

    Raises:
        ValueError: 32-bit pixels without `levels`, or negative pixels.
    """
    from PIL import Image

    deep = deep_pixels(image, levels)
    if deep is not None:
        white = levels or common_white([counts_above(deep.visible)])
        clipped = int(np.count_nonzero(deep.visible > white))
        return Page(Image.fromarray(deep.to_bytes(white)).convert(mode), clipped)
    most = _largest_value(image)
    picture, clipped = upright(image), 0
    transparent = picture.has_transparency_data
    if levels is not None and levels < 255 and picture.mode != "1":
        grey = picture.mode == "L" and not transparent
        picture = picture.convert("RGBA" if transparent else "L" if grey else "RGB")
        colours = len(picture.getbands()) - transparent
        histogram = np.reshape(picture.histogram(), (-1, 256))[:colours]
        values = np.rint(np.arange(256) * ((most or 255) / 255)).astype(int)
        clipped = int(histogram[:, values > levels].sum())
        table = scaling(levels)[values].tolist()
        picture = picture.point(table * colours + [*range(256)] * transparent)
    if transparent:
        white, clear = Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")
        if clear.getchannel("A").getextrema() == (0, 0):
            remark("wholly transparent, so that it became white")
        picture = Image.alpha_composite(white, clear)
    return Page(picture if picture.mode == mode else picture.convert(mode), clipped)


class DeepPixels(NamedTuple):
    """A grey page of more than 8 bits, upright.

    Attributes:
        values: (height, width), at least 0.
        transparent: which pixels are transparent; None: no pixel is.
    """

    values: np.ndarray
    transparent: np.ndarray | None

    def to_bytes(self, levels: int) -> np.ndarray:
        """Return bytes: floor(255 v / levels + 1/2), at most 255; transparent pixels are white."""
        scaled = to_levels(self.values, levels)
        if self.transparent is not None:
            scaled[self.transparent] = 255
        return scaled

    @property
    def visible(self) -> np.ndarray:
        """The values of the pixels that are not transparent."""
        return self.values if self.transparent is None else self.values[~self.transparent]


def deep_pixels(image: Picture, levels: int | None = None) -> DeepPixels | None:
    """Return the pixels of a page of more than 8 bits; None: it has 8 bits, or fewer.

    Args:
        image: an opened image file.
        levels: if given, pages of 32 bits are read, too.

    Raises:
        ValueError: see `decoded`.
    """
    signed = image.format == "TIFF" and _sample_format(image) == ("signed", 16)
    sixteen_bit = (
        image.mode.startswith("I;16")
        or (image.mode == "I" and image.format in ("PNG", "PPM"))
        or signed
    )
    if not sixteen_bit and image.mode not in ("I", "F"):
        return None
    if not sixteen_bit and levels is None:
        raise ValueError(
            "32-bit pixels, whose range is not known; pass --levels N with the value that means "
            "white, or save as 8 or 16 bit"
        )
    level, most = image.info.get("transparency"), _largest_value(image)
    values = np.asarray(upright(image))
    if most is not None:
        values = np.rint(values * (most / DEEP)).astype(np.int32)
    if values.min(initial=0) < 0 or not np.isfinite(values).all():
        kind = "signed 16-bit pixels" if signed else "32-bit pixels"
        raise ValueError(f"{kind} with values below 0 or NaN, whose range is not known")
    return DeepPixels(values, values == level if isinstance(level, int) else None)


def _largest_value(image: Any) -> int | None:
    """Return the value that means white in a PGM or PPM file that is not loaded yet.

    Pillow scales such files to 255 or 65535. Scaled back and rounded, they have their own values.
    None: other formats, and files that Pillow does not scale.
    """
    kinds = [(tile[0], tile[3]) for tile in getattr(image, "tile", ())]
    if len(kinds) != 1 or kinds[0][0] not in ("ppm", "ppm_plain"):
        return None
    most = kinds[0][1][-1]
    return None if most in (255, DEEP) else most


def has_deep_colour(image: Picture) -> bool:
    """Return whether a page that is not decoded yet has colours of 16 bits.

    Pillow reads the upper 8 of them.
    """
    layouts = (str(tile[3]) for tile in getattr(image, "tile", ()))
    return not image.mode.startswith("I") and any(";16" in layout for layout in layouts)


def _sample_format(image: Any) -> tuple[str, int]:
    kinds, bits = image.tag_v2.get(339, (1,)), image.tag_v2.get(258, (1,))
    return ("signed" if kinds == (2,) else "other"), bits[0] if len(bits) == 1 else 0


def common_white(counts: Sequence[tuple[int, ...]]) -> int:
    """Return the smallest of `WHITES` that holds 99.9 % of the values of every image.

    Args:
        counts: of each image: how many values it has, and how many exceed each of `WHITES`.
    """
    if not counts:
        return DEEP
    table = np.array(counts)
    held = (table[:, 1:] <= HOT_SHARE * table[:, :1]).all(0)
    return WHITES[int(held.argmax())]


def counts_above(values: np.ndarray) -> tuple[int, ...]:
    """Return how many values there are, and how many exceed each of `WHITES`."""
    return values.size, *(int(np.count_nonzero(values > white)) for white in WHITES)


def to_levels(values: np.ndarray, levels: int) -> np.ndarray:
    """Return bytes: floor(255 v / levels + 1/2), with v clipped to [0, levels]."""
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        return scaling(levels)[values]
    clipped = values.clip(0, levels).astype(np.float64)
    return np.floor(clipped * 255 / levels + 0.5).astype(np.uint8)


@lru_cache(maxsize=8)
def scaling(levels: int) -> np.ndarray:
    """Return the byte of each 16-bit value, (65536,); see `to_levels`."""
    values = np.arange(DEEP + 1).clip(0, levels)
    return ((510 * values + levels) // (2 * levels)).astype(np.uint8)


def upright(image: Picture) -> Picture:
    """Return a picture rotated by its EXIF orientation; `image` itself if it is upright.

    A picture whose EXIF data are damaged counts as upright.
    """
    from PIL import ExifTags, Image, ImageOps

    image.load()  # decodes every pixel: a truncated file fails here
    try:
        exif = image.getexif()
        if exif.get(ExifTags.Base.Orientation, 1) in range(2, 9):
            return ImageOps.exif_transpose(image)
        if not exif and image.info.get("exif"):  # damaged data may count as empty
            Image.Exif().load(image.info["exif"])
    except Exception:  # the parser can raise anything on damaged data
        remark("damaged EXIF data: taken as upright")
    return image


def square_resize(image: Picture, size: int) -> Picture:
    """Crop the largest centred square of an upright picture and resize it to (size, size).

    If a margin is odd, the bottom or the right loses one row or column more.

    The resize is Pillow's BICUBIC, which has antialiasing: its support grows with the reduction.
    Parmar et al. 2022 recommend this for the FID.
    """
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # A large picture is not copied if the crop would change nothing.
    square = (
        image if image.size == (side, side) else image.crop((left, top, left + side, top + side))
    )
    return square.resize((size, size), Image.Resampling.BICUBIC)


ALIGNED = (178, 218)  # pixels of CelebA's aligned faces
FACE = (25, 45, 153, 173)  # left, top, right and bottom of the crop


def crop_and_resize(image: Picture, *, size: int = 64) -> Picture:
    """Crop one of CelebA's aligned 178x218 faces and resize it to (size, size).

    The crop has rows 45 to 172 and columns 25 to 152, as is usual for CelebA. The resize is
    Pillow's BILINEAR, which has antialiasing, as has the scipy.misc.imresize of Dai & Wipf's code.

    Args:
        image: the aligned face.
        size: side of the result in pixels.

    Raises:
        InputError: the picture is smaller than the crop.
    """
    from PIL import Image

    left, top, right, bottom = FACE
    if image.width < right or image.height < bottom:
        raise InputError(
            f"an image of {image.width}x{image.height} pixels has no rows {top}:{bottom} "
            f"and columns {left}:{right}: the crop is for CelebA's aligned images of 178x218"
        )
    face = image.crop(FACE)
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
