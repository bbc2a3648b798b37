"""Test the estimator: scikit-learn's checks, probabilistic PCA, and use on tables."""

import copy
import json
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.stats import sem, ttest_1samp
from sklearn.base import clone
from sklearn.datasets import load_digits, load_wine
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, KFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import poise
from poise import VAEEstimator, estimator
from poise.tables.scoring import HeldOut
from poise.tables.stopping import EarlyStopping

QUICK = {"hidden": (16,), "steps": 60, "device": "cpu"}
DRAWS = np.random.default_rng(0)
AXES = np.linalg.qr(DRAWS.normal(size=(6, 6)))[0][:2] * [[3.0], [1.5]]
# Samples of probabilistic PCA with two latents.
LINEAR = DRAWS.normal(size=(4_000, 2)) @ AXES + 0.5 * DRAWS.normal(size=(4_000, 6)) + 7


# Few steps on few rows do not converge.
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def linear() -> VAEEstimator:
    """Return a network without hidden layers, trained to the end: no closed form replaces it."""
    how = {
        "steps": 500,
        "batch_size": 2_000,
        "learning_rate": 2e-2,
        "validation_fraction": 0,
        "device": "cpu",
        "random_state": 0,
    }
    model = VAEEstimator(2, hidden=(), noise="shared", prior="normal", **how).fit(LINEAR)
    assert model.n_iter_ == 500
    return model


@pytest.fixture(scope="module")
def wine() -> np.ndarray:
    return StandardScaler().fit_transform(load_wine().data)


@parametrize_with_checks([VAEEstimator(2, hidden=(8,), steps=10, device="cpu")])
def test_scikit_learns_checks_pass(estimator, check, unchecked):
    check(estimator)


def test_without_hidden_layers_it_is_probabilistic_pca(linear):
    exact = PCA(2).fit(LINEAR)
    assert linear.noise_variance_ == pytest.approx(exact.noise_variance_, rel=0.03)
    some = LINEAR[:500]
    error = linear.score_samples(some) - exact.score_samples(some)
    assert linear.score(some) == pytest.approx(exact.score(some), abs=0.02) and error.std() < 0.15
    latents = np.column_stack([linear.transform(LINEAR), np.ones(len(LINEAR))])
    explained = latents @ np.linalg.lstsq(latents, exact.transform(LINEAR), rcond=None)[0]
    assert (
        1 - np.square(explained - exact.transform(LINEAR)).mean() / exact.transform(LINEAR).var()
        > 0.999
    )


def test_samples_have_the_mean_and_covariance_of_the_model(linear):
    drawn = linear.sample(20_000, random_state=1)
    exact = PCA(2).fit(LINEAR)
    assert drawn.mean(0) == pytest.approx(LINEAR.mean(0), abs=0.1)
    scale = exact.get_covariance().diagonal().max()
    assert np.abs(np.cov(drawn.T) - exact.get_covariance()).max() < 0.06 * scale
    still = np.cov(linear.sample(20_000, noise=False, random_state=1).T)
    assert np.trace(np.cov(drawn.T) - still) == pytest.approx(6 * linear.noise_variance_, rel=0.05)


def test_units_move_the_density_and_nothing_else(wine):
    """p(10 x + 3) = p(x) / 10^D, and the codes are the same."""
    one, other = (
        VAEEstimator(2, **QUICK, random_state=0).fit(table) for table in (wine, 10 * wine + 3)
    )
    moved = 10 * wine + 3
    np.testing.assert_allclose(one.transform(wine), other.transform(moved), atol=1e-3)
    assert other.score(moved) == pytest.approx(
        one.score(wine) - wine.shape[1] * math.log(10), abs=1e-2
    )
    assert other.noise_variance_ == pytest.approx(100 * one.noise_variance_, rel=1e-3)
    np.testing.assert_allclose(other.sample(9), 10 * one.sample(9) + 3, atol=1e-2)


def test_it_finds_rows_never_seen_likelier_than_the_linear_model_does():
    """The digits lie on a curved manifold; VAE and PCA both have 16 latents."""
    seen, unseen = train_test_split(load_digits().data, test_size=200, random_state=0)
    model = VAEEstimator(16, hidden=(128,), steps=3_000, device="cpu", random_state=0)
    assert model.fit(seen).score(unseen) > PCA(16).fit(seen).score(unseen) + 5


def test_training_ends_when_rows_held_out_get_less_likely(wine, monkeypatch):
    how = {"hidden": (64,), "learning_rate": 5e-3, "device": "cpu", "random_state": 0}
    monkeypatch.setattr(poise.tables.stopping, "PATIENCE_ROWS", 20_000)
    model = VAEEstimator(2, steps=1_000, **how).fit(wine)
    assert max(entry["step"] for entry in model.history_) < 1_000
    longer = clone(model).set_params(steps=50_000).fit(wine)
    assert longer.n_iter_ == model.n_iter_, "patience does not grow with the number of steps"
    np.testing.assert_array_equal(longer.transform(wine), model.transform(wine))
    whole = clone(model).set_params(validation_fraction=0).fit(wine)
    assert whole.n_iter_ == 1_000
    assert whole.noise_variance_.mean() < model.noise_variance_.mean()


@pytest.mark.parametrize("prior", ["normal", "second-stage", "mixture", "flow"])
def test_samples_come_from_the_prior_that_was_chosen(prior, wine):
    model = VAEEstimator(2, **QUICK, prior=prior, second_steps=30, random_state=0).fit(wine)
    assert (
        type(model.prior_).__name__
        == {
            "normal": "NormalPrior",
            "second-stage": "SecondStagePrior",
            "flow": "FlowPrior",
            "mixture": "MixturePrior",
        }[prior]
    )
    assert model.sample(3).shape == (3, 13) and {entry["stage"] for entry in model.history_} == (
        {1, 2} if prior in ("second-stage", "flow") else {1}
    )


def test_the_same_random_state_gives_the_same_model_and_samples(wine):
    one, again, other = (
        VAEEstimator(2, **QUICK, random_state=seed).fit(wine) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one.transform(wine), again.transform(wine))
    np.testing.assert_array_equal(one.sample(5), again.sample(5))
    assert not np.allclose(one.transform(wine), other.transform(wine))
    np.testing.assert_array_equal(one.sample(8)[:5], one.sample(5))
    assert not np.allclose(one.sample(5, random_state=2), one.sample(5))


def test_a_fitted_model_survives_pickling(wine):
    model = VAEEstimator(2, **QUICK, random_state=0).fit(wine)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.transform(wine), model.transform(wine))
    assert again.score(wine) == model.score(wine)


def test_it_works_in_pipelines_and_searches():
    table, model = load_wine().data, VAEEstimator(2, **QUICK, random_state=0)
    line = make_pipeline(StandardScaler(), model).fit(table)
    assert line.transform(table).shape == (178, 2) and line.inverse_transform(
        line.transform(table)
    ).shape == (178, 13)
    assert list(line.get_feature_names_out()) == ["vaeestimator0", "vaeestimator1"]
    search = GridSearchCV(
        line,
        {"vaeestimator__balance": ["computed", "fixed:gamma2=1"]},
        cv=KFold(2, shuffle=True, random_state=0),  # the wines are sorted by kind
    ).fit(table)
    assert search.best_params_["vaeestimator__balance"] == "computed"


def test_a_steered_balance_trains_to_the_end_and_reaches_its_aim(wine):
    """The held-out ELBO peaks before the target is reached: early stopping must be off."""
    model = VAEEstimator(
        6,
        balance="constrained:target_mse=0.3",
        hidden=(32,),
        steps=1_500,
        device="cpu",
        random_state=0,
    )
    assert model.fit(wine).n_iter_ == 1_500
    last = [entry["mse"] for entry in model.history_[-20:]]
    assert np.mean(last) == pytest.approx(0.3, rel=0.1)


def test_of_few_rows_two_are_held_out_and_the_linear_model_is_kept(wine):
    """A network overfits a dozen rows: others lose thousands of nats."""
    how = {"hidden": (64,), "noise": "shared", "steps": 60, "device": "cpu", "random_state": 0}
    model = VAEEstimator(3, **how).fit(wine[:12])
    assert model.n_iter_ == 0 and model.score(wine[100:]) > -100


def test_early_stopping_keeps_the_weights_of_the_best_score(wine, monkeypatch):
    kept, restore = [], EarlyStopping.restore

    def restored(self):
        last = self.state.step
        restore(self)
        kept.append((last, self.state.step, dict(self.scores)))

    monkeypatch.setattr(EarlyStopping, "restore", restored)
    monkeypatch.setattr("poise.tables.stopping.PATIENCE_ROWS", 10_000)
    monkeypatch.setattr(HeldOut, "is_better_than", lambda *given, **named: True)
    how = {"hidden": (64,), "noise": "shared", "steps": 1_500, "device": "cpu", "random_state": 0}
    model = VAEEstimator(3, **how).fit(wine[:60])
    last, best, scores = kept[0]
    assert model.n_iter_ == best == max(scores, key=scores.__getitem__) < last < 1_500


def test_too_few_rows_to_hold_some_out_are_said(wine):
    with pytest.warns(
        UserWarning,
        match="2 rows are too few .* all 60 steps and overfits; give at least 4",
    ):
        VAEEstimator(2, **QUICK).fit(wine[:2])
    VAEEstimator(2, **QUICK).fit(wine[:4])  # must not warn: warnings are errors
    VAEEstimator(2, **QUICK, validation_fraction=0).fit(wine[:2])


def test_the_noise_variance_is_that_of_maximum_likelihood():
    """PCA divides by n - 1, so that its variance of ten rows is 1.11 times as large."""
    draws = np.random.default_rng(1)
    rows = draws.normal(size=(10, 2)) @ AXES + 0.3 * draws.normal(size=(10, 6))
    how = {
        "steps": 6_000,
        "batch_size": 10,
        "learning_rate": 3e-3,
        "validation_fraction": 0,
        "device": "cpu",
    }
    how |= {"noise": "shared", "prior": "normal", "balance": "computed:decay=0.995"}
    model = VAEEstimator(2, hidden=(), random_state=0, **how).fit(rows)
    assert model.noise_variance_ / PCA(2).fit(rows).noise_variance_ == pytest.approx(
        9 / 10, abs=0.03
    )


def test_too_few_steps_are_said():
    with pytest.warns(
        ConvergenceWarning,
        match=r"rose by .* nats in the last fifth of 100 steps: train for more steps",
    ):
        VAEEstimator(16, hidden=(64,), steps=100, device="cpu", random_state=0).fit(
            load_digits().data[:600]
        )


def test_a_fit_that_fails_leaves_no_model(wine):
    model = VAEEstimator(2, **QUICK, random_state=0).fit(wine)
    with pytest.raises(poise.RunError, match=r"lower learning rate, such as learning_rate=1e\+08"):
        model.set_params(learning_rate=1e9).fit(wine * 50 + 1000)
    with pytest.raises(NotFittedError):
        model.transform(wine)


def test_rows_far_from_all_others_have_a_density(wine):
    model = VAEEstimator(
        2, hidden=(64,), steps=300, device="cpu", importance_samples=5, random_state=0
    ).fit(wine)
    scores = model.score_samples(wine * 10_000)
    assert np.isfinite(scores).all() and scores.max() < model.score_samples(wine).min()


@pytest.mark.parametrize("value", [0.1, 1e9 + 0.1, 0.0])
def test_columns_that_do_not_vary_are_not_scaled_by_rounding(value):
    table = np.full((50, 3), value)
    for noise in ("shared", "column"):
        model = VAEEstimator(1, **QUICK, noise=noise, random_state=0).fit(table)
        assert np.all(model.scale_ == 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_dim": 0}, "latent_dim must be a whole number of at least 1, not 0"),
        ({"noise": "row"}, "noise must be column or shared, not 'row'"),
        ({"latent_dim": 2.5}, "latent_dim must be a whole number"),
        ({"latent_dim": True}, "latent_dim must be a whole number of at least 1, not True"),
        ({"hidden": 16}, "hidden must be .* a tuple of widths"),
        ({"score_prior": "mixture", "prior": "normal"}, "score_prior must be .*, not 'mixture'"),
        ({"score_proposal": "best"}, "score_proposal must be refined or encoder, not 'best'"),
        ({"latent_dim": 513}, 'at most 512 latents, not 513: use prior="flow" or prior="normal"'),
        ({"prior": "gauss"}, "prior must be one of .*mixture, flow, not 'gauss'"),
        ({"balance": "computd"}, "unknown balance 'computd'"),
        ({"balance": None}, "balance must be the name"),
        ({"balance": "computed:power=1"}, "with a squared error, not 'computed:power=1'"),
        ({"validation_fraction": 1.0}, "validation_fraction must be at least 0 and less than 1"),
        ({"importance_samples": 0}, "importance_samples must be a whole number of at least 1"),
        ({"steps": 10.5}, "steps must be a whole number of at least 1, not 10.5"),
        ({"second_steps": 0}, "second_steps must be a whole number of at least 1"),
        ({"batch_size": 1}, "batch_size must be a whole number of at least 2"),
        ({"learning_rate": 0}, "learning_rate must be greater than 0"),
        ({"learning_rate": math.inf}, "learning_rate must be greater than 0 and finite, not inf"),
        ({"device": "abacus"}, "device 'abacus' is not available"),
    ],
)
def test_parameters_that_cannot_be_are_refused_by_name(changes, message, wine, unchecked):
    with pytest.raises(poise.InputError, match=message):
        VAEEstimator(**QUICK | changes).fit(wine)


def test_values_beyond_what_can_be_squared_are_refused(wine):
    with pytest.raises(poise.InputError, match="too large to be squared"):
        VAEEstimator(**QUICK).fit(wine * 1e200)


def test_latents_of_another_number_and_no_samples_are_refused(wine):
    model = VAEEstimator(2, **QUICK, random_state=0).fit(wine)
    with pytest.raises(poise.InputError, match="X has 3 columns, but the model has 2 latents"):
        model.inverse_transform(np.zeros((1, 3)))
    model.set_params(latent_dim=3)
    assert (
        model.inverse_transform(model.transform(wine)).shape == wine.shape
        and len(model.get_feature_names_out()) == 2
    )
    with pytest.raises(poise.InputError, match="n_samples must be at least 1"):
        model.sample(0)
    with pytest.raises(TypeError, match="Sparse data was passed"):
        model.inverse_transform(sparse.eye(3, 2).tocsr())


@pytest.fixture(scope="module")
def bent() -> tuple[np.ndarray, VAEEstimator]:
    """Return rows near a parabola, and a model with one latent."""
    draws = np.random.default_rng(0)
    line = draws.normal(size=500)
    table = np.c_[line, line**2] + 0.1 * draws.normal(size=(500, 2))
    how = {"learning_rate": 5e-3, "validation_fraction": 0, "device": "cpu", "random_state": 0}
    return table, VAEEstimator(1, hidden=(32,), steps=500, **how).fit(table)


def test_the_density_of_rows_near_and_far_is_that_of_quadrature(bent):
    table, model = bent
    rows = np.r_[table[:9], [[10, 0], [2, 0], [0, -3], [-8, 3], [0, 30], [30, -30]]]
    vae, variances = copy.deepcopy(model.vae_).double(), model.noise_variance_
    latents = torch.linspace(-60, 60, 100_001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        means = model.mean_ + model.scale_ * vae.decode(latents).numpy()
    log_joint = -(np.square(rows[:, None] - means) / (2 * variances)).sum(-1)
    log_joint = torch.from_numpy(log_joint - latents.square().numpy()[:, 0] / 2)
    exact = log_joint.logsumexp(1) + math.log(120 / 100_000) - 1.5 * math.log(2 * math.pi)
    scores = model.score_details(rows)
    assert np.abs(scores.log_density - (exact.numpy() - np.log(variances).sum() / 2)).max() < 0.05
    assert scores.certain.all() and scores.effective_share.min() > 0.2
    narrow = clone(model).set_params(score_proposal="encoder")
    narrow.__dict__.update({k: v for k, v in vars(model).items() if k.endswith("_")})
    assert np.abs(narrow.score_samples(rows) - scores.log_density).max() > 0.05


def test_a_score_does_not_hang_on_rounding_or_on_other_rows(bent):
    table, model = bent
    scores = model.score_samples(table[:50])
    assert np.abs(model.score_samples(table[:50] * (1 + 1e-7)) - scores).max() < 1e-3
    assert np.abs(model.score_samples(table[:50].astype(np.float32)) - scores).max() < 1e-3
    spoilt = table[:50].copy()
    spoilt[7] = 1e39
    with_extreme = model.score_samples(spoilt)
    np.testing.assert_allclose(np.delete(with_extreme, 7), np.delete(scores, 7), rtol=1e-6)
    assert with_extreme[7] < -1e70
    assert np.isfinite(model.inverse_transform(model.transform(spoilt))).all()


@pytest.mark.parametrize(("prior", "tolerance"), [("mixture", 1e-3), ("flow", 5e-3)])
def test_a_score_under_a_fitted_prior_is_that_of_its_samples(prior, tolerance):
    """Codes in two clusters: N(0, I) has most of its mass between them."""
    draws = np.random.default_rng(0)
    clusters = np.where(draws.random((200, 1)) < 0.5, -3, 3)
    table = clusters * [[1.0, 1.0]] + 0.3 * draws.normal(size=(200, 2))
    how = {"hidden": (32,), "steps": 50, "device": "cpu", "random_state": 0}
    how |= {"importance_samples": 20}
    normal = VAEEstimator(1, **how).fit(table)
    fitted = VAEEstimator(1, prior=prior, score_prior=prior, second_steps=400, **how).fit(table)
    assert fitted.score(table) > normal.score(table) + 0.3
    latents = torch.linspace(-8, 8, 2_001, dtype=torch.float64)[:, None]
    density = fitted.prior_.log_density(latents)
    assert float(density.logsumexp(0)) + math.log(16 / 2_000) == pytest.approx(0, abs=tolerance)
    rows = fitted.sample(400, random_state=1)  # their entropy is below that of a Gaussian
    assert -fitted.score(rows) < 0.5 * np.linalg.slogdet(2 * math.pi * math.e * np.cov(rows.T))[1]


@pytest.mark.parametrize("latents", [2, 3, 9])
def test_it_is_never_worse_than_pca_on_collinear_columns(latents):
    """Two hundred rows of seven columns of rank three, plus a little noise."""
    draws = np.random.default_rng(0)
    table = draws.normal(size=(200, 3)) @ draws.normal(size=(3, 7))
    table += 1e-2 * draws.normal(size=table.shape)
    seen, unseen = table[:150], table[150:]
    how = {"noise": "shared", "steps": 100, "device": "cpu", "random_state": 0}
    model = VAEEstimator(latents, **how).fit(seen)
    pca = PCA(min(latents, 6)).fit(seen)
    assert model.score(unseen) > pca.score(unseen) - 0.05

    def error(model):
        return np.square(model.inverse_transform(model.transform(unseen)) - unseen).mean()

    assert error(model) < 1.01 * error(pca)


def test_a_network_has_to_beat_pca_beyond_chance():
    """The density by scipy's one-sided t-test, the error by one standard error, of ten rows."""
    draws = np.random.default_rng(0)
    found = {True: 0, False: 0}
    for rows in (2, 9, 10, 50):
        for gain in (0.0, 0.5, 1.0):
            rise, fall = draws.normal(gain, 1, rows), draws.normal(gain, 1, rows)
            zeros = torch.zeros(rows, dtype=torch.float64)
            ones = torch.ones(len(rise), dtype=torch.float64)
            network = HeldOut(torch.from_numpy(rise), torch.from_numpy(-fall), ones)
            better = network.is_better_than(HeldOut(zeros, zeros, ones))
            chance = ttest_1samp(rise, 0, alternative="greater").pvalue
            assert better == bool(rows >= 10 and chance < 0.05 and fall.mean() > sem(fall))
            found[better] += 1
            per_column = network.is_better_than(HeldOut(zeros, zeros, ones), shared=False)
            assert per_column == bool(rows >= 10 and rise.mean() > sem(rise))
    assert min(found.values()) > 0


def test_ctrl_c_keeps_the_best_weights(wine, monkeypatch):
    check, scores = EarlyStopping.check, {}

    def interrupted(self):
        check(self)
        scores.update(self.scores)
        if len(self.scores) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(EarlyStopping, "check", interrupted)
    monkeypatch.setattr(HeldOut, "is_better_than", lambda *given, **named: True)
    model = VAEEstimator(2, **QUICK | {"steps": 2_000}, random_state=0)
    with pytest.raises(KeyboardInterrupt):
        model.fit(wine)
    assert model.n_iter_ == max(scores, key=scores.__getitem__) and len(scores) == 20


@pytest.mark.parametrize("prior", ["second-stage", "flow"])
@pytest.mark.parametrize("stage", [1, 2])
def test_ctrl_c_ends_both_stages(stage, prior, wine, monkeypatch):
    """Former defects: in stage 2 it was swallowed, and after stage 1 all of stage 2 was trained."""
    trained, fit = [], estimator.fit

    def interrupted(state, *arguments, number, **named):
        fit(state, *arguments, number=number, **named)
        trained.append(state.step)
        if number == stage:
            raise KeyboardInterrupt

    monkeypatch.setattr(estimator, "fit", interrupted)
    model = VAEEstimator(2, **QUICK, prior=prior, second_steps=30, random_state=0)
    with pytest.raises(KeyboardInterrupt):
        model.fit(wine)
    assert trained[1] == (1 if stage == 1 else 30) and model.sample(3).shape == (3, wine.shape[1])


def test_an_uncertain_density_is_said(wine):
    model = VAEEstimator(2, **QUICK, importance_samples=1, random_state=0).fit(wine)
    with pytest.warns(ConvergenceWarning, match="the density of .* of 20 rows has a standard err"):
        model.score(wine[:20])


def test_two_rows_are_trained_on_however_many_are_held_out(wine):
    for count, fraction in product(range(2, 9), (0.0, 0.1, 0.9)):
        held_out, trained = estimator._split(count, fraction, seed=0)
        assert sorted([*held_out.tolist(), *trained.tolist()]) == [*range(count)]
        assert len(trained) >= 2 and (len(held_out) >= 2 or not fraction or count < 4)
    model = VAEEstimator(2, **QUICK, validation_fraction=0.9).fit(wine[:5])
    assert np.isfinite(model.score(wine))


def test_copies_of_rows_make_no_network_better():
    """Former defect: the standard error fell with the root of the weights."""
    source = torch.Generator().manual_seed(0)
    gains = 0.1 * torch.randn(12, generator=source, dtype=torch.float64)
    gains += 0.5 * gains.std() / math.sqrt(12) - gains.mean()  # half a standard error
    ones = torch.ones(12, dtype=torch.float64)
    for weight in (1, 50):
        line = HeldOut(torch.zeros_like(gains), ones, weight * ones)
        assert not HeldOut(gains, ones - 1e-3 * gains, weight * ones).is_better_than(
            line, shared=False
        )
        nine = HeldOut(gains[:9] + 9, ones[:9], 50 * ones[:9])
        assert not nine.is_better_than(HeldOut(0 * gains[:9], ones[:9], ones[:9]))
    sure = HeldOut(gains + 1, ones, ones)
    assert sure.is_better_than(HeldOut(0 * gains, ones, ones), shared=False)
    # The weighted mean counts, and one row cannot hide behind the others.
    heavy = torch.where(torch.arange(12) == 0, 1e6, 1.0).double()
    gains[0] = -1
    assert not HeldOut(gains + 1, ones, heavy).is_better_than(
        HeldOut(0 * gains, ones, heavy), shared=False
    )


def test_large_whole_weights_do_not_fill_the_memory():
    weights = np.full(50, 190_000.0)
    weights[0] = 380_000
    counts = estimator._counts(np.zeros((50, 2)), weights)
    assert counts.sum() == 50 and counts[0] in (1, 2)
    assert estimator._counts(np.zeros((50, 2)), np.full(50, 3)).tolist() == [3] * 50


def test_a_prior_for_scores_that_the_fit_lacks_is_refused(wine):
    model = VAEEstimator(1, **QUICK, prior="mixture", random_state=0).fit(wine)
    assert np.isfinite(model.set_params(score_prior="mixture").score(wine[:5]))
    with pytest.raises(poise.InputError, match="score_prior='flow' is not the prior of the fit"):
        model.set_params(score_prior="flow").score(wine[:5])


def test_many_latents_are_scored_by_the_encoder_and_that_is_said(wine):
    model = VAEEstimator(300, **QUICK, prior="normal", random_state=0).fit(wine[:30])
    with pytest.warns(ConvergenceWarning, match="refined ones take at most 256 latents"):
        model.score(wine[:3])


def test_progress_and_history_speak_of_rows(wine, capsys):
    model = VAEEstimator(2, **QUICK, verbose=True, random_state=0).fit(wine)
    assert {"rows_seen", "rows_per_second"} < set(model.history_[0])
    shown = capsys.readouterr().err
    assert "stage 1" in shown and "rows/s" in shown and "im" not in shown


def test_latents_in_reverse_order_are_decoded(wine):
    model = VAEEstimator(2, **QUICK, random_state=0).fit(wine)
    latents = model.transform(wine)
    np.testing.assert_array_equal(
        model.inverse_transform(latents[::-1]), model.inverse_transform(latents[::-1].copy())
    )


def test_a_weight_is_a_number_of_equal_rows(wine):
    weights = np.arange(178) % 3
    how = {**QUICK, "validation_fraction": 0, "random_state": 0}
    weighted = VAEEstimator(2, **how).fit(wine, sample_weight=weights)
    repeated = VAEEstimator(2, **how).fit(np.repeat(wine, weights, 0))
    np.testing.assert_allclose(weighted.mean_, np.average(wine, 0, weights))
    np.testing.assert_allclose(weighted.scale_, repeated.scale_)
    np.testing.assert_allclose(weighted.transform(wine), repeated.transform(wine), atol=0.3)
    same = VAEEstimator(2, **how).fit(wine, sample_weight=np.full(178, 0.5))
    np.testing.assert_array_equal(same.transform(wine), VAEEstimator(2, **how).fit_transform(wine))
    for bad in (-weights, np.eye(178)[0]):
        with pytest.raises(poise.InputError, match="sample_weight must"):
            VAEEstimator(2, **how).fit(wine, sample_weight=bad)


def test_threads_give_the_models_that_one_thread_gives(wine):
    models = [VAEEstimator(2, **QUICK | {"steps": 20}, random_state=seed) for seed in range(3)]
    alone = [clone(model).fit(wine).transform(wine) for model in models]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda model: model.fit(wine).transform(wine), models))
    np.testing.assert_array_equal(together, alone)
    assert torch.equal(torch.get_rng_state(), before), "the global generator"


SEARCH = """
from joblib import parallel_config
from sklearn.datasets import load_wine
from sklearn.model_selection import GridSearchCV
from poise import VAEEstimator

def search(backend):
    how = {"steps": 20, "validation_fraction": 0, "device": "cpu", "random_state": 0}
    grid = GridSearchCV(VAEEstimator(2, **how), {"hidden": [(), (8,)]}, cv=2, refit=False)
    with parallel_config(backend, n_jobs=2):
        table = load_wine().data[::3]
        return grid.fit(table).cv_results_["mean_test_score"].tolist()
"""


def test_a_search_in_threads_or_processes_has_the_numbers_of_one_after_another(run_forked):
    searched = {}
    exec(SEARCH, searched)
    alone = searched["search"]("sequential")
    assert searched["search"]("threading") == alone
    assert json.loads(run_forked(SEARCH + "print(search('multiprocessing'))")) == alone


def test_more_latents_than_rows_and_bad_tables(wine):
    few = VAEEstimator(8, **QUICK, random_state=0).fit(wine[:6])
    assert few.transform(wine).shape == (178, 8) and np.isfinite(few.score(wine))
    bad = wine.copy()
    bad[0, 0] = math.inf
    for table, message in ((bad, "infinity"), (wine[:1], "minimum of 2 is required")):
        with pytest.raises(ValueError, match=message):
            VAEEstimator(2, **QUICK).fit(table)
    for use in (few.transform, few.score):
        with pytest.raises(ValueError, match="infinity"):
            use(bad)
    for use in (VAEEstimator(2, **QUICK).fit, few.transform, few.score):
        with pytest.raises(TypeError, match="Sparse data was passed") as refusal:
            use(sparse.csr_matrix(wine))
        assert "\n" not in str(refusal.value)
