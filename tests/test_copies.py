"""Nearest training images, and whether samples are copies of them."""

import json

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

import poise
from poise.data import Rows
from poise.metrics import copies
from test_pipeline import IMAGES, TINY


@pytest.mark.parametrize("mapped", [False, True])
def test_the_nearest_training_images_are_those_of_scikit_learn(mapped, tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "BLOCK_VALUES", 7 * 3 * 16)  # 7 images at a time
    training = np.random.default_rng(0).integers(0, 256, (50, 3, 4, 4), dtype=np.uint8)
    queries = torch.rand(9, 3, 4, 4)
    queries[4] = torch.from_numpy(training[31]) / 255  # a copy
    flat = training.reshape(50, -1) / 255
    neighbours = NearestNeighbors(n_neighbors=1).fit(flat)
    distances, places = neighbours.kneighbors(queries.flatten(1).double().numpy())
    if mapped:
        np.save(tmp_path / "training.npy", training)
        array = np.load(tmp_path / "training.npy", mmap_mode="r")
        training = Rows(array, np.arange(50))
    found = copies.nearest(queries, training)
    expected = torch.from_numpy(flat[places[:, 0]]).reshape(9, 3, 4, 4).float()
    torch.testing.assert_close(found.images, expected)
    torch.testing.assert_close(found.distances, torch.from_numpy(distances[:, 0] / 48**0.5).float())
    assert found.distances[4] == 0


def test_mirror_images_are_searched_if_they_were_trained_on():
    training = np.random.default_rng(0).integers(0, 256, (20, 1, 4, 4), dtype=np.uint8)
    queries = torch.from_numpy(training[[3, 5]]) / 255
    queries[1] = queries[1].flip(2)  # without the batch: left to right
    assert copies.nearest(queries, training).distances[1] > 0.1
    found = copies.nearest(queries, training, mirrored=True)
    assert (found.distances == 0).all() and torch.equal(found.images, queries)


def test_of_a_very_large_data_set_a_fixed_part_is_searched(monkeypatch):
    monkeypatch.setattr(copies, "MOST_VALUES", 10 * 16)
    training = np.random.default_rng(0).integers(0, 256, (50, 1, 4, 4), dtype=np.uint8)
    assert copies.most_searched(training) == 10 and copies.most_searched(training[:7]) == 7
    found = copies.nearest(torch.from_numpy(training) / 255, training)
    assert int((found.distances == 0).sum()) == 10


def smooth(seed, count, side=16):
    """Return images as a blurred model makes them: few coarse values, enlarged."""
    coarse = np.random.default_rng(seed).random((count, 1, 4, 4))
    return (coarse.repeat(side // 4, 2).repeat(side // 4, 3) * 255).astype(np.uint8)


def test_noisy_copies_are_said_and_new_images_are_not():
    training = smooth(0, 40)
    as_floats = torch.from_numpy(training) / 255
    others = torch.from_numpy(smooth(1, 30)) / 255
    copied = as_floats[:30] + 0.02 * torch.randn(30, 1, 16, 16)
    assert copies.copies_note(torch.from_numpy(smooth(2, 30)) / 255, others, training) is None
    note = copies.copies_note(copied, others, training)
    assert note is not None and note.startswith("30 of 30 samples are near copies")
    mirrored = copied.flip(3)
    assert copies.copies_note(mirrored, others, training) is None
    few = torch.cat([copied[:3], others[:27]])
    assert copies.copies_note(few, others, training) is None
    assert copies.copies_note(mirrored, others, training, mirrored=True) is not None


def test_a_run_compares_its_samples_with_a_small_training_set(tmp_path, monkeypatch):
    options = poise.Options(device="cpu", quiet=True)
    notes = {}
    for share in (0.0, 1e9):
        monkeypatch.setattr(copies, "COPIED", share)
        run = poise.train(IMAGES, recipe=TINY, out=tmp_path / str(share), options=options)
        summary = json.loads((run.folder / "summary.json").read_text())
        notes[share] = " ".join(summary.get("notes", []))
    assert "copies" not in notes[0.0] and "64 of 64 samples are near copies" in notes[1e9]
