"""Compare distances of feature sets with closed forms, brute force, scipy and torch-fidelity."""

import importlib
import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from poise.errors import InputError
from poise.metrics import blocks, manifold
from poise.metrics.distances import (
    frechet_distance,
    frechet_infinity,
    inception_score,
    kernel_distance,
)
from poise.metrics.manifold import manifold_figures


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    """Return correlated normal samples; each seed has its own covariance."""
    mixing = torch.randn(d, d, generator=generator(seed + 1000)).double() / math.sqrt(d)
    return torch.randn(n, d, generator=generator(seed)).double() @ mixing + shift


def with_moments(n: int, mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """Return samples with exactly this sample mean and covariance: noise, whitened and coloured."""
    noise = torch.randn(n, len(mean), generator=generator(seed)).double()
    noise -= noise.mean(0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(torch.cov(noise.T)), noise.T, upper=False
    ).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def rotation(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=generator(seed)).double()).Q


def by_scipy(a: Tensor, b: Tensor) -> float:
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return float((a.mean(0) - b.mean(0)).square().sum() + np.trace(cov_a + cov_b - 2 * root))


def by_samples(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance from samples, for covariances of any rank.

    With A, B the centred samples over sqrt(n - 1), the trace term is the nuclear norm of A B^T.
    """
    half = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    cross = torch.linalg.svdvals(half[0] @ half[1].T).sum()
    return float(
        (a.mean(0) - b.mean(0)).square().sum()
        + half[0].square().sum()
        + half[1].square().sum()
        - 2 * cross
    )


def test_frechet_distance_equals_scipys_matrix_square_root():
    a, b = features(200, 12, 0), features(150, 12, 1, shift=1)
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-9)


@pytest.mark.parametrize("n_a, n_b, d", [(900, 700, 64), (3000, 2500, 10), (65, 400, 64)])
def test_frechet_distance_equals_torch_fidelitys(torch_fidelity, n_a, n_b, d):
    metric = importlib.import_module("torch_fidelity.metric_fid")
    a, b = features(n_a, d, 0).float(), features(n_b, d, 1, shift=0.3).float()
    expected = metric.fid_statistics_to_metric(
        *(metric.fid_features_to_statistics(x.double()) for x in (a, b)), verbose=False
    )
    assert frechet_distance(a, b) == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)


@pytest.mark.parametrize("n", [13, 50, 5000])
def test_frechet_distance_of_gaussians_with_commuting_covariances_is_the_sum_over_their_axes(n):
    d, turn = 12, rotation(12, 0)
    means, scales = features(2, d, 3), features(2, d, 4).abs() + 0.1
    a, b = (
        with_moments(n, means[i], turn @ torch.diag(scales[i] ** 2) @ turn.T, seed=i)
        for i in range(2)
    )
    expected = float((means[0] - means[1]).square().sum() + (scales[0] - scales[1]).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_gaussians_with_any_covariances_is_bures():
    root_a, root_b = (features(40, 6, seed) for seed in (0, 1))
    cov_a, cov_b = root_a.T @ root_a, root_b.T @ root_b
    # tr (A^1/2 B A^1/2)^1/2, all symmetric
    half = torch.from_numpy(scipy.linalg.sqrtm(cov_a.numpy()).real)
    cross = torch.linalg.eigvalsh(half @ cov_b @ half).sqrt().sum()
    a, b = (
        with_moments(30, torch.zeros(6).double(), cov_a, 2),
        with_moments(70, torch.ones(6).double(), cov_b, 3),
    )
    assert frechet_distance(a, b) == pytest.approx(
        float(6 + cov_a.trace() + cov_b.trace() - 2 * cross), rel=1e-9
    )


@pytest.mark.parametrize("n_a, n_b", [(20, 30), (30, 200), (200, 64), (2, 2), (64, 65)])
def test_frechet_distance_is_exact_with_fewer_samples_than_features(n_a, n_b):
    a, b = features(n_a, 64, 0, shift=5), features(n_b, 64, 1)
    assert frechet_distance(a, b) == pytest.approx(by_samples(a, b), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(by_samples(a, b), rel=1e-9)


def test_repeated_features_count_once_more_and_constant_ones_not_at_all():
    a, b = features(300, 8, 0), features(250, 8, 1, shift=0.5)
    doubled = [torch.cat([x, x, torch.full((len(x), 3), 7.0).double()], 1) for x in (a, b)]
    assert frechet_distance(*doubled) == pytest.approx(2 * frechet_distance(a, b), rel=1e-7)
    # singular up to rounding
    sums = [torch.cat([x, (x[:, :2] * 0.1).sum(1, keepdim=True)], 1) for x in (a, a + 1)]
    assert frechet_distance(*sums) == pytest.approx(8 + 0.2**2, rel=1e-7)
    constant = torch.ones(5, 4).double()
    assert frechet_distance(constant, 3 * constant) == pytest.approx(4 * 2**2, rel=1e-12)


def test_few_samples_keep_directions_of_tiny_variance():
    noise_a, noise_b = (
        with_moments(3, torch.zeros(2).double(), torch.eye(2).double(), seed) for seed in range(2)
    )
    a = torch.cat([noise_a * torch.tensor([1, 1e-8]), torch.zeros(3, 18)], 1)
    b = torch.cat([noise_b * torch.tensor([1e-8, 1]), torch.zeros(3, 18)], 1)
    assert frechet_distance(a, b) == pytest.approx(2 - 4e-8, rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_a_dependent_feature_adds_no_variance_of_its_own(seed):
    x, b = features(300, 2, seed), torch.randn(250, 3, generator=generator(seed)).double()
    # The covariance has rank 2 up to rounding.
    a = x @ torch.randn(2, 3, generator=generator(seed)).double()
    assert frechet_distance(a, b) == pytest.approx(by_samples(a, b), rel=1e-11)


@pytest.mark.parametrize("n", [40, 1000])
def test_frechet_distance_of_a_set_to_itself_is_zero_and_of_shifted_ones_the_shift(n):
    a = features(n, 100, 0) * 10
    trace = float(a.var(0).sum())
    assert 0 <= frechet_distance(a, a) < 1e-12 * trace
    assert frechet_distance(a, a + 0.01) == pytest.approx(100 * 0.01**2, abs=1e-11 * trace)


def test_frechet_distance_knows_no_order_direction_or_side():
    a, b = features(300, 12, 0), features(200, 12, 1, shift=1)
    value, turn = frechet_distance(a, b), rotation(12, 2)
    assert frechet_distance(b, a) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(a.flip(0), b[torch.randperm(200)]) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(a @ turn + 3, b @ turn + 3) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(a * 3, b * 3) == pytest.approx(9 * value, rel=1e-10)


def test_statistics_of_float32_features_are_float64():
    a, b = ((features(3000, 8, seed) * (1 + seed) + 4096).float() for seed in range(2))
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a.double(), b.double()), rel=1e-9)


def test_moments_in_blocks_are_those_of_the_whole():
    a, b = features(2 * blocks.ROWS + 17, 6, 0), features(blocks.ROWS + 1, 6, 1, shift=1)
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-9)
    moved = frechet_distance(torch.cat([a, a[:1] + 100]), b)  # the last row changes the result
    assert moved == pytest.approx(by_scipy(torch.cat([a, a[:1] + 100]), b), rel=1e-9)


def test_metrics_leave_their_arguments_alone():
    a, b = features(60, 8, 0), features(60, 8, 1)
    before = a.clone(), b.clone()
    frechet_distance(a, b)
    kernel_distance(a, b, subsets=2, subset_size=20)
    manifold_figures(a, b)
    inception_score(a, splits=2)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_extrapolation_takes_the_samples_bias_away():
    d, n, truth = 32, 2000, 0.2
    real = with_moments(
        500, torch.full((d,), math.sqrt(truth / d)).double(), torch.eye(d).double(), 0
    )
    plain, extrapolated = [], []
    for seed in range(8):
        generated = torch.randn(n, d, generator=generator(seed + 1))
        plain.append(frechet_distance(real, generated.double()))
        extrapolated.append(
            frechet_infinity(real, generated.double(), smallest=400, seed=seed).value
        )
    bias, left = np.mean(plain) - truth, np.mean(extrapolated) - truth
    assert bias > 0.05
    assert abs(left) < bias / 5
    nearer = np.abs(np.array(extrapolated) - truth) < np.abs(np.array(plain) - truth)
    assert nearer.mean() > 0.8


def test_extrapolation_follows_the_line_of_its_own_subsets():
    real, generated = features(300, 4, 0), features(400, 4, 1)
    found = frechet_infinity(real, generated, smallest=100, points=4, seed=5)
    source, values, sizes = generator(5), [], np.array([100, 200, 300, 400])
    for size in sizes:
        values.append(
            frechet_distance(real, generated[torch.randperm(400, generator=source)[:size]])
        )
    (_, intercept), spread = np.polyfit(1 / sizes, values, 1, cov=True)
    assert found.value == pytest.approx(intercept, rel=1e-9)
    assert found.standard_error == pytest.approx(math.sqrt(spread[1, 1]), rel=1e-6)
    assert found == frechet_infinity(real, generated, smallest=100, points=4, seed=5)
    assert found != frechet_infinity(real, generated, smallest=100, points=4, seed=6)


def test_extrapolation_says_how_many_samples_it_needs():
    a, b = features(50, 8, 0), features(50, 8, 1)
    with pytest.raises(InputError, match="50 generated samples are too few: give at least 60"):
        frechet_infinity(a, b, smallest=30)
    with pytest.raises(InputError, match=r"more than d = 8 samples.*not 8"):
        frechet_infinity(a, b, smallest=8)
    with pytest.raises(InputError, match="at least 3"):
        frechet_infinity(a, b, smallest=20, points=2)


@pytest.mark.parametrize("n_real, n_generated, size", [(300, 250, 100), (120, 400, 120)])
def test_kernel_distance_equals_torch_fidelitys(torch_fidelity, n_real, n_generated, size):
    metric = importlib.import_module("torch_fidelity.metric_kid")
    real, generated = features(n_real, 16, 0), features(n_generated, 16, 1, shift=0.1)
    settings = {"kid_subsets": 7, "kid_subset_size": size, "rng_seed": 11, "verbose": False}
    expected = metric.kid_features_to_metric(generated, real, **settings)
    found = kernel_distance(real, generated, subsets=7, subset_size=size, seed=11)
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-6)


def test_defaults_are_torch_fidelitys(torch_fidelity):
    theirs = importlib.import_module("torch_fidelity.defaults").DEFAULTS

    def ours(metric: Callable[..., object], name: str) -> object:
        return inspect.signature(metric).parameters[name].default

    assert ours(kernel_distance, "subsets") == theirs["kid_subsets"]
    assert ours(kernel_distance, "subset_size") == theirs["kid_subset_size"]
    assert ours(kernel_distance, "seed") == ours(inception_score, "seed") == theirs["rng_seed"]
    assert ours(inception_score, "splits") == theirs["isc_splits"]
    assert ours(manifold_figures, "neighbours") == theirs["prc_neighborhood"]


def test_kernel_distance_of_whole_sets_equals_three_loops():
    x, y = features(9, 5, 0).numpy(), features(9, 5, 1, shift=1).numpy()
    pairs = [(i, j) for i in range(9) for j in range(9)]
    within = sum((s[i] @ s[j] / 5 + 1) ** 3 for s in (x, y) for i, j in pairs if i != j) / (9 * 8)
    expected = within - 2 * sum((x[i] @ y[j] / 5 + 1) ** 3 for i, j in pairs) / 81
    found = kernel_distance(torch.from_numpy(x), torch.from_numpy(y), subsets=3, subset_size=9)
    assert found.mean == pytest.approx(expected, rel=1e-10) and found.std == pytest.approx(
        0, abs=1e-12
    )


def test_kernel_distance_is_unbiased_and_around_zero_for_equal_distributions():
    draws = []
    for seed in range(60):
        x, y = (torch.randn(200, 8, generator=generator(2 * seed + side)) for side in range(2))
        draws.append(kernel_distance(x, y, subsets=1, subset_size=200).mean)
    error = np.std(draws, ddof=1) / math.sqrt(len(draws))
    assert abs(np.mean(draws)) < 3 * error
    assert error < 0.01 and min(draws) < 0 < max(draws)


def test_kernel_distance_of_a_set_to_itself_is_near_zero_and_grows_with_a_shift():
    a = features(2000, 16, 0)
    same = kernel_distance(a, a, subsets=20, subset_size=500)
    assert abs(same.mean) < 3 * same.std
    shifted = [
        kernel_distance(a, a + shift, subsets=20, subset_size=500).mean for shift in (0.3, 1.0)
    ]
    assert same.mean + 0.1 < shifted[0] < shifted[1] - 0.1


def test_kernel_distance_asks_for_smaller_subsets_openly():
    with pytest.raises(
        InputError,
        match=r"subset_size 1000 is larger .* 2000 real and 300 generated .* lower subset_size",
    ):
        kernel_distance(features(2000, 4, 0), features(300, 4, 1))
    for settings in ({"subset_size": 1}, {"subsets": 0}):
        with pytest.raises(InputError, match="subsets >= 1"):
            kernel_distance(features(20, 4, 0), features(30, 4, 1), **settings)


@pytest.mark.parametrize("n, splits", [(500, 10), (103, 4), (7, 7)])
def test_inception_score_equals_torch_fidelitys(torch_fidelity, n, splits):
    metric = importlib.import_module("torch_fidelity.metric_isc")
    logits = features(n, 10, 0).float() * 3
    expected = metric.isc_features_to_metric(logits, splits=splits, rng_seed=3)
    found = inception_score(logits, splits=splits, seed=3)
    assert found.mean == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert found.std == pytest.approx(expected["inception_score_std"], rel=1e-6, abs=1e-12)


def test_inception_score_is_one_for_equal_images_and_the_number_of_classes_at_best():
    assert inception_score(features(1, 10, 0).expand(50, 10), splits=5).mean == pytest.approx(
        1, rel=1e-12
    )
    # Logits so large that all other probabilities are exactly zero.
    certain = torch.eye(10).repeat(4, 1) * 2000
    assert inception_score(certain, splits=1).mean == pytest.approx(10, rel=1e-9)
    missing = torch.cat([certain[:3], torch.zeros(0, 10)])
    assert inception_score(missing, splits=1).mean == pytest.approx(3, rel=1e-9)


def test_inception_score_refuses_what_it_cannot_split(unchecked):
    with pytest.raises(InputError, match="from 1 to 5, the number of images"):
        inception_score(features(5, 3, 0), splits=6)
    with pytest.raises(InputError, match="finite"):
        inception_score(features(5, 3, 0).log(), splits=1)
    with pytest.raises(InputError, match=r"\(n, classes\)"):
        inception_score(torch.ones(5), splits=1)


def brute_force(real: Tensor, generated: Tensor, k: int, k_density: int) -> tuple[float, ...]:
    """Return precision, recall, density and coverage by their definitions, in numpy."""
    x, y = real.double().numpy(), generated.double().numpy()
    squared = lambda a, b: np.square(a[:, None, :] - b[None, :, :]).sum(2)  # noqa: E731
    reach = lambda a, k: np.sort(squared(a, a), axis=1)[:, k]  # noqa: E731
    between = squared(x, y)
    precision = (between <= reach(x, k)[:, None]).any(0).mean()
    recall = (between <= reach(y, k)[None, :]).any(1).mean()
    near = between <= reach(x, k_density)[:, None]
    return precision, recall, near.sum() / (k_density * len(y)), near.any(1).mean()


def four(figures: manifold.Manifold) -> tuple[float, ...]:
    return figures.precision, figures.recall, figures.density, figures.coverage


@pytest.mark.parametrize("rows", [1, 37, 2**20])
def test_manifold_figures_equal_brute_force_whatever_the_blocks(monkeypatch, rows):
    real, generated = features(120, 6, 0).float(), features(150, 6, 1, shift=0.4).float()
    expected = brute_force(real, generated, 3, 5)
    assert all(0.05 < figure < 0.95 for figure in expected) and len(set(expected)) == 4
    monkeypatch.setattr(manifold, "DISTANCES", rows * 150)
    monkeypatch.setattr(manifold, "ROWS", 41)
    assert four(manifold_figures(real, generated)) == pytest.approx(expected, rel=1e-12)
    assert four(
        manifold_figures(real, generated, neighbours=7, density_neighbours=2)
    ) == pytest.approx(brute_force(real, generated, 7, 2), rel=1e-12)


@pytest.mark.parametrize("d", [3, 40])
def test_precision_and_recall_count_as_torch_fidelity_does(torch_fidelity, d):
    metric = importlib.import_module("torch_fidelity.metric_prc")
    real, generated = features(300, d, 0), features(220, d, 1, shift=0.4)
    settings = {
        "prc_neighborhood": 3,
        "prc_batch_size": 10_000,
        "save_cpu_ram": False,
        "verbose": False,
    }
    expected = metric.prc_features_to_metric(generated, real, **settings)
    found = manifold_figures(real, generated)
    assert round(found.precision * 220) == round(expected["precision"] * 220)
    assert round(found.recall * 300) == round(expected["recall"] * 300)
    assert 0 < found.recall < 1 and 0 < found.precision < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_count_as_within_the_manifold_whatever_the_rounding(dtype):
    # On a lattice nearly all comparisons are ties. Centring makes its points inexact.
    real, generated = (
        torch.randint(0, 3, (n, 30), generator=generator(n)).to(dtype) / 4 + 5 for n in (90, 110)
    )
    assert four(manifold_figures(real, generated)) == pytest.approx(
        brute_force(real, generated, 3, 5), rel=1e-12
    )


def test_figures_of_a_set_beside_itself_and_beside_a_far_one():
    a = features(200, 8, 0)
    figures = manifold_figures(a, a)
    assert (figures.precision, figures.recall, figures.coverage) == (1, 1, 1)
    # Closed balls hold five neighbours and the sample itself.
    assert figures.density == pytest.approx(6 / 5, rel=1e-12)
    assert four(manifold_figures(a, a + 1000)) == (0, 0, 0, 0)


def test_one_repeated_image_is_precise_but_recalls_and_covers_nearly_nothing():
    real = features(200, 8, 0)
    repeated = real[:1].expand(50, 8)
    figures = manifold_figures(real, repeated)
    assert figures.precision == 1 and figures.recall == 1 / 200 and figures.coverage < 0.2
    assert figures.density * 5 == pytest.approx(round(figures.coverage * 200), rel=1e-9)


def test_density_and_coverage_of_equal_distributions_have_their_expectations():
    figures = [
        manifold_figures(
            *(torch.randn(300, 4, generator=generator(2 * seed + side)) for side in range(2))
        )
        for seed in range(10)
    ]
    assert np.mean([figure.density for figure in figures]) == pytest.approx(1, abs=0.05)
    # The other 2n - 1 samples are exchangeable, so with probability about (1/2)^k none of the k
    # nearest is generated.
    n, k = 300, 5
    missed = math.prod((n - 1 - i) / (2 * n - 1 - i) for i in range(k))
    assert np.mean([figure.coverage for figure in figures]) == pytest.approx(1 - missed, abs=0.01)


def test_neighbours_are_found_exactly_far_from_the_origin():
    real, generated = (features(80, 6, seed).float() for seed in range(2))
    assert four(manifold_figures(real.double() + 1e6, generated.double() + 1e6)) == pytest.approx(
        brute_force(real.double() + 1e6, generated.double() + 1e6, 3, 5), rel=1e-12
    )


def test_manifold_figures_know_no_order_and_no_direction():
    real, generated, turn = features(100, 6, 0), features(120, 6, 1, shift=0.3), rotation(6, 0)
    figures = manifold_figures(real, generated)
    assert manifold_figures(real.flip(0), generated[torch.randperm(120)]) == figures
    assert manifold_figures(real @ turn - 2, generated @ turn - 2) == figures
    swapped = manifold_figures(generated, real)
    assert (swapped.precision, swapped.recall) == (figures.recall, figures.precision)


def test_manifold_figures_say_how_many_samples_they_need():
    for real, generated in [
        (features(5, 4, 0), features(50, 4, 1)),
        (features(50, 4, 0), features(5, 4, 1)),
    ]:
        with pytest.raises(InputError, match="too few for 5 neighbours: give at least 6"):
            manifold_figures(real, generated)
        assert manifold_figures(real, generated, density_neighbours=4).density >= 0
    for settings in ({"neighbours": 0}, {"density_neighbours": 0}):
        with pytest.raises(InputError, match="at least 1"):
            manifold_figures(features(50, 4, 0), features(50, 4, 1), **settings)


@pytest.mark.parametrize(
    "metric",
    [
        frechet_distance,
        lambda a, b: frechet_infinity(a, b, smallest=10),
        lambda a, b: kernel_distance(a, b, subset_size=5),
        manifold_figures,
    ],
)
def test_every_distance_refuses_what_it_cannot_compare(unchecked, metric):
    a = features(30, 4, 0)
    for b in (features(30, 5, 1), features(1, 4, 1), a[0], a[:, :0]):
        for pair in ((a, b), (b, a)):
            with pytest.raises(InputError, match="n >= 2 and equal d"):
                metric(*pair)
    broken = a.clone()
    for value in (math.nan, math.inf):
        broken[-1, -1] = value
        with pytest.raises(InputError, match="the first set has NaN"):
            metric(broken, a)
        with pytest.raises(InputError, match="the second set has NaN"):
            metric(a, broken)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_figures_on_an_accelerator_are_those_on_the_cpu():
    a, b = features(300, 32, 0).float(), features(250, 32, 1, shift=0.3).float()
    far_a, far_b = a.cuda(), b.cuda()
    assert frechet_distance(far_a, far_b) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    ours, theirs = (
        kernel_distance(*pair, subsets=3, subset_size=100) for pair in ((a, b), (far_a, far_b))
    )
    assert theirs.mean == pytest.approx(ours.mean, rel=1e-9)
    assert manifold_figures(far_a, far_b) == manifold_figures(a, b)
    assert inception_score(far_a).mean == pytest.approx(inception_score(a).mean, rel=1e-9)
