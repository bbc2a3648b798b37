"""Test finished runs that are trained for longer, and runs that start from others' weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import poise
from poise.errors import InputError
from poise.recipes import Recipe, Stage
from poise.runs import continuing, pipeline, timing
from poise.runs.pipeline import train
from poise.runs.run import load
from poise.runs.timing import Pace, Timing, lengths_with_more
from test_pipeline import IMAGES, QUIET, TINY, Killed, die_at, weights

SHORT = replace(
    TINY,
    first=Stage(epochs=2, batch_size=20, learning_rate=1e-2, ema_decay=0.9),  # 8 steps
    second=Stage(epochs=1, batch_size=20, learning_rate=1e-2, balance="learned"),  # 4 steps
)
LONG = replace(
    SHORT,
    first=replace(SHORT.first, epochs=4),
    second=SHORT.second and replace(SHORT.second, epochs=2),
)


RARE = replace(QUIET, save_seconds=60)  # for runs that are not killed


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def go_on(out: Path, images=IMAGES, **more) -> poise.Run:
    return train(images, out=out, **({"options": RARE} | more))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of constant learning rate. Tests do not change it."""
    return train(
        IMAGES, recipe=SHORT, out=tmp_path_factory.mktemp("short") / "run", options=QUIET
    ).folder


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(
        IMAGES, recipe=LONG, out=tmp_path_factory.mktemp("long") / "run", options=QUIET
    ).folder


@pytest.fixture
def copy(short: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(short, tmp_path / "copy"))


def die_in(patch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Make the beginning of a continuation die before call `number` of one of its functions."""
    calls, real = iter(range(number)), getattr(continuing, name)

    def mortal(*arguments):
        if next(calls, None) is None:
            raise Killed
        return real(*arguments)

    patch.setattr(continuing, name, mortal)


@pytest.mark.parametrize("kill", [5, 9, "finish", ("remove", 0), ("remove", 8)])
def test_a_continued_run_is_the_longer_run_also_after_a_kill(kill, copy, long, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if isinstance(kill, int):
            die_at(patch, kill)
        elif kill == "finish":
            patch.setattr(pipeline, "finish", Mock(side_effect=Killed))
        else:
            die_in(patch, *kill)
        go_on(copy, more_epochs=2, options=QUIET)
    if kill == 5:  # the run's first command resumes it, too
        train(IMAGES, recipe=SHORT, out=copy, options=RARE)
    else:
        go_on(copy, more_epochs=2)
    again, undisturbed = weights(copy), weights(long)
    assert again.keys() == undisturbed.keys()
    assert all(torch.equal(again[name], undisturbed[name]) for name in again)
    told = config(copy)
    assert told["recipe"] == config(long)["recipe"] and len(told["continued"]) == 1
    assert told["continued"][0] == {
        "more_epochs": 2,
        "more_minutes": None,
        "step": 8,
        "first": {"epochs": 2, "steps": None, "halve_every": None},
        "second": {"epochs": 1, "steps": None, "halve_every": None},
        "moments": "kept",
        "other_rates": 0,
    }
    figures = [json.loads((folder / "summary.json").read_text()) for folder in (copy, long)]
    assert figures[0]["reconstruction"] == figures[1]["reconstruction"]
    steps = [(entry["stage"], entry["step"]) for entry in load(copy).history.to_dict("records")]
    assert steps == [(1, k) for k in range(1, 17)] + [(2, k) for k in range(1, 9)]


def test_rates_that_fall_are_said_and_repeating_a_command_changes_nothing(
    copy, tmp_path, capsys, monkeypatch
):
    halved = replace(SHORT, first=replace(SHORT.first, halve_every=1), second=None)
    out = tmp_path / "halved"
    train(IMAGES, recipe=halved, out=out, options=RARE)
    (out / "last" / "tensors.safetensors").write_bytes(b"damaged")
    train(IMAGES, out=out, options=replace(RARE, quiet=False), more_epochs=2)
    said = capsys.readouterr().err
    # Rates halve every epoch of two, then every two of four: steps 4 to 7 of 8 differ.
    assert "from step 8 to 16, learning rate 0.005" in said and "moments of Adam" in said
    assert "other learning rates in 4 of the first 8 steps" in said
    rates = load(out).history["learning_rate"]
    assert list(rates) == [1e-2] * 4 + [5e-3] * 4 + [5e-3] * 8
    monkeypatch.setattr(poise.training.engines, "training_step", None)  # no step is taken
    train(IMAGES, recipe=halved, out=out, options=RARE)
    assert len(config(out)["continued"]) == 1


class StopEarly(poise.Callback):
    def on_log(self, entry):
        if entry["step"] == 5:
            raise poise.StopStage


def test_more_epochs_count_from_the_step_where_stage_1_ended(tmp_path):
    recipe = replace(SHORT, second=None)
    out = tmp_path / "run"
    train(IMAGES, recipe=recipe, out=out, options=RARE, callbacks=[StopEarly()])
    go_on(out, more_epochs=2)
    assert list(load(out).history["step"]) == [*range(1, 5 + 2 * 4 + 1)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"more_epochs": 0}, "more_epochs must be greater than 0 and finite, not 0"),
        ({"more_minutes": float("inf")}, "more_minutes must be greater than 0 and finite"),
        ({"more_epochs": 1, "more_minutes": 1.0}, "give either more_epochs or more_minutes"),
        ({"more_epochs": 1, "epochs": 9}, "its own settings: leave out epochs"),
        ({"more_epochs": 1, "recipe": TINY}, "leave out recipe and start_from"),
        ({"more_epochs": 1, "images": IMAGES[1:]}, "other settings .the images themselves"),
        ({"more_epochs": 1, "images": None}, "was trained on an array.*pass the images"),
    ],
)
def test_what_cannot_be_continued_is_refused_in_one_line(changes, message, short, unchecked):
    with pytest.raises(InputError, match=message):
        go_on(short, **changes)


def test_unfinished_and_shared_runs_are_not_continued(copy, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 3)
        train(IMAGES, recipe=SHORT, out=tmp_path / "half", options=QUIET)
    with pytest.raises(InputError, match="not finished: run its command again, without more_ep"):
        go_on(tmp_path / "half", more_epochs=1)
    shared = load(copy).save_pretrained(tmp_path / "shared")
    with pytest.raises(InputError, match="was shared without the state of its training"):
        go_on(shared, more_epochs=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 3)
        go_on(copy, more_epochs=1, options=QUIET)
    with pytest.raises(InputError, match="not yet finished more_epochs=1: run that again before"):
        go_on(copy, more_epochs=2)


def test_more_minutes_are_used_up_and_stage_2_keeps_its_share(short, tmp_path, monkeypatch):
    recipe = Recipe("r", TINY.data, TINY.network, Stage(steps=100), Stage(steps=300))
    pace = Timing((Pace(1.0, 0.2), Pace(2.0, 0.1)), rest=7.0)  # 20 s and 30 s of steps: 60 %
    longer = lengths_with_more(recipe, pace, 1_000, 100, 60.0, 1.0)
    assert longer.second is not None
    first, second = longer.first.total_steps(1_000), longer.second.total_steps(1_000)
    assert (first - 100) * 0.2 + second * 0.1 == pytest.approx(60 - 7 - 3, abs=0.3)
    assert second * 0.1 / (first * 0.2 + second * 0.1) == pytest.approx(0.6, abs=0.01)
    with pytest.raises(InputError, match=r"0\.5 more minutes are too few .* give 2 or more"):
        lengths_with_more(recipe, pace, 1_000, 100, 30.0, 0.5)

    out = Path(shutil.copytree(short, tmp_path / "copy"))
    quick = Timing((Pace(0.0, 0.5), Pace(0.0, 0.5)), rest=0.0)
    monkeypatch.setattr(timing, "measure", lambda *values, **options: quick)
    go_on(out, more_minutes=0.5)
    told = config(out)
    assert told["continued"][0]["more_minutes"] == 0.5 and told["recipe"]["minutes"] is None
    lengths = told["recipe"]["first"]["steps"], told["recipe"]["second"]["steps"]
    assert 8 + 10 <= lengths[0] < 8 + 40 and lengths[1] == pytest.approx(lengths[0] / 2, abs=1)


def test_a_run_starts_from_the_weights_of_another(short, tmp_path, monkeypatch):
    source = Path(shutil.copytree(short, tmp_path / "source"))
    # So small a learning rate changes no weight.
    still = {"learning_rate": 1e-30, "epochs": 1, "start_from": source}
    new = (255 - IMAGES)[:60]
    run = train(new, out=tmp_path / "still", options=RARE, **still)
    trained, kept = weights(short), weights(run.folder)
    for stage in (1, 2):
        averaged = "average" if stage == 1 else "vae"
        mine = {name for name in kept if name.startswith(f"stage{stage}.vae.")}
        assert mine and all(
            torch.equal(kept[name], trained[name.replace(".vae.", f".{averaged}.")])
            for name in mine
        )
    assert kept["stage1.balance.gamma2"] != trained["stage1.balance.gamma2"]
    start = config(run.folder)["start"]
    assert start["run"] == str(source.resolve()) and "weights of stage 2" in start["kept"]
    assert "optimizer" in start["new"] and run.recipe.network == load(source).recipe.network

    starting = {"epochs": 1, "start_from": source}
    whole = train(new, out=tmp_path / "whole", options=RARE, **starting).folder
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 2)
        train(new, out=tmp_path / "cut", options=QUIET, **starting)
    shutil.rmtree(source)  # it is needed at the start only
    train(new, out=tmp_path / "cut", options=QUIET, **starting)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(tmp_path / "cut")[name])
    with pytest.raises(InputError, match=r"started from .*source, not from None: give the same"):
        train(new, recipe=load(whole).recipe, out=whole, options=QUIET)


def test_a_flow_of_other_classes_is_trained_anew(tmp_path):
    """Former defect: such a start was refused with a message about damaged checkpoints."""
    how = {"epochs": 1, "second_epochs": 1, "options": QUIET}
    settings = {"recipe": "digits", "latent_dim": 3, "second": "flow"}
    train(IMAGES, labels=[0, 1, 2] * 30, out=tmp_path / "one", **settings, **how)
    for name, labels in {"two": [0, 1] * 45, "none": False, "three": [5, 6, 7] * 30}.items():
        start = {"start_from": tmp_path / "one", "labels": labels}
        run = train(IMAGES, out=tmp_path / name, **start, **how)
        kept = config(run.folder)["start"]["kept"]
        assert ("weights of stage 2" in kept) == (name == "three")


@pytest.mark.parametrize(
    ("changes", "kind"), [({"stages": 2}, "vae"), ({"second": "flow"}, "flow")]
)
def test_a_second_stage_may_follow_the_weights_of_one_stage(changes, kind, tmp_path):
    """Former defect: these settings were ignored without a word."""
    how = {"recipe": "digits", "latent_dim": 3, "epochs": 1, "options": QUIET}
    train(IMAGES, stages=1, out=tmp_path / "one", **how)
    of_second = {"second_epochs": 1, "start_from": tmp_path / "one", "epochs": 1}
    run = train(IMAGES, out=tmp_path / "two", options=QUIET, **of_second, **changes)
    assert run.second_stage == kind and run.recipe.second.epochs == 1
    one_stage = load(tmp_path / "one").recipe
    with pytest.raises(InputError, match="'digits' has one stage: give a recipe with a second"):
        train(IMAGES, recipe=one_stage, out=tmp_path / "three", options=QUIET, **changes)


@pytest.mark.parametrize(
    "images, changes, message",
    [
        (IMAGES, {"latent_dim": 4}, r"another shape \(latent_dim: 3 there, 4 here\)"),
        (IMAGES, {"size": 4}, r"another shape \(size: 8x8 there, 4x4 here\)"),
        (IMAGES, {"recipe": "images"}, r"kind: mlp there, conv here; latent_dim: 3 there, 32"),
        (IMAGES, {"standardise": "after"}, r"\(standardise: never there, after here\)"),
        (IMAGES, {"objective": "rae-l2"}, r"\(objective: vae there, rae-l2 here\)"),
        (IMAGES, {"start_from": "nowhere"}, "nowhere: no such folder"),
    ],
)
def test_a_start_of_another_shape_is_refused_in_one_line(images, changes, message, short, tmp_path):
    with pytest.raises(InputError, match=message):
        train(images, out=tmp_path / "new", options=QUIET, **({"start_from": short} | changes))
    assert not (tmp_path / "new").exists()
