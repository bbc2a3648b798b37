"""Compare each rival objective with an independent computation, and test that runs accept it."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import nn

import poise
from poise import training
from poise.errors import InputError
from poise.latent import DiagonalGaussian
from poise.objectives import (
    IMQ_SCALES,
    OBJECTIVES,
    Deterministic,
    half_square,
    make_objective,
    squared_mmd,
    squared_slope,
    weight_norm,
)
from poise.recipes import RECIPES, Data, Network, Recipe, Stage
from poise.recipes.settings import Changes
from poise.runs import checkpoint, pipeline
from poise.runs.build import first_stage
from poise.runs.options import Options
from poise.runs.pipeline import train
from poise.training import (
    CodeBatches,
    TrainingState,
    Watch,
    fit,
    new_state,
    restore_state,
    state_tensors,
)

RIVALS = [name for name in OBJECTIVES if name != "vae"]
IMAGES = np.random.default_rng(0).integers(0, 256, (50, 8, 8), dtype=np.uint8)
FIRST = Stage(epochs=3, batch_size=15, learning_rate=1e-2, balance="fixed:gamma2=0.5")
TINY = Recipe(
    name="tiny",
    data=Data("array"),
    network=Network("mlp", latent_dim=3, hidden=(16,), second_hidden=8),
    first=FIRST,
    second=Stage(epochs=2, batch_size=20, learning_rate=1e-2),
)
QUIET = Options(device="cpu", quiet=True, save_seconds=0.0)


def tiny(out: Path, objective: str, **changes) -> poise.Run:
    return train(
        IMAGES,
        recipe=replace(TINY, first=replace(FIRST, objective=objective)),
        out=out,
        options=QUIET,
        **changes,
    )


@pytest.fixture(scope="module", params=["rae-gp", "wae-mmd"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> poise.Run:
    """Return a finished run of a rival objective. Tests must not change it."""
    return tiny(tmp_path_factory.mktemp("runs") / request.param, request.param)


class Linear(nn.Module):
    """A linear encoder or decoder of vectors; the encoder has an unused second head, as usual."""

    def __init__(self, inputs: int, outputs: int, *, encodes: bool) -> None:
        super().__init__()
        self.linear, self.encodes = nn.Linear(inputs, outputs), encodes
        self.head = nn.Linear(inputs, outputs) if encodes else None

    def forward(self, values):
        return (
            (self.linear(values), self.head(values))
            if self.head is not None
            else self.linear(values)
        )


def linear_vae(dims: int, latents: int) -> poise.VAE:
    encoder = Linear(dims, latents, encodes=True)
    return poise.VAE(Deterministic(encoder), Linear(latents, dims, encodes=False)).double()


def fitted(
    objective: str, data: torch.Tensor, latents: int, steps: int, **settings
) -> TrainingState:
    """Return the state of a linear model after full-batch training on vectors."""
    torch.manual_seed(0)
    stage = Stage(
        steps=steps,
        batch_size=len(data),
        balance="fixed:gamma2=0.5",
        objective=objective,
        **settings,
    )
    vae = linear_vae(data.shape[1], latents)
    state = new_state(vae, poise.FixedBalance(gamma2=0.5), stage, torch.device("cpu"))
    batches = CodeBatches(data, torch.full_like(data, -60.0), torch.device("cpu"))
    assert fit(state, batches, stage, number=1, seed=0, watch=Watch(quiet=True))
    return state


def digits() -> torch.Tensor:
    values = torch.as_tensor(load_digits().data[:300] / 16)
    return values - values.mean(0)


def test_a_linear_autoencoder_reaches_the_error_of_pca():
    data = digits()
    vae = fitted("autoencoder", data, 4, 300, learning_rate=3e-2, halve_every=60).network
    pca = PCA(4).fit(data.numpy())
    error = np.square(data.numpy() - pca.inverse_transform(pca.transform(data.numpy()))).mean()
    with torch.no_grad():
        assert float((vae.reconstruct(data) - data).square().mean()) == pytest.approx(
            error, rel=1e-3
        )


def test_a_linear_rae_reaches_the_closed_form_minimum():
    """The loss is |X - X E W|^2 / n + a/2 |X E|^2 / n + b |W|^2.

    It separates into directions of variance s^2. For a code e x and a weight w, the minimum of
    s^2 (1 - e w)^2 + a/2 s^2 e^2 + b w^2 over e is s^2 (a/2) / (w^2 + a/2) + b w^2. Its minimum
    over w^2 is 2 s sqrt(b a/2) - b a/2, where the minimiser w^2 is positive.
    """
    data, a, b = digits(), 0.05, 0.02
    variances = np.sort(PCA().fit(data.numpy()).singular_values_ ** 2 / len(data))[::-1]
    kept = variances[:3]
    squares = np.sqrt(kept * (a / 2) / b) - a / 2
    assert (squares > 0).all()
    least = (kept * (a / 2) / (squares + a / 2) + b * squares).sum() + variances[3:].sum()

    state = fitted(
        f"rae-l2:latent={a},decoder={b}", data, 3, 500, learning_rate=3e-2, halve_every=100
    )
    constant = data.shape[1] / 2 * np.log(np.pi)  # constant term of the balance at gamma2 = 1/2
    terms = make_objective(f"rae-l2:latent={a},decoder={b}")(
        state.network, state.balance, data, torch.zeros(len(data), 3)
    )
    assert float(terms.loss.detach()) - constant == pytest.approx(least, rel=1e-3)


def test_the_terms_of_rae_l2_are_those_that_numpy_computes():
    vae = first_stage(replace(TINY, first=replace(FIRST, objective="rae-l2")), [1, 8, 8])
    images, noise = torch.rand(5, 1, 8, 8), torch.randn(5, 3)
    terms = make_objective("rae-l2:latent=0.3,decoder=0.7")(
        vae, poise.FixedBalance(gamma2=0.5), images, noise
    )
    mean, decoder = vae.encode(images).mean.detach().numpy(), dict(vae.decoder.named_parameters())
    weights = [decoder[name].detach().numpy() for name in ("layers.0.weight", "layers.2.weight")]
    assert len(decoder) == 4, "two layers, each with a bias, which is not penalised"
    penalty = 0.3 * np.square(mean).sum(1).mean() / 2 + 0.7 * sum(
        np.square(weight).sum() for weight in weights
    )
    error = (
        np.square(vae.reconstruct(images).detach().numpy() - images.numpy()).sum((1, 2, 3)).mean()
    )
    assert float(terms.kl) == pytest.approx(penalty, rel=1e-5)
    assert float(terms.loss.detach()) == pytest.approx(
        error + 32 * np.log(np.pi) + penalty, rel=1e-5
    )


def test_the_slope_in_a_direction_is_that_of_the_jacobian():
    decoder = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    latents, direction = (
        torch.randn(4, 3, dtype=torch.double, requires_grad=True),
        torch.randn(4, 5, dtype=torch.double),
    )
    slope = squared_slope(decoder(latents), latents, direction)
    for one, v, found in zip(latents, direction, slope, strict=True):
        jacobian = torch.autograd.functional.jacobian(decoder, one)
        assert float(found.detach()) == pytest.approx(
            float((v @ jacobian).square().sum()), rel=1e-9
        )


def test_the_gradient_penalty_is_on_average_the_square_of_all_the_jacobians_entries():
    torch.manual_seed(0)
    vae = linear_vae(6, 3)
    images, noise = (
        torch.randn(4000, 6, dtype=torch.double),
        torch.randn(4000, 3, dtype=torch.double),
    )
    terms = make_objective("rae-gp:latent=0,gradient=2")(vae, poise.FixedBalance(), images, noise)
    assert float(terms.kl) == pytest.approx(2 * float(weight_norm(vae.decoder).detach()), rel=0.05)


def test_the_gradient_penalty_of_a_linear_decoder_makes_its_weights_small():
    """On a linear decoder the penalty is the squared Frobenius norm, as in RAE-L2.

    On average its gradient is the same.
    """
    torch.manual_seed(0)
    vae = linear_vae(6, 3)
    weight, latents = (
        vae.decoder.linear.weight,
        torch.randn(20_000, 3, dtype=torch.double, requires_grad=True),
    )
    images = vae.decode(latents)
    (by_slope,) = torch.autograd.grad(
        squared_slope(images, latents, torch.randn_like(images)).mean(), weight
    )
    assert float((by_slope - 2 * weight.detach()).norm() / by_slope.norm()) < 0.05


def test_the_discrepancy_is_that_of_a_double_loop():
    rng = np.random.default_rng(0)
    z, u = rng.normal(1, 2, (6, 3)), rng.normal(size=(6, 3))

    def kernel(x, y):
        return sum(6 * scale / (6 * scale + ((x - y) ** 2).sum()) for scale in IMQ_SCALES)

    within = sum(
        kernel(a, b)
        for points in (z, u)
        for i, a in enumerate(points)
        for j, b in enumerate(points)
        if i != j
    )
    across = sum(kernel(a, b) for a in z for b in u)
    found = squared_mmd(torch.as_tensor(z), torch.as_tensor(u))
    assert float(found) == pytest.approx(within / 30 - 2 * across / 36, rel=1e-9)


def test_the_discrepancy_is_zero_on_average_for_equal_distributions_and_positive_for_others():
    draws = torch.randn(400, 2, 20, 4, generator=torch.Generator().manual_seed(0))
    equal, wider = (
        torch.stack([squared_mmd(width * z, u) for z, u in draws]) for width in (1.0, 1.5)
    )
    error = float(equal.std()) / 20
    assert abs(float(equal.mean())) < 3 * error and float(wider.mean()) > 5 * error
    assert float(equal.min()) < 0, "an estimate without bias has either sign"


def test_the_discrepancy_weighs_as_much_as_asked_for_and_is_one_number_for_the_batch():
    vae, images, noise = (
        linear_vae(6, 3),
        torch.randn(10, 6, dtype=torch.double),
        torch.randn(10, 3),
    )
    terms = make_objective("wae-mmd:weight=7")(vae, poise.FixedBalance(), images, noise)
    expected = 7 * squared_mmd(vae.encode(images).mean, noise.double())
    assert float(terms.kl) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_with_a_discrepancy_codes_come_to_look_like_the_prior():
    data = 5 * torch.randn(200, 3, dtype=torch.double) + 3
    codes = (
        fitted("wae-mmd:weight=1000", data, 3, 120, learning_rate=1e-1, halve_every=30)
        .network.encode(data)
        .mean.detach()
    )
    assert float(codes.mean(0).abs().max()) < 0.15
    assert torch.cov(codes.T) == pytest.approx(torch.eye(3).numpy(), abs=0.2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["resnet", "infogan", "mlp"])
@pytest.mark.parametrize("name", RIVALS)
def test_gradients_reach_every_parameter_but_the_head_of_the_log_variance(name, kind, precision):
    network = Network(kind, latent_dim=3, hidden=(8,) if kind == "mlp" else ())
    stage = replace(FIRST, objective=name, precision=precision)
    state = new_state(
        first_stage(replace(TINY, network=network, first=stage), [1, 8, 8]),
        poise.FixedBalance(),
        stage,
        CPU,
    )
    images, noise = torch.rand(15, 1, 8, 8), torch.randn(15, 3)
    training.step.training_step(state, images, noise, stage)
    untouched = {
        name for name, parameter in state.network.named_parameters() if parameter.grad is None
    }
    head = {"resnet": "log_std", "mlp": "log_std", "infogan": "raw_std"}[kind]
    assert untouched and all(head in name for name in untouched)
    dead = [
        name
        for name, p in state.network.named_parameters()
        if p.grad is not None and not p.grad.isfinite().all()
    ]
    assert not dead and float(state.verdict[0]) == 0
    # Biases before a normalisation of batches have no influence, and ReLU may be 0 everywhere.
    weights = [p.grad for p in state.network.parameters() if p.grad is not None and p.ndim > 1]
    assert all(float(grad.abs().sum()) > 0 for grad in weights)


CPU = torch.device("cpu")


def test_the_rivals_have_as_many_parameters_as_the_vae_and_begin_with_its_weights():
    vae, rival = (
        first_stage(replace(TINY, first=replace(FIRST, objective=name)), [1, 8, 8])
        for name in ("vae", "rae-l2")
    )
    expected = [tuple(parameter.shape) for parameter in vae.parameters()]
    assert [tuple(parameter.shape) for parameter in rival.parameters()] == expected
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), rival.parameters(), strict=True))


def test_the_vaes_objective_is_its_balance():
    vae, balance = poise.VAE(*poise.networks.mlp((1, 8, 8), 3)), poise.ComputedBalance(start=0.3)
    images, noise = torch.rand(6, 1, 8, 8), torch.randn(6, 3)
    terms = make_objective("vae")(vae, balance.eval(), images, noise)
    reconstruction, posterior = vae(images, noise)
    assert all(
        map(torch.equal, terms, balance(reconstruction, images, posterior.mean, posterior.logvar))
    )


def test_codes_are_points_everywhere(run):
    images = torch.rand(5, 1, 8, 8)
    assert float(run.codes.std.max()) < 2e-6 and float(run.encode(images).std.max()) < 2e-6
    sampled = replace(run.recipe.generation, reconstruct_from="sample")
    torch.testing.assert_close(
        run.reconstruct(images, generation=sampled), run.reconstruct(images), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(run.latents(), run.codes.mean, atol=1e-4, rtol=0)


def test_samples_are_drawn_from_every_prior(run):
    for prior in ("normal", "second-stage", "mixture"):
        assert run.sample(3, prior=prior).shape == (3, 1, 8, 8)


def test_what_needs_a_posterior_is_left_out_and_said(run):
    evaluation = run.evaluate(IMAGES[:20], extractor="pixels")
    assert {m.metric for m in evaluation.measurements if m.of == "model"} == set()
    page, latents = evaluation.pages["reconstruction"], evaluation.pages["latents"]
    assert [page[name] for name in ("kl_nats", "elbo_nats", "bits_per_dim")] == [None] * 3 and page[
        "mse"
    ] > 0
    assert [latents[name] for name in ("variance_law", "mean_variance", "kl_nats_per_latent")] == [
        None
    ] * 3
    assert evaluation.pages["second_stage"]["kl_nats"] > 0, "stage 2 is a VAE"
    assert any("no KL" in note for note in evaluation.notes)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["reconstruction"]["elbo_nats"] is None and any(
        "no KL" in note for note in summary["notes"]
    )
    with pytest.raises(InputError, match="no likelihood"):
        run.evaluate(IMAGES[:20], extractor="none", nll_samples=2)


def test_the_log_calls_a_penalty_by_its_name(run):
    entries = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    named = {entry["stage"]: {"penalty", "kl_nats"} & set(entry) for entry in entries}
    assert named == {1: {"penalty"}, 2: {"kl_nats"}}


def test_there_is_nothing_to_diagnose(run):
    for model in (run, run.first.vae):
        with pytest.raises(InputError, match="no posterior to diagnose"):
            poise.diagnose(model, IMAGES[:20])


class Killed(BaseException):
    """Simulates a kill: nothing catches it."""


def test_a_run_that_was_killed_ends_bit_identical(run, tmp_path, monkeypatch):
    def mortal(*arguments):
        if next(taken, None) is None:
            raise Killed
        return real(*arguments)

    objective, whole = run.recipe.first.objective, weights(run)
    taken, real = iter(range(4)), training.engines.training_step
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training.engines, "training_step", mortal)
        tiny(tmp_path / "killed", objective)
    again = weights(tiny(tmp_path / "killed", objective))
    assert again.keys() == whole.keys() and all(
        torch.equal(again[name], whole[name]) for name in again
    )


def weights(run: poise.Run) -> dict[str, torch.Tensor]:
    saved, _ = checkpoint.newest_intact_checkpoint(run.folder / "checkpoints")
    assert saved is not None and saved.meta["finished"]
    return saved.tensors


def test_the_head_that_no_gradient_reaches_has_no_state_of_adam_and_is_restored_without(tmp_path):
    stage = replace(FIRST, objective="autoencoder")
    make = partial(first_stage, replace(TINY, first=stage), [1, 8, 8])
    state, other = (new_state(make(), poise.FixedBalance(), stage, CPU) for _ in range(2))
    training.step.training_step(state, torch.rand(15, 1, 8, 8), torch.randn(15, 3), stage)
    restore_state(other, {name: tensor.clone() for name, tensor in state_tensors(state).items()})
    moments = [name for name in state_tensors(other) if name.endswith("exp_avg")]
    assert len(moments) == len(list(state.network.parameters())) - 2
    for one in (state, other):
        training.step.training_step(one, torch.full((15, 1, 8, 8), 0.3), torch.zeros(15, 3), stage)
    assert all(map(torch.equal, state.network.parameters(), other.network.parameters()))


def test_a_network_of_ones_own_becomes_deterministic_too(tmp_path):
    class Returning(nn.Module):
        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, images):
            return DiagonalGaussian(*self.encoder(images))

    encoder, decoder = poise.networks.mlp((1, 8, 8), 3, hidden=(16,))
    vae = poise.VAE(Returning(encoder), decoder)
    run = train(
        IMAGES,
        recipe=TINY,
        vae=vae,
        out=tmp_path / "run",
        options=QUIET,
        objective="rae-l2",
        stages=1,
    )
    assert float(run.codes.std.max()) < 2e-6
    loaded = poise.load(tmp_path / "run", device="cpu", vae=poise.VAE(Returning(encoder), decoder))
    assert float(loaded.encode(IMAGES[:3]).std.max()) < 2e-6


def test_an_objective_without_a_balance_is_the_published_one():
    digits = RECIPES["digits"]
    assert Changes(objective="rae-l2").apply(digits).first.balance == "fixed:gamma2=0.5"
    assert Changes(objective="rae-l2", balance="computed").apply(digits).first.balance == "computed"
    assert (
        Changes(objective="vae").apply(digits).first
        == Changes().apply(digits).first
        == digits.first
    )
    assert Changes(objective="rae-l2").apply(digits).second == digits.second


def test_a_penalty_may_be_balanced_by_the_error(tmp_path):
    run = tiny(tmp_path / "run", "rae-l2", balance="computed:decay=0.5", stages=1)
    assert float(run.first.balance.gamma2) == pytest.approx(
        run.evaluate(IMAGES, extractor="none").value("MSE"), rel=0.5
    )


def test_a_run_from_before_there_were_objectives_is_loaded_and_goes_on(tmp_path):
    tiny(tmp_path / "run", "vae")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    for stage in ("first", "second"):
        del config["recipe"][stage]["objective"]
    path.write_text(json.dumps(config))
    assert poise.load(tmp_path / "run", device="cpu").recipe.first.objective == "vae"
    assert tiny(tmp_path / "run", "vae").finished
    with pytest.raises(InputError, match=r"first\.objective: vae -> rae-l2"):
        tiny(tmp_path / "run", "rae-l2")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("elbo", "unknown objective 'elbo'; there are vae, autoencoder, rae-l2, rae-gp, wae-mmd"),
        ("rae-l2:gradient=1", "'rae-l2' has no option 'gradient'; it takes latent, decoder"),
        ("autoencoder:latent=1", "'autoencoder' has no option 'latent'; it takes none"),
        (
            "rae-gp:latent=much",
            "latent='much' of objective 'rae-gp' is not a number: write rae-gp:latent=",
        ),
        ("wae-mmd:weight=-1", "weight must be a finite number >= 0, not -1"),
        ("wae-mmd:weight=nan", "weight must be a finite number >= 0, not nan"),
    ],
)
def test_a_wrong_objective_is_said_before_the_data_are_read(spec, message, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "read_data", lambda *arguments: pytest.fail("the data were read"))
    with pytest.raises(InputError, match=message):
        train("digits", out=tmp_path / "run", options=QUIET, objective=spec)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["balance", "second_balance"])
def test_a_wrong_balance_is_said_before_the_data_are_read(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "read_data", lambda *arguments: pytest.fail("the data were read"))
    with pytest.raises(InputError, match=r"'zen'.*computed"):
        train("digits", out=tmp_path / "run", options=QUIET, **{setting: "zen"})


@pytest.mark.parametrize(
    "name, alone", [("rae-gp", True), ("wae-mmd", True), ("rae-l2", False), ("autoencoder", False)]
)
def test_several_processes_are_refused_where_a_batch_must_be_whole(name, alone, monkeypatch):
    for variable, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "nowhere",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(variable, value)
    if not alone:
        pipeline.check_objective(name)
        return
    with pytest.raises(InputError, match="one process"):
        pipeline.check_objective(name)


def test_stage_2_is_a_vae_or_a_flow():
    with pytest.raises(InputError, match="objective of stage 2 must be one of vae, flow"):
        replace(TINY, second=replace(FIRST, objective="rae-l2"))


def test_half_a_square_and_the_weights_norm_are_exact():
    assert half_square(torch.tensor([[3.0, 4.0]])).tolist() == [12.5]
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.bias.fill_(9.0)
    assert float(weight_norm(nn.Sequential(layer, nn.BatchNorm1d(1))).detach()) == 5
