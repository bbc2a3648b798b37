"""Test scores of images: percentiles against scipy, and what a run keeps of them."""

import csv
import io
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import poise
from poise.errors import InputError
from poise.metrics import nll_per_image
from poise.recipes import Data, Network, Recipe, Stage
from poise.runs import checkpoint, pipeline, scores
from poise.runs.options import Options
from poise.support.seeds import drawn

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
TINY = Recipe(
    name="tiny",
    data=Data("array"),
    network=Network("mlp", latent_dim=2, hidden=(16,)),
    first=Stage(steps=20, batch_size=20, learning_rate=1e-2),
    second=None,
)
QUIET = Options(device="cpu", quiet=True)
FEW = {"samples": 10, "training_images": 15}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> poise.Run:
    """Return a trained run without its pictures. Tests must not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "finish", lambda *_, **__: None)
        return poise.train(IMAGES, recipe=TINY, out=tmp_path_factory.mktemp("runs"), options=QUIET)


def test_scores_are_those_of_the_metrics_and_percentiles_those_of_scipy(run):
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[4:] = torch.from_numpy(run.dataset().train[:2].copy()) / 255
    found = run.score(images, **FEW)
    expected = nll_per_image(
        run.first.vae, run.first.balance, images, samples=10, proposal="encoder"
    )
    torch.testing.assert_close(found.log_likelihood, -expected.nll_nats)
    torch.testing.assert_close(found.effective_share, expected.effective_share)
    error = (run.first.vae.decode(run.encode(images).mean) - images).double().square()
    torch.testing.assert_close(found.mse, error.flatten(1).mean(1).detach())
    train = run.dataset().train[drawn(len(run.dataset().train), 15)]
    of_train = run.score(train, samples=10, training_images=0)
    assert of_train.mse_percentile is None and found.training_images == 15
    for name in ("log_likelihood", "mse"):
        values, among = getattr(found, name), getattr(of_train, name)
        truth = [stats.percentileofscore(among, value, kind="mean") for value in values]
        np.testing.assert_allclose(getattr(found, f"{name}_percentile"), truth)
    assert found.oddest_first() == found.log_likelihood.argsort().tolist()


def test_equal_values_count_half():
    among = torch.tensor([1.0, 2.0, 2.0, 3.0])
    assert scores.percentiles(torch.tensor([0.0, 2.0, 3.0]), among).tolist() == [0, 50, 87.5]


def test_a_table_has_a_row_for_each_image_and_a_column_for_each_known_score(run):
    found = run.score(IMAGES[:3], names=["a,b.png", "c.png", 'd"e.png'], **FEW)
    head, *rows = csv.reader(io.StringIO(found.to_csv()))
    assert head == ["name", *scores.COLUMNS]
    assert [row[0] for row in rows] == ["a,b.png", "c.png", 'd"e.png']
    assert float(rows[1][1]) == pytest.approx(float(found.log_likelihood[1]), rel=1e-6)


def test_scores_of_training_images_are_kept_and_used_again(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run.folder, tmp_path / "copy")
    again = poise.load(tmp_path / "copy", device="cpu")
    again.remember(run.dataset())
    calls = []
    real = scores.measured
    monkeypatch.setattr(
        scores, "measured", lambda *a, **k: calls.append(len(a[1])) or real(*a, **k)
    )
    shutil.rmtree(tmp_path / "copy" / "scores", ignore_errors=True)
    first = again.score(IMAGES[:2], **FEW)
    other = poise.load(tmp_path / "copy", device="cpu")  # without its images
    second = other.score(IMAGES[:2], **FEW)
    assert calls.count(15) == 1
    assert torch.equal(first.log_likelihood_percentile, second.log_likelihood_percentile)
    assert torch.equal(first.mse_percentile, second.mse_percentile)
    with pytest.raises(InputError, match=r"not stored: pass the images; or .*--training-images 0"):
        other.score(IMAGES[:2], samples=11, training_images=15)
    given = other.score(IMAGES[:2], samples=11, training_images=15, training=IMAGES)
    assert given.training_images == 15
    with pytest.raises(InputError, match="not stored"):  # those of other images were not kept
        other.score(IMAGES[:2], samples=11, training_images=15)
    path = tmp_path / "copy" / "scores" / checkpoint.TENSORS
    path.write_bytes(path.read_bytes()[:-1])
    again.score(IMAGES[:2], samples=11, training_images=15)
    assert "computing the scores of training images again" in capsys.readouterr().err


def test_scores_of_training_images_are_those_of_the_present_weights(run, tmp_path):
    """Former defect: another run in the same folder, of the same length, got those of the first."""
    shutil.copytree(run.folder, tmp_path / "copy")
    poise.load(tmp_path / "copy", device="cpu").remember(run.dataset()).score(IMAGES[:2], **FEW)
    assert (tmp_path / "copy" / "scores").exists()
    found = []
    for name in ("copy", "alone"):
        shutil.rmtree(tmp_path / name / "checkpoints", ignore_errors=True)
        recipe = replace(run.recipe, seed=1)
        changed = poise.train(IMAGES, recipe=recipe, out=tmp_path / name, options=QUIET)
        found.append(changed.score(IMAGES[:9], **FEW).mse_percentile)
    assert torch.equal(*found)


def test_a_model_without_a_likelihood_has_errors_only(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "finish", lambda *_, **__: None)
    plain = replace(TINY, first=replace(TINY.first, objective="autoencoder", steps=2))
    run = poise.train(IMAGES, recipe=plain, out=tmp_path / "run", options=QUIET)
    found = run.score(IMAGES[:4], **FEW)
    assert found.log_likelihood is None and found.log_likelihood_percentile is None
    assert found.to_csv().startswith("name,mse,mse_percentile\n")
    assert found.oddest_first() == (-found.mse).argsort().tolist()


def test_wrong_numbers_of_samples_and_images_are_refused(run, unchecked):
    for wrong in ({"samples": 0}, {"training_images": -1}):
        with pytest.raises(InputError, match="samples must be at least 1 and training_images"):
            run.score(IMAGES[:2], **wrong)
    with pytest.raises(InputError, match="1 names for 2 images"):
        run.score(IMAGES[:2], names=["a"])


def test_numbers_of_numpy_are_numbers_of_samples_and_seeds(run, unchecked):
    plain = run.score(IMAGES[:2], samples=3, training_images=4, seed=1)
    counted = {"samples": np.int64(3), "training_images": np.int64(4), "seed": np.int64(1)}
    assert torch.equal(run.score(IMAGES[:2], **counted).log_likelihood, plain.log_likelihood)
