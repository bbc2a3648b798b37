"""Test that images and codes are written in parts, and completely or not at all."""

import errno
import weakref
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from poise.errors import InputError, RunError
from poise.latent import DiagonalGaussian
from poise.runs.export import write_codes, write_images

IMAGES = torch.rand(25, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CODES = DiagonalGaussian(IMAGES[:, 0, 0], IMAGES[:, 1, 0])


def test_images_are_written_as_grid_array_or_files(tmp_path):
    write_images(IMAGES.split(10), tmp_path / "grid.png", 25, columns=25)
    write_images(IMAGES.split(10), tmp_path / "array.npz", 25)
    write_images(IMAGES.split(10), tmp_path / "folder", 25, first=7)
    stored = np.load(tmp_path / "array.npz")["images"]
    np.testing.assert_array_equal(
        stored, np.round(255 * IMAGES.permute(0, 2, 3, 1).numpy()).astype(np.uint8)
    )
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        f"{k:06d}.png" for k in range(7, 32)
    ]
    with (
        Image.open(tmp_path / "folder" / "000029.png") as picture,
        Image.open(tmp_path / "grid.png") as grid,
    ):
        np.testing.assert_array_equal(np.asarray(picture), stored[22])
        assert grid.width > 20 * grid.height


def test_what_has_no_form_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"\.png"):
        write_images([IMAGES], tmp_path / "movie.mp4", 25)
    with pytest.raises(InputError, match="a grid takes 10000 images, not 10001"):
        write_images([IMAGES], tmp_path / "grid.png", 10_001)
    with pytest.raises(InputError, match=r"\.safetensors"):
        write_codes([CODES], tmp_path / "codes.pt", 25)


@pytest.mark.parametrize("out", ["array.npz", "folder"])
def test_few_parts_are_held_at_a_time(out, tmp_path):
    parts: list[weakref.ref] = []

    def drawn():
        for _ in range(8):
            assert sum(part() is not None for part in parts) <= 2
            images = torch.rand(10, 1, 4, 4)
            parts.append(weakref.ref(images))
            yield images

    write_images(drawn(), tmp_path / out, 80)
    assert len(parts) == 8


@pytest.mark.parametrize("out", ["array.npz", "folder"])
@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), InputError("NaN"), KeyboardInterrupt()],
)
def test_what_fails_half_way_leaves_nothing_half_done(out, failure, tmp_path):
    def drawn():
        yield IMAGES[:10]
        raise failure

    expected = RunError if isinstance(failure, OSError) and out.endswith(".npz") else type(failure)
    with pytest.raises(expected):
        write_images(drawn(), tmp_path / out, 25)
    if out == "folder":
        assert sorted(path.name for path in (tmp_path / out).iterdir()) == [
            f"{k:06d}.png" for k in range(10)
        ]
    else:
        assert not list(tmp_path.iterdir())


def test_a_file_that_was_there_stays_where_writing_fails(tmp_path):
    write_images([IMAGES], tmp_path / "array.npz", 25)
    before = (tmp_path / "array.npz").read_bytes()
    with pytest.raises(InputError, match="NaN"):
        write_images([IMAGES, torch.full((5, 3, 8, 8), torch.nan)], tmp_path / "array.npz", 30)
    assert (tmp_path / "array.npz").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_an_archive_is_sound_and_not_compressed(tmp_path):
    write_images(IMAGES.split(10), tmp_path / "array.npz", 25)
    with zipfile.ZipFile(tmp_path / "array.npz") as archive:
        assert (
            archive.testzip() is None
            and archive.getinfo("images.npy").compress_type == zipfile.ZIP_STORED
        )


@pytest.mark.parametrize("name", ["codes.npz", "codes.safetensors"])
def test_codes_are_written_by_name(name, tmp_path):
    parts = [
        DiagonalGaussian(mean, logvar)
        for mean, logvar in zip(CODES.mean.split(10), CODES.logvar.split(10), strict=True)
    ]
    write_codes(parts, tmp_path / name, 25)
    stored = (
        load_file(tmp_path / name) if name.endswith("safetensors") else np.load(tmp_path / name)
    )
    for key in ("mean", "logvar"):
        np.testing.assert_array_equal(np.asarray(stored[key]), getattr(CODES, key))
