"""Test that a new variant needs one class or function and one entry in a list."""

from contextlib import contextmanager
from typing import final

import numpy as np
import pytest
import torch

import poise
from poise.balance import Balance, make_balance
from poise.diagnosis.outputs import compare
from poise.diagnosis.subject import look
from poise.evaluation import evaluate
from poise.metrics.listed import (
    DISTANCES,
    FIGURES,
    SIMILARITIES,
    Distance,
    Figure,
    Similarity,
    figures_table,
)
from poise.priors import Prior
from poise.studies.comparison import table
from poise.studies.results import result_of
from poise.variants import (
    BALANCES,
    DATA_SETS,
    PRIORS,
    NamedBalance,
    NamedDataSet,
    NamedPrior,
)

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
QUIET = poise.Options(device="cpu", quiet=True)
TINY = {"network": "mlp", "latent_dim": 2, "epochs": 1, "stages": 1, "batch_size": 10}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> poise.Run:
    return poise.train(IMAGES, out=tmp_path_factory.mktemp("run"), options=QUIET, **TINY)


@pytest.fixture
def shown_help(run_python):
    """Return a function that gives a command's help with one more entry in a list.

    It runs in a new process and returns one line.
    """

    def show(command: str, entry: str) -> str:
        code = f"""
import sys
from poise.variants import *
{entry}
from poise.cli import main
sys.argv = ["poise", "{command}", "--help"]
main()
"""
        return " ".join(run_python(code).replace("│", " ").split())

    return show


@contextmanager
def listed(variants: list, variant):
    variants.append(variant)
    try:
        yield
    finally:
        variants.remove(variant)


def compared(run: poise.Run, evaluation: poise.Evaluation) -> dict[str, str]:
    """Return the rows of the table of `poise compare`."""
    result = result_of(run, evaluation, experiment="x", label="computed")
    return dict(table([result])[1:])


@final
class HalvedBalance(Balance):
    """A balance with the constant gamma2 = `share`."""

    early_stopping = False

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("gamma2", torch.tensor(share))

    def _factors(self, batch):
        return self.gamma2, self.kl_weight

    def _next_state(self, batch, gamma2):
        return {}


def test_a_balance(monkeypatch, tmp_path, shown_help):
    monkeypatch.setitem(
        BALANCES, "halved", NamedBalance(f"{__name__}:HalvedBalance", ("halved:share=0.2",))
    )
    with pytest.raises(poise.InputError, match=r"there are computed, .*, halved"):
        make_balance("doubled")
    entry = 'BALANCES["halved"] = NamedBalance("x:y", ("halved:share=0.2",))'
    assert "halved:share=0.2" in shown_help("train", entry)
    settings = TINY | {"balance": "halved:share=0.25"}
    run = poise.train(IMAGES, out=tmp_path / "run", options=QUIET, **settings)
    assert run.evaluate(IMAGES, extractor="none").pages["reconstruction"]["gamma2"] == 0.25
    rows = np.random.default_rng(0).normal(size=(40, 3))
    model = poise.VAEEstimator(2, hidden=(4,), steps=20, balance="halved", random_state=0)
    assert model.fit(rows).n_iter_ == 20


@final
class WidePrior(Prior):
    """A prior z ~ N(m, 4 I) with the mean code m."""

    def __init__(self, mean: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.noise_dims = len(mean)

    @classmethod
    def fitted(cls, model):
        return cls(model.codes().mean.mean(0))

    def latents(self, noise):
        return self.mean + 2 * noise


def test_a_prior(monkeypatch, run, shown_help):
    monkeypatch.setitem(
        PRIORS, "wide", NamedPrior(f"{__name__}:WidePrior", "GEN-wide", "a wide Gaussian")
    )
    with pytest.raises(
        poise.InputError, match=r"there are normal, second-stage, mixture, flow, wide"
    ):
        run.sample(1, prior="narrow")
    entry = 'PRIORS["wide"] = NamedPrior("x:y", "GEN-wide", "a wide Gaussian")'
    assert "wide (GEN-wide)" in shown_help("sample", entry)
    assert not torch.equal(run.sample(3, prior="wide"), run.sample(3, prior="normal"))
    evaluation = run.evaluate(IMAGES, extractor="pixels")
    assert "GEN-wide" in str(evaluation) and "GEN-2" not in str(evaluation)
    assert "FD-pixels of GEN-wide" in compared(run, evaluation)
    seen = look(run.first.vae, torch.from_numpy(IMAGES)[:, None] / 255, 0)
    assert "wide" in compare(run.first.vae, seen, run.codes, {}, 0).priors
    rows = np.random.default_rng(0).normal(size=(40, 3))
    settings = {"hidden": (4,), "steps": 20, "validation_fraction": 0, "random_state": 0}
    model = poise.VAEEstimator(2, prior="wide", **settings).fit(rows)
    assert type(model.prior_) is WidePrior and model.sample(3).shape == (3, 3)


def test_a_distance_of_features(run):
    def difference(pair):
        return float((pair.reference.features.mean() - pair.produced.mean()).abs()), None

    invented = Distance("mean difference", difference, of_network=False, in_compare=True)
    with listed(DISTANCES, invented):
        own = run.evaluate(IMAGES, extractor="pixels")
        assert own.table()[0][-1] == "mean difference"
        assert "mean difference of REC" in compared(run, own)
        measured = evaluate(IMAGES, IMAGES // 2, extractor="pixels", device="cpu")
    expected = (IMAGES.mean() - (IMAGES // 2).mean()) / 255
    assert measured.value("mean difference") == pytest.approx(expected, rel=1e-4)


def test_a_similarity_of_reconstructions(run):
    def largest_error(images, restored):
        return (images - restored).abs().flatten(1).amax(1).double().cpu()

    with listed(SIMILARITIES, Similarity("largest error", largest_error, in_compare=True)):
        evaluation = run.evaluate(IMAGES, extractor="pixels")
        assert "largest error of REC" in compared(run, evaluation)
    restored = run.reconstruct(IMAGES)[:, 0]
    expected = (torch.from_numpy(IMAGES) / 255 - restored).abs().flatten(1).amax(1).mean()
    assert evaluation.value("largest error", "REC") == pytest.approx(float(expected), rel=1e-6)
    assert "largest error" in str(evaluation)


def test_a_figure_of_a_page(run, tmp_path):
    figure = Figure("mean |m| (per latent)", "latents.aggregate.mean_norm", ".3f", "|m|")
    evaluation = run.evaluate(IMAGES, extractor="none")
    with listed(FIGURES, figure):
        rows = dict(figures_table(evaluation.pages))
        assert rows["mean |m| (per latent)"] and "|m|" in compared(run, evaluation)
        page = poise.report.write_report([run.folder], tmp_path / "page.html", device="cpu")
    assert "mean |m| (per latent)" in page.read_text(encoding="utf-8")


def test_a_data_set(monkeypatch, tmp_path, shown_help):
    monkeypatch.setenv("POISE_DATA", str(tmp_path))
    monkeypatch.setitem(DATA_SETS, "noise", NamedDataSet(archives=("noise.npz",)))
    with pytest.raises(poise.InputError, match=r"noise is not in .*: put noise\.npz there"):
        poise.train("noise", out=tmp_path / "run", options=QUIET, **TINY)
    np.savez(tmp_path / "noise.npz", x_train=IMAGES[:50], x_test=IMAGES[50:])
    run = poise.train("noise", out=tmp_path / "run", options=QUIET, **TINY)
    assert run.recipe.data.source == "noise" and run.data["test"] == 10
    with pytest.raises(poise.InputError, match=r"did you mean noise\?.*, noise"):
        poise.train("noize", out=tmp_path / "other", options=QUIET, **TINY)
    entry = 'DATA_SETS["noise"] = NamedDataSet(archives=("noise.npz",))'
    assert "noise" in shown_help("train", entry)
