"""Write images and codes to files in chunks, so that memory use does not grow with their number.

Each file is written atomically. Arrays in an .npz are not compressed, because compression takes
longer than decoding the images.
"""

import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.data.decoding import grid, save_png, to_bytes, to_png
from poise.data.encoded import available_cores
from poise.data.storage import allocate
from poise.errors import InputError
from poise.latent import DiagonalGaussian, LatentScale
from poise.shapes import Images
from poise.support.files import appearing, sync, write_file

LARGEST_GRID = 10_000
QUICK = 1  # PNG compression level: twice as fast as Pillow's default, files 5 % larger


def write_images(
    chunks: Iterable[Tensor], out: Path, number: int, *, columns: int | None = None, first: int = 0
) -> None:
    """Write images as one grid (.png), a uint8 array `images` (.npz) or one PNG each (a folder).

    Args:
        chunks: images (n, channels, height, width), float in [0, 1]. They are consumed one chunk at
            a time, except for a grid, which needs them all at once.
        out: output path. Its suffix decides the format.
        number: total number of images.
        columns: columns of the grid.
        first: number of the first file in a folder.

    Raises:
        InputError: an unknown suffix, or too many images for a grid.
        RunError: the disk is full or not writable. In a folder, the files written so far are
            complete.
    """
    check_output(out, number)
    if out.suffix == ".png":
        save_png(out, grid(torch.cat(list(chunks)), columns))
    elif out.suffix == ".npz":
        _write_array(map(_pixels, chunks), out, number)
    else:
        _write_folder(map(_pixels, chunks), out, first)


def check_output(out: Path, number: int = 1) -> None:
    """Check that `write_images` can write to a path.

    Args:
        out: output path.
        number: number of images.

    Raises:
        InputError: an unknown suffix, a file in place of a folder, or too many images for a grid.
    """
    if out.suffix not in (".png", ".npz", ""):
        raise InputError(
            f"{out}: give a .png (one grid), an .npz (array of bytes) "
            "or a folder (one PNG per image)"
        )
    if out.suffix == "" and out.is_file():
        raise InputError(f"{out} is a file: give a .png, an .npz or the name of a folder")
    if out.suffix == ".png" and number > LARGEST_GRID:
        raise InputError(
            f"{out}: a grid takes {LARGEST_GRID} images, not {number}: give an .npz or a folder"
        )


def _pixels(images: Images) -> np.ndarray:
    return to_bytes(images).permute(0, 2, 3, 1).contiguous().numpy()


def _write_array(chunks: Iterator[np.ndarray], out: Path, number: int) -> None:
    start = next(chunks)
    head = {"descr": "|u1", "fortran_order": False, "shape": (number, *start.shape[1:])}
    with _archive(out) as archive, archive.open("images.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, head)
        for pixels in chain([start], chunks):
            member.write(pixels.data)


@contextmanager
def _archive(out: Path) -> Iterator[zipfile.ZipFile]:
    with appearing(out) as writing, open(writing, "xb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            yield archive
        sync(file)


def _write_folder(chunks: Iterator[np.ndarray], out: Path, first: int) -> None:
    """Write one PNG per image. Threads write one chunk while the next one is computed.

    Files are not synced one by one: that would take longer than all the rest.
    """

    def write(place: int, pixels: np.ndarray) -> None:
        with appearing(out / f"{place:06d}.png") as writing:
            writing.write_bytes(to_png(pixels, effort=QUICK))

    pending: Iterator[None] = iter(())
    with ThreadPoolExecutor(available_cores()) as threads:
        for pixels in chunks:
            list(pending)  # wait for the previous chunk, and raise its errors
            pending = threads.map(write, range(first, first + len(pixels)), pixels)
            first += len(pixels)
        list(pending)


def write_codes(
    chunks: Iterable[DiagonalGaussian],
    out: Path,
    number: int,
    names: Sequence[str] = (),
    sides: Sequence[str] = (),
    scale: LatentScale | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Write posteriors as two float32 arrays `mean` and `logvar` of shape (number, latents).

    Args:
        chunks: posteriors of consecutive images.
        out: output path, .npz or .safetensors.
        number: total number of images.
        names, sides: the name of each image and its side of the split, written beside the arrays:
            as arrays of text, or as JSON in the metadata of a .safetensors file.
        scale: mean and scale of the training images' latents, written in the same way.
        labels: the class of each image, written like its name. Empty: not known.

    Raises:
        InputError: an unknown suffix.
        RunError: the disk is full or not writable.
    """
    check_codes_output(out)
    arrays: dict[str, np.ndarray] = dict(
        zip(("mean", "logvar"), _to_arrays(chunks, number), strict=True)
    )
    told: dict[str, Any] = {"names": [*names], "sides": [*sides]} if names else {}
    told |= {"labels": [*labels]} if labels else {}
    told |= asdict(scale) if scale else {}
    if out.suffix == ".safetensors":
        from safetensors.numpy import save

        metadata = {name: json.dumps(value) for name, value in told.items()}
        return write_file(out, save(arrays, metadata or None))
    arrays |= {name: np.array(value) for name, value in told.items()}
    with _archive(out) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array)
    return None


def check_codes_output(out: Path) -> None:
    """Check that `write_codes` can write to a path.

    Raises:
        InputError: an unknown suffix.
    """
    if out.suffix not in (".npz", ".safetensors"):
        raise InputError(f"{out}: give an .npz or a .safetensors file")


def _to_arrays(chunks: Iterable[DiagonalGaussian], number: int) -> list[np.ndarray]:
    """Return the means and the log variances of all chunks, in memory if they fit."""
    both, done = None, 0
    for codes in chunks:
        shape = (number, codes.mean.shape[1])
        both = both or [allocate(shape, np.dtype(np.float32), None, None) for _ in range(2)]
        for array, values in zip(both, (codes.mean, codes.logvar), strict=True):
            array[done : done + len(codes)] = values.numpy()
        done += len(codes)
    assert both is not None and done == number
    return both
