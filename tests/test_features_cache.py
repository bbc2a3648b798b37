"""Test cached features: found again, never mixed up, correct after damage or a kill."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

import forking
from poise.features import Extractor, cache, cached_features, make_extractor
from poise.features.cache import default_cache

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)


class Counting:
    """An extractor that counts its batches."""

    def __init__(self) -> None:
        self.calls = 0
        self.extractor = replace(make_extractor("pixels"), network=self.network)

    def network(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return images.flatten(1)

    def __call__(
        self, folder: Path | None, content: str = "a", images=IMAGES, **changes
    ) -> torch.Tensor:
        return cached_features(replace(self.extractor, **changes), images, content, cache=folder)


@pytest.fixture
def counting():
    return Counting()


def test_features_are_computed_once(counting, tmp_path, capsys):
    first = counting(tmp_path / "new" / "folder")
    calls = counting.calls
    assert torch.equal(counting(tmp_path / "new" / "folder"), first) and counting.calls == calls
    assert capsys.readouterr().err == ""


def test_a_generator_is_not_touched_when_its_features_are_there(tmp_path):
    def batches():
        yield from (IMAGES[:40], IMAGES[40:])

    def never():
        raise AssertionError
        yield

    pixels = make_extractor("pixels")
    first = cached_features(pixels, batches(), "a", total=60, cache=tmp_path)
    assert torch.equal(cached_features(pixels, never(), "a", total=60, cache=tmp_path), first)


@pytest.mark.parametrize(
    "other",
    [
        {"content": "b"},
        {"images": IMAGES[:50]},
        {"images": IMAGES / np.float32(255)},
        {"checksum": "1" * 64},
        {"resize": "another"},
    ],
)
def test_other_images_or_another_extractor_are_computed_anew(counting, tmp_path, other):
    counting(tmp_path)
    calls = counting.calls
    counting(tmp_path, **other)
    assert counting.calls > calls and len(list(tmp_path.iterdir())) == 2


def flip(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda content: content[:-100],
        lambda content: b"",
        lambda content: b"nothing of the kind",
    ],
)
def test_a_damaged_file_is_said_and_computed_again(counting, tmp_path, capsys, damage):
    first = counting(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert torch.equal(counting(tmp_path), first)
    assert capsys.readouterr().err.count("computing them again\n") == 1
    assert torch.equal(counting(tmp_path), first) and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "other",
    [
        lambda features: features[:3].clone(),
        lambda features: features.reshape(-1),
        lambda features: features * torch.nan,
        lambda features: features.double(),
        lambda features: features[:, :0].clone(),
    ],
)
def test_features_of_another_kind_are_computed_again_even_with_a_right_hash(
    counting, tmp_path, capsys, other
):
    first = counting(tmp_path)
    (path,) = tmp_path.iterdir()
    features = other(first)
    path.write_bytes(save({"features": features, "sha256": cache._digest(path, features)}))
    assert torch.equal(counting(tmp_path), first)
    assert capsys.readouterr().err.count("computing them again\n") == 1


def test_a_file_under_anothers_name_is_not_believed(counting, tmp_path, capsys):
    first = counting(tmp_path)
    (path,) = tmp_path.iterdir()
    counting(tmp_path, content="b", images=255 - IMAGES)
    (other,) = set(tmp_path.iterdir()) - {path}
    other.replace(path)
    assert (
        torch.equal(counting(tmp_path), first) and "computing them again" in capsys.readouterr().err
    )


def test_a_folder_that_cannot_be_written_costs_a_warning_only(counting, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert torch.equal(counting(tmp_path / "file" / "cache"), counting(tmp_path / "good"))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("poise: warning: features are not kept")


def test_the_folder_is_the_variables_or_in_the_home_or_off(monkeypatch, tmp_path, counting):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("POISE_CACHE", raising=False)
    assert default_cache() == tmp_path / ".cache" / "poise" / "features"
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "mine"))
    counting(None)
    assert len(list((tmp_path / "mine").iterdir())) == 1
    monkeypatch.setenv("POISE_CACHE", "off")
    counting(None)
    assert default_cache() is None and sorted(p.name for p in tmp_path.iterdir()) == ["mine"]


def test_what_killed_processes_left_is_swept_up_after_a_day(counting, tmp_path):
    old, new = tmp_path / ".writing-a-1", tmp_path / ".writing-b-2"
    old.touch(), new.touch()
    os.utime(old, (time.time() - 90_000,) * 2)
    counting(tmp_path)
    assert not old.exists() and new.exists()


WRITER = """
import sys, torch
from pathlib import Path
import forking
from poise.features import Extractor, cached_features, make_extractor
images = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, -1, 40, 40).contiguous()
folder = Path(sys.argv[1])
while True:
    cached_features(make_extractor("pixels"), images, "a", cache=folder)
    for path in folder.glob("*.safetensors"):
        path.unlink(missing_ok=True)
"""


def test_a_reader_sees_all_or_nothing_while_others_write_and_are_killed(
    tmp_path, tmp_path_factory, capsys
):
    images = (
        torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, -1, 40, 40).contiguous()
    )
    expected = make_extractor("pixels")(images)
    writers = [
        forking.start(WRITER, ["-c", str(tmp_path)], tmp_path_factory.mktemp("writer"))
        for _ in range(2)
    ]
    try:
        deadline, found = time.monotonic() + 60, False
        while not found and time.monotonic() < deadline:
            time.sleep(0.02)
            found = any(tmp_path.iterdir())  # the writers also delete it
        assert found and all(w.process.is_alive() for w in writers)
        ends = time.monotonic() + 1
        while time.monotonic() < ends:
            assert torch.equal(
                cached_features(make_extractor("pixels"), images, "a", cache=tmp_path), expected
            )
    finally:
        for writer in writers:
            writer.process.kill()
            writer.process.join()
    assert torch.equal(
        cached_features(make_extractor("pixels"), images, "a", cache=tmp_path), expected
    )
    assert capsys.readouterr().err == ""


def test_the_extractor_type_is_public():
    assert isinstance(make_extractor("pixels"), Extractor)
