"""Test that all sources give the same data set, splits are disjoint, and errors name a remedy."""

import builtins
import dataclasses
import gzip
import io
import os
import pickle
import struct
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from poise import data as datasets
from poise.data import (
    Rows,
    cached,
    checked_images,
    encoded,
    find_images,
    gather,
    load,
    read_images,
    spread,
)
from poise.data.arrays import as_split
from poise.data.dataset import Reading, content_hashes, count_shared, split_by_content
from poise.data.decoding import read_image
from poise.data.layouts import is_celeba
from poise.data.storage import gather_rows
from poise.errors import InputError, MissingExtraError, MissingInputError
from poise.variants import DATA_SETS


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write_images(folder: Path, pixels: np.ndarray, ending: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{k:03}.{ending}")
    return folder


def refusal(source, kind: type[InputError] = InputError, **options) -> str:
    """Return the message of an error; it must be one line."""
    with pytest.raises(kind) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def together(dataset: datasets.Dataset) -> list[bytes]:
    return sorted([*content_hashes(dataset.train), *content_hashes(dataset.test)])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POISE_DATA", raising=False)


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)


# The split


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 40), min_size=10, max_size=120), st.randoms())
def test_the_split_depends_on_the_images_alone_and_never_overlaps(kinds, random):
    if len(set(kinds)) == 1:
        kinds[0] += 1
    images = np.array(kinds, np.uint8).reshape(-1, 1, 1, 1)
    train, test = split_by_content(images)
    assert sorted([*train, *test]) == list(range(len(kinds)))
    sides = {*images[train].ravel()}, {*images[test].ravel()}
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    shuffled = random.sample(kinds, len(kinds))
    again = split_by_content(np.array(shuffled, np.uint8).reshape(-1, 1, 1, 1))[1]
    assert sorted(np.array(shuffled)[again]) == sorted(images[test].ravel())


@pytest.mark.parametrize(("count", "tested"), [(10, 1), (14, 1), (1797, 180), (120_000, 10_000)])
def test_one_image_in_ten_is_tested_and_at_most_ten_thousand(count, tested):
    images = np.arange(count, dtype=np.uint32).view(np.uint8).reshape(count, 1, 2, 2)
    assert len(split_by_content(images)[1]) == tested


def test_identical_images_cannot_be_split():
    assert "all 12 images are identical" in refusal(np.zeros((12, 4, 4), np.uint8))


# Arrays


@pytest.mark.parametrize(
    ("given_shape", "shape"),
    [
        ((12, 8, 8), (1, 8, 8)),
        ((12, 8, 8, 3), (3, 8, 8)),
        ((12, 8, 8, 1), (1, 8, 8)),
        ((12, 3, 8, 8), (3, 8, 8)),
        ((12, 1, 3, 3), (1, 3, 3)),
    ],
)
def test_arrays_and_tensors_come_in_three_layouts(given_shape, shape):
    array = noise(*given_shape)
    dataset = load(array)
    assert (
        dataset.shape == shape
        and dataset.train.shape == (11, *shape)
        and dataset.test.shape == (1, *shape)
    )
    assert (dataset.name, dataset.source, dataset.notes) == ("array", "array", ())
    last = (
        array.transpose(0, 3, 1, 2)
        if array.shape[-1] in (1, 3) and shape[1] == 8 and array.ndim == 4
        else array
    )
    assert together(dataset) == sorted(
        content_hashes(np.ascontiguousarray(last.reshape(12, *shape)))
    )
    assert load(torch.from_numpy(array)).checksum == dataset.checksum


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "f8"])
def test_floats_in_the_unit_range_stay_floats(dtype):
    array = (noise(12, 8, 8) / 255).astype(dtype)
    dataset = load(array)
    assert dataset.train.dtype == np.float32
    images = gather(dataset.train, range(len(dataset.train)))
    assert images.dtype == torch.float32 and np.allclose(images.numpy(), dataset.train)


def test_a_half_precision_tensor_that_numpy_does_not_know_is_taken():
    assert load(torch.rand(10, 1, 4, 4).bfloat16()).train.dtype == np.float32


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((12, 64), np.uint8), "vectors: poise train takes images"),
        (np.zeros(12, np.uint8), r"shape (12,): images come as (n, h, w), (n, h, w, c) or (n, c, h, w)"),
        (np.zeros((64, 48, 3), np.uint8), "looks like a single image"),
        (np.zeros((12, 8, 8, 2), np.uint8), "images have 1 or 3 channels"),
        (np.zeros((12, 4, 8, 8), np.uint8), "images have 1 or 3 channels"),
        (np.zeros((12, 3, 3, 3), np.uint8), "the channels may be first or last"),
        (np.zeros((12, 0, 0), np.uint8), "shape (12, 0, 0)"),
        (np.zeros((12, 8, 8), np.int64), "type int64: save as uint8 (0 to 255), or as floats in [0, 1]"),
        (np.zeros((12, 8, 8), object), "type object"),
        (np.full((12, 8, 8), 255.0), "values from 255 to 255, allowed are floats in [0, 1]: divide by 255 or save as uint8"),
        (np.full((12, 8, 8), -0.5), "values from -0.5 to -0.5"),
        (noise(12, 8, 8) / 127.5 - 1, "they look like [-1, 1]; pass (images + 1) / 2"),
        (np.full((12, 8, 8), 1.002, np.float32), "values from 1.002 to 1.002, allowed are floats in [0, 1]"),
        (np.full((12, 8, 8), 4095.0), "divide by the value that means white, or pass it with --levels N"),
        (np.array([0.5] * 700 + [np.nan] * 68).reshape(12, 8, 8), "NaN or infinite values, first in image 10"),
        (np.full((12, 8, 8), np.inf), "NaN or infinite values, first in image 0"),
        (noise(12, 8, 6), "images of 6x8, not square: pass --size N"),
        (noise(3, 8, 8), "3 images are too few: at least 10 are needed"),
        (noise(1, 8, 8), "1 image is too few"),
        (noise(0, 8, 8), "0 images are too few"),
    ],
)  # fmt: skip
def test_an_array_that_is_not_images_is_refused(array, message):
    assert message in refusal(array)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"channels": 4}, "channels must be 1 (grey) or 3 (RGB)"),
        ({"jpeg_quality": 0}, "1 to 95"),
        ({"levels": 0}, "levels must be at least 1, not 0"),
        ({"max_megapixels": 0}, "max_megapixels must be at least 1, not 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    assert message in refusal(noise(12, 8, 8), **options)


WHITES = (255, 4095, 65535)


@pytest.mark.parametrize("white", WHITES)
@pytest.mark.parametrize("kind", ["array", "npz", "tif"])
def test_one_scale_is_chosen_for_all_images_of_sixteen_bits(tmp_path, white, kind):
    values = np.random.default_rng(0).integers(0, white // 2, (12, 40, 40)).astype(np.uint16)
    values[5, :20] = white  # the others are darker, and stay darker
    values[7, 3, 3] = 65535  # a hot pixel: 1 of 1,600
    source = values
    if kind == "npz":
        source = tmp_path / "x.npz"
        np.savez(source, x_train=values[:4], x_test=values[4:])
    if kind == "tif":
        source = write_images(tmp_path / "x", values, "tif")
    dataset = load(source)
    expected = np.floor(values.clip(0, white) * (255 / white) + 0.5).astype(np.uint8)
    assert (
        together(dataset) == sorted(content_hashes(expected[:, None])) and dataset.levels == white
    )
    clipped = ", and so did 1 larger value in 1 image" if white < 65535 else ""
    what = "16-bit files" if kind == "tif" else "16-bit values"
    assert dataset.notes == (
        f"{what}: the value {white:,} became white{clipped}; --levels N sets another",
    )
    assert load(source, levels=65535).levels == 65535


@pytest.mark.parametrize("kind", ["array", "floats", "png", "twice"])
def test_images_that_use_little_of_their_range_are_named_before_anything_else(tmp_path, kind):
    mask = (noise(12, 8, 8) > 127).astype(np.uint8)
    source = {
        "array": mask,
        "png": write_images(tmp_path / "x", mask),
        "floats": mask / 255,
        "twice": mask.astype(np.float32) / 255,
    }[kind]
    first = load(source).notes[0]
    assert first.startswith("check the range: the images use only the values from 0 to ")
    if kind in ("array", "png"):
        assert first.endswith("1 of 0 to 255; if 1 means white, pass --levels 1")
        white = load(source, levels=1)
        assert not white.notes and white.checksum == load(mask * np.uint8(255)).checksum
    else:
        assert "multiply them by 255" in first


def test_floats_above_the_white_of_masks_are_noted():
    mask = (noise(12, 8, 8) > 127).astype(np.float32)
    mask[0, 0, :3] = 3
    (note,) = [note for note in load(mask, levels=1).notes if "became white" in note]
    assert "3" in note


def test_bytes_and_floats_of_one_file_are_encoded_together(tmp_path):
    pixels = noise(12, 8, 8)
    np.savez(tmp_path / "x.npz", x_train=pixels[:8], x_test=pixels[8:] / np.float32(255))
    whole = find_images(tmp_path / "x.npz", side="all").images
    np.testing.assert_allclose(whole[:, 0], pixels / 255, rtol=1e-6)


def test_masks_are_black_and_white_whatever_their_type():
    mask = noise(12, 8, 8) > 127
    expected = load(mask * np.uint8(255)).checksum
    assert load(mask).checksum == expected
    for kind in (np.int64, np.uint16, np.int8):
        assert load(mask.astype(kind), levels=1).checksum == expected


def test_floats_that_leave_the_range_by_rounding_are_clipped_and_noted():
    array = (noise(12, 8, 8) / 255).astype(np.float32)
    array[0, 0, 0], array[1, 0, 0] = 1.000001, -1e-7
    dataset = load(array)
    assert dataset.checksum == load(array.clip(0, 1)).checksum
    assert "values from -1e-07 to 1.000001 were clipped to [0, 1]" in dataset.notes[0]
    assert checked_images(array[:, None], (1, 8, 8)).max() == 1


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 1, 8, 8), (3, 8, 8, 1)])
def test_arrays_for_a_network_have_the_scale_of_its_training(shape):
    values = np.arange(192, dtype=np.uint16)
    expected = np.floor(values * (255 / 4095) + 0.5).reshape(3, 1, 8, 8)
    for images in (values.reshape(shape), torch.from_numpy(values.reshape(shape))):
        assert np.array_equal(checked_images(images, (1, 8, 8), 4095), expected)
    mask = values.reshape(shape) > 90
    assert np.array_equal(checked_images(mask, (1, 8, 8)), 255 * mask.reshape(3, 1, 8, 8))
    if shape[-1] == 1:
        with pytest.raises(InputError, match=r"they look like \[-1, 1\]; pass \(images"):
            checked_images(2 * values.reshape(shape) / 191 - 1, (1, 8, 8))


def test_bytes_of_the_scale_of_the_masks_of_training_are_warned_of(capsys):
    masks = noise(3, 8, 8) % 2
    checked_images(masks, (1, 8, 8), 1)
    assert "divide them by 1 and pass floats" in capsys.readouterr().err
    checked_images(255 * masks, (1, 8, 8), 1)
    checked_images(masks, (1, 8, 8))
    checked_images(masks, (1, 8, 8), 4095)
    assert not capsys.readouterr().err


def test_floats_of_another_scale_are_divided_on_request():
    array = noise(12, 8, 8) * np.float32(16)
    array[0, 0, 0] = 5000
    dataset = load(array, levels=4080)
    np.testing.assert_array_equal(
        np.sort(np.concatenate([dataset.train, dataset.test]), None),
        np.sort((array / np.float32(4080)).clip(0, 1), None),
    )
    assert dataset.notes == (
        "images: the value 4,080 became white, and so did 1 larger value in 1 image",
    )
    unit = load(array / 5000, levels=4080)  # floats in [0, 1] are never scaled
    assert unit.checksum == load(array / 5000).checksum


def test_the_same_pictures_give_the_same_bytes_as_files_and_as_an_array(tmp_path):
    pixels = noise(12, 20, 30, 3)
    folder = write_images(tmp_path / "photos", pixels)
    for options in ({"size": 8}, {"size": 8, "channels": 1}):
        assert load(pixels, **options).checksum == load(folder, **options).checksum
    square = write_images(tmp_path / "square", pixels[:, :, :20])
    assert load(pixels[:, :, :20], channels=1).checksum == load(square, channels=1).checksum


def test_floats_are_resized_and_greyed_like_bytes_within_rounding():
    pixels, form = noise(12, 20, 30, 3), Reading(size=8, channels=1)
    floats = as_split({"floats": pixels / np.float32(255)}, form).train
    assert (
        floats.dtype == np.float32
        and floats.shape == (12, 1, 8, 8)
        and floats.min() >= 0
        and floats.max() <= 1
    )
    assert np.abs(floats * 255 - as_split({"bytes": pixels}, form).train).max() < 2


def test_grey_becomes_colour_on_request():
    dataset = load(noise(12, 8, 8), channels=3)
    assert dataset.shape == (3, 8, 8) and np.array_equal(dataset.train[:, 0], dataset.train[:, 2])


# Files of arrays


def test_an_npy_file_is_mapped_not_loaded(tmp_path):
    array = noise(40, 8, 8, 3)
    np.save(tmp_path / "x.npy", array)
    dataset = load("x.npy")
    assert isinstance(dataset.train, Rows) and isinstance(dataset.train.array, np.memmap)
    assert dataset.name == "x" and dataset.checksum == load(array).checksum
    order = torch.randperm(36)
    images = gather(dataset.train, order)
    assert images.is_contiguous() and torch.equal(images, gather(np.asarray(dataset.train), order))
    assert (
        np.array_equal(dataset.train[3], np.asarray(dataset.train)[3])
        and len(dataset.train[2:5]) == 3
    )


@pytest.mark.parametrize("options", [{}, {"size": 4}, {"channels": 1}])
def test_a_mapped_file_of_floats_is_converted_block_by_block(tmp_path, monkeypatch, options):
    monkeypatch.setattr(datasets.storage, "BLOCK_BYTES", 1000)
    array = np.random.default_rng(0).random((30, 3, 8, 8))
    np.save(tmp_path / "x.npy", array)
    mapped = load("x.npy", memory_budget=0, cache=tmp_path / "cache", **options)
    assert isinstance(mapped.train, Rows) and mapped.checksum == load(array, **options).checksum


@pytest.mark.parametrize(
    "keys", [("x_train", "x_test"), ("train", "test"), ("train_images", "test_images")]
)
def test_an_npz_file_keeps_its_split(tmp_path, keys):
    train, test = noise(12, 8, 8), noise(4, 8, 8, seed=1)
    np.savez(
        tmp_path / "x.npz", **dict(zip(keys, (train, test), strict=True)), y_train=np.zeros(12)
    )
    dataset = load("x.npz")
    assert (
        np.array_equal(dataset.train[:, 0], train)
        and np.array_equal(dataset.test[:, 0], test)
        and not dataset.notes
    )


@pytest.mark.parametrize("key", ["images", "x_train", "anything"])
def test_an_npz_file_without_a_split_is_split(tmp_path, key):
    other = {} if key == "anything" else {"labels": np.zeros(12)}
    np.savez(tmp_path / "x.npz", **{key: noise(12, 8, 8)}, **other)
    assert load("x.npz").checksum == load(noise(12, 8, 8)).checksum


def test_arrays_of_the_usual_names_are_recognised(tmp_path):
    train, test, val = noise(12, 8, 8), noise(4, 8, 8, seed=1), noise(3, 8, 8, seed=2)
    np.savez("labelled.npz", train, np.zeros(12))  # arr_0, arr_1
    assert load("labelled.npz").checksum == load(train).checksum
    np.savez("val.npz", X_train=train, X_val=val, y_train=np.zeros(12))
    dataset = load("val.npz")
    assert np.array_equal(dataset.train[:, 0], train) and np.array_equal(dataset.test[:, 0], val)
    np.savez("three.npz", train_images=train, val_images=val, test_images=test)
    dataset = load("three.npz")
    assert np.array_equal(dataset.test[:, 0], test)
    assert dataset.notes == ("not used: the array val_images",)
    everything = find_images("three.npz", side="all")
    assert everything.sides == ("train",) * 12 + ("test",) * 4 + ("val",) * 3
    assert np.array_equal(everything.images[:, 0], np.concatenate([train, test, val]))
    np.save("upper.npy", train)
    Path("upper.npy").rename("UPPER.NPY")
    assert load("UPPER.NPY").checksum == load(train).checksum


def test_test_images_that_were_trained_on_are_counted(tmp_path):
    images = noise(15, 8, 8)
    np.savez(tmp_path / "x.npz", train=images[:12], test=images[10:])
    assert load("x.npz").notes == ("2 of 5 test images also occur in training",)


def test_files_of_arrays_that_cannot_be_used_are_named(tmp_path):
    np.savez("keys.npz", a=noise(12, 8, 8), b=noise(12, 8, 8))
    assert "keys.npz has the arrays a, b: name the images x_train and x_test" in refusal("keys.npz")
    assert "is a single file: give a folder" in refusal(
        write_images(tmp_path, noise(1, 8, 8)) / "000.png"
    )
    np.savez("pair.npz", train=noise(12, 8, 8), test=noise(12, 4, 4))
    assert "do not go together" in refusal("pair.npz")
    np.savez("nan.npz", images=np.full((12, 8, 8), np.nan))
    assert "nan.npz (images) holds NaN" in refusal("nan.npz")
    np.save("objects.npy", np.array([noise(2, 2), None], object))
    np.savez("objects.npz", np.array([noise(2, 2), None], object))
    for name in ("objects.npy", "objects.npz"):
        assert f"{name} holds Python objects, which are never loaded" in refusal(name)


@pytest.mark.parametrize("ending", ["npy", "npz"])
@pytest.mark.parametrize("content", ["cut", "text", "nothing"])
def test_damaged_files_of_arrays_are_refused(tmp_path, ending, content):
    path = tmp_path / f"x.{ending}"
    np.save(path, noise(12, 8, 8)) if ending == "npy" else np.savez(path, noise(12, 8, 8))
    path.write_bytes(
        {"cut": path.read_bytes()[:-300], "text": b"no array at all", "nothing": b""}[content]
    )
    assert f"x.{ending} is {'damaged (' if content == 'cut' else 'not an .np'}" in refusal(path)


@pytest.mark.parametrize("header", ["(-12, 8, 8)", "(12, 8, -8)", "(12, 8, ", "(1e9, 8, 8)", "[]"])
def test_a_broken_header_of_an_array_is_refused(tmp_path, header):
    content = b"{'descr': '|u1', 'fortran_order': False, 'shape': %s}\n" % header.encode()
    array = b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content + bytes(768)
    (tmp_path / "x.npy").write_bytes(array)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", array)
    for name in ("x.npy", "x.npz"):
        assert f"{name} is damaged (" in refusal(tmp_path / name)


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes are POSIX")
def test_an_array_that_is_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.npy")
    assert "x.npy is not a file" in refusal(tmp_path / "x.npy")


def test_an_archive_without_arrays_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", b"no array at all")
    assert "x.npz (images) is not an array" in refusal(tmp_path / "x.npz")


# Folders of images


@pytest.mark.parametrize(
    "ending", ["png", "jpg", "JPEG", "webp", "bmp", "gif", "tif", "tiff", "ppm", "jfif", "jpe"]
)
def test_a_folder_of_any_accepted_kind_is_read(tmp_path, ending):
    dataset = load(write_images(tmp_path / "photos", noise(12, 8, 8, 3), ending))
    assert dataset.shape == (3, 8, 8) and (len(dataset.train), len(dataset.test)) == (11, 1)
    assert dataset.name == "photos" and dataset.source.endswith("photos")


def test_a_folder_is_searched_below_and_other_files_are_counted(tmp_path):
    pixels = noise(12, 8, 8)
    write_images(tmp_path / "photos" / "deep" / "inside", pixels[:6])
    write_images(tmp_path / "photos", pixels[6:])
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / ".DS_Store").write_text("hidden")
    (tmp_path / "photos" / "._000.png").write_text("hidden")
    dataset = load(tmp_path / "photos")
    assert dataset.shape == (1, 8, 8) and together(dataset) == together(load(pixels))
    assert dataset.notes == ("ignored: 1 .txt",)


@pytest.mark.parametrize("name", ["test", "val", "valid", "Validation"])
def test_a_folder_keeps_its_split(tmp_path, name):
    train, test, rest = noise(12, 8, 8), noise(4, 8, 8, seed=1), noise(1, 8, 8, seed=2)
    write_images(tmp_path / "x" / "train" / "class", train)
    write_images(tmp_path / "x" / name, test)
    write_images(tmp_path / "x" / "other", rest)
    dataset = load("x")
    assert np.array_equal(dataset.train[:, 0], train) and np.array_equal(dataset.test[:, 0], test)
    assert dataset.notes == ("ignored: 1 image outside the split's two folders",)


LAYOUTS = {
    "archive": ("archive/train", "archive/test"),
    "images": ("images/Train/a", "images/val/a"),
    "two domains": ("trainA", "testA", "trainB", "testB"),
    "training": ("training", "testing"),
    "classes": ("cat/train", "cat/test", "dog/train", "dog/test"),
    "years": ("train2017", "val2017"),
    "suffix": ("train_images", "test-set"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_usual_layouts_keep_their_split(tmp_path, name):
    train, test = [], []
    for seed, folder in enumerate(LAYOUTS[name]):
        pixels = noise(11, 8, 8, seed=seed)
        write_images(tmp_path / "x" / folder, pixels)
        (train if "train" in folder.lower() else test).extend(pixels)
    dataset = load("x")
    assert np.array_equal(dataset.train[:, 0], train) and np.array_equal(dataset.test[:, 0], test)


@pytest.mark.parametrize(
    ("folders", "note"),
    [
        (("train", "rest"), "test is missing beside train"),
        (("a/val", "a/test"), "train is missing beside a/test, a/val"),
    ],
)
def test_folders_that_look_like_a_split_but_are_none_are_named(tmp_path, folders, note):
    for seed, folder in enumerate(folders):
        write_images(tmp_path / "x" / folder, noise(6, 8, 8, seed=seed))
    (found,) = load("x").notes
    assert note in found and found.endswith("all images are used together")


def test_files_that_look_like_a_split_are_named(tmp_path):
    folder = write_images(tmp_path / "x", noise(12, 8, 8))
    for k, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"{'test' if k > 8 else 'train'}_{path.name}")
    (note,) = load("x").notes
    assert "begin with test and train, but are no split" in note


def test_links_are_followed_and_loops_are_not(tmp_path):
    train, test = noise(12, 8, 8), noise(4, 8, 8, seed=1)
    write_images(tmp_path / "store" / "a", test)
    folder = write_images(tmp_path / "x" / "train", train).parent
    (folder / "test").symlink_to(tmp_path / "store" / "a")
    (folder / "train" / "again").symlink_to(folder / "test")
    (folder / "train" / "up").symlink_to("..")
    (folder / "out").symlink_to(tmp_path)
    (folder / "all").symlink_to(tmp_path / "store")  # before test in the alphabet
    os.mkfifo(folder / "train" / "pipe.png")
    dataset = load("x")
    assert np.array_equal(dataset.train[:, 0], train) and np.array_equal(dataset.test[:, 0], test)
    assert sorted(note.split(":")[0].split(",")[0] for note in dataset.notes) == [
        "ignored",
        "x/all/a is not read again",
        "x/out is not read again",
        "x/train/again is not read again",
        "x/train/up is not read again",
    ]
    (folder / "train" / "gone.png").symlink_to("nowhere.png")
    assert "x/train/gone.png does not exist, the target of a link (nowhere.png)" in refusal("x")
    assert load("x", skip_unreadable=True).checksum == dataset.checksum


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes are POSIX")
def test_an_image_that_is_a_named_pipe_is_not_waited_for(tmp_path):
    folder = write_images(tmp_path / "x", noise(12, 8, 8))
    os.mkfifo(folder / "pipe.png")
    assert len(read_images(folder)) == 12
    with pytest.raises(InputError, match="it is a named pipe"):
        read_image(folder / "pipe.png", "L")


def test_a_folder_that_cannot_be_read_is_named_or_skipped(tmp_path, monkeypatch):
    write_images(tmp_path / "x" / "locked", noise(1, 8, 8))
    write_images(tmp_path / "x" / "open", noise(12, 8, 8))
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert refusal("x") == (
        "x/locked cannot be read: Permission denied; "
        "change its permissions, or pass --skip-unreadable"
    )
    dataset = load("x", skip_unreadable=True)
    assert len(dataset.train) == 11
    assert dataset.notes == ("skipped: x/locked cannot be read: Permission denied",)


def test_pages_of_tiff_files_are_images_and_frames_are_counted(tmp_path):
    pixels = noise(12, 8, 8)
    folder = write_images(tmp_path / "x", pixels[:3])
    for k, pages in enumerate((pixels[3:10], pixels[10:])):
        first, *others = map(Image.fromarray, pages)
        first.save(folder / f"s{k}.tif", save_all=True, append_images=others)
    dataset = load(folder)
    assert together(dataset) == together(load(pixels))
    assert dataset.notes == ("2 TIFF files with 9 pages: each is an image",)
    assert find_images(folder).names[3:5] == ("s0.tif (page 1)", "s0.tif (page 2)")
    first, *others = map(Image.fromarray, noise(3, 8, 8, seed=4))
    first.save(folder / "moving.gif", save_all=True, append_images=others)
    assert load(folder, channels=1).notes[1:] == (
        "only the first frame is read of 1 .gif file: 2 other frames",
    )


def test_a_tiff_file_may_begin_with_a_thumbnail(tmp_path):
    pixels = noise(12, 8, 8)
    folder = write_images(tmp_path / "x", pixels[:11])
    whole = Image.fromarray(pixels[11])
    whole.encoderinfo = {"tiffinfo": {}}
    reduced = {254: 1}  # NewSubfileType
    whole.resize((2, 2)).save(
        folder / "page.tif", save_all=True, append_images=[whole], tiffinfo=reduced
    )
    assert together(load(folder)) == together(load(pixels))


@pytest.mark.parametrize(("most", "plain"), [(4095, False), (4095, True), (15, False)])
def test_a_pgm_file_has_its_own_values_not_those_that_pillow_scales(tmp_path, most, plain):
    kind = ">u2" if most > 255 else np.uint8
    values = np.random.default_rng(0).integers(0, most + 1, (12, 8, 8)).astype(kind)
    values[:, 0, 0] = most
    (tmp_path / "x").mkdir()
    for k, page in enumerate(values):
        pixels = " ".join(map(str, page.flat)).encode() if plain else page.tobytes()
        head = f"{'P2' if plain else 'P5'} 8 8 {most}\n".encode()
        (tmp_path / "x" / f"{k:02}.pgm").write_bytes(head + pixels)
    values = values.astype(int)
    expected = np.floor(255 * values / most + 0.5).astype(np.uint8)
    shown = find_images(tmp_path / "x", side="all").images[:, 0]
    np.testing.assert_array_equal(shown, expected)
    given = find_images(tmp_path / "x", side="all", levels=most)
    np.testing.assert_array_equal(given.images[:, 0], expected)
    assert not any("became white" in note for note in given.notes), given.notes
    half = find_images(tmp_path / "x", side="all", levels=most // 2).images[:, 0]
    scaled = np.floor(255 * np.minimum(values, most // 2) / (most // 2) + 0.5)
    np.testing.assert_array_equal(half, scaled)


def test_colours_of_sixteen_bits_are_read_with_eight_and_that_is_noted(tmp_path):
    folder = write_images(tmp_path / "x", noise(12, 4, 4, 3) // 16)
    pixels = (noise(4, 4, 3, seed=1) * 16).astype(">u2")  # 12 bits; Pillow cannot write such files
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        chunk = kind + content
        file += struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (folder / "deep.png").write_bytes(file)
    narrow, deep = load("x").notes
    assert narrow.startswith("check the range") and narrow.endswith("pass --levels 15")
    assert deep.startswith("1 image of 16-bit colour: read with 8 bits a channel")


def test_a_damaged_page_does_not_hide_the_others(tmp_path):
    pages = [Image.fromarray(pixels) for pixels in noise(12, 32, 32)]
    file = io.BytesIO()
    pages[0].save(
        file, "TIFF", save_all=True, append_images=pages[1:], compression="tiff_adobe_deflate"
    )
    content = bytearray(file.getvalue())
    start = content.find(b"\x78\x9c", content.find(b"\x78\x9c") + 2)  # the data of page 2
    content[start : start + 600] = bytes(600)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "stack.tif").write_bytes(content)
    assert "stack.tif (page 2) cannot be decoded" in refusal("x")
    dataset = load("x", skip_unreadable=True)
    assert len(dataset.train) + len(dataset.test) == 11
    assert len(dataset.skipped) == 1


def test_a_name_that_is_not_utf8_can_be_printed(tmp_path):
    folder = write_images(tmp_path / "x", noise(12, 8, 8))
    (folder / os.fsdecode(b"caf\xe9.png")).write_text("no image")
    assert r"x/caf\xe9.png cannot be decoded" in refusal("x").encode().decode()
    assert r"x/caf\xe9.png" in load("x", skip_unreadable=True).notes[0].encode().decode()


def test_a_few_of_many_bad_files_are_listed(tmp_path):
    folder = write_images(tmp_path / "x", noise(12, 8, 8))
    for k in range(9):
        (folder / f"bad{k}.png").write_text("no image")
    dataset = load("x", skip_unreadable=True)
    assert len(dataset.skipped) == 9 and len(dataset.notes) == 6
    assert dataset.notes[-1].startswith("skipped 4 more files")


def test_warnings_about_files_name_them(tmp_path):
    folder = write_images(tmp_path / "x", noise(12, 8, 8, 3), "jpg")
    short = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x01\0\0\0"
    Image.fromarray(noise(8, 8, 3)).save(folder / "004.jpg", exif=short)
    (note,) = load("x").notes
    assert note.startswith("x/004.jpg: Corrupt EXIF data")


def test_a_damaged_exif_is_noted_and_does_not_stop(tmp_path):
    folder = write_images(tmp_path / "x", noise(12, 16, 16, 3), "jpg")
    plain = load("x", size=8)
    damaged = b"Exif\0\0\xff\xff\xff\xff\0\0\0\x08"
    Image.fromarray(noise(12, 16, 16, 3)[4]).save(folder / "004.jpg", exif=damaged)
    dataset = load("x", size=8)
    assert dataset.checksum == plain.checksum
    assert dataset.notes == ("x/004.jpg: damaged EXIF data: taken as upright",)


def test_an_image_without_an_opaque_pixel_is_named(tmp_path):
    folder = write_images(tmp_path / "x", noise(12, 8, 8, 3))
    Image.fromarray(noise(8, 8, 4) * np.array([1, 1, 1, 0], np.uint8)).save(folder / "clear.png")
    assert load("x").notes == ("x/clear.png: wholly transparent, so that it became white",)


def test_a_limit_on_large_files_can_be_raised(tmp_path):
    folder = write_images(tmp_path / "x", noise(12, 8, 8))
    Image.new("L", (1500, 1000)).save(folder / "large.png")
    message = refusal("x", size=8, max_megapixels=1)
    assert "decoded: it has 2 megapixels, over the limit of 1; pass --max-megapixels 2" in message
    assert "repair" not in message and message.endswith("or pass --skip-unreadable")
    assert len(load("x", size=8, max_megapixels=2).train) == 12


def test_a_limit_is_that_of_its_own_call_in_threads_too(tmp_path):
    """Former defect: one thread restored the limit of another, for the whole process."""
    folder = write_images(tmp_path / "x", noise(12, 8, 8))
    Image.new("L", (3000, 2000)).save(folder / "large.png")
    before = Image.MAX_IMAGE_PIXELS, warnings.showwarning

    def fits(limit: int) -> bool:
        try:
            load("x", size=8, max_megapixels=limit)
        except InputError as error:
            assert "over the limit of" in str(error)
            return False
        return True

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(fits, [5, 6, 7] * 4)) == [False, True, True] * 4
    assert (Image.MAX_IMAGE_PIXELS, warnings.showwarning) == before


def test_every_image_of_a_split_folder_is_found_with_its_side(tmp_path):
    parts = {
        "train": noise(12, 8, 8),
        "val": noise(3, 8, 8, seed=1),
        "test": noise(4, 8, 8, seed=2),
    }
    for side, pixels in parts.items():
        write_images(tmp_path / "x" / side, pixels)
    found = find_images("x", side="all")
    assert found.side == "given" and len(found.images) == 19
    for side, pixels in parts.items():
        rows = [row for row, of in enumerate(found.sides) if of == side]
        assert [found.names[row] for row in rows] == [
            f"{side}/{k:03}.png" for k in range(len(pixels))
        ]
        assert np.array_equal(found.images[rows][:, 0], pixels)
    assert find_images("x").notes[0] == "x: 4 of 16 images, those for test"


def test_decoded_images_are_kept_until_a_file_or_an_option_changes(tmp_path, monkeypatch):
    folder, cache = (
        write_images(tmp_path / "x", noise(12, 8, 8).astype(np.uint16) * 16),
        tmp_path / "c",
    )
    decoding = Mock(wraps=cached.decode_now)
    monkeypatch.setattr(cached, "decode_now", decoding)
    monkeypatch.setattr(cached, "WORTH_SECONDS", 0)
    first = load(folder, cache=cache)
    again = load(folder, cache=cache, memory_budget=0)
    assert decoding.call_count == 1 and isinstance(again.train, Rows)
    assert (again.checksum, again.notes, again.levels) == (
        first.checksum,
        first.notes,
        first.levels,
    )
    load(folder, cache=cache, levels=65535)
    os.utime(folder / "003.png", (1, 1))
    load(folder, cache=cache)
    assert decoding.call_count == 3
    (kept,) = cache.glob("*.npy")  # the others are deleted
    kept.write_bytes(kept.read_bytes()[:-30])
    assert load(folder, cache=cache).checksum == first.checksum and decoding.call_count == 4
    (told,) = cache.glob("*.json")
    told.write_text(told.read_text().replace('"names": [', '"names": [7, '))
    assert load(folder, cache=cache).checksum == first.checksum and decoding.call_count == 5
    (kept,) = cache.glob("*.npy")
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")  # one pixel
    assert load(folder, cache=cache).checksum == first.checksum and decoding.call_count == 6
    (told,) = cache.glob("*.json")
    told.write_text(told.read_text().replace('"positions": [\n    0', '"positions": [\n    1'))
    assert load(folder, cache=cache).checksum == first.checksum and decoding.call_count == 7
    monkeypatch.setattr(cached.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    (folder / "003.png").unlink()
    load(folder, cache=cache)
    assert len([*cache.glob("*.npy")]) == 1


def test_decoding_uses_the_cores_of_the_process(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert encoded.available_cores() == 3


def test_pictures_that_are_decoded_at_the_same_time_fit_into_the_limit():
    room, sizes, most = encoded._Room(80), [], []

    def take(width):
        with room.taken_by(Image.new("L", (width, 1))):
            sizes.append(width)
            most.append(sum(sizes))
            sleep(0.001)
            sizes.remove(width)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(take, [4, 5, 3, 100, 2, 6, 4, 5] * 4))
    assert {size for size in most if size > 10} == {100}  # 80 bytes are 10 pixels


def test_a_folder_with_one_colour_image_is_colour(tmp_path):
    write_images(tmp_path / "x", noise(12, 8, 8))
    write_images(tmp_path / "x" / "more", noise(1, 8, 8, 3))
    assert load("x").shape == (3, 8, 8) and load("x", channels=1).shape == (1, 8, 8)


def test_sixteen_bit_greys_keep_their_levels(tmp_path):
    levels = noise(12, 8, 8)
    folder = write_images(tmp_path / "x", levels.astype(np.uint16) * 257)
    assert together(load(folder)) == together(load(levels))


def test_a_damaged_image_is_named_or_skipped_and_listed(tmp_path):
    folder = write_images(tmp_path / "photos", noise(13, 16, 16, 3), "jpg")
    whole = (folder / "004.jpg").read_bytes()
    (folder / "004.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    (folder / "007.jpg").write_text("no image")
    for options in ({}, {"size": 8}, {"size": 8, "channels": 3}):
        message = refusal(folder, **options)
        assert (
            "photos/00" in message
            and "cannot be decoded" in message
            and message.endswith("or pass --skip-unreadable")
        )
        dataset = load(folder, skip_unreadable=True, **options)
        assert len(dataset.train) + len(dataset.test) == 11
        assert [note.split("/")[-1][:25] for note in dataset.notes] == [
            "004.jpg cannot be decoded",
            "007.jpg cannot be decoded",
        ]
    (folder / "004.jpg").unlink()
    (folder / "007.jpg").unlink()
    assert load(folder).checksum == load(folder, skip_unreadable=True).checksum


def test_skipping_does_not_hide_that_too_few_are_left(tmp_path):
    folder = write_images(tmp_path / "photos", noise(10, 8, 8))
    (folder / "000.png").write_text("no image")
    assert "9 images are too few" in refusal(folder, skip_unreadable=True)


def test_folders_that_cannot_be_used_say_what_to_do(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty is empty: put images there (png, jpg" in refusal("empty")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    np.save(tmp_path / "texts" / "x.npy", noise(12, 8, 8))
    assert "texts holds 2 files, none an image: accepted are png, jpg" in refusal("texts")
    assert "name the file itself, as texts/x.npy" in refusal("texts")
    assert "there are 1 .txt, 1 .npy" in refusal("texts")
    assert "3 images are too few" in refusal(write_images(tmp_path / "few", noise(3, 8, 8)))
    tall = write_images(tmp_path / "tall", noise(12, 8, 6))
    assert (
        "not square: " in refusal(tall)
        and "000.png and " in refusal(tall)
        and "are 6x8; pass --size N" in refusal(tall)
    )
    write_images(tmp_path / "mixed", noise(11, 8, 8))
    write_images(tmp_path / "mixed" / "z", noise(1, 9, 9))
    message = refusal("mixed")
    assert "mixed/000.png is 8x8 and mixed/z/000.png is 9x9" in message and "--size N" in message
    assert "000.png is a single file" in refusal(tmp_path / "few" / "000.png")


def test_pictures_are_turned_upright_before_the_cut(tmp_path):
    folder = write_images(tmp_path / "x", noise(11, 16, 32, 3), "jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.new("RGB", (48, 32), "white")
    lying.paste("black", (0, 0, 24, 32))
    lying.save(folder / "phone.jpg", exif=exif)
    images = np.concatenate(
        [part[:] for part in (lambda d: (d.train, d.test))(load(folder, size=16))]
    )
    halves = images[:, :, :7].mean((1, 2, 3)), images[:, :, 9:].mean((1, 2, 3))
    assert ((halves[0] < 5) & (halves[1] > 250)).sum() == 1


@pytest.mark.parametrize(
    "layout", [(0, 1, 2, 3), (0, 3, 1, 2)], ids=["channels first", "channels last"]
)
@pytest.mark.parametrize("count", [0, 1, 60, 3000])
@pytest.mark.parametrize("far_apart", [True, False])
def test_rows_of_a_mapped_file_are_those_of_the_array_in_the_order_asked_for(
    tmp_path, layout, count, far_apart, monkeypatch
):
    monkeypatch.setattr(
        "poise.data.storage._far_apart", lambda array, indices: far_apart and len(indices) > 0
    )
    images = noise(1000, 3, 8, 8)
    np.save(tmp_path / "x.npy", images)
    rows = np.load(tmp_path / "x.npy", mmap_mode="r").transpose(layout)[5:]
    wanted = np.random.default_rng(0).integers(-995, 995, count)
    expected = images.transpose(layout)[5:][wanted]
    assert torch.equal(gather_rows(rows, wanted), torch.from_numpy(expected))
    with pytest.raises(IndexError):
        gather_rows(rows, np.append(wanted, 995))


def test_images_beyond_the_memory_budget_go_to_a_file_that_goes_with_them(tmp_path):
    folder = write_images(tmp_path / "photos", noise(30, 8, 8, 3))
    (folder / "003.png").write_text("no image")
    mapped = load(folder, memory_budget=1000, cache=tmp_path / "cache", skip_unreadable=True)
    assert isinstance(mapped.train, Rows) and isinstance(mapped.train.array, np.memmap)
    assert os.name != "posix" or not list((tmp_path / "cache").iterdir()), (
        "a kill would leave it behind"
    )
    plain = load(folder, skip_unreadable=True)
    assert mapped.checksum == plain.checksum and isinstance(plain.train, np.ndarray)
    assert torch.equal(gather(mapped.test, [2, 0, 0]), gather(plain.test, [2, 0, 0]))
    del mapped
    assert not list((tmp_path / "cache").iterdir())


def test_images_go_to_the_folder_for_temporary_files_if_a_cache_cannot_be_written(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("poise.data.storage.os.access", lambda folder, mode: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    made = Mock(wraps=tempfile.mkstemp)
    monkeypatch.setattr(tempfile, "mkstemp", made)
    folder = write_images(tmp_path / "x", noise(12, 8, 8))
    mapped = load(folder, memory_budget=0, cache=tmp_path / "cache")
    assert isinstance(mapped.train, Rows)
    assert {Path(call.args[2]) for call in made.call_args_list} == {tmp_path / "temporary"}


@pytest.mark.parametrize("remedy", ["poise.data.cached.os.access", "poise.data.cached.find_spec"])
def test_skipped_files_are_tried_again_once_they_may_be_read(remedy, tmp_path, monkeypatch):
    folder, decoding = write_images(tmp_path / "x", noise(12, 8, 8)), Mock(wraps=cached.decode_now)
    (folder / "003.png").write_text("no image")
    monkeypatch.setattr(cached, "decode_now", decoding)
    monkeypatch.setattr(cached, "WORTH_SECONDS", 0)
    how = {"cache": tmp_path / "c", "skip_unreadable": True}
    with monkeypatch.context() as patch:
        patch.setattr(remedy, lambda *_: None)
        for _ in range(2):
            assert load(folder, **how).skipped
        assert decoding.call_count == 1, "the others are kept"
    load(folder, **how)
    assert decoding.call_count == 2


def test_the_crop_of_celeba_is_known_once_its_files_are_gone(tmp_path):
    """A plain folder called like the data set has no such crop."""
    assert is_celeba("celeba64") and is_celeba(str(tmp_path / "gone"), "celeba64")
    assert not is_celeba(str(tmp_path / "celeba64"), "celeba64")
    assert not is_celeba(str(tmp_path / "gone"), "gone") and not is_celeba(str(tmp_path / "gone"))


def test_the_memory_budget_is_half_of_what_is_free_unless_given(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "photos", noise(12, 8, 8))
    assert isinstance(load(folder).train, np.ndarray) and datasets.storage._free_memory() > 2**20
    monkeypatch.setattr(datasets.storage, "_free_memory", lambda: 2 * 12 * 64 - 2)
    assert isinstance(load(folder).train, Rows)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_that_a_control_group_denies_is_not_free(tmp_path, version):
    controllers, limit, usage = (
        ("memory", "limit_in_bytes", "usage_in_bytes") if version == 1 else ("", "max", "current")
    )
    (tmp_path / "membership").write_text(f"9:cpu:/elsewhere\n4:{controllers}:/job/step\n")
    for place, allowed, used in (
        ("job", "1000", 700),
        ("job/step", "max" if version == 2 else "5000", 650),
    ):
        folder = tmp_path / controllers / place
        folder.mkdir(parents=True)
        (folder / f"memory.{limit}").write_text(f"{allowed}\n")
        (folder / f"memory.{usage}").write_text(f"{used}\n")
        stat = "anon 300\nactive_file 40\ninactive_file 60\n"
        (folder / "memory.stat").write_text(
            stat + ("total_active_file 140\ntotal_inactive_file 160\n" if version == 1 else "")
        )
    left = list(datasets.storage._left_in_groups(tmp_path / "membership", tmp_path))
    assert left == ([5000 - 650 + 300, 1000 - 700 + 300] if version == 1 else [1000 - 700 + 100])


def test_a_disk_too_small_for_the_images_is_noticed_before_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(RuntimeError, match="choose a smaller --size"):
        load(write_images(tmp_path / "x", noise(12, 8, 8)), memory_budget=0)


# torchvision's folders, and data sets by name


def idx_file(images: np.ndarray) -> bytes:
    return struct.pack(">IIII", 0x803, *images.shape) + images.tobytes()


def write_mnist(folder: Path, packed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True)
    parts = noise(30, 28, 28), noise(10, 28, 28, seed=1)
    for name, images in zip(("train", "t10k"), parts, strict=True):
        content = idx_file(images)
        path = folder / f"{name}-images-idx3-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)
    return parts


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_mnist_is_read_from_its_idx_files(tmp_path, monkeypatch, name, folder, packed):
    train, test = write_mnist(tmp_path / "shelf" / folder / "raw", packed)
    monkeypatch.setenv("POISE_DATA", str(tmp_path / "shelf"))
    dataset = load(name)
    assert (
        dataset.name == name
        and np.array_equal(dataset.train[:, 0], train)
        and np.array_equal(dataset.test[:, 0], test)
    )
    monkeypatch.delenv("POISE_DATA")
    for place in ("shelf", f"shelf/{folder}", f"shelf/{folder}/raw"):
        assert load(place).checksum == dataset.checksum and load(place).name == folder
    assert load(name, data_dir="shelf", size=8, channels=3).shape == (3, 8, 8)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:7], lambda b: b"\0\0\x08\x01" + b[4:], lambda b: b""]
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_idx_files_are_refused(tmp_path, damage, packed):
    write_mnist(tmp_path / "raw")
    path = tmp_path / "raw" / "t10k-images-idx3-ubyte"
    content = damage(path.read_bytes())
    path.unlink()
    path.with_suffix(".gz" if packed else "").write_bytes(
        gzip.compress(content) if packed else content
    )
    assert "t10k-images-idx3-ubyte" in refusal("raw") and "download it again" in refusal("raw")
    if packed:
        path.with_suffix(".gz").write_bytes(gzip.compress(content)[:-5])
        assert "download it again" in refusal("raw")


@pytest.mark.parametrize("header", [b"", idx_file(noise(3, 8, 8))[:16]])
def test_a_small_idx_archive_of_gigabytes_is_not_unpacked(header, tmp_path, monkeypatch):
    write_mnist(tmp_path / "raw")
    path = tmp_path / "raw" / "t10k-images-idx3-ubyte"
    path.unlink()
    path.with_suffix(".gz").write_bytes(gzip.compress(header + bytes(2**24)))
    unpacked: list[int] = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(
        gzip.GzipFile, "read", lambda *given: unpacked.append(len(part := read(*given))) or part
    )
    assert "download it again" in refusal("raw")
    assert sum(unpacked) <= 2**20 + 16


def test_a_missing_idx_file_is_named(tmp_path):
    write_mnist(tmp_path / "raw")
    (tmp_path / "raw" / "t10k-images-idx3-ubyte").unlink()
    assert "t10k-images-idx3-ubyte is missing" in refusal("raw", MissingInputError)


def write_cifar10(folder: Path, protocol: int = 4) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True)
    parts = noise(20, 3072), noise(4, 3072, seed=1)
    batches = {f"data_batch_{k + 1}": parts[0][4 * k : 4 * k + 4] for k in range(5)} | {
        "test_batch": parts[1]
    }
    for name, data in batches.items():
        content = pickle.dumps(
            {b"data": data, b"labels": [0, 1, 2, 3], b"batch_label": b"some"}, protocol
        )
        (folder / name).write_bytes(
            content.replace(b"numpy._core", b"numpy.core") if protocol == 3 else content
        )
    return parts[0].reshape(-1, 3, 32, 32), parts[1].reshape(-1, 3, 32, 32)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_cifar10_is_read_from_its_batches(tmp_path, protocol):
    train, test = write_cifar10(tmp_path / "data" / "cifar-10-batches-py", protocol)
    dataset = load("cifar10")  # found in ./data
    assert np.array_equal(dataset.train, train) and np.array_equal(dataset.test, test)
    assert load("data").checksum == load("data/cifar-10-batches-py").checksum == dataset.checksum


class Malicious:
    def __reduce__(self):
        return builtins.exec, ("import poise; poise.was_here = True",)


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_that_asks_for_more_than_arrays_is_refused(tmp_path, protocol):
    import poise

    write_cifar10(tmp_path / "x")
    (tmp_path / "x" / "data_batch_3").write_bytes(pickle.dumps({"data": Malicious()}, protocol))
    message = refusal("x")
    assert (
        "data_batch_3 is not an intact CIFAR-10 batch (it asks for" in message
        and "exec, which is refused)" in message
    )
    assert not hasattr(poise, "was_here")


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps({b"labels": 1}), pickle.dumps({b"data": [1, 2]})]
)
def test_a_damaged_batch_is_refused(tmp_path, content):
    write_cifar10(tmp_path / "x")
    (tmp_path / "x" / "test_batch").write_bytes(content)
    assert "test_batch is not an intact CIFAR-10 batch" in refusal("x")
    (tmp_path / "x" / "test_batch").unlink()
    assert "test_batch is missing" in refusal("x", MissingInputError)


def test_the_jpeg_round_trip_of_the_release_is_named_in_the_notes(tmp_path):
    train, test = write_cifar10(tmp_path / "data" / "cifar-10-batches-py")
    dataset = load("cifar10", jpeg_quality=75)
    for ours, raw in ((dataset.train, train), (dataset.test, test)):
        for image, original in zip(ours, raw, strict=True):
            file = io.BytesIO()
            Image.fromarray(original.transpose(1, 2, 0)).save(file, "JPEG", quality=75)
            assert np.array_equal(image, np.asarray(Image.open(file)).transpose(2, 0, 1))
    assert dataset.notes == ("every image went through JPEG at quality 75",)
    assert "jpeg_quality is for bytes" in refusal(noise(12, 8, 8) / 255, jpeg_quality=75)


def write_celeba(folder: Path) -> np.ndarray:
    pixels = noise(20, 218, 178, 3)
    write_images(folder / "img_align_celeba", pixels, "jpg")
    # Reversed: the order of names and the order of listing both give another split.
    parts = ([0] * 12 + [1] * 3 + [2] * 5)[::-1]
    lines = [f"{k:03}.jpg {part}" for k, part in enumerate(parts)]
    (folder / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    faces = [
        Image.open(folder / "img_align_celeba" / f"{k:03}.jpg").crop((25, 45, 153, 173))
        for k in range(20)
    ]
    return np.stack(
        [
            np.asarray(face.resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
            for face in faces
        ]
    )


def test_celeba_has_its_official_cut_and_split(tmp_path):
    faces = write_celeba(tmp_path / "data" / "celeba")
    dataset = load("celeba64")
    assert np.array_equal(dataset.train, faces[8:]) and np.array_equal(dataset.test, faces[:5])
    assert load("data/celeba").checksum == dataset.checksum
    assert load("celeba64", size=32, channels=1).shape == (1, 32, 32)


def test_celeba_of_kaggle_has_a_table_and_a_folder_in_a_folder(tmp_path):
    write_celeba(tmp_path / "official")
    checksum = load("official").checksum
    folder = tmp_path / "kaggle" / "archive"
    write_celeba(folder)
    lines = (folder / "list_eval_partition.txt").read_text().split()
    pairs = zip(lines[::2], lines[1::2], strict=True)
    table = ["image_id,partition", *(f"{name},{part}" for name, part in pairs)]
    (folder / "list_eval_partition.csv").write_text("\n".join(table) + "\n")
    (folder / "list_eval_partition.txt").unlink()
    (folder / "img_align_celeba").rename(folder / "inner")
    (folder / "img_align_celeba").mkdir()
    (folder / "inner").rename(folder / "img_align_celeba" / "img_align_celeba")
    assert load("kaggle").checksum == checksum
    found = find_images("kaggle", side="all")
    assert Counter(found.sides) == {"train": 12, "val": 3, "test": 5}


def test_celeba_split_by_the_order_of_the_listing_is_the_release(tmp_path, monkeypatch):
    faces = write_celeba(tmp_path / "celeba")
    order = np.random.default_rng(0).permutation(20)
    listing = [tmp_path / "celeba" / "img_align_celeba" / f"{k:03}.jpg" for k in order]
    monkeypatch.setattr(Path, "iterdir", lambda _: iter([*listing, Path("readme.jpg")]))
    dataset = load("celeba", file_order="listing")
    assert np.array_equal(dataset.train, faces[order[:12]]) and np.array_equal(
        dataset.test, faces[order[-5:]]
    )
    assert "file system lists" in dataset.notes[0]


def test_an_order_that_has_no_meaning_for_the_source_is_refused():
    assert "is for CelebA's folder" in refusal(noise(12, 8, 8), file_order="listing")


def test_an_incomplete_celeba_is_named(tmp_path):
    write_celeba(tmp_path / "celeba")
    (tmp_path / "celeba" / "img_align_celeba" / "004.jpg").unlink()
    assert "lacks 1 of 20 images, 004.jpg for one" in refusal("celeba", MissingInputError)
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("000.jpg zero\n")
    assert "list_eval_partition.txt is damaged" in refusal("celeba")
    (tmp_path / "celeba" / "list_eval_partition.txt").unlink()
    assert "list_eval_partition.txt is missing" in refusal("celeba", MissingInputError)


def test_celeba_images_of_another_size_are_named(tmp_path):
    write_celeba(tmp_path / "celeba")
    Image.new("RGB", (64, 64)).save(tmp_path / "celeba" / "img_align_celeba" / "009.jpg")
    assert "009.jpg: an image of 64x64" in refusal("celeba")


def test_the_digits_are_scikit_learns():
    levels = load_digits(return_X_y=True)[0].reshape(-1, 1, 8, 8)
    np.testing.assert_array_equal(
        read_images("digits"), np.floor(levels * 255 / 16 + 0.5).astype(np.uint8)
    )


def test_the_digits_need_no_file():
    dataset = load("digits")
    assert dataset.name == "digits" and dataset.shape == (1, 8, 8)
    assert (len(dataset.train), len(dataset.test), dataset.train.max(), dataset.train.min()) == (
        1617,
        180,
        255,
        0,
    )
    assert len(np.unique(dataset.train)) == 17 and count_shared(dataset.train, dataset.test) == 0


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "mnist"),
        ("fashion-mnist", "fashion"),
        ("fashion-mnist", "fashion-mnist"),
        ("cifar10", "cifar10"),
        ("celeba64", "celeba64"),
    ],
)
def test_an_npz_file_of_the_name_does_as_well(tmp_path, name, file):
    np.savez(tmp_path / f"{file}.npz", x_train=noise(12, 8, 8), x_test=noise(4, 8, 8))
    dataset = load(name, data_dir=tmp_path)
    assert dataset.name == name and len(dataset.test) == 4


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", [*DATA_SETS][1:])
def test_a_data_set_that_is_nowhere_says_where_to_put_it(name):
    message = refusal(name, MissingInputError)
    assert (
        f"{name} is not in the data folder data: put " in message
        and 'pip install "poise[data]"' in message
    )
    assert "data folder elsewhere does not exist" in refusal(
        name, MissingInputError, data_dir="elsewhere"
    )


def test_a_folder_with_two_data_sets_asks_which(tmp_path):
    write_mnist(tmp_path / "x" / "MNIST" / "raw")
    write_cifar10(tmp_path / "x" / "cifar-10-batches-py")
    assert "x holds 2 data sets: name one, x/MNIST/raw or x/cifar-10-batches-py" in refusal("x")


def test_a_source_that_does_not_exist_gets_the_known_names():
    message = refusal("minst", MissingInputError)
    assert (
        "'minst' does not exist (did you mean mnist?): give a folder" in message
        and ", ".join(DATA_SETS) in message
    )
    assert "(did you mean fashion-mnist?)" in refusal("fashion_mnist", MissingInputError)
    assert "does not exist: give" in refusal("photos/holiday", MissingInputError)
    assert "does not exist" in refusal("", MissingInputError)


# The Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(library.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    library.disable_progress_bars()
    return library


def test_a_folder_of_images_goes_through_the_hub_library(tmp_path, hub):
    train, test = noise(12, 8, 8), noise(4, 8, 8, seed=1)
    write_images(tmp_path / "x" / "train", train)
    write_images(tmp_path / "x" / "test", test)
    dataset = load("hf:x")
    assert np.array_equal(dataset.train[:, 0], train) and np.array_equal(dataset.test[:, 0], test)
    assert (dataset.name, dataset.source) == ("x", "hf:x")
    assert load(f"hf:{tmp_path / 'x'}", size=4, channels=3).shape == (3, 4, 4)


def test_a_folder_that_the_library_saved_is_read(tmp_path, hub):
    folder, test = write_images(tmp_path / "x", noise(12, 8, 8)), noise(4, 8, 8, seed=1)
    pictures = {"image": [str(path) for path in sorted(folder.iterdir())]}
    train = hub.Dataset.from_dict(pictures).cast_column("image", hub.Image())
    train.save_to_disk("one")
    assert load("hf:one").checksum == load("x").checksum
    held_out = {
        "image": [str(path) for path in sorted(write_images(tmp_path / "y", test).iterdir())]
    }
    both = {
        "train": train,
        "test": hub.Dataset.from_dict(held_out).cast_column("image", hub.Image()),
    }
    hub.DatasetDict(both).save_to_disk("both")
    assert np.array_equal(load("hf:both").test[:, 0], test)
    assert "hf:both has no labels" in refusal("hf:both", labels=True)
    kinds = hub.ClassLabel(names=["cat", "ant"])
    for side, images in both.items():
        numbers = [row % 2 for row in range(len(images))]
        both[side] = images.add_column("kind", numbers).cast_column("kind", kinds)
    hub.DatasetDict(both).save_to_disk("labelled")
    labels = load("hf:labelled", labels=True).labels
    assert labels is not None and labels.classes == ("ant", "cat")
    assert [*labels.train] == [1, 0] * 6 and [*labels.test] == [1, 0] * 2
    assert "for a data set of the Hub's library, give hf:one" in refusal("one")


def test_a_parquet_file_without_a_split_and_with_a_damaged_image(tmp_path, hub):
    folder = write_images(tmp_path / "files", noise(13, 8, 8))
    encoded = [{"bytes": path.read_bytes(), "path": None} for path in sorted(folder.iterdir())]
    encoded[5]["bytes"] = encoded[5]["bytes"][:80]
    table = hub.Dataset.from_dict({"label": [0] * 13, "img": encoded}).cast_column(
        "img", hub.Image(decode=False)
    )
    (tmp_path / "hub").mkdir()
    table.cast_column("img", hub.Image()).to_parquet(tmp_path / "hub" / "train.parquet")
    assert "hf:hub train[5] cannot be decoded" in refusal("hf:hub")
    dataset = load("hf:hub", skip_unreadable=True)
    assert (len(dataset.train), len(dataset.test)) == (11, 1) and len(dataset.notes) == 1


def test_celeba_from_the_hub_is_cut_too(tmp_path, hub, monkeypatch):
    pixels = noise(12, 218, 178, 3)
    for split, images in (("train", pixels[:8]), ("validation", pixels[8:9]), ("test", pixels[9:])):
        write_images(tmp_path / "x" / split, images)
    place = DATA_SETS["celeba64"]
    monkeypatch.setitem(DATA_SETS, "celeba64", dataclasses.replace(place, hub="x"))
    dataset = load("celeba64")
    assert (dataset.name, dataset.source, len(dataset.train), len(dataset.test)) == (
        "celeba64",
        "hf:x",
        8,
        3,
    )
    face = (
        Image.fromarray(pixels[9])
        .crop((25, 45, 153, 173))
        .resize((64, 64), Image.Resampling.BILINEAR)
    )
    assert np.array_equal(dataset.test[0], np.asarray(face).transpose(2, 0, 1))


def test_hub_data_without_images_and_hub_data_that_do_not_exist_are_named(tmp_path, hub):
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text("a,b\n1,2\n")
    assert "hf:table has no column of images: its columns are a, b" in refusal("hf:table")
    assert "hf:nobody/nothing cannot be loaded" in refusal("hf:nobody/nothing", MissingInputError)
    assert "mnist is not in the data folder data" in refusal("mnist", MissingInputError)


@pytest.mark.usefixtures("no_hub")
def test_the_hub_without_its_library_names_the_extra():
    assert 'hf: data sets needs an optional dependency: pip install "poise[data]"' in refusal(
        "hf:x/y", MissingExtraError
    )


# Methods of a data set


def test_the_checksum_sees_every_pixel_and_both_sides(tmp_path):
    images = noise(20, 8, 8)
    checksum = load(images).checksum
    assert len(checksum) == 64 and load(images.copy()).checksum == checksum
    for changed in (images[:, ::-1], images[:-1], images / np.float32(255)):
        assert load(changed).checksum != checksum


@pytest.mark.parametrize("kind", ["bytes", "floats", "tensor"])
def test_gathered_images_are_floats_in_the_order_asked(kind):
    images = noise(12, 1, 4, 4)
    array = {
        "bytes": images,
        "floats": (images / np.float32(255)),
        "tensor": torch.from_numpy(images),
    }[kind]
    for indices in ([3, 1, 1], torch.tensor([3, 1, 1]), np.array([3, 1, 1])):
        assert torch.equal(gather(array, indices), torch.from_numpy(images[[3, 1, 1]]) / 255)
    assert gather(array, range(0)).shape == (0, 1, 4, 4)


def test_importing_the_module_needs_no_heavy_library(run_python):
    code = (
        "import sys, poise.data; "
        "print(sorted({'sklearn', 'rich', 'PIL', 'datasets', 'tyro'} & set(sys.modules)))"
    )
    assert run_python(code).strip() == "[]"


def test_images_spread_over_a_set_are_evenly_spaced_and_read_when_they_are_used(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(103))
    rows = Rows(np.load(tmp_path / "x.npy", mmap_mode="r"), np.arange(3, 103))
    for count in (1, 7, 50, 100, 200):
        some = spread(rows, count)
        assert isinstance(some, Rows) and len(some) == min(count, 100)
        gaps = {int(gap) for gap in np.diff(some[:])}
        shortest = max(1, 100 // count)
        assert some[0] == 3 and gaps <= {shortest, shortest + 1}
        assert some[-1] + shortest >= 102, "the last images count as well"
