"""Test callbacks: when they are called, how they stop a stage, that errors lose nothing."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import poise
from poise.errors import InputError, MissingExtraError, RunError
from poise.recipes import Stage
from poise.runs.pipeline import train
from poise.support.files import read_json
from test_pipeline import IMAGES, QUIET, TINY, weights

ONE = replace(TINY, first=Stage(epochs=3, batch_size=20, learning_rate=1e-2), second=None)


class Recorder(poise.Callback):
    """Records its calls; raises an error in call `number` of a method."""

    def __init__(self, method: str = "", number: int = 0, error: Exception | None = None) -> None:
        self.calls: list[tuple] = []
        self.method, self.number, self.error = method, number, error

    def note(self, method: str, *values) -> None:
        self.calls.append((method, *values))
        same = sum(call[0] == method for call in self.calls)
        if (method, same) == (self.method, self.number) and self.error is not None:
            raise self.error

    def on_start(self, folder, recipe, stage, step):
        self.note("on_start", folder.name, recipe.name, stage, step)

    def on_log(self, entry):
        self.note("on_log", entry["stage"], entry["step"])

    def on_samples(self, stage, step, images):
        self.note("on_samples", stage, step, tuple(images.shape))

    def on_stage_end(self, stage, step, network):
        self.note("on_stage_end", stage, step, type(network))

    def on_end(self):
        self.note("on_end")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run without callbacks."""
    return train(
        IMAGES, recipe=ONE, out=tmp_path_factory.mktemp("whole") / "run", options=QUIET
    ).folder


def test_callbacks_are_called_in_the_order_of_training(tmp_path, monkeypatch):
    seen = Recorder()
    run = train(IMAGES, recipe=TINY, out=tmp_path / "run", options=QUIET, callbacks=[seen])
    assert seen.calls[0] == ("on_start", "run", "tiny", 1, 0) and seen.calls[-1] == ("on_end",)
    logs = [call[1:] for call in seen.calls if call[0] == "on_log"]
    assert logs == [(1, step) for step in range(1, 17)] + [(2, step) for step in range(1, 13)]
    shapes = {call[1]: call[3] for call in seen.calls if call[0] == "on_samples"}
    assert shapes == {1: (8, 1, 8, 8), 2: (16, 1, 8, 8)}
    ends = [(place, call) for place, call in enumerate(seen.calls) if call[0] == "on_stage_end"]
    assert [call[1:] for _, call in ends] == [(1, 16, poise.VAE), (2, 12, poise.VAE)]
    assert seen.calls[ends[0][0] + 1] == ("on_log", 2, 1)

    frame, entries = run.history, (run.folder / "metrics.jsonl").read_text().splitlines()
    assert len(frame) == len(entries) == 28
    assert frame.iloc[20].dropna().to_dict() == json.loads(entries[20])
    assert frame["stage"].dtype == frame["step"].dtype == int
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"run\.history needs .*poise\[track\]"):
        _ = run.history


@pytest.mark.parametrize("method, number", [("on_log", 12), ("on_samples", 3), ("on_stage_end", 1)])
def test_a_callback_that_raises_is_said_in_one_line_and_loses_nothing(
    method, number, whole, tmp_path
):
    broken = Recorder(method, number, KeyError("my\nkey"))
    options = replace(QUIET, save_seconds=60)  # no checkpoint but that of the error
    message = rf"callback Recorder.{method} raised KeyError \('my\\nkey'\); .*same command to go on"
    with pytest.raises(RunError, match=message) as raised:
        train(IMAGES, recipe=ONE, out=tmp_path / "cut", options=options, callbacks=[broken])
    assert isinstance(raised.value.__cause__, KeyError) and "\n" not in str(raised.value)
    assert ("not called again for this stage" in str(raised.value)) == (method == "on_stage_end")
    assert broken.calls[-1] == ("on_end",)
    again = Recorder()
    train(IMAGES, recipe=ONE, out=tmp_path / "cut", options=options, callbacks=[again])
    logged = [call[1:] for call in (*broken.calls, *again.calls) if call[0] == "on_log"]
    assert logged == [(1, step) for step in range(1, 13)]  # each once
    ended, other = weights(tmp_path / "cut"), weights(whole)
    assert all(torch.equal(ended[name], other[name]) for name in other)
    pictures = [(run / "progress.png").read_bytes() for run in (tmp_path / "cut", whole)]
    assert pictures[0] == pictures[1]


def test_a_callback_ends_a_stage_and_the_run_is_finished(tmp_path, capsys):
    stopper = Recorder("on_log", 5, poise.StopStage())
    faulty = Recorder("on_end", 1, OSError("gone"))
    run = train(
        IMAGES, recipe=TINY, out=tmp_path / "run", options=QUIET, callbacks=[stopper, faulty]
    )
    assert run.finished and run.second is not None
    ends = [call[1:3] for call in stopper.calls if call[0] == "on_stage_end"]
    assert ends == [(1, 5), (2, 12)]
    assert "Recorder.on_end raised OSError (gone)" in capsys.readouterr().err


def test_what_is_no_callback_is_refused(tmp_path, unchecked):
    with pytest.raises(InputError, match=r"a list of .* poise\.Callback, not <test_callbacks"):
        train(IMAGES, recipe=ONE, out=tmp_path / "run", options=QUIET, callbacks=Recorder())  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"derived from poise\.Callback, not \[<class"):
        train(IMAGES, recipe=ONE, out=tmp_path / "run", options=QUIET, callbacks=[Recorder])  # pyright: ignore[reportArgumentType]


def test_wandb_gets_entries_and_samples_and_the_same_run_after_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr("poise.runs.callbacks.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'W&B needs .* pip install "poise\[wandb\]"'):
        poise.WandB()
    monkeypatch.undo()
    inits, logged, finished = [], [], []

    def init(**settings):
        inits.append(settings)
        return types.SimpleNamespace(
            define_metric=lambda name, step_metric: None,
            log=logged.append,
            finish=lambda: finished.append(True),
        )

    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()  # pyright: ignore[reportAttributeAccessIssue]
    fake.__dict__.update(init=init, Image=lambda pixels: pixels)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out, stop = tmp_path / "run", Recorder("on_log", 2, ValueError())
    with pytest.raises(RunError, match="raised ValueError; "):
        train(IMAGES, recipe=ONE, out=out, options=QUIET, callbacks=[poise.WandB("p"), stop])
    train(IMAGES, recipe=ONE, out=out, options=QUIET, callbacks=[poise.WandB("p", mode="offline")])
    assert inits[0]["id"] == inits[1]["id"] and len(inits[0]["id"]) == 16 and len(finished) == 2
    assert inits[1]["mode"] == "offline" and inits[1]["project"] == "p"
    config = json.loads(json.dumps(inits[0]["config"]))
    assert config == read_json(out / "config.json", dict)["recipe"]
    assert [entry["stage1/step"] for entry in logged if "stage1/loss" in entry] == [*range(1, 13)]
    samples = [entry["stage1/samples"] for entry in logged if "stage1/samples" in entry]
    assert samples[0][0].shape == (8, 8) and samples[0][0].dtype.name == "uint8"
