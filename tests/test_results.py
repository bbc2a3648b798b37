"""Test the JSON of a run: it agrees with the run's files and evaluation, and loads unchanged."""

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import poise
from poise.recipes import Data, Network, Recipe, Stage
from poise.runs.options import Options
from poise.runs.pipeline import train
from poise.studies import results
from poise.studies.results import Result, curves, read_results, result_of, safe_name, write_result

IMAGES = np.random.default_rng(0).integers(0, 256, (90, 8, 8), dtype=np.uint8)
TINY = Recipe(
    name="tiny",
    data=Data("array"),
    network=Network("mlp", latent_dim=3, hidden=(16,), second_hidden=8),
    first=Stage(epochs=4, batch_size=20, learning_rate=1e-2),
    second=Stage(epochs=3, batch_size=20, learning_rate=1e-2),
    seed=7,
)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[poise.Run, poise.Evaluation, Result]:
    folder = tmp_path_factory.mktemp("results") / "run"
    run = train(IMAGES, recipe=TINY, out=folder, options=Options(device="cpu", quiet=True))
    evaluation = run.evaluate(IMAGES[:20, None], extractor="pixels")
    return (
        run,
        evaluation,
        result_of(
            run, evaluation, experiment="trial", label="fixed:beta=4", seconds={"evaluation": 1.5}
        ),
    )


def test_a_result_says_what_its_evaluation_and_the_runs_files_say(finished):
    run, evaluation, result = finished
    for m in evaluation.measurements:
        assert result.value(m.metric, m.of) == m.value == result.value(m.metric, m.of, "default")
    assert result.value("latents.active_units") == evaluation.pages["latents"]["active_units"]
    assert result.value("reconstruction.gamma2") == pytest.approx(float(run.first.balance.gamma2))
    summary = json.loads((run.folder / "summary.json").read_text())
    assert (
        result.seconds == {"training": summary["seconds"], "evaluation": 1.5}
        and result.value("seconds.evaluation") == 1.5
    )
    assert (
        result.seed == 7
        and result.distance_names == ("FD-pixels",)
        and result.data["checksum"] == run.data["checksum"]
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("FD-pixels",), "several"),
        (("FID", "GEN-1"), "not measured; there are MSE of REC"),
        (("MSE", "REC", "dai-wipf"), "not measured"),
        (("latents.nonsense",), "has no latents.nonsense"),
        (("latents.kl_nats_per_latent",), "not one number"),
        (("latents.aggregate",), "not one number"),
    ],
)
def test_a_number_that_is_not_there_is_refused(finished, names, message):
    with pytest.raises(poise.InputError, match=message):
        finished[2].value(*names)


def test_a_result_comes_back_as_it_was_and_its_file_is_strict_json(finished, tmp_path):
    result = finished[2]
    undefined = replace(
        result, evaluation=result.evaluation | {"latents": {"variance_law_active": math.nan}}
    )
    path = write_result(undefined, tmp_path)
    assert path.name == "trial-fixed-beta=4-7.json"
    json.loads(path.read_text(), parse_constant=pytest.fail)
    (back,) = read_results([path])
    assert back.curves == result.curves and math.isnan(back.value("latents.variance_law_active"))
    write_result(result, tmp_path / "results")
    (tmp_path / "results" / "bench.json").write_text("[1]")
    assert read_results([tmp_path]) == read_results([tmp_path / "results"]) == [result]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "not a result"),
        (None, "no such file"),
        ("[]", "not a"),
    ],
)
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "it.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(poise.InputError, match=f"it.json.*{message}"):
        read_results([path])
    if content is not None:
        complaints: list[poise.InputError] = []
        assert read_results([path], complaints.append) == [] and len(complaints) == 1


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(poise.InputError, match="holds no results"):
        read_results([tmp_path])


def log_of(path: Path, seen: np.ndarray, rate: np.ndarray, mse: np.ndarray) -> Path:
    rest = {"stage": 1, "kl_nats": 1.0, "gamma2": 0.1, "reconstruction_nats": -3.0}
    entries = [
        rest | {"images_seen": int(s), "images_per_second": float(r), "mse": float(m)}
        for s, r, m in zip(seen, rate, mse, strict=True)
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_a_curve_keeps_the_mean_over_all_images_and_the_time_that_the_rates_say(tmp_path):
    draws = np.random.default_rng(1)
    images, rate, mse = (
        draws.integers(50, 90, 403),
        draws.uniform(10, 1000, 403),
        draws.uniform(0, 1, 403),
    )
    curve = curves(log_of(tmp_path / "metrics.jsonl", images.cumsum(), rate, mse))["1"]
    assert {len(values) for values in curve.values()} == {100}
    assert curve["images_seen"][-1] == images.sum()
    assert curve["seconds"][-1] == pytest.approx((images / rate).sum(), rel=1e-5)
    weights = np.diff(curve["images_seen"], prepend=0)
    assert np.average(curve["mse"], weights=weights) == pytest.approx(
        np.average(mse, weights=images), rel=1e-5
    )


def test_a_short_curve_is_the_log_itself(tmp_path):
    curve = curves(
        log_of(
            tmp_path / "metrics.jsonl",
            np.array([10, 30]),
            np.array([5.0, 10.0]),
            np.array([0.5, 0.25]),
        )
    )["1"]
    assert curve == {
        "images_seen": [10, 30],
        "seconds": [2.0, 4.0],
        "mse": [0.5, 0.25],
        "kl_nats": [1.0, 1.0],
        "gamma2": [0.1, 0.1],
        "reconstruction_nats": [-3.0, -3.0],
    }


def test_names_of_files_keep_labels_apart_and_hold_nothing_strange():
    labels = [
        "fixed",
        "fixed:beta=4",
        "fixed:beta=0.4",
        "learned:rate=1e-2",
        "learned:rate=1e2",
        "computed:start=1,monotone=true",
    ]
    names = [safe_name("compare", label, seed) for label in labels for seed in (0, 1)]
    assert len(set(names)) == len(names) and not set("".join(names)) & set(':/\\ *?"<>|')


def test_the_commit_is_that_of_the_clone_with_a_mark_if_the_source_was_changed(
    tmp_path, monkeypatch
):
    def git(*arguments: str) -> str:
        command = [
            "git",
            "-C",
            str(tmp_path),
            "-c",
            "user.name=n",
            "-c",
            "user.email=e",
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit() -> str | None:
        results.source_commit.cache_clear()
        return results.source_commit()

    package = tmp_path / "src"
    source, other = package / "studies" / "results.py", package / "vae.py"
    source.parent.mkdir(parents=True)
    source.write_text("1")
    other.write_text("1")
    monkeypatch.setattr(results, "__file__", str(source))
    assert commit() is None
    git("init")
    (tmp_path / "other").write_text("1")
    git("add", "other")
    git("commit", "-m", "other")
    assert commit() is None  # a git repository, but not of this package
    git("add", "src")
    git("commit", "-m", "source")
    assert commit() == git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "other").write_text("2")
    assert commit() == git("rev-parse", "--short=12", "HEAD")
    other.write_text("2")  # former defect: changes outside `studies` were not seen
    assert commit() == git("rev-parse", "--short=12", "HEAD") + "-dirty"
    results.source_commit.cache_clear()
