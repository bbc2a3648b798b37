"""Test images in tar files, and images that are decoded whenever they are read."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from poise import data as datasets
from poise.data.storage import gather
from poise.errors import InputError
from poise.recipes import Data
from poise.runs.options import Options
from poise.runs.pipeline import train
from test_pipeline import TINY, Killed, die_at, weights

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)


def as_file(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def images(numbers: range, folder: str = "") -> dict[str, bytes]:
    return {f"{folder}{k:03}.png": as_file(PIXELS[k]) for k in numbers}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "folder"
    place.mkdir()
    for name, content in images(range(60)).items():
        (place / name).write_bytes(content)
    return place


# Memory for none of the 60 images, for 20, and for all.
@pytest.mark.parametrize(
    "how", [{}, *({"stream": True, "memory_budget": 2 * 64 * kept} for kept in (0, 20, 60))]
)
def test_a_tar_file_holds_the_images_of_the_folder_that_was_packed(folder, how, tmp_path):
    plain = datasets.load(folder)
    tar = write_tar(tmp_path / "packed.tar", images(range(60), "inside/"))
    shards = tmp_path / "shards"
    for start in (0, 30):
        write_tar(shards / f"part-{start:03}.tar", images(range(start, start + 30)))
    for source in (folder, tar, shards):
        found = datasets.load(source, **how)
        assert found.checksum == plain.checksum and found.name == source.stem
        rows = [50, 3, 17, 3]
        assert torch.equal(gather(found.train, rows), gather(plain.train, rows))
        assert torch.equal(gather(found.test, [0, 5]), gather(plain.test, [0, 5]))


@pytest.mark.parametrize("stream", [False, True])
def test_the_names_of_tar_files_or_of_folders_inside_say_the_split(stream, tmp_path):
    write_tar(tmp_path / "named" / "set-train-000.tar", images(range(20)))
    write_tar(tmp_path / "named" / "set-train-001.tar", images(range(20, 40)))
    write_tar(tmp_path / "named" / "set-val-000.tar", images(range(40, 60)))
    inside = images(range(40), "train/") | images(range(40, 60), "test/")
    for source in (tmp_path / "named", write_tar(tmp_path / "inside.tar", inside)):
        found = datasets.load(source, stream=stream)
        assert (len(found.train), len(found.test)) == (40, 20)
        np.testing.assert_array_equal(np.asarray(found.test)[:, 0], PIXELS[40:])


@pytest.mark.parametrize("above", ["/data/photos/", "../photos/"])
def test_names_of_members_may_lead_outside(above, tmp_path):
    members = images(range(40), f"{above}train/") | images(range(40, 60), f"{above}test/")
    tar = write_tar(tmp_path / "outside.tar", members)
    found = datasets.load(tar)
    assert (len(found.train), len(found.test)) == (40, 20)
    names = datasets.find_images(tar, side="all").names
    assert names[0] == f"outside.tar/{above}train/000.png"


def test_links_in_a_tar_file_are_the_images_that_they_lead_to(tmp_path):
    tar = tmp_path / "links.tar"
    with tarfile.open(tar, "w") as archive:
        for name, target, kind in (
            ("a/soft.png", "../b/real.png", tarfile.SYMTYPE),
            ("b/real.png", "", tarfile.REGTYPE),
            ("b/hard.png", "b/real.png", tarfile.LNKTYPE),
            ("loop.png", "loop.png", tarfile.SYMTYPE),
        ):
            member = tarfile.TarInfo(name)
            content = as_file(PIXELS[0]) if kind == tarfile.REGTYPE else b""
            member.type, member.linkname, member.size = kind, target, len(content)
            archive.addfile(member, io.BytesIO(content))
    found = datasets.find_images(tar, side="all")
    assert found.names == tuple(f"links.tar/{name}.png" for name in ("a/soft", "b/real", "b/hard"))
    assert np.array_equal(found.images[:, 0], PIXELS[[0, 0, 0]])
    assert any("1 link in" in note for note in found.notes)


def test_the_folders_inside_tar_files_say_the_class(tmp_path):
    for shard, numbers in enumerate((range(30), range(30, 60))):
        members = images(numbers[:15], "cats/") | images(numbers[15:], "dogs/")
        for form in ("plain", "train"):
            write_tar(tmp_path / form / f"{form}-{shard}.tar", members)
    for form in ("plain", "train"):
        found = datasets.load(tmp_path / form, labels=True)
        assert found.labels is not None and found.labels.classes == ("cats", "dogs")
        for image, label in zip(np.asarray(found.train)[:, 0], found.labels.train, strict=True):
            (number,) = np.flatnonzero((image == PIXELS).all((1, 2)))
            assert label == number % 30 // 15


def test_one_image_of_a_sample_is_read_and_the_rest_is_noted(tmp_path):
    members = {}
    for k in range(12):
        members |= {f"{k:04}.png": as_file(PIXELS[k]), f"{k:04}.json": b"{}"}
        members |= {f"{k:04}.mask.png": as_file(PIXELS[k + 20]), f"._{k:04}.png": b"hidden"}
    given = datasets.find_images(write_tar(tmp_path / "samples.tar", members), side="all")
    np.testing.assert_array_equal(np.asarray(given.images)[:, 0], PIXELS[:12])
    assert given.names[3] == "samples.tar/0003.png"
    assert "ignored: 12 .json" in given.notes
    assert "ignored: 12 images beside another one of the same sample" in given.notes


@pytest.mark.parametrize(
    "make, options, message",
    [
        (lambda p: write_tar(p / "x.tar.gz", images(range(12)), "w:gz"), {}, "is compressed.*unp"),
        (
            lambda p: write_tar(p / "x.tar", {"a.txt": b"text"}),
            {},
            r"holds no image \(ignored: 1 \.txt\)",
        ),
        (lambda p: write_tar(p / "x.tar", images(range(12)) | {"b.png": b""}), {}, "b.png"),
        (lambda p: PIXELS, {"stream": True}, "stream is for image files.*leave it out"),
        (lambda p: PIXELS, {"stream": True, "jpeg_quality": 75}, "leave one out"),
    ],
)
def test_what_cannot_be_read_is_refused(make, options, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        datasets.load(make(tmp_path), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size, said", [(30_000, "is damaged"), (31_300, "ends within 030")])
def test_a_tar_file_that_was_cut_short_is_refused(size, said, tmp_path):
    tar = write_tar(tmp_path / "cut.tar", images(range(60)))
    with tar.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(InputError, match=rf"cut\.tar cannot be read .*it {said}.*again"):
        datasets.load(tar)


def test_a_tar_file_without_its_end_is_noted(tmp_path):
    tar = write_tar(tmp_path / "cut.tar", images(range(60)))
    with tar.open("r+b") as file:
        file.truncate(30 * 1024)  # headers and images take 512 bytes each
    assert "cut.tar has no mark of its end: it may have been cut short" in str(
        datasets.load(tar).notes
    )


def test_unreadable_images_of_a_stream_are_skipped(tmp_path):
    damaged = images(range(20)) | {"005.png": b"no image"}
    found = datasets.load(
        write_tar(tmp_path / "some.tar", damaged),
        stream=True,
        skip_unreadable=True,
        memory_budget=2 * 64 * 10,
    )
    assert len(found.train) + len(found.test) == 19 and len(found.skipped) == 1
    kept = {PIXELS[k].tobytes() for k in range(20) if k != 5}
    assert {image.tobytes() for part in (found.train, found.test) for image in part[:]} == kept


def test_a_killed_stream_ends_with_the_bits_of_a_run_in_memory(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("poise.data.encoded.room", lambda budget: 2 * 64 * 25)  # 25 of 60 images
    tar = write_tar(tmp_path / "packed.tar", images(range(60)))
    options = Options(device="cpu", quiet=True, save_seconds=0.0)

    def run(source: Path, out: str, **changes: bool) -> None:
        first = replace(TINY.first, epochs=2)  # 4 steps
        recipe = replace(TINY, data=Data(str(source)), first=first, second=None)
        train(source, recipe=recipe, out=tmp_path / out, options=options, **changes)

    run(folder, "memory")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 3)
        run(tar, "stream", stream=True)
    run(tar, "stream", stream=True)
    memory, stream = weights(tmp_path / "memory"), weights(tmp_path / "stream")
    assert memory.keys() == stream.keys()
    assert all(torch.equal(memory[name], stream[name]) for name in memory)
