"""Test runs of both stages: files, what survives, and that interruptions change nothing."""

import errno
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import poise
from poise import data as datasets
from poise import training
from poise.data.decoding import grid, jpeg_round_trip, to_bytes
from poise.errors import InputError, Interrupted, MissingInputError, RunError
from poise.features import make_extractor
from poise.latent import spherical_path, variance_law
from poise.metrics import frechet_distance, structural_similarity
from poise.priors import NormalPrior
from poise.protocols import PROTOCOLS, Protocol
from poise.recipes import RECIPES, Data, Generation, Network, Recipe, Stage
from poise.recipes.settings import Changes
from poise.runs import checkpoint, growth, pipeline
from poise.runs.log import read_log
from poise.runs.options import Options
from poise.runs.pipeline import train
from poise.runs.run import load
from poise.support import files
from poise.support.seeds import drawn
from poise.vae import VAE

IMAGES = np.random.default_rng(0).integers(0, 256, (90, 8, 8), dtype=np.uint8)
TINY = Recipe(
    name="tiny",
    data=Data("array"),
    network=Network("mlp", latent_dim=3, hidden=(16,), second_hidden=8),
    first=Stage(epochs=4, batch_size=20, learning_rate=1e-2, halve_every=2),
    second=Stage(epochs=3, batch_size=20, learning_rate=1e-2, balance="learned"),
)
STEPS = 16 + 12  # 81 training images in batches of 20: 4 steps per epoch
QUIET = Options(device="cpu", quiet=True, save_seconds=0.0)  # a checkpoint after every step


def tiny(out: Path, **changes) -> poise.Run:
    return train(IMAGES, recipe=replace(TINY, **changes), out=out, options=QUIET)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved, _ = checkpoint.newest_intact_checkpoint(folder / "checkpoints")
    assert saved is not None and saved.meta["finished"]
    return saved.tensors


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run. Tests must not change it."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    tiny(folder)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


class Killed(BaseException):
    """Simulates a kill: nothing catches it."""


def die_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make training die before the given step, counted over both stages."""
    taken = iter(range(step))

    def mortal(*arguments):
        if next(taken, None) is None:
            raise Killed
        return real(*arguments)

    real = training.engines.training_step
    monkeypatch.setattr(training.engines, "training_step", mortal)


def test_a_run_folder_describes_itself(finished):
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    pictures = {"samples.png", "reconstructions.png", "training.png", "progress.png"}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "codes",
        "last",
        "latents.json",
        "mixture",
        *pictures,
    }
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["poise"] == poise.__version__
    assert {"KL", "ELBO"} <= {entry["metric"] for entry in summary["measurements"]}
    assert all(entry["protocol"] in summary["protocols"] for entry in summary["measurements"])
    config = json.loads((finished / "config.json").read_text())
    assert (
        config["recipe"]["first"]["epochs"] == 4
        and config["data"]["train"] == 81
        and config["data"]["test"] == 9
    )
    entries = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["stage"], entry["step"]) for entry in entries] == [
        (1, k) for k in range(1, 17)
    ] + [(2, k) for k in range(1, 13)]
    assert [entry["learning_rate"] for entry in entries[:16]] == [1e-2] * 8 + [5e-3] * 8
    assert len(checkpoint.checkpoints(finished / "checkpoints")) == 2


@pytest.mark.parametrize("step", [0, 1, 5, 15, 16, 17, 27])
def test_a_run_killed_before_any_step_ends_bit_identical(step, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, step)
        tiny(tmp_path / "run")
    tiny(tmp_path / "run")
    again, undisturbed = weights(tmp_path / "run"), weights(finished)
    assert again.keys() == undisturbed.keys()
    assert all(torch.equal(again[name], undisturbed[name]) for name in again)
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [*range(1, 17), *range(1, 13)]
    assert (tmp_path / "run" / "progress.png").read_bytes() == (
        finished / "progress.png"
    ).read_bytes()


def tiles(folder: Path, stage: int, tenth: int) -> list[np.ndarray]:
    """Return the left and the right half of a row of progress.png: 8 images of 8x8 pixels each."""
    with Image.open(folder / "progress.png") as file:
        picture = np.asarray(file)
    above = {1: 24, 2: 24 + 24 + 12 + 10 * 66}[stage] + 66 * tenth
    lefts = (48, 48 + 8 * 66 + 12)
    return [picture[above : above + 64, left : left + 8 * 66 - 2] for left in lefts]


def test_the_last_rows_of_the_progress_are_what_the_trained_model_gives(finished):
    run, data = load(finished, device="cpu"), datasets.load(IMAGES)
    test = datasets.gather(data.test, drawn(len(data.test), 8))
    rows = {
        (1, 0): [np.full((64, 526), 255), grid(test, 8)],
        (1, 10): [grid(run.sample(8, prior="normal"), 8), grid(run.reconstruct(test), 8)],
        (2, 10): [grid(part, 8) for part in run.sample(16).split(8)],
    }
    for place, expected in rows.items():
        for shown, wanted in zip(tiles(finished, *place), expected, strict=True):
            assert np.abs(shown - wanted.reshape(shown.shape).astype(float)).max() <= 1
    assert (tiles(finished, 1, 5)[1] != tiles(finished, 1, 10)[1]).any()


@pytest.mark.parametrize("steps", [3, 12])
def test_progress_is_shown_once_in_each_tenth_and_changes_no_weight(steps, tmp_path, monkeypatch):
    def network():
        torch.manual_seed(0)
        encoder, decoder = poise.networks.mlp((1, 8, 8), 3, hidden=(16,))
        front = [nn.Flatten(), nn.Dropout(0.2), nn.BatchNorm1d(64), nn.Unflatten(1, (1, 8, 8))]
        return VAE(nn.Sequential(*front, encoder), decoder)

    def add(picture, stage, tenth, vae, prior):
        shown.append((stage, tenth))
        if drawing:
            real(picture, stage, tenth, vae, prior)

    real, ended = growth.ProgressPicture.add, []
    monkeypatch.setattr(growth.ProgressPicture, "add", add)
    for drawing in (True, False):
        shown: list[tuple[int, int]] = []
        out = tmp_path / str(drawing)
        first, second = (Stage(steps=count, batch_size=20) for count in (steps, 10))
        recipe = replace(TINY, first=first, second=second)
        train(
            IMAGES, recipe=recipe, vae=network(), out=out, options=replace(QUIET, save_seconds=60)
        )
        ended.append(weights(out))
        tenths = {10 * step // steps for step in range(1, steps + 1)} - {0}
        assert [tenth for stage, tenth in shown if stage == 1] == sorted(tenths)
        assert [tenth for stage, tenth in shown if stage == 2] == list(range(1, 11))
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


def test_the_picture_of_progress_grows_and_is_mended(tmp_path, capsys, monkeypatch):
    vae, seen = VAE(*poise.networks.mlp((1, 8, 8), 3)), torch.rand(9, 1, 8, 8)
    path, prior = tmp_path / "progress.png", NormalPrior(3)
    about = {"seed": 0, "priors": ["N(0, I)", "the second stage"]}

    def height():
        with Image.open(path) as picture:
            return picture.height

    def draw(picture, *places):
        for place in places:
            picture.add(*place, vae.train(), prior)
            assert all(module.training for module in vae.modules())
        picture.write()
        return path.read_bytes()

    whole = draw(growth.ProgressPicture(path, seen, **about), (1, 1), (1, 2), (2, 1))
    assert height() == 24 + 11 * 66 + 12 + 24 + 66
    begun = growth.ProgressPicture(path, seen, **about)
    draw(begun, (1, 1))
    assert height() == 24 + 2 * 66
    draw(begun, (1, 2))
    assert draw(growth.ProgressPicture(path, seen, **about, shown=(1, 1)), (1, 2), (2, 1)) == whole
    path.write_bytes(whole[:500])  # damaged: the rows until then stay empty
    draw(growth.ProgressPicture(path, seen, **about, shown=(1, 1)), (1, 2))
    assert (tiles(tmp_path, 1, 1)[0] == 255).all() and (tiles(tmp_path, 1, 2)[0] < 255).any()
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(files, "write_synced", lambda path, content: (_ for _ in ()).throw(full))
    draw(growth.ProgressPicture(path, seen, **about), (1, 1), (1, 2))
    assert capsys.readouterr().err.count("No space left") == 1
    for parameter in vae.parameters():
        nn.init.constant_(parameter, torch.nan)
    growth.ProgressPicture(path, seen, **about).add(1, 1, vae, prior)


def test_large_images_are_reduced_in_the_picture_of_progress(tmp_path):
    large = torch.rand(3, 3, 200, 200)
    picture = growth.ProgressPicture(tmp_path / "p.png", large, seed=0, priors=["N(0, I)"])
    vae = VAE(*poise.networks.mlp((3, 200, 200), 2, hidden=(4,)))
    picture.add(1, 1, vae, NormalPrior(2))
    picture.write()
    with Image.open(tmp_path / "p.png") as file:
        assert file.size == (48 + 16 * 130 + 12, 24 + 2 * 130) and file.mode == "RGB"


def test_a_run_stopped_by_a_signal_saves_and_goes_on(finished, tmp_path, monkeypatch):
    def asked(entry):
        if entry["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="step 3 of stage 1"):
        patch.setattr(training.loop, "figures", lambda entry: asked(entry) or {})
        tiny(tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) is before
    tiny(tmp_path / "run")
    assert all(
        torch.equal(tensor, weights(tmp_path / "run")[name])
        for name, tensor in weights(finished).items()
    )


def test_another_seed_gives_other_weights(finished, tmp_path):
    tiny(tmp_path / "run", seed=1)
    name = "stage1.vae.encoder.mean.weight"
    assert not torch.equal(weights(tmp_path / "run")[name], weights(finished)[name])


def test_a_prior_that_does_not_exist_is_refused(finished, unchecked):
    with pytest.raises(InputError, match="unknown prior 'mixtures'"):
        load(finished, device="cpu").sample(3, prior="mixtures")


def test_the_same_images_may_have_moved(tmp_path):
    def run(where):
        return train(where, recipe=TINY, out=tmp_path / "run", options=QUIET)

    np.save(tmp_path / "here.npy", IMAGES)
    run(tmp_path / "here.npy")
    (tmp_path / "here.npy").rename(tmp_path / "there.npy")
    assert run(tmp_path / "there.npy").finished


def test_settings_can_be_changed_by_name(tmp_path):
    run = train(
        IMAGES,
        recipe=TINY,
        out=tmp_path / "run",
        options=QUIET,
        epochs=1,
        latent_dim=2,
        stages=1,
        seed=3,
    )
    assert (
        run.recipe.first.epochs,
        run.recipe.network.latent_dim,
        run.recipe.second,
        run.recipe.seed,
    ) == (1, 2, None, 3)
    with pytest.raises(InputError, match="no setting epoch;"):
        train(IMAGES, recipe=TINY, out=tmp_path / "other", epoch=1)


def test_training_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    tiny(tmp_path / "run", first=Stage(steps=2), second=None)
    assert torch.equal(before, torch.get_rng_state())


def test_a_finished_run_is_not_trained_again(copy, monkeypatch):
    die_at(monkeypatch, 0)
    tiny(copy)


def test_a_folder_alone_is_enough_to_sample(finished, tmp_path):
    moved = shutil.copytree(finished, tmp_path / "elsewhere")
    samples = load(moved, device="cpu").sample(5, seed=3)
    assert samples.shape == (5, 1, 8, 8) and samples.min() >= 0 and samples.max() <= 1
    assert torch.equal(samples, load(finished, device="cpu").sample(5, seed=3))


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(copy):
    newest = checkpoint.checkpoints(copy / "checkpoints")[-1]
    blob = bytearray((newest / "tensors.safetensors").read_bytes())
    blob[-1] ^= 1
    (newest / "tensors.safetensors").write_bytes(blob)
    run = load(copy, device="cpu")
    assert "damaged" in run.warnings[0] and newest.name in run.warnings[0]
    assert not run.finished
    (checkpoint.checkpoints(copy / "checkpoints")[0] / "manifest.json").unlink()
    with pytest.raises(RunError, match="every checkpoint is damaged"):
        load(copy, device="cpu")


def test_a_walk_goes_from_one_reconstruction_to_the_other_through_decoded_codes(finished):
    run, images = load(finished, device="cpu"), torch.from_numpy(IMAGES[:2])[:, None]
    walk = run.interpolate(images[0], IMAGES[1], steps=105)
    assert walk.shape == (105, 1, 8, 8)
    torch.testing.assert_close(walk[[0, -1]], run.reconstruct(images), rtol=0, atol=1e-5)
    path = spherical_path(*run.encode(images).mean, 105)
    with torch.no_grad():
        middle = run.first.vae.decode(path[52:53]).clamp(0, 1)
    torch.testing.assert_close(walk[52:53], middle, rtol=0, atol=1e-5)
    first = replace(run.recipe.first, objective="autoencoder")
    run.recipe = replace(run.recipe, first=first)  # codes without a posterior: a straight line
    with torch.no_grad():
        middle = run.first.vae.decode(run.encode(images).mean.mean(0, keepdim=True)).clamp(0, 1)
    straight = run.interpolate(images[0], images[1], 3)
    torch.testing.assert_close(straight[1:2], middle, rtol=0, atol=1e-5)
    for steps in (1, 1001):
        with pytest.raises(InputError, match=rf"steps must be from 2 to 1000, not {steps}"):
            run.interpolate(images[0], images[1], steps)
    with pytest.raises(InputError, match=r"images must have shape \(n, 1, 8, 8\), not"):
        run.interpolate(images[0], images[1, :, :7], 5)


def test_a_run_has_its_pictures_at_hand(finished, copy):
    run = load(copy)
    picture = run.grid(9, prior="normal", seed=1)
    expected = grid(run.sample(9, prior="normal", seed=1))
    np.testing.assert_array_equal(np.asarray(picture), expected[:, :, 0])
    assert picture.size == (3 * 66 - 2, 3 * 66 - 2)
    curves = run.plot()
    assert curves.size[0] > curves.size[1] > 100
    html = run._repr_html_()
    assert html.count("data:image/png;base64,") == 2 and "training images" in html
    (copy / "metrics.jsonl").unlink()
    (copy / "samples.png").unlink()
    assert run._repr_html_().count("<img") == 1
    with pytest.raises(InputError, match="has no log yet"):
        run.plot()


def test_damage_is_repaired_by_training_again(finished, copy, capsys):
    (checkpoint.checkpoints(copy / "checkpoints")[-1] / "manifest.json").write_text("{")
    (copy / "codes" / "tensors.safetensors").write_bytes(b"")
    tiny(copy)
    assert "damaged" in capsys.readouterr().err
    assert all(
        torch.equal(tensor, weights(copy)[name]) for name, tensor in weights(finished).items()
    )
    assert torch.equal(load(copy, device="cpu").codes.mean, load(finished, device="cpu").codes.mean)


def test_a_full_disk_loses_nothing(finished, tmp_path, monkeypatch):
    real, room = files.write_synced, iter(range(12))

    def full(path, content):
        if next(room, None) is None:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    with (
        monkeypatch.context() as patch,
        pytest.raises(RunError, match=r"No space left on device.*intact"),
    ):
        patch.setattr(checkpoint, "write_synced", full)
        tiny(tmp_path / "run")
    assert checkpoint.newest_intact_checkpoint(tmp_path / "run" / "checkpoints")[1] == []
    tiny(tmp_path / "run")
    assert all(
        torch.equal(tensor, weights(tmp_path / "run")[name])
        for name, tensor in weights(finished).items()
    )


def test_a_folder_of_other_settings_or_data_is_refused(copy, tmp_path):
    with pytest.raises(InputError, match=r"first.learning_rate: 0.01 -> 0.001"):
        tiny(copy, first=replace(TINY.first, learning_rate=1e-3))
    with pytest.raises(InputError, match="the images themselves"):
        train(255 - IMAGES, recipe=TINY, out=copy, options=QUIET)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        tiny(tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir() if path.name != ".lock"] == [
        "chapter.tex"
    ]


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    with pipeline.locked(tmp_path / "run"), pytest.raises(InputError, match="another process"):
        tiny(tmp_path / "run")


def test_wrong_images_leave_no_folder_behind(tmp_path):
    with pytest.raises(InputError, match="too few"):
        train(IMAGES[:3], recipe=TINY, out=tmp_path / "run", options=QUIET)
    assert not (tmp_path / "run").exists()


class Exploding(nn.Module):
    """A decoder that overflows after some batches."""

    def __init__(self, decoder: nn.Module, after: int) -> None:
        super().__init__()
        self.decoder, self.left = decoder, after

    def forward(self, latents):
        self.left -= self.training
        return self.decoder(latents) * (1 if self.left >= 0 else torch.inf)


def test_a_loss_that_is_not_finite_stops_before_weights_change(tmp_path):
    encoder, decoder = poise.networks.mlp((1, 8, 8), 3, hidden=(16,))
    vae = VAE(encoder, Exploding(decoder, after=5))
    with pytest.raises(
        RunError,
        match=r"step 5 of stage 1 \((reconstruction|mse)=.*batch images \d+.*--learning-rate 0\.001 or another --network\)",
    ):
        train(IMAGES, recipe=TINY, vae=vae, out=tmp_path / "run", options=QUIET)
    saved, _ = checkpoint.newest_intact_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None and saved.meta["step"] == 5
    held = {
        name: tensor for name, tensor in saved.tensors.items() if name.startswith("stage1.vae.")
    }
    assert all(
        torch.equal(tensor, vae.state_dict()[name.removeprefix("stage1.vae.")])
        for name, tensor in held.items()
    )


def test_a_failure_read_steps_later_names_its_step_and_leaves_the_weights_of_then(
    tmp_path, monkeypatch
):
    def failing(out):
        vae = VAE(*poise.networks.mlp((1, 8, 8), 3, hidden=(16,)))
        vae.decoder = Exploding(vae.decoder, after=5)
        with pytest.raises(RunError) as caught:
            train(
                IMAGES,
                recipe=replace(TINY, first=Stage(steps=401, batch_size=20)),
                vae=vae,
                out=out,
                options=QUIET,
            )
        return str(caught.value), vae.state_dict()

    torch.manual_seed(1)
    (message, expected), _ = failing(tmp_path / "at-once"), torch.manual_seed(1)
    monkeypatch.setitem(training.loop.STEPS_BETWEEN_READS, "cpu", 7)
    monkeypatch.setattr(training.loop, "LOGS_PER_STAGE", 1)
    later, weights = failing(tmp_path / "later")
    assert later == message and "step 5 of stage 1" in later
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert checkpoint.checkpoints(tmp_path / "later" / "checkpoints") == []


def test_dropout_and_tied_weights_survive_a_kill(tmp_path, monkeypatch):
    def network():
        torch.manual_seed(0)
        encoder, decoder = poise.networks.mlp((1, 8, 8), 3, hidden=(16,))
        decoder.layers[0].weight = nn.Parameter(encoder.mean.weight.detach().T.clone())
        decoder.tied = decoder.layers[0].weight
        return VAE(nn.Sequential(nn.Dropout(0.2), encoder), decoder)

    train(IMAGES, recipe=TINY, vae=network(), out=tmp_path / "whole", options=QUIET)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 5)
        train(IMAGES, recipe=TINY, vae=network(), out=tmp_path / "killed", options=QUIET)
    train(IMAGES, recipe=TINY, vae=network(), out=tmp_path / "killed", options=QUIET)
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_memory_that_runs_out_is_said_with_the_remedy(tmp_path, monkeypatch):
    def greedy(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(RunError, match="--batch-size"):
        patch.setattr(training.engines, "training_step", greedy)
        tiny(tmp_path / "run")
    # The folder holds no checkpoint to protect.
    tiny(tmp_path / "run", first=replace(TINY.first, batch_size=10))


def test_a_gradient_that_is_not_finite_stops_before_weights_change(tmp_path):
    class Steep(nn.Module):
        """The identity, with a gradient that overflows."""

        def forward(self, latents):
            tiny = (latents * 0).square()
            return latents + 1e-30 * tiny.sqrt()

    encoder, decoder = poise.networks.mlp((1, 8, 8), 3, hidden=(16,))
    vae = VAE(encoder, nn.Sequential(Steep(), decoder))
    with pytest.raises(
        RunError, match=r"gradient is not finite at step 0 of stage 1 \(gradient=nan"
    ):
        train(IMAGES, recipe=TINY, vae=vae, out=tmp_path / "run", options=QUIET)
    assert all(parameter.isfinite().all() for parameter in vae.parameters())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"network": "mlp"}, r"the network is your own \(vae=\): leave out network"),
        ({"latent_dim": 3, "latent_channels": 2}, "leave out latent_dim, latent_channels"),
        ({"second_balance": "computed:power=1"}, "stage 2 has a squared error"),
        ({"second_balance": "computed:groups=2"}, "training logs one gamma2"),
        ({"balance": "computed:groups=1,per=channel"}, "training logs one gamma2"),
        ({"balance": "fixed:beta=-1"}, "beta must be a finite number >= 0, not -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_training(changes, message, tmp_path):
    vae = VAE(*poise.networks.mlp((1, 8, 8), 5, hidden=(7,)))
    with pytest.raises(InputError, match=message):
        train(IMAGES, recipe=TINY, vae=vae, out=tmp_path / "run", options=QUIET, **changes)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_dataset_of_a_name_has_its_own_recipe(tmp_path):
    assert pipeline.resolve(poise.data.load("digits"), None, None).name == "digits"
    assert pipeline.resolve(poise.data.load(IMAGES), None, None).name == "images"
    with pytest.raises(InputError, match="a Dataset has labels of its own"):
        train(poise.data.load(IMAGES), labels=[0] * len(IMAGES), out=tmp_path / "run")


def test_the_log_names_the_absolute_error_however_it_is_chosen(tmp_path):
    one = replace(TINY, second=None)
    for name, stage in {
        "balance": replace(one.first, balance="computed:power=1"),
        "error": replace(one.first, error="absolute"),
        "power": replace(one.first, balance="computed:power=1.5"),
    }.items():
        run = train(IMAGES, recipe=replace(one, first=stage), out=tmp_path / name, options=QUIET)
        key = "error" if name == "power" else "mae"
        named = set(read_log(run.folder / "metrics.jsonl")[0])
        assert key in named and "mse" not in named


def test_any_pair_of_modules_can_be_trained_and_loaded(tmp_path):
    def network():
        return VAE(*poise.networks.mlp((1, 8, 8), 5, hidden=(7,)))

    trained = train(IMAGES, recipe=TINY, vae=network(), out=tmp_path / "run", options=QUIET)
    with pytest.raises(InputError, match="vae="):
        load(tmp_path / "run")
    loaded = load(tmp_path / "run", vae=network(), device="cpu")
    assert torch.equal(loaded.sample(4), trained.sample(4))
    assert loaded.recipe.network.latent_dim == 5


def test_averaged_weights_are_used_and_survive_a_kill(tmp_path, monkeypatch):
    stage = replace(TINY.first, ema_decay=0.5, precision="bfloat16")
    run = tiny(tmp_path / "whole", first=stage)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 9)
        tiny(tmp_path / "killed", first=stage)
    tiny(tmp_path / "killed", first=stage)
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    name = "decoder.layers.0.weight"
    assert torch.equal(run.first.vae.state_dict()[name], whole[f"stage1.average.{name}"])
    assert not torch.equal(whole[f"stage1.average.{name}"], whole[f"stage1.vae.{name}"])


@pytest.mark.parametrize("standardise", ["after", "during"])
def test_standard_latents_change_no_reconstruction_and_survive_a_kill(
    standardise, tmp_path, monkeypatch
):
    stage = replace(TINY.first, standardise=standardise, standardise_every=2, ema_decay=0.5)
    run = tiny(tmp_path / "whole", first=stage)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 17)
        tiny(tmp_path / "killed", first=stage)
    tiny(tmp_path / "killed", first=stage)
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    law = variance_law(run.codes.mean, run.codes.logvar)
    torch.testing.assert_close(law, torch.ones_like(law), atol=1e-4, rtol=0)
    loaded = load(tmp_path / "killed", device="cpu")
    torch.testing.assert_close(loaded.encode(IMAGES[:5]).mean, run.encode(IMAGES[:5]).mean)
    if standardise == "after":
        plain = tiny(tmp_path / "plain", first=replace(stage, standardise="never"))
        torch.testing.assert_close(
            run.reconstruct(IMAGES[:5]), plain.reconstruct(IMAGES[:5]), atol=1e-5, rtol=0
        )
        assert run.codes.kl().mean() < plain.codes.kl().mean()


def test_standard_latents_need_a_posterior(tmp_path):
    stage = replace(TINY.first, standardise="after", objective="autoencoder")
    with pytest.raises(InputError, match="standardise=after is for the objective vae"):
        tiny(tmp_path / "run", first=stage)


def test_the_average_of_weights_follows_its_formula():
    average, current = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = 0.9 * average.weight.detach() + 0.1 * current.weight.detach()
    training.step.update_averaged_weights(average, current, 0.1)
    torch.testing.assert_close(average.weight.detach(), expected)


def test_data_of_0_and_1_are_trained_without_a_warning(tmp_path):
    """Advice to pass a cross-entropy is for loops of one's own."""
    images = IMAGES // 128 * 255
    train(images, recipe=replace(TINY, second=None), out=tmp_path / "run", options=QUIET)


def test_one_stage_is_enough(tmp_path):
    run = tiny(tmp_path / "run", second=None)
    assert run.finished and run.second is None
    assert run.sample(3).shape == run.sample(3, prior="mixture").shape == (3, 1, 8, 8)
    with pytest.raises(InputError, match="no trained second VAE"):
        run.sample(3, prior="second-stage")


def test_codes_are_drawn_afresh_at_every_visit():
    data = training.CodeBatches(torch.zeros(4, 2), torch.zeros(4, 2), torch.device("cpu"))
    first, second = (
        data.place(data.fetch(torch.arange(4)), lambda columns: torch.randn(4, columns))
        for _ in range(2)
    )
    assert not torch.equal(first, second)


def batches_seen(images, wanted) -> list[torch.Tensor]:
    data = training.ImageBatches(images, torch.device("cpu"))
    with training.batches.fetched_ahead(data, iter(wanted), slice(1, 4)) as fetched:
        return [data.place(one, lambda columns: torch.zeros(3, columns)) for one in fetched]


def test_images_read_ahead_or_resident_are_those_read_in_time(tmp_path, monkeypatch):
    np.save(tmp_path / "images.npy", IMAGES[:, None])
    wanted = [torch.randperm(90)[:5] for _ in range(7)]
    expected = [torch.from_numpy(IMAGES[:, None])[indices[1:4]] / 255 for indices in wanted]
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    for images in (IMAGES[:, None], mapped, datasets.storage.Rows(mapped, np.arange(90))):
        seen = batches_seen(images, wanted)
        assert len(seen) == 7 and all(
            torch.equal(one, other) for one, other in zip(seen, expected, strict=True)
        )
        with monkeypatch.context() as patch:
            patch.setattr(training.batches, "fits", lambda images, device: True)
            assert all(
                torch.equal(one, other)
                for one, other in zip(batches_seen(images, wanted), expected, strict=True)
            )


def test_the_thread_that_reads_ahead_ends_with_the_loop(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES[:, None])
    mapped, before = np.load(tmp_path / "images.npy", mmap_mode="r"), threading.active_count()
    with pytest.raises(IndexError):
        batches_seen(mapped, [torch.arange(5), torch.arange(88, 93), torch.arange(5)])
    with (
        pytest.raises(Killed),
        training.batches.fetched_ahead(
            training.ImageBatches(mapped, torch.device("cpu")),
            iter([torch.arange(5)] * 9),
            slice(5),
        ) as fetched,
    ):
        next(fetched)
        # Wait until the prefetch, which has its own threads, is done.
        for _ in range(500):
            if threading.active_count() == before + 1:
                break
            time.sleep(0.01)
        assert threading.active_count() == before + 1
        raise Killed
    assert threading.active_count() == before


def test_an_unknown_setting_in_a_config_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["recipe"]["first"]["momentum"] = 0.9
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"unknown keys.*momentum"):
        load(copy)


def test_a_folder_of_other_files_is_refused_before_images_are_decoded_into_it(
    tmp_path, monkeypatch
):
    (tmp_path / "letter.txt").touch()
    monkeypatch.setattr(pipeline, "read_data", Mock(side_effect=AssertionError("decoded")))
    with pytest.raises(InputError, match="is not empty and is not a run's folder"):
        train("digits", recipe=TINY, out=tmp_path, options=QUIET)
    assert {path.name for path in tmp_path.iterdir()} == {"letter.txt", ".lock"}


def test_a_folder_with_a_config_of_another_program_is_refused(tmp_path):
    others = {"config.json": '{"model_type": "x"}', "summary.json": "{}", "metrics.jsonl": "{}"}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="is not empty and is not a run's folder"):
        train(IMAGES, recipe=TINY, out=tmp_path, options=QUIET)
    assert {name: (tmp_path / name).read_text() for name in others} == others


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation": Generation(guidance=2.0)}, "guidance 2 needs a flow that is trained with"),
        ({"second": replace(TINY.second, error="absolute")}, "give it no error 'absolute'"),
    ],
)
def test_settings_that_stage_2_cannot_use_are_refused_before_stage_1(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        tiny(tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_latent_map_with_another_number_of_latents_is_refused_before_stage_1(tmp_path):
    vae = poise.VAE(*poise.networks.mlp((1, 8, 8), 3, hidden=(8,)))
    vae.decoder.latent_shape = (4, 2, 2)
    recipe = Changes(second="flow").apply(TINY)
    with pytest.raises(InputError, match=r"latent_shape \(4, 2, 2\) has 16 values, .* 3 latents"):
        train(IMAGES, recipe=recipe, vae=vae, out=tmp_path / "run", options=QUIET)


def test_the_released_weight_of_the_kl_is_that_of_stage_1_only():
    recipe = Changes(second_balance="released", balance="released").apply(RECIPES["celeba64"])
    first, second = (pipeline.stage_balance(stage, recipe, [3, 64, 64]) for stage in recipe.stages)
    assert (first.kl_weight, second.kl_weight) == (4, 1) and second.monotone


def test_numbers_of_numpy_are_those_of_python_in_the_files_of_a_run(tmp_path, unchecked):
    run = tiny(tmp_path / "run", seed=np.int64(1))
    assert run.recipe.seed == 1 and type(run.recipe.seed) is int
    more = train(IMAGES, out=tmp_path / "run", more_epochs=np.int64(1), options=QUIET)
    assert more.recipe.first.epochs == 5


def test_a_path_is_never_the_name_of_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingInputError, match="mnist"):
        train(Path("mnist"), out="run", options=QUIET)
    Path("digits").mkdir()
    for number, image in enumerate(IMAGES[:30]):
        Image.fromarray(image).save(f"digits/{number:02}.png")
    how = {"recipe": TINY, "epochs": 1, "second": None, "options": QUIET}
    run = train(Path("digits"), out="run", **how)
    assert run.recipe.data.source == str(Path("digits").resolve())
    assert run.data["train"] + run.data["test"] == 30


def test_a_run_inside_the_folder_that_it_is_trained_on_is_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, image in enumerate(IMAGES[:30]):
        Image.fromarray(image).save(f"{number:02}.png")
    how = {"recipe": replace(TINY, second=None), "out": "runs/x", "options": QUIET}
    with pytest.raises(RunError, match="same command to go on"):
        train(".", **how, callbacks=[StopsAfter(3)])
    assert (tmp_path / "runs" / "x" / "progress.png").exists()
    run = train(".", **how)
    assert load("runs/x").dataset().checksum == run.data["checksum"]
    assert "ignored: runs/x, which is the folder of a run" in datasets.load(".").notes


def test_an_evaluation_of_earlier_weights_goes_when_training_ends(tmp_path):
    with pytest.raises(RunError, match="same command to go on"):
        train(IMAGES, recipe=TINY, out=tmp_path, options=QUIET, callbacks=[StopsAfter(2)])
    (tmp_path / "evaluation.json").write_text("{}")
    tiny(tmp_path)
    assert not (tmp_path / "evaluation.json").exists() and (tmp_path / "summary.json").exists()


def test_an_array_that_was_compressed_is_not_looked_for_on_disk(tmp_path):
    recipe = replace(TINY, data=replace(TINY.data, jpeg_quality=75))
    run = train(IMAGES, recipe=recipe, out=tmp_path, options=QUIET)
    with pytest.raises(InputError, match="was trained on an array, which is not stored"):
        run.evaluate(extractor="none")


def test_figures_of_a_model_say_which_images_they_are_of(copy):
    run = load(copy)
    found = [
        run.evaluate(images, extractor="none").measurements for images in (IMAGES, 255 - IMAGES)
    ]
    first, second = ({m.metric: m.data for m in measured} for measured in found)
    assert {"MSE", "KL", "ELBO"} <= first.keys() and all(map(len, first.values()))
    assert not set(first.values()) & set(second.values())


class StopsAfter(poise.Callback):
    """Stop training with an error after some entries of the log."""

    def __init__(self, entries: int) -> None:
        self.left = entries

    def on_log(self, entry):
        self.left -= 1
        if self.left < 0:
            raise ValueError("stop")


@pytest.mark.parametrize("recipe", ["digits", TINY])
def test_a_run_on_a_loaded_data_set_reads_it_again(recipe, tmp_path, monkeypatch):
    """Former defect: its config named the recipe's data, or no data that exist."""
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for number, image in enumerate(IMAGES[:30]):
        Image.fromarray(image).save(f"pictures/{number:02}.png")
    how = {"recipe": recipe, "epochs": 1, "second_epochs": 1, "options": QUIET}
    train(datasets.load("pictures"), out="run", **how)
    monkeypatch.chdir(tmp_path.parent)
    again = load(tmp_path / "run")
    assert again.recipe.data.source == str((tmp_path / "pictures").resolve())
    assert again.dataset().checksum == again.data["checksum"]
    named = train(datasets.load("digits"), out=tmp_path / "named", **how)
    assert named.recipe.data.source == "digits"


def test_a_network_whose_latents_are_no_vectors_is_refused_in_one_line(tmp_path):
    layers = nn.Conv2d(1, 4, 4, stride=4), nn.Conv2d(1, 4, 4, stride=4)

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.logvar = layers

        def forward(self, images):
            return self.mean(images), self.logvar(images)

    vae = poise.VAE(Maps(), nn.ConvTranspose2d(4, 1, 4, stride=4))
    with pytest.raises(InputError, match=r"of shape \(n, latents\), not \(1, 4, 2, 2\): flatten"):
        train(IMAGES, recipe=TINY, vae=vae, out=tmp_path, options=QUIET)


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(MissingInputError, match="no such folder"):
        load(tmp_path / "nothing")
    with pytest.raises(InputError, match="not a run's folder"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"name": "another program"}')
    with pytest.raises(InputError, match="not a run's"):
        load(tmp_path)


def test_reconstructions_do_not_depend_on_their_neighbours(copy):
    config = json.loads((copy / "config.json").read_text())
    config["recipe"]["generation"] |= {"adjust_reconstructions": True, "reconstruct_from": "sample"}
    (copy / "config.json").write_text(json.dumps(config))
    run, images = load(copy, device="cpu"), torch.from_numpy(IMAGES[:, None])
    torch.testing.assert_close(run.reconstruct(images)[:2], run.reconstruct(images[:2]))
    figures = run.evaluate(images, extractor="none").pages["reconstruction"]
    error = (run.reconstruct(images) - images / 255).square().mean()
    assert figures["mse_as_shown"] == pytest.approx(float(error), rel=1e-4) != figures["mse"]


@pytest.mark.parametrize(
    "wrong", [255.0 * torch.rand(3, 1, 8, 8), torch.ones(3, 1, 8, 8).long(), torch.rand(3, 1, 9, 9)]
)
def test_images_of_the_wrong_kind_are_refused(wrong, finished, unchecked):
    with pytest.raises(InputError, match="images must"):
        load(finished, device="cpu").encode(wrong)


def test_released_generation_switches_run(finished):
    run = load(finished, device="cpu")
    released = Generation(False, "always", "released", adjust_variance=True)
    adjusted = run.sample(6, generation=released)
    assert not torch.equal(adjusted, run.sample(6))
    assert torch.equal(adjusted[:2], run.sample(2, generation=released)), (
        "image i depends on how many are drawn"
    )


def test_evaluation_covers_both_stages(finished):
    run = load(finished, device="cpu")
    evaluation = run.evaluate(IMAGES[:20, None], extractor="none", nll_samples=30)
    pages = evaluation.pages
    assert pages["reconstruction"]["kl_nats"] > 0 and pages["latents"]["latent_dim"] == 3
    assert {"mse_sampled", "variance_lost", "gamma2", "active_units", "aggregate"} <= pages[
        "second_stage"
    ].keys()
    assert evaluation.value("MSE", "REC") == pages["reconstruction"]["mse"]
    assert evaluation.value("NLL (30 samples)", "model") < -evaluation.value("ELBO", "model")
    assert all(m.protocol.real == 20 for m in evaluation.measurements)
    assert any("standard error above 0.05 nats" in note for note in evaluation.notes)
    enough = run.evaluate(IMAGES[:20, None], extractor="none", nll_samples=1000)
    assert not any("standard error" in note for note in enough.notes)
    with pytest.raises(InputError, match="pass the images"):
        run.evaluate()


def test_test_images_are_compared_with_each_kind_of_image(finished):
    run, test, pixels = (
        load(finished, device="cpu"),
        torch.from_numpy(IMAGES[:40, None]),
        make_extractor("pixels"),
    )
    evaluation = run.evaluate(test, extractor="pixels", seed=3)
    produced = {
        "REC": run.reconstruct(test.float() / 255),
        "GEN-1": run.sample(40, prior="normal", seed=3),
    }
    produced |= {
        "GEN-2": run.sample(40, prior="second-stage", seed=3),
        "GEN-mixture": run.sample(40, prior="mixture", seed=3),
    }
    for label, images in produced.items():
        expected = frechet_distance(pixels(test), pixels(to_bytes(images)))
        assert evaluation.value("FD-pixels", label) == pytest.approx(expected, rel=1e-9)
    seeds = {m.of: m.seed for m in evaluation.measurements if m.metric == "FD-pixels"}
    assert seeds["GEN-2"] == 3 and seeds["REC"] == run.recipe.seed


def test_a_protocol_says_how_images_are_made_and_how_many(finished):
    run, test, pixels = (
        load(finished, device="cpu"),
        torch.from_numpy(IMAGES[:40, None]),
        make_extractor("pixels"),
    )
    sampled = Generation(reconstruct_from="sample", second_stage_noise=False)
    protocol = Protocol("mine", real=30, generated=25, generation=sampled)
    evaluation = run.evaluate(test, protocol=protocol, extractor="pixels")
    real = test[torch.arange(30) * 40 // 30]  # evenly spaced
    some = real[torch.arange(25) * 30 // 25]
    restored, drawn = (
        run.reconstruct(some, generation=sampled),
        run.sample(25, generation=sampled),
    )
    for label, images in {"REC": restored, "GEN-2": drawn}.items():
        expected = frechet_distance(pixels(real), pixels(to_bytes(images)))
        assert evaluation.value("FD-pixels", label) == pytest.approx(expected, rel=1e-9)
    assert not torch.equal(restored, run.reconstruct(some))


@pytest.mark.parametrize(
    "trained_on, wanted", [(None, None), (None, 40), (40, None), (40, 40), (40, 60)]
)
def test_images_are_as_the_protocol_says_whatever_the_run_was_trained_on(
    trained_on, wanted, tmp_path, monkeypatch
):
    np.save(tmp_path / "images.npy", IMAGES)
    recipe = replace(
        TINY, data=Data(str(tmp_path / "images.npy"), jpeg_quality=trained_on), second=None
    )
    run = train(tmp_path / "images.npy", recipe=recipe, out=tmp_path / "run", options=QUIET)
    raw = torch.from_numpy(datasets.load(tmp_path / "images.npy").test[:])
    expected = raw if wanted is None else jpeg_round_trip(raw, wanted)
    protocol = replace(PROTOCOLS["default"], jpeg=wanted)
    evaluation = run.evaluate(protocol=protocol, extractor="pixels")
    pixels, restored = make_extractor("pixels"), run.reconstruct(expected)
    assert evaluation.distance("REC") == pytest.approx(
        frechet_distance(pixels(expected), pixels(to_bytes(restored))), rel=1e-9
    )
    error = (restored - expected / 255).double().square().mean()
    assert evaluation.value("MSE", "REC") == pytest.approx(float(error), rel=1e-5)
    assert {m.protocol.jpeg for m in evaluation.measurements} == {wanted}
    given = run.evaluate(raw, protocol=protocol, extractor="pixels")
    assert given.distance("REC") == evaluation.distance("REC")
    assert {m.protocol.reference for m in given.measurements} == {"given"}


def test_errors_are_of_the_images_that_the_protocol_describes(finished):
    run, test = load(finished, device="cpu"), torch.from_numpy(IMAGES[:40, None])
    for name in ("default", "released-celeba"):
        evaluation, generation = (
            run.evaluate(test, protocol=name, extractor="none"),
            PROTOCOLS[name].generation,
        )
        restored = run.reconstruct(test, generation=generation)
        error = float((restored - test / 255).double().square().mean())
        assert evaluation.value("MSE", "REC") == pytest.approx(error, rel=1e-5)
        assert evaluation.value("SSIM", "REC") == pytest.approx(
            float(structural_similarity(test / 255, restored).mean()), rel=1e-5
        )
    same = {
        m.protocol.hash
        for e in (
            run.evaluate(test, protocol=n, extractor="none") for n in ("default", "released-celeba")
        )
        for m in e.measurements
        if m.metric == "ELBO"
    }
    assert len(same) == 1, "the settings of generation do not change the ELBO"


def test_what_the_recipe_says_of_generation_is_in_the_hash(finished, copy):
    config = json.loads((copy / "config.json").read_text())
    config["recipe"]["generation"] |= {"second_stage_noise": False}
    (copy / "config.json").write_text(json.dumps(config))
    plain, other = (
        load(folder, device="cpu").evaluate(IMAGES[:40, None], extractor="pixels")
        for folder in (finished, copy)
    )
    assert plain.distance("GEN-2") != other.distance("GEN-2")
    assert plain.measurements[-1].protocol.hash != other.measurements[-1].protocol.hash


def test_figures_of_the_model_are_of_as_many_images_as_the_protocol_says(finished):
    run, protocol = load(finished, device="cpu"), replace(PROTOCOLS["default"], real=30)
    part, whole = (
        run.evaluate(images, protocol=protocol, extractor="none")
        for images in (IMAGES[np.arange(30) * 50 // 30, None], IMAGES[:50, None])
    )
    assert [m.value for m in part.measurements] == [m.value for m in whole.measurements]


def test_arrays_are_evaluated_as_they_are_trained_on(finished):
    run = load(finished, device="cpu")
    flat, hwc, chw = (
        run.evaluate(x, extractor="none")
        for x in (IMAGES[:20], IMAGES[:20, ..., None], IMAGES[:20, None])
    )
    assert flat.measurements == hwc.measurements == chw.measurements


def test_an_unfinished_run_is_evaluated_without_what_needs_its_codes(tmp_path, monkeypatch):
    die_at(monkeypatch, 7)
    with pytest.raises(Killed):
        tiny(tmp_path / "run")
    monkeypatch.undo()
    evaluation = load(tmp_path / "run", device="cpu").evaluate(
        IMAGES[:40, None], extractor="pixels"
    )
    assert {m.of for m in evaluation.measurements} == {"REC", "GEN-1", "model"}
    assert any("not finished" in note for note in evaluation.notes)


def test_mapped_images_are_not_read_whole(finished, tmp_path):
    np.save(tmp_path / "many.npy", IMAGES[:, None])
    rows = datasets.Rows(np.load(tmp_path / "many.npy", mmap_mode="r"), np.arange(40))
    run = load(finished, device="cpu")
    assert (
        run.evaluate(rows, extractor="none").measurements
        == run.evaluate(IMAGES[:40, None], extractor="none").measurements
    )
    assert datasets.checked_images(rows, run.data["shape"]) is rows


def test_the_training_images_are_the_reference_where_the_protocol_says_so(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    run = train(
        tmp_path / "images.npy",
        recipe=replace(TINY, second=None),
        out=tmp_path / "run",
        options=QUIET,
    )
    found = {name: run.evaluate(protocol=name, extractor="pixels") for name in PROTOCOLS}
    counts = {name: evaluation.measurements[-1].protocol for name, evaluation in found.items()}
    pages = [found[name].pages["reconstruction"] for name in ("50k-train", "default")]
    assert pages[0] == pages[1] and pages[0]["images"] == 9, (
        "the model's figures are of test images"
    )
    assert (counts["50k-train"].real, counts["default"].real, counts["50k-train"].generated) == (
        81,
        9,
        81,
    )


def test_tensorboard_reads_every_figure_and_the_samples_of_each_tenth(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe, options = replace(TINY, second=None), replace(QUIET, tensorboard=True)
    run = train(IMAGES, recipe=recipe, out=tmp_path / "run", options=options)
    (file,) = (run.folder / "tensorboard" / "stage1").iterdir()
    board = events.EventAccumulator(str(file)).Reload()
    logged = [value.value for value in board.Scalars("loss")]
    np.testing.assert_allclose(logged, run.history["loss"], rtol=1e-6)
    assert board.Images("samples")[-1].step == recipe.first.total_steps(len(IMAGES))


def test_the_folder_of_a_run_is_no_folder_of_images(finished, tmp_path):
    with pytest.raises(InputError, match=r"is a run, not a folder of images: poise train --out"):
        train(finished, size=8, recipe=TINY, out=tmp_path / "new", options=QUIET)
    assert not (tmp_path / "new" / "config.json").exists()
