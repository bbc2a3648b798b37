"""Compare the flow with closed forms for Gaussian codes, and test runs whose second stage it is."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import sqrtm
from torch import nn

import poise
from poise import networks, training
from poise.errors import InputError
from poise.flow import Flow
from poise.latent import DiagonalGaussian, latent_scale
from poise.metrics import encode_all
from poise.objectives import make_objective
from poise.priors import FlowPrior, TrainedModel, fit_mixture, make_prior
from poise.priors.flow_prior import evaluations
from poise.recipes import RECIPES, Data, Generation, Network, Recipe, Stage
from poise.recipes.settings import Changes
from poise.runs import checkpoint
from poise.runs.options import Options
from poise.support.seeds import generator
from poise.training import CodeBatches, ImageBatches, Watch, fit, new_state
from poise.training.loop import may_draw

MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
COVARIANCE = torch.tensor(
    [[1.5, 0.6, -0.2], [0.6, 0.8, 0.1], [-0.2, 0.1, 0.3]], dtype=torch.float64
)
CPU = torch.device("cpu")


class Exact(nn.Module):
    """The velocity v*(y, t) for codes N(MEAN, COVARIANCE), plus `shift` (eq. 3 of poise.flow)."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, y, t):
        t = t[:, None, None]
        eye = torch.eye(3, dtype=y.dtype)
        between = (1 - t) ** 2 * eye + t**2 * COVARIANCE
        centred = y[:, :, None] - t * MEAN[:, None]
        slope = (t * COVARIANCE - (1 - t) * eye) @ torch.linalg.solve(between, centred)
        return MEAN + slope[:, :, 0] + self.shift * y.sin()


def exact(shift: float = 0.0) -> Flow:
    return Flow(Exact(shift), (3,)).double()


@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("euler", 1)])
def test_the_exact_velocity_carries_noise_to_the_codes_at_the_order_of_the_solver(solver, order):
    """The flow of Gaussian codes is y -> MEAN + COVARIANCE^(1/2) y, with scipy's square root."""
    noise = torch.randn(50, 3, dtype=torch.float64, generator=generator("flow", 0))
    flow = exact()
    flow.mean += 2.0
    flow.std *= 3.0
    root = torch.from_numpy(np.real(sqrtm(COVARIANCE.numpy())))
    expected = 2.0 + 3.0 * (MEAN + noise @ root)
    errors = []
    for steps in (20, 40, 80):
        found = FlowPrior(flow, steps=steps, solver=solver).latents(noise)
        errors.append(float((found - expected).norm()))
    ratios = np.divide(errors[:-1], errors[1:])
    assert ratios == pytest.approx([2.0**order] * 2, rel=0.2)
    assert errors[-1] < 0.02 * float(expected.norm())


def test_the_density_of_the_exact_flow_is_that_of_the_codes():
    latents = 4 * torch.randn(40, 3, dtype=torch.float64, generator=generator("flow", 4))
    flow = exact()
    flow.mean += 2.0
    flow.std *= 3.0
    expected = torch.distributions.MultivariateNormal(2.0 + 3.0 * MEAN, 9.0 * COVARIANCE)
    found = FlowPrior(flow, steps=1).log_density(latents)
    np.testing.assert_allclose(found, expected.log_prob(latents), rtol=1e-3)


def test_the_density_of_a_network_has_mass_one_and_the_mean_of_its_samples():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        velocity = networks.flow((1,), width=16, blocks=2)
        for weight in velocity.parameters():
            weight.data += 0.3 * torch.randn_like(weight)
    prior = FlowPrior(Flow(velocity, (1,)), steps=100)
    grid = torch.linspace(-12, 12, 4_001, dtype=torch.float64)[:, None]
    density = prior.log_density(grid).exp() * 24 / 4_000
    assert float(density.sum()) == pytest.approx(1, abs=5e-3)
    samples = prior.latents(torch.randn(20_000, 1, generator=generator("flow", 5)))
    assert float(density @ grid[:, 0]) == pytest.approx(float(samples.mean()), abs=0.05)


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_the_number_of_evaluations_is_what_is_said(solver):
    calls = []
    flow = exact()
    flow.velocity.register_forward_hook(lambda *call: calls.append(call))
    FlowPrior(flow, steps=5, solver=solver).latents(torch.randn(2, 3, dtype=torch.float64))
    assert len(calls) == evaluations(5, solver)


def test_the_loss_is_least_at_the_exact_velocity():
    """At v* + d it is larger by the mean of d^2, and times are logit-normal."""
    source = generator("flow", 1)
    factor = torch.linalg.cholesky(COVARIANCE)
    codes = MEAN + torch.randn(40_000, 3, dtype=torch.float64, generator=source) @ factor.T
    noise = torch.randn(40_000, 4, dtype=torch.float64, generator=source)
    between, time, _ = exact().target(codes, noise)
    assert stats.kstest(time.logit(), "norm").pvalue > 1e-3
    balance, objective = poise.FixedBalance(gamma2=0.5), make_objective("flow")
    terms = [objective(exact(shift), balance, codes, noise) for shift in (-0.3, 0.0, 0.3)]
    least, added = terms[1].mse, 0.09 * between.sin().square().mean()
    for other in (terms[0], terms[2]):
        assert float(other.mse - least) == pytest.approx(float(added), rel=0.1)
    assert float(terms[1].kl) == 0


@pytest.mark.parametrize("shape", [(6,), (2, 3, 1)])
def test_codes_are_standardised_per_latent_or_per_channel(shape):
    source = generator("flow", 2)
    mean = torch.randn(50, 6, generator=source) * torch.arange(1, 7) + 3
    codes = DiagonalGaussian(mean, torch.randn(50, 6, generator=source))
    flow = Flow(nn.Identity(), shape)
    flow.set_statistics(codes)
    channels = mean.numpy().astype(float).reshape(50, shape[0], -1)
    variances = codes.logvar.exp().numpy().astype(float).reshape(channels.shape)
    std = np.sqrt(channels.var((0, 2)) + variances.mean((0, 2)))
    positions = 6 // shape[0]
    np.testing.assert_allclose(flow.mean, channels.mean((0, 2)).repeat(positions), rtol=1e-5)
    np.testing.assert_allclose(flow.std, std.repeat(positions), rtol=1e-5)
    scale = latent_scale(codes, shape)
    np.testing.assert_allclose(scale.latents_mean, channels.mean((0, 2)), rtol=1e-6)
    np.testing.assert_allclose(scale.latents_std, std, rtol=1e-6)
    assert scale.shift_factor == pytest.approx(channels.mean())
    assert scale.scaling_factor == pytest.approx((channels.var() + variances.mean()) ** -0.5)


def test_a_small_flow_learns_mean_and_covariance_of_correlated_codes():
    source = generator("flow", 3)
    factor = torch.tensor([[1.0, 0.0], [1.2, 0.5]])
    mean = torch.randn(2_000, 2, generator=source) @ factor.T + torch.tensor([4.0, -1.0])
    codes = DiagonalGaussian(mean, torch.full_like(mean, 0.1).log())
    with poise.support.seeds.seeded(0):
        flow = Flow(networks.flow((2,), width=32, blocks=2), (2,))
    flow.set_statistics(codes)
    stage = Stage(
        steps=400, batch_size=64, learning_rate=5e-3, objective="flow", decay=0.5, ema_decay=0.95
    )
    state = new_state(flow, poise.ComputedBalance(), stage, CPU)
    data = CodeBatches(codes.mean, codes.logvar, CPU)
    assert fit(state, data, stage, number=2, seed=0, watch=Watch(quiet=True))
    drawn = FlowPrior(state.trained, steps=10).latents(torch.randn(4_000, 2, generator=source))
    expected = np.cov(mean.T) + 0.1 * np.eye(2)
    np.testing.assert_allclose(drawn.mean(0), mean.mean(0), atol=0.15)
    np.testing.assert_allclose(np.cov(drawn.T), expected, atol=0.15)


IMAGES = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
TINY = Recipe(
    name="tiny",
    data=Data("array", flips=True),
    network=Network("conv", latent_channels=2, conv_width=8, flow_width=8, flow_blocks=3),
    first=Stage(steps=3, batch_size=10, learning_rate=1e-3, decay=0.5),
    second=Stage(
        steps=4,
        batch_size=10,
        learning_rate=1e-2,
        objective="flow",
        warmup=0.5,
        ema_decay=0.9,
        ema_warmup=True,
    ),
)
QUIET = Options(device="cpu", quiet=True, save_seconds=0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> poise.Run:
    """Return a finished run with latent maps and a flow. Tests must not change it."""
    return poise.train(IMAGES, recipe=TINY, out=tmp_path_factory.mktemp("runs"), options=QUIET)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved, _ = checkpoint.newest_intact_checkpoint(folder / "checkpoints")
    assert saved is not None and saved.meta["finished"]
    return saved.tensors


def test_a_run_with_a_flow_keeps_it_and_samples_from_it(run):
    assert run.recipe.network.latent_dim == 2 * 4 * 4 == run.codes.mean.shape[1]
    assert (run.second_stage, run.default_prior, run.second) == ("flow", "flow", None)
    config = json.loads((run.folder / "config.json").read_text())["recipe"]
    assert config["second"]["objective"] == "flow" and config["network"]["latent_dim"] == 32
    again = poise.load(run.folder, device="cpu")
    assert torch.equal(again.sample(3), run.sample(130, prior="flow")[:3])
    steps = Generation(flow_steps=2, flow_solver="euler")
    assert not torch.equal(run.sample(3, generation=steps), run.sample(3))
    assert run.flow is not None
    scale = json.loads((run.folder / "latents.json").read_text())
    assert scale["latent_shape"] == [2, 4, 4]
    np.testing.assert_allclose(scale["latents_mean"], run.flow.mean[::16], rtol=1e-6)
    np.testing.assert_allclose(scale["latents_std"], run.flow.std[::16], rtol=1e-6)
    entries = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    of_flow = [entry for entry in entries if entry["stage"] == 2]
    assert len(of_flow) == 4 and all(entry["velocity_mse"] > 0 for entry in of_flow)
    assert not {"kl_nats", "reconstruction_nats", "mse"} & set(of_flow[0])
    assert [entry["learning_rate"] for entry in of_flow] == [5e-3, 1e-2, 1e-2, 1e-2]


def test_a_flow_is_averaged_with_a_warm_start(run):
    """After the first step of four, the average of the weights is nearly the last weights."""
    tensors = weights(run.folder)
    name = "velocity.output.2.weight"
    last, average = (tensors[f"stage2.{kind}.{name}"] for kind in ("vae", "average"))
    assert 0 < float((last - average).norm()) < 0.7 * float(last.norm())
    assert [TINY.second.ema_decay_at(k) for k in (0, 8, 1000)] == [0.1, 0.5, 0.9]  # pyright: ignore[reportOptionalMemberAccess]


@pytest.fixture
def killed_after(tmp_path, monkeypatch):
    """Train until a number of steps, and return the folder."""

    class Killed(BaseException):
        pass

    def train(step: int) -> Path:
        left, real = iter(range(step)), training.engines.training_step

        def mortal(*arguments):
            if next(left, None) is None:
                raise Killed
            return real(*arguments)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(training.engines, "training_step", mortal)
            poise.train(IMAGES, recipe=TINY, out=tmp_path / "run", options=QUIET)
        return tmp_path / "run"

    return train


@pytest.mark.parametrize("damage", [None, torch.nan, "absent"])
def test_damaged_codes_of_mirror_images_are_computed_again(damage, run, killed_after, capsys):
    folder = killed_after(5)
    saved = checkpoint.read_folder(folder / "codes")
    if damage == "absent":
        del saved.tensors["mirrored_logvar"]
    elif damage is not None:
        saved.tensors["mirrored_mean"][3, 1] = damage
    checkpoint.write_folder(folder / "codes", *saved)
    poise.train(IMAGES, recipe=TINY, out=folder, options=QUIET)
    assert ("computing the codes again" in capsys.readouterr().err) == (damage is not None)
    again, undisturbed = weights(folder), weights(run.folder)
    assert all(torch.equal(again[name], undisturbed[name]) for name in undisturbed)


def test_a_flow_draws_nothing_from_the_global_generator(run):
    assert not may_draw(run.flow)


@pytest.mark.parametrize("step", [2, 5])
def test_a_run_with_a_flow_that_is_killed_ends_bit_identical(step, run, tmp_path, killed_after):
    killed_after(step)
    poise.train(IMAGES, recipe=TINY, out=tmp_path / "run", options=QUIET)
    again, undisturbed = weights(tmp_path / "run"), weights(run.folder)
    assert again.keys() == undisturbed.keys()
    assert all(torch.equal(again[name], undisturbed[name]) for name in again)


def test_evaluation_diagnosis_and_report_know_the_flow(run, tmp_path):
    evaluation = run.evaluate(IMAGES, extractor="pixels")
    assert np.isfinite(evaluation.value("FD-pixels", "GEN-flow"))
    assert {m.of for m in evaluation.measurements} >= {"GEN-1", "GEN-flow"}
    assert "GEN-2" not in {m.of for m in evaluation.measurements}
    many = np.concatenate([IMAGES, 255 - IMAGES])
    diagnosis = poise.diagnose(run, many, train_images=many)
    assert "distance_flow" in str(diagnosis.to_json())
    page = poise.report.write_report([run.folder], tmp_path / "page.html", device="cpu")
    assert "GEN-flow" in page.read_text(encoding="utf-8")


def test_mirror_images_are_trained_on_and_encoded(run):
    """Items are mirrored by the sign of their own noise, and so are codes."""
    images = ImageBatches(IMAGES.transpose(0, 3, 1, 2), CPU, flips=True)
    signs = torch.tensor([1.0, -1.0, 1.0])
    batch = images.place(images.fetch(torch.arange(3)), lambda columns: signs[:, None])
    plain = torch.from_numpy(IMAGES[:3]).permute(0, 3, 1, 2) / 255
    expected = torch.stack([plain[0].flip(2), plain[1], plain[2].flip(2)])
    torch.testing.assert_close(batch, expected)
    tensors = checkpoint.read_folder(run.folder / "codes").tensors
    mirrored = encode_all(run.first.vae, run.dataset().train[:, :, :, ::-1])
    torch.testing.assert_close(tensors["mirrored_mean"], mirrored.mean)
    pair = DiagonalGaussian(tensors["mirrored_mean"], tensors["mirrored_logvar"])
    codes = CodeBatches(run.codes.mean, torch.full_like(pair.logvar, -200.0), CPU, mirrored=pair)
    placed = codes.place(torch.arange(3), lambda columns: signs[:, None] * torch.ones(columns))
    assert torch.equal(placed[1], run.codes.mean[1])
    torch.testing.assert_close(placed[0], pair.mean[0] + (0.5 * pair.logvar[0]).exp())
    assert len(codes) == len(run.codes.mean)


def test_a_flow_that_is_not_there_or_does_not_fit_is_refused_in_one_line(run, tmp_path, unchecked):
    one_stage = replace(TINY, second=None)
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["recipe"]["second"] = None
    (folder / "config.json").write_text(json.dumps(config))
    without = poise.load(folder, device="cpu")
    codes = DiagonalGaussian(torch.zeros(3, 2), torch.zeros(3, 2))
    requests = {
        "has no trained flow: its priors are normal, .*mixture": lambda: without.sample(
            3, prior="flow"
        ),
        "has no trained second VAE: its priors are .*flow": lambda: run.sample(
            3, prior="second-stage"
        ),
        "needs a trained flow as second stage, and this model has none": lambda: make_prior(
            "flow", TrainedModel(2, lambda: codes)
        ),
        "this recipe trains a vae: .*--second flow": lambda: poise.compare(
            "digits", priors=["flow"], out=tmp_path
        ),
        "needs a second stage: leave it out": lambda: poise.compare(
            IMAGES, recipe=one_stage, priors=["flow"], out=tmp_path
        ),
        "a mixture .* takes at most 512 latents, not 513: use a flow": lambda: fit_mixture(
            DiagonalGaussian(torch.zeros(20, 513), torch.zeros(20, 513))
        ),
        "flow_steps must be at least 1, not 0": lambda: Generation(flow_steps=0),
        "flow_solver must be one of heun, euler, not 'rk4'": lambda: Generation(flow_solver="rk4"),
        "a flow can only be the second stage": lambda: replace(TINY, first=TINY.second),
        "network conv has no setting latent_dim: give latent_channels": lambda: Changes(
            latent_dim=3
        ).apply(TINY),
        "network mlp has no setting latent_channels: give latent_dim": lambda: Changes(
            latent_channels=3
        ).apply(RECIPES["digits"]),
        "warmup must be from 0 to 1, not 2": lambda: Stage(steps=1, warmup=2),
        "network conv takes image sizes that are multiples of 4": lambda: poise.train(
            IMAGES[:, :15, :15], recipe=TINY, out=tmp_path / "odd", options=QUIET
        ),
    }
    for message, request in requests.items():
        with pytest.raises(InputError, match=message) as error:
            request()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "odd" / "checkpoints").exists()
