"""Test the kinds of reconstruction error, in the loss, the figures and the runs."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import poise
from poise.balance import ComputedBalance, FeatureError, FixedBalance, PowerError
from poise.balance.kinds import make_error
from poise.errors import InputError
from poise.metrics import importance_weighted_nll, reconstruction
from poise.recipes import Data, Network, Recipe, Stage
from poise.runs.options import Options

BATCH = [torch.rand(5, 2, 9, 8), torch.rand(5, 2, 9, 8), torch.randn(5, 3), torch.randn(5, 3)]
IMAGES = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
TINY = Recipe(
    name="tiny",
    data=Data("array"),
    network=Network("mlp", latent_dim=3, hidden=(16,), second_hidden=8),
    first=Stage(steps=8, batch_size=20, learning_rate=1e-2),
    second=None,
)


@pytest.mark.parametrize("name, power", [("squared", 2), ("absolute", 1)])
def test_an_error_by_name_is_that_of_its_power(name, power):
    error = make_error(name, channels=2)
    measured, plain = ComputedBalance().measuring(error), ComputedBalance(power=power)
    for _ in range(2):
        for ours, theirs in zip(measured(*BATCH), plain(*BATCH), strict=True):
            assert torch.equal(ours, theirs)
    assert error.name == name and error.is_likelihood


def independent_features(error: FeatureError, images: Tensor) -> list[Tensor]:
    """Compute the features by numpy, one patch at a time."""
    maps = []
    values = images.numpy().astype(np.float64)
    for weight in (buffer.numpy() for buffer in error.buffers()):
        padded = np.pad(values, ((0, 0), (0, 0), (1, 1), (1, 1)))
        height, width = ((side + 1) // 2 for side in values.shape[2:])
        out = np.empty((len(values), len(weight), height, width))
        for i in range(height):
            for j in range(width):
                patch = padded[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
                out[:, :, i, j] = np.einsum("nchw,ochw->no", patch, weight)
        values = np.where(out > 0, out, 0.2 * out)
        maps.append(torch.from_numpy(values))
    return maps


def test_the_error_of_features_is_a_group_for_pixels_and_one_for_each_layer():
    error = FeatureError(channels=2)
    balance = ComputedBalance(groups=4).measuring(error)
    terms = balance(*BATCH)
    pairs = zip(*(independent_features(error, part) for part in BATCH[:2]), strict=True)
    expected = [F.mse_loss(*BATCH[:2]).double(), *(F.mse_loss(a, b) for a, b in pairs)]
    torch.testing.assert_close(terms.group_error.double(), torch.stack(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(balance.gamma2, terms.group_error)
    shifted = balance(BATCH[0] + 0.1, BATCH[0], *BATCH[2:])
    inner = error.features(BATCH[0] + 0.1)[0] - error.features(BATCH[0])[0]
    assert float(shifted.group_error[0]) == pytest.approx(0.01, rel=1e-4)
    assert float(inner[:, :, 1:-1, 1:-1].abs().max()) < 1e-5, "layer 1 does not see brightness"


def test_the_error_of_features_is_the_same_under_autocast_and_in_float64():
    """Former defect: bfloat16 rounds the difference of features that are nearly equal."""
    images = torch.rand(4, 2, 16, 16)
    nearly, codes = images + 1e-3 * torch.randn_like(images), torch.zeros(4, 2)
    balance = ComputedBalance(groups=4).measuring(FeatureError(channels=2))
    expected = balance(nearly, images, codes, codes).group_error
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(balance(nearly, images, codes, codes).group_error, expected)
    of_double = balance(nearly.double(), images.double(), codes, codes).group_error
    torch.testing.assert_close(of_double.float(), expected, rtol=1e-3, atol=0)


def test_the_network_of_features_is_fixed_and_is_not_saved():
    balance = ComputedBalance(groups=4).measuring(FeatureError(channels=2))
    assert not list(balance.parameters())
    assert not any("weight_" in name for name in balance.state_dict())
    before = [weight.clone() for weight in balance.error.buffers()]
    moved = copy.deepcopy(balance).to("meta").to_empty(device="cpu")
    moved.reset_parameters()
    for other in (moved.error, FeatureError(channels=2), copy.deepcopy(balance).half().error):
        assert all(map(torch.equal, before, other.buffers()))
    given = BATCH[0].clone().requires_grad_()
    balance(given, *BATCH[1:]).loss.backward()
    assert given.grad is not None and given.grad.isfinite().all() and given.grad.ne(0).all()


@pytest.mark.parametrize(
    "attempt, words",
    [
        (lambda: ComputedBalance().measuring(FeatureError(2)), "4 groups, but the balance has 1"),
        (lambda: FixedBalance(gamma2=0.5).measuring(FeatureError(2)), "such as computed"),
        (lambda: ComputedBalance(power=3).measuring(PowerError(1.0)), "leave out one of the two"),
        (lambda: make_error("l2", 1), "must be one of squared, absolute, features, not 'l2'"),
        (lambda: FeatureError(0), "at least 1, not 0"),
        (
            lambda: ComputedBalance(groups=4).measuring(FeatureError(3))(*BATCH),
            "made for 3 channels, not 2",
        ),
        (
            lambda: (
                ComputedBalance(groups=4)
                .measuring(FeatureError(2))
                .errors(*BATCH[:2], mask=torch.ones(5))
            ),
            "without mask and samples",
        ),
    ],
)
def test_an_error_that_does_not_fit_is_refused_in_one_line(attempt, words):
    with pytest.raises(InputError, match=words) as caught:
        attempt()
    assert "\n" not in str(caught.value)


def test_the_figures_follow_the_error_or_are_refused():
    vae = poise.VAE(*poise.networks.mlp((1, 8, 8), 2, hidden=(8,))).eval()
    images = torch.from_numpy(IMAGES[:20, None])
    absolute = ComputedBalance(start=0.2).measuring(make_error("absolute", 1)).eval()
    same = reconstruction(vae, ComputedBalance(start=0.2, power=1).eval(), images)
    assert reconstruction(vae, absolute, images) == same and same.elbo_nats is not None
    features = ComputedBalance(start=0.2, groups=4).measuring(FeatureError(1)).eval()
    figures = reconstruction(vae, features, images)
    assert figures.elbo_nats is None and figures.bits_per_dim is None
    assert figures.mse == same.mse and figures.gamma2 == pytest.approx(0.2)
    assert figures.quadratic_share == pytest.approx(figures.mse_sampled / 0.2)
    with pytest.raises(InputError, match="features is no likelihood"):
        importance_weighted_nll(vae, features, images, samples=2)


@pytest.mark.parametrize("error", ["absolute", "features"])
def test_a_run_learns_by_its_error_and_says_which_it_was(tmp_path, error):
    recipe = replace(TINY, first=replace(TINY.first, error=error))
    options = Options(device="cpu", quiet=True)
    run = poise.train(IMAGES, recipe=recipe, out=tmp_path / "run", options=options)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    entry = json.loads(lines[-1])
    assert run.first.balance.error.name == error and run.recipe.first.error == error
    assert ("mae" in entry, "mse" in entry) == (error == "absolute", error == "features")
    again = poise.load(tmp_path / "run", device="cpu")
    assert torch.equal(again.first.balance.gamma2, run.first.balance.gamma2)
    evaluation = run.evaluate(extractor="none")
    page = evaluation.pages["reconstruction"]
    if error == "absolute":
        assert page["elbo_nats"] is not None and page["gamma2"] != pytest.approx(page["mse"], 0.5)
    else:
        assert page["elbo_nats"] is None and "no ELBO" in str(evaluation.notes)
        with pytest.raises(InputError, match="leave nll_samples out"):
            run.evaluate(extractor="none", nll_samples=2)


def test_the_balance_of_a_rival_is_said(tmp_path, capfd):
    options = Options(device="cpu")
    first = replace(TINY.first, steps=1, objective="autoencoder", balance="fixed:gamma2=0.5")
    poise.train(IMAGES, recipe=replace(TINY, first=first), out=tmp_path / "run", options=options)
    assert "objective autoencoder: balance fixed:gamma2=0.5" in capfd.readouterr().err


def test_old_names_of_the_terms_can_be_read():
    terms = ComputedBalance()(*BATCH)
    assert terms.mse is terms.error and terms.group_mse is terms.group_error
