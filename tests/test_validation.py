"""Test held-out images: the split, both ELBOs, best weights, early stopping, and overfitting."""

import json
import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import poise
from poise import data as datasets
from poise.data import hold_out
from poise.data.storage import Rows
from poise.diagnosis import subject
from poise.errors import InputError
from poise.metrics import reconstruction
from poise.recipes import Data, Stage
from poise.runs import checkpoint, plots, validation
from poise.runs.log import HELD_OUT, TRAINING, read_log
from poise.runs.pipeline import train
from poise.runs.run import load
from poise.runs.validation import affordable_images
from test_pipeline import IMAGES, QUIET, TINY, Killed, die_at, weights

FEW = IMAGES[:30]  # noise, which can only be learned by heart
# Of 27 training images 9 are held out. The other 18 are two steps.
OVERFITTING = replace(
    TINY,
    data=Data("array", validation=1 / 3),
    network=replace(TINY.network, latent_dim=16, hidden=(128,)),
    first=Stage(epochs=60, batch_size=9, learning_rate=1e-2),
    second=None,
)


def summary(run: poise.Run) -> dict:
    return json.loads((run.folder / "summary.json").read_text())


def held_out_elbo(run: poise.Run, images) -> float | None:
    return reconstruction(run.first.vae, run.first.balance, images, seed=0).elbo_nats


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> poise.Run:
    """Return a run that learns its few images by heart, with images held out."""
    out = tmp_path_factory.mktemp("validated") / "run"
    return train(FEW, recipe=OVERFITTING, out=out, options=replace(QUIET, save_seconds=60))


def test_held_back_images_are_not_trained_on_and_do_not_depend_on_the_order():
    doubled = np.concatenate([IMAGES, IMAGES[:30]])
    sides = []
    for images in (doubled, doubled[::-1]):
        whole = datasets.load(images)
        split = hold_out(whole, 0.2)
        assert split.validation is not None and split.test is whole.test
        sides.append(
            [{image.tobytes() for image in side} for side in (split.train, split.validation)]
        )
        assert len(split.train) + len(split.validation) == len(whole.train)
        assert len(split.validation) in (round(0.2 * len(whole.train)) - d for d in (0, 1))
        assert not sides[-1][0] & sides[-1][1]  # copies stay together
        assert split.checksum != whole.checksum
    assert sides[0] == sides[1]


def test_rows_of_a_mapped_file_are_held_back_without_reading_it_whole(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES[:, None])
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    plain = datasets.Dataset("x", IMAGES[5:, None], IMAGES[:5, None], "x")
    rows = replace(plain, train=Rows(mapped, np.arange(5, len(IMAGES))))
    mapped_split, plain_split = hold_out(rows, 0.1), hold_out(plain, 0.1)
    for side in ("train", "validation"):
        mine, theirs = getattr(mapped_split, side), getattr(plain_split, side)
        assert isinstance(mine, Rows) and np.array_equal(mine[:], np.asarray(theirs))


def test_labels_stay_with_their_images_and_a_class_must_keep_one():
    classes = IMAGES[:, 0, 0].astype(int) % 3
    whole = datasets.load(IMAGES, labels=classes)
    split = hold_out(whole, 0.2)
    assert split.labels is not None and len(split.labels.train) == len(split.train)
    for image, label in zip(split.train, split.labels.train, strict=True):
        assert split.labels.classes[label] == str(image[0, 0, 0] % 3)
    assert split.labels.checksum != whole.labels.checksum
    rare = np.zeros(len(whole.train), int)
    rare[datasets.dataset.first_by_content(whole.train, 5)[1][0]] = 1
    labelled = replace(whole, labels=datasets.labels.Labels(("a", "b"), rare, rare[:0]))
    with pytest.raises(InputError, match="all training images of class b were held out"):
        hold_out(labelled, 5 / len(whole.train))


def test_both_elbos_are_those_of_the_metrics_and_the_best_weights_are_kept(run):
    data, told = run.dataset(), summary(run)["validation"]
    assert data.validation is not None and len(data.validation) == 9 and run.data["validation"] == 9
    assert len(run.codes.mean) == len(data.train) == run.data["train"] == 18
    log = run.history.dropna(subset="held_out_elbo_nats")
    assert list(log["step"]) == list(range(8, 121, 8))
    best = log.loc[log["held_out_elbo_nats"].idxmax()]
    assert told["best_step"] == best["step"] < told["last_step"] == 120
    assert held_out_elbo(run, data.validation) == pytest.approx(
        best["held_out_elbo_nats"], rel=1e-6
    )
    assert told["images"] == 9 and told["held_out_elbo_nats"] == best["held_out_elbo_nats"]

    last = checkpoint.read_folder(run.folder / "last").tensors
    network, balance = run.first.vae, run.first.balance
    kept = network.state_dict(), balance.state_dict()
    kept = [{name: tensor.clone() for name, tensor in part.items()} for part in kept]
    for module, prefix in ((network, "vae."), (balance, "balance.")):
        module.load_state_dict(
            {n[len(prefix) :]: t for n, t in last.items() if n.startswith(prefix)}
        )
    now = held_out_elbo(run, data.validation)
    network.load_state_dict(kept[0])
    balance.load_state_dict(kept[1])
    assert now == pytest.approx(log["held_out_elbo_nats"].iloc[-1], rel=1e-6)


def test_learning_by_heart_is_said(run):
    told, notes = summary(run)["validation"], summary(run)["notes"]
    assert told["overfitting"] and told["last_train_elbo_nats"] > told["train_elbo_nats"]
    assert told["last_held_out_elbo_nats"] < told["held_out_elbo_nats"]
    (note,) = (text for text in notes if "overfitting: from step" in text)
    assert f"the weights of step {told['best_step']} are kept" in note


def test_the_diagnosis_looks_at_the_course_of_the_kept_weights(run):
    course = subject._courses(run)[1]
    kept = summary(run)["validation"]["best_step"]
    assert course[-1][0] <= kept < run.history["step"].max()


def test_evaluations_change_no_bit(run, tmp_path):
    data = run.dataset()
    plain = replace(OVERFITTING, data=Data("array"))
    alone = replace(data, validation=None)
    other = train(
        alone, recipe=plain, out=tmp_path / "run", options=replace(QUIET, save_seconds=60)
    )
    last = checkpoint.read_folder(run.folder / "last").tensors
    mine = checkpoint.read_folder(other.folder / "last").tensors
    assert mine.keys() < last.keys()
    assert all(torch.equal(last[name], tensor) for name, tensor in mine.items())


def test_the_held_out_images_that_are_measured_are_of_all_classes():
    """Former defect: of sorted files, the first ones were measured, all of one class."""
    noise = np.random.default_rng(0).integers(0, 16, (1_000, 8, 8))
    classes = np.repeat(np.arange(10), 100).reshape(-1, 1, 1)
    dataset = hold_out(datasets.load((16 * classes + noise).astype(np.uint8)), 0.5)
    held_out = validation.Validation(dataset, Stage(steps=5, batch_size=8), 0, {})._held_out
    assert dataset.validation is not None and len(held_out) < len(dataset.validation) / 2
    assert len(np.unique(held_out[:, 0, 0, 0] // 16)) == 10


def test_best_weights_and_patience_survive_a_kill(tmp_path, monkeypatch):
    recipe = replace(OVERFITTING, first=replace(OVERFITTING.first, epochs=30, patience=1))
    folders = []
    for name in ("whole", "cut"):
        folders.append(tmp_path / name)
        if name == "cut":
            with monkeypatch.context() as patch, pytest.raises(Killed):
                die_at(patch, 20)
                train(FEW, recipe=recipe, out=folders[-1], options=QUIET)
        train(FEW, recipe=recipe, out=folders[-1], options=replace(QUIET, save_seconds=60))
    whole, cut = map(weights, folders)
    assert whole.keys() == cut.keys() and all(torch.equal(whole[n], cut[n]) for n in whole)
    told = summary(load(folders[1]))["validation"]
    assert told == summary(load(folders[0]))["validation"]
    assert told["last_step"] <= min(told["best_step"] + 8, told["steps"])


def test_training_stops_when_patience_is_over(tmp_path, monkeypatch):
    falling = iter(range(100, 0, -1))

    def elbos(mine, state):
        level = torch.full((5,), float(next(falling)), dtype=torch.float64)
        return level, -level

    monkeypatch.setattr(validation.Validation, "_elbos", elbos)
    recipe = replace(TINY, data=Data("array", validation=0.2), second=None)
    recipe = replace(recipe, first=Stage(steps=80, batch_size=20, patience=2))
    run = train(
        IMAGES, recipe=recipe, out=tmp_path / "run", options=replace(QUIET, save_seconds=60)
    )
    told = summary(run)["validation"]
    assert (told["best_step"], told["last_step"], told["steps"]) == (8, 24, 80) and run.finished


def test_a_training_elbo_that_is_not_finite_damages_no_checkpoint(tmp_path, monkeypatch):
    levels = iter([1.0, 3.0, 2.0, *[0.0] * 200])

    def elbos(mine, state):
        level = torch.full((5,), next(levels), dtype=torch.float64)
        return level, torch.full((5,), -math.inf if level[0] in (3, 0) else 0.0).double()

    monkeypatch.setattr(validation.Validation, "_elbos", elbos)
    recipe = replace(TINY, data=Data("array", validation=0.2))
    recipe = replace(recipe, first=Stage(steps=40, batch_size=20))
    run = train(IMAGES, recipe=recipe, out=tmp_path / "run", options=QUIET)
    told = summary(load(run.folder))["validation"]
    assert run.finished and told["held_out_elbo_nats"] == 2.0


@pytest.mark.parametrize("steps, batch", [(30_000, 64), (400, 20), (6_100, 16), (1_000_000, 100)])
def test_evaluations_take_at_most_their_share_of_the_time(steps, batch):
    every = validation.LOGS_BETWEEN * poise.training.steps_between_logs(steps)
    evaluations = steps // every + 1
    images = affordable_images(steps, batch, evaluations)
    assert 50 <= evaluations <= 101 and 50 <= images <= 1_000
    share = 2 * images * evaluations / (3 * steps * batch)  # a forward pass is a third of a step
    assert share <= validation.SHARE_OF_TIME or images == 50


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"validation": 0.6}, "greater than 0 and at most 0.5, not 0.6"),
        ({"validation": 0.01}, "0.01 of 81 training images is 1 image, and at least two"),
        ({"patience": 3}, "give validation, such as --validation 0.05, too"),
        ({"validation": 0.1, "patience": 0}, "patience must be at least 1, not 0"),
        ({"validation": 0.1, "objective": "rae-l2"}, "objective rae-l2 has no ELBO: leave valida"),
        ({"validation": 0.1, "error": "features"}, "error features is no likelihood"),
        ({"validation": 0.1, "balance": "scheduled:ramp_steps=9"}, "a target of its own"),
    ],
)
def test_what_cannot_be_validated_is_refused_in_one_line(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train(IMAGES, recipe=TINY, out=tmp_path / "run", options=QUIET, **changes)
    assert not Path(tmp_path / "run").exists()


def test_both_curves_are_drawn_where_they_were_measured(run):
    axis = Mock()
    plots._curve(axis, read_log(run.folder / "metrics.jsonl"), 1, HELD_OUT, "ELBO", "linear")
    log = run.history.dropna(subset=HELD_OUT)
    drawn = {call.kwargs["label"]: call.args[1] for call in axis.plot.call_args_list}
    assert drawn == {
        "held-out images": list(log[HELD_OUT]),
        "training images": list(log[TRAINING]),
    }
    assert axis.set_title.call_args.args == ("stage 1: ELBO",)
