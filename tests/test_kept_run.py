"""Test that files of poise 0.1.0 still load: a run, its figures and a result.

Written on 2026-11-25 (commit fbe1d6b).
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import poise

KEPT = Path(__file__).parent / "data" / "run-of-2026-11-25"
IMAGES = np.load(KEPT / "images.npy")
QUIET = poise.Options(device="cpu", quiet=True)


@pytest.fixture
def run(tmp_path) -> poise.Run:
    return poise.load(shutil.copytree(KEPT / "run", tmp_path / "run"), device="cpu")


def test_its_networks_give_what_they_gave(run):
    expected = np.load(KEPT / "expected.npz")
    found = {
        "samples": run.sample(3, seed=1),
        "normal": run.sample(3, prior="normal"),
        "reconstructions": run.reconstruct(IMAGES[:3]),
        "mean": run.encode(IMAGES).mean,
    }
    assert set(found) == set(expected)
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], atol=1e-5, err_msg=name)


def test_its_settings_state_and_figures_are_there(run):
    assert run.finished and run.recipe.network.kind == "mlp" and run.recipe.first.steps == 20
    assert 0 < float(run.first.balance.gamma2) < 1 and not run.first.balance.training


def test_it_is_finished_for_the_version_that_finds_it(run):
    """The same images start no training."""
    again = poise.train(IMAGES, recipe=run.recipe, out=run.folder, options=QUIET)
    for name, values in run.first.vae.state_dict().items():
        assert torch.equal(again.first.vae.state_dict()[name], values), name


def test_it_is_measured_as_it_was(run):
    """Compare every figure of the test images; on one machine they were equal to the last bit."""
    (result,) = poise.read_results([KEPT / "results"])
    test = poise.train(IMAGES, recipe=run.recipe, out=run.folder, options=QUIET).dataset().test
    found = {(m.metric, m.of): m.value for m in run.evaluate(test, extractor="pixels").measurements}
    expected = {(m["metric"], m["of"]): m["value"] for m in result.measurements()}
    assert found.keys() == expected.keys() and len(found) == 29
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def test_its_result_is_read():
    (result,) = poise.read_results([KEPT / "results"])
    assert result.label == "computed" and result.value("MSE", "REC") > 0
    assert result.settings["network"]["kind"] == "mlp"
