"""Test the mean and covariance of real images in a file, of Poise and of other libraries."""

import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from poise import evaluation, features
from poise.errors import InputError
from poise.evaluation import evaluate
from poise.metrics import read_statistics, reference_statistics
from poise.metrics.distances import fit_gaussian
from poise.protocols import PROTOCOLS

GENERATOR = np.random.default_rng(0)
REAL = GENERATOR.integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
OTHER = GENERATOR.integers(30, 200, (50, 3, 8, 8), dtype=np.uint8)
PIXELS = features.make_extractor("pixels")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))


def clean_statistics(path: Path, mean, covariance, **more) -> Path:
    np.savez(path, mu=mean, sigma=covariance, **more)
    return path


def test_statistics_of_real_images_give_the_distance_of_the_images(tmp_path):
    written = evaluation.save_statistics(REAL, tmp_path / "real.npz", extractor="pixels")
    features = PIXELS(REAL).double().numpy()
    with np.load(tmp_path / "real.npz") as stored:
        np.testing.assert_allclose(stored["mu"], features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(stored["sigma"], np.cov(features.T), rtol=1e-9, atol=1e-15)
    assert (written.images, written.origin) == (60, "poise")
    by_images = evaluate(REAL, OTHER, extractor="pixels")
    by_statistics = evaluate(tmp_path / "real.npz", OTHER)  # "auto" is the network of the file
    for count in (1, 0, -5):
        with pytest.raises(
            InputError, match=f"at least 2 images are needed to compare, not {count}"
        ):
            evaluate(tmp_path / "real.npz", OTHER, count=count)
    one = evaluation.Produced("REC", lambda count: iter([torch.from_numpy(OTHER[:1]) / 255]), 1)
    with pytest.raises(InputError, match="REC: 1 image cannot be compared with others"):
        evaluation.compare(written, [one], by_statistics.measurements[0].protocol, PIXELS)
    (found,), expected = by_statistics.measurements, by_images.measurements[0]
    assert found.value == pytest.approx(expected.value, rel=1e-9)
    same = (found.metric, found.protocol.hash, found.data)
    assert same == (expected.metric, expected.protocol.hash, expected.data)
    assert "KID, precision, recall" in by_statistics.notes[0] and "left out" in str(by_statistics)
    assert not any("the same images" in note for note in by_statistics.notes)


def test_all_generated_images_are_compared_as_with_the_images_of_a_split(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=OTHER, x_test=REAL[:20])
    evaluation.save_statistics(tmp_path / "x.npz", tmp_path / "statistics.npz", extractor="pixels")
    for count in (None, 10):
        found, expected = (
            evaluate(tmp_path / name, OTHER, extractor="pixels", count=count).measurements[0]
            for name in ("statistics.npz", "x.npz")
        )
        assert found.protocol.generated == (count or len(OTHER))
        if count is None:  # the statistics are of all 20 real images
            assert found.protocol.hash == expected.protocol.hash
            assert found.value == pytest.approx(expected.value, rel=1e-9)


def test_statistics_of_others_are_taken_by_the_name_of_their_file(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_statistics, "FEATURES", 64)  # in place of 2048
    values = np.random.default_rng(0).random((400, 64)).astype(np.float32)
    # torch-fidelity keeps the mean of float32 features as float32.
    both = {"mu": values.mean(0), "sigma": np.cov(values.T)}
    path = tmp_path / "faces-inception-v3-compat-stat-fid-64.pt"
    torch.save(both, path)
    found = read_statistics(path, images=400)
    expected = fit_gaussian(torch.from_numpy(values))
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-6, atol=0)
    covariance = expected.factor @ expected.factor.T
    torch.testing.assert_close(found.covariance, covariance, rtol=1e-4, atol=1e-6)
    assert (found.origin, found.extractor, found.data[:9]) == (
        "torch-fidelity",
        "inception",
        "mu,sigma ",
    )
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    ours, theirs = b"cnumpy._core.", b"cnumpy.core."  # of numpy 2 and of numpy 1
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            renamed = (ours, theirs) if ours in content else (theirs, ours)
            archive.writestr(name, content.replace(*renamed))
    torch.testing.assert_close(read_statistics(path, images=400).mean, found.mean)
    clean = tmp_path / "faces_legacy_tensorflow_train_64.npz"
    clean_statistics(clean, both["mu"], both["sigma"].astype(np.float32))
    statistics = read_statistics(clean, images=3_000)
    assert statistics.origin == "clean-fid-legacy-tensorflow"
    plain = clean.rename(tmp_path / "faces.npz")
    statistics = read_statistics(plain, by="ttur", images=3_000)
    wanted = replace(PROTOCOLS["every-image"], extractor="inception", extractor_checksum="ab")
    protocol = statistics.protocol(wanted, 64)
    assert (protocol.statistics, protocol.real, protocol.side) == ("ttur", 3_000, 64)
    assert "3000 given images of side 64 as statistics of ttur" in str(protocol)


WRONG_STATISTICS = {
    "does not say which network and resize": ({}, {}),
    "does not say how many images": ({}, {"by": "ttur"}),
    "pytorch-fid (it resizes with half-pixel centres)": ({}, {"by": "pytorch-fid", "images": 9}),
    "not of the last pooling layer of the 2015 Inception": ({}, {"by": "ttur", "images": 9}),
    "clean-fid-clean (it resizes": ({"name": "x_clean_train_32.npz"}, {"images": 9}),
    "its name says clean-fid-clean, and": ({"name": "x_clean_test_32.npz"}, {"by": "ttur"}),
    "torch-fidelity, x-clip-vit-b-32, feature 512": (
        {"name": "x-clip-vit-b-32-stat-fid-512.pt"},
        {},
    ),
    "sigma is not symmetric": ({"covariance": np.tri(3)}, {"by": "ttur", "images": 9}),
    "must be finite": ({"mean": np.full(3, np.nan)}, {"by": "ttur", "images": 9}),
    "the mean mu (d,) and the covariance": ({"covariance": np.eye(2)}, {}),
    "cannot be read as an .npz file": ({"content": b"PK no archive"}, {}),
    "not a file of statistics of torch-fidelity": ({"name": "x.pt", "content": b"PK"}, {}),
    "not a file of statistics of torch-fidelity (EOF": ({"name": "x.pt", "content": b""}, {}),
    "no such file of statistics": ({"name": "absent.npz", "content": None}, {}),
    "poise is damaged: Object missing required field": ({"poise": "{}"}, {}),
    "says itself who computed it": ({"poise": "{}"}, {"by": "ttur"}),
}


@pytest.mark.parametrize("message", WRONG_STATISTICS)
def test_statistics_that_cannot_be_compared_are_refused_in_one_line(message, tmp_path, unchecked):
    made, declared = WRONG_STATISTICS[message]
    path = tmp_path / made.get("name", "x.npz")
    mean, covariance = made.get("mean", np.ones(3)), made.get("covariance", np.eye(3))
    if "content" in made:
        if made["content"] is not None:
            path.write_bytes(made["content"])
    elif path.suffix == ".pt":
        torch.save({"mu": mean, "sigma": covariance}, path)
    else:
        extra = {"poise": made["poise"]} if "poise" in made else {}
        clean_statistics(path, mean, covariance, **extra)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_statistics(path, **declared)
    assert "\n" not in str(error.value)


def test_a_pickle_in_a_file_of_statistics_runs_nothing(tmp_path, unchecked):
    class Harmful:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "harm", "done"))

    torch.save({"mu": Harmful(), "sigma": Harmful()}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="not a file of statistics"):
        read_statistics(tmp_path / "x.pt")
    assert not (tmp_path / "harm").exists()


def test_statistics_of_other_conditions_are_refused(tmp_path, unchecked):
    path = tmp_path / "real.npz"
    evaluation.save_statistics(REAL, path, extractor="pixels")
    with np.load(path) as stored:
        arrays = dict(stored)
    other = arrays | {"poise": np.array(str(arrays["poise"]).replace(PIXELS.checksum, "ab" * 32))}
    np.savez(tmp_path / "other.npz", **other)
    negative = arrays | {"sigma": -arrays["sigma"]}
    np.savez(tmp_path / "negative.npz", **negative)
    floats = replace(PROTOCOLS["every-image"], pixels="float")
    requests = {
        "real images, and the statistics are of 60": (path, OTHER, {"protocol": "default"}),
        "have extractor_checksum abab": (tmp_path / "other.npz", OTHER, {}),
        "has negative eigenvalues": (tmp_path / "negative.npz", OTHER, {}),
        "have pixels 8-bit, and this comparison has float": (path, OTHER, {"protocol": floats}),
        "of 8 pixels, and these have 4: pass --size 8": (path, OTHER[:, :, ::2, ::2], {}),
        "generated images cannot be statistics": (REAL, path, {}),
        "leave out extractor none": (path, OTHER, {"extractor": "none"}),
        "at least 2 are needed": (path, OTHER[:1], {}),
    }
    for message, (real, generated, options) in requests.items():
        with pytest.raises(InputError, match=re.escape(message)) as error:
            evaluate(real, generated, **options)
        assert "\n" not in str(error.value)
