"""Test budgets: lengths fit the speed of the machine, stay fixed, and trials leave no trace."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import poise
from poise import training
from poise.errors import InputError
from poise.recipes import RECIPES, Data, Network, Recipe, Stage
from poise.recipes.settings import Changes
from poise.runs import checkpoint, timing
from poise.runs.options import Options
from poise.runs.pipeline import train
from poise.runs.timing import Pace, Timing, lengths_within_budget
from poise.support.progress import hours_minutes
from poise.training import ImageBatches, Watch, fit, new_state

IMAGES = np.random.default_rng(0).integers(0, 256, (90, 8, 8), dtype=np.uint8)
TINY = Recipe(
    name="tiny",
    data=Data("array"),
    network=Network("mlp", latent_dim=3, hidden=(16,), second_hidden=8),
    first=Stage(epochs=4, batch_size=20, learning_rate=1e-2, halve_every=2),
    second=Stage(steps=12, batch_size=20, learning_rate=1e-2, halve_every=5),
)
QUIET = Options(device="cpu", quiet=True, save_seconds=0.0)  # a checkpoint after every step
HALF_A_MINUTE = Timing((Pace(3.0, 0.5), Pace(1.0, 0.25)), 2.0)


def final_rates(recipe: Recipe, num_images: int) -> list[float]:
    """Return the rates of the last steps, without a linear fall, which ends at 1 / length."""
    stages = [replace(stage, decay=0.0) for stage in recipe.stages]
    return [
        stage.learning_rate_at(stage.total_steps(num_images) - 1, num_images) for stage in stages
    ]


# Lengths


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 60), min_size=3, max_size=3),
    st.floats(1e-3, 5),
    st.floats(1e-3, 5),
    st.sampled_from(sorted(RECIPES)),
)
def test_lengths_take_the_whole_budget_and_no_more(once, first, second, name):
    recipe, num_images, budget = replace(RECIPES[name], minutes=60), 5_000, 3600
    measured = Timing((Pace(once[0], first), Pace(once[1], second)), once[2])
    chosen = lengths_within_budget(recipe, measured, num_images, budget)
    times = measured.seconds(chosen, num_images)
    assert (
        budget - sum(pace.step for pace in measured.stages) - 1e-6
        <= sum(times) + measured.rest
        <= budget + 1e-6
    )
    training_times = [time - pace.start for time, pace in zip(times, measured.stages, strict=True)]
    assert training_times[1] + measured.stages[1].step >= 0.1 * sum(training_times) - 1e-6
    assert final_rates(chosen, num_images) == pytest.approx(final_rates(recipe, num_images))


def test_a_second_stage_that_takes_longest_in_its_recipe_does_so_in_a_budget():
    recipe, measured = (
        replace(RECIPES["digits"], minutes=2),
        Timing((Pace(0, 1e-2), Pace(0, 1e-2)), 0.0),
    )
    first, second = measured.seconds(lengths_within_budget(recipe, measured, 1_600, 100), 1_600)
    assert second / first == pytest.approx(400 * 50 / (100 * 32), rel=1e-2)


def test_a_budget_for_one_stage_is_all_its_own():
    recipe = replace(TINY, second=None, minutes=1)
    assert lengths_within_budget(recipe, Timing((Pace(3.0, 0.5),), 2.0), 81, 60).first.steps == 110


def test_a_budget_that_is_too_short_names_one_that_is_not():
    recipe = replace(TINY, minutes=0.1)
    with pytest.raises(InputError, match=r"0\.1 min is too short.*give 2 or more"):
        lengths_within_budget(recipe, Timing((Pace(10.0, 2.0), Pace(0.0, 0.1)), 20.0), 81, 6)
    lengths_within_budget(
        replace(recipe, minutes=2), Timing((Pace(10.0, 2.0), Pace(0.0, 0.1)), 20.0), 81, 120
    )


def test_statistics_of_a_short_run_settle_within_it():
    short, long = (
        lengths_within_budget(replace(TINY, minutes=1), HALF_A_MINUTE, 81, seconds)
        for seconds in (60, 6_000)
    )
    assert short.network.norm_decay ** (short.first.steps or 0) < 1e-3
    assert long.network.norm_decay == TINY.network.norm_decay


@pytest.mark.parametrize(
    ("name", "epochs", "second"),
    [
        ("digits", 1_000, 4_000),
        ("digits", 5, 20),
        ("images-resnet", 8, 25),
        ("images", 8, 11),
        ("cifar10", 7, 14),
    ],
)
def test_epochs_keep_the_proportions_of_a_recipe(name, epochs, second):
    recipe = RECIPES[name]
    changed = Changes(epochs=epochs).apply(recipe)
    assert (changed.first.epochs, changed.second and changed.second.epochs) == (epochs, second)
    assert final_rates(changed, 5_000) == pytest.approx(final_rates(recipe, 5_000))
    apart = Changes(epochs=epochs, second_epochs=3).apply(recipe)
    assert apart.first == changed.first and apart.second and apart.second.epochs == 3


def test_a_budget_and_lengths_exclude_each_other():
    for length in ({"epochs": 3}, {"second_epochs": 3}):
        with pytest.raises(InputError, match="leave out either"):
            Changes(minutes=2, **length)
    with pytest.raises(InputError, match="minutes must be greater than 0"):
        Changes(minutes=0).apply(TINY)


def test_a_whole_number_of_epochs_halves_rates_at_the_steps_it_always_did():
    stage = Stage(epochs=30, batch_size=7, halve_every=3)
    for step in range(30 * 143):
        assert stage.learning_rate_at(step, 1_005) == 1e-4 * 0.5 ** (step // 143 // 3)


# A run with a budget


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved, _ = checkpoint.newest_intact_checkpoint(folder / "checkpoints")
    assert saved is not None and saved.meta["finished"]
    return saved.tensors


class Killed(BaseException):
    """Simulates a kill: nothing catches it."""


def paced(monkeypatch: pytest.MonkeyPatch, pace: float) -> None:
    """Simulate a machine of this speed, and ignore the time that has passed."""
    monkeypatch.setattr(
        timing, "measure", lambda *_, **__: Timing((Pace(0.0, pace), Pace(0.0, pace)), 0.0)
    )
    monkeypatch.setattr(
        timing,
        "lengths_within_budget",
        lambda recipe, measured, n, left: lengths_within_budget(
            recipe, measured, n, 60 * recipe.minutes
        ),
    )


def budgeted(out: Path, options: Options = QUIET) -> poise.Run:
    return train(IMAGES, recipe=TINY, out=out, options=options, minutes=1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> poise.Run:
    """Return a run with a budget that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        paced(patch, 1.0)
        seldom = replace(QUIET, save_seconds=60)
        run = budgeted(tmp_path_factory.mktemp("budgeted") / "undisturbed", seldom)
    assert sum(stage.steps or 0 for stage in run.recipe.stages) == pytest.approx(60, abs=2)
    return run


@pytest.mark.parametrize("step", [0, 1, 30, 57])
def test_a_run_killed_at_any_step_keeps_its_lengths_on_a_machine_of_another_pace(
    step, undisturbed, tmp_path, monkeypatch
):
    paced(monkeypatch, 1.0)
    taken, real = iter(range(step)), training.engines.training_step

    def mortal(*arguments):
        if next(taken, None) is None:
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training.engines, "training_step", mortal)
        budgeted(tmp_path / "run")
    paced(monkeypatch, 0.5)
    assert budgeted(tmp_path / "run").recipe == undisturbed.recipe
    again, expected = weights(tmp_path / "run"), weights(undisturbed.folder)
    assert again.keys() == expected.keys() and all(
        torch.equal(again[name], expected[name]) for name in again
    )


def test_another_budget_is_another_run(tmp_path, monkeypatch):
    paced(monkeypatch, 1.0)
    train(IMAGES, recipe=TINY, out=tmp_path / "run", options=QUIET, minutes=1)
    with pytest.raises(InputError, match=r"minutes: 1 -> 2"):
        train(IMAGES, recipe=TINY, out=tmp_path / "run", options=QUIET, minutes=2)


def test_a_budget_is_measured_and_told_with_its_lengths(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "PICTURES_SECONDS", 2.0)
    options = Options(device="cpu", threads=1)
    run = train(IMAGES, recipe=TINY, out=tmp_path / "run", options=options, minutes=0.1)
    steps = [stage.steps for stage in run.recipe.stages]
    assert run.recipe.minutes == 0.1 and min(steps) >= 10
    told = capsys.readouterr().err
    assert (
        "0.1 minutes on cpu" in told
        and f"{steps[0]:,} + {steps[1]:,} steps take about 0:01 h here" in told
    )


def test_what_was_tried_leaves_no_trace(tmp_path, capsys):
    train(IMAGES, recipe=TINY, out=tmp_path / "quiet", options=QUIET)
    train(IMAGES, recipe=TINY, out=tmp_path / "told", options=Options(device="cpu"))
    assert "16 + 12 steps take about 0:01 h here" in capsys.readouterr().err
    quiet, told = weights(tmp_path / "quiet"), weights(tmp_path / "told")
    assert all(torch.equal(told[name], quiet[name]) for name in quiet)
    names = [
        sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("quiet", "told")
    ]
    assert names[0] == names[1]


# Threads


@pytest.mark.parametrize(
    ("times", "chosen"), [({1: 1.0, 2: 0.95}, 1), ({1: 1.0, 2: 0.6}, 2), ({1: 1.0, 2: 4.0}, 1)]
)
def test_the_number_of_threads_is_the_least_that_is_clearly_fastest(times, chosen, monkeypatch):
    monkeypatch.setattr(
        timing,
        "measure_pace",
        lambda state, data, stage, number, seed, engine, count, s: Pace(0, times[count]),
    )
    vae, data = (
        poise.VAE(*poise.networks.mlp((1, 8, 8), 3)),
        ImageBatches(IMAGES[:, None], torch.device("cpu")),
    )
    assert timing.choose_threads([1, 2], vae, poise.ComputedBalance(), TINY, data) == chosen


def test_a_run_goes_on_with_the_threads_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(training.machine, "SMALL_PARAMETERS", 0)
    monkeypatch.setattr(timing, "choose_threads", lambda *_: 2)
    measured = replace(QUIET, threads=0)
    train(IMAGES, recipe=TINY, out=tmp_path / "run", options=measured)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["threads"] == 2
    monkeypatch.setattr(timing, "choose_threads", lambda *_: pytest.fail("it was chosen before"))
    train(IMAGES, recipe=TINY, out=tmp_path / "run", options=measured)
    with pytest.raises(InputError, match="threads must be at least 1"):
        Options(threads=-1)


# The clock


def test_a_clock_does_not_count_the_first_step(monkeypatch):
    """The first step takes 10 simulated seconds, each other step 2."""
    state = new_state(
        poise.VAE(*poise.networks.mlp((1, 8, 8), 3)),
        poise.ComputedBalance(),
        TINY.first,
        torch.device("cpu"),
    )
    time, real = [0.0], training.engines.training_step

    def step(*arguments):
        time[0] += 2.0 if state.step else 10.0
        return real(*arguments)

    monkeypatch.setattr(training.engines, "training_step", step)
    monkeypatch.setattr(timing.time, "monotonic", lambda: time[0])
    clock, data = timing.Clock(state, 5.0), ImageBatches(IMAGES[:, None], torch.device("cpu"))
    fit(
        state,
        data,
        Stage(steps=100, batch_size=20),
        number=1,
        seed=0,
        watch=Watch(stop=clock, quiet=True),
    )
    assert state.step == 4 and clock.pace() == Pace(start=8.0, step=2.0)


@settings(deadline=None)
@given(st.floats(0, 1e6))
def test_hours_and_minutes_round_up(seconds):
    hours, minutes = map(int, hours_minutes(seconds).removesuffix(" h").split(":"))
    assert 0 <= minutes < 60 and seconds - 1e-6 <= 3600 * hours + 60 * minutes < seconds + 60 + 1e-6
