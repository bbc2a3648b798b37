"""Test published experiments, shortened and on generated images: in pieces, whole, with numbers."""

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import poise
from poise import cli
from poise.recipes import EXPERIMENTS, RECIPES
from poise.report.records import read_records
from poise.runs.options import Options
from poise.studies.comparison import execution
from poise.studies.comparison.measuring import measured, measuring_for
from poise.studies.comparison.plan import Share
from poise.studies.comparison.worker import Ended, is_held
from poise.studies.reproduction import experiment_of, protocols_for, reproduce, shortened, text
from poise.studies.results import read_results
from poise.variants import available_priors

QUIET = Options(device="cpu", quiet=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draws = np.random.default_rng(0)
    sides = {
        name: draws.integers(0, 256, (count, 12, 12), dtype=np.uint8)
        for name, count in (("x_train", 140), ("x_test", 30))
    }
    path = tmp_path_factory.mktemp("data") / "made.npz"
    np.savez(path, **sides)
    return path


@pytest.fixture(scope="module")
def small(images, tmp_path_factory: pytest.TempPathFactory) -> tuple[poise.Comparison, Path]:
    folder = tmp_path_factory.mktemp("reproduced")
    how = {
        "length": 0.03,
        "out": folder / "runs",
        "results": folder / "results",
        "extractor": "pixels",
    }
    return reproduce("mnist", data=images, options=QUIET, **how), folder


def test_a_trial_has_every_set_under_every_protocol_and_says_that_it_is_one(small):
    _, folder = small
    (result,) = read_results([folder / "results"])
    assert (result.experiment, result.label, result.seed) == ("mnist", "computed (length 0.03)", 0)
    for protocol in ("default", "default-renormalised", "dai-wipf"):
        assert all(
            result.value("FD-pixels", of, protocol) >= 0
            for of in ("REC", "GEN-1", "GEN-2", "GEN-mixture")
        )
    assert result.value("FD-pixels", "REC", "default") == result.value(
        "FD-pixels", "REC", "default-renormalised"
    )
    assert result.value("FD-pixels", "GEN-2", "default") != result.value(
        "FD-pixels", "GEN-2", "default-renormalised"
    )
    measured = [(m["metric"], m["of"], m["protocol"]) for m in result.measurements()]
    assert len(set(measured)) == len(measured)


def test_a_report_finds_the_results_though_they_lie_elsewhere(small):
    (record,) = read_records([small[0].folder])
    assert record.label == "computed (length 0.03)"
    assert {m["of"] for m in record.evaluation["measurements"]} >= {
        "REC",
        "GEN-1",
        "GEN-2",
        "GEN-mixture",
    }


def test_numbers_stand_beside_the_published_ones(small):
    page = text(small[0])
    assert "FD-pixels of GEN-2, dai-wipf" in page and page.rstrip().endswith("gamma = 1 52.0")
    assert (small[0].folder / "table.md").read_text() == page


def test_a_result_of_other_images_is_not_overwritten(small, tmp_path):
    _, folder = small
    (path,) = (folder / "results").iterdir()
    before, draws = path.read_bytes(), np.random.default_rng(1)
    others = {
        name: draws.integers(0, 256, (count, 12, 12), dtype=np.uint8)
        for name, count in (("x_train", 140), ("x_test", 30))
    }
    np.savez(tmp_path / "others.npz", **others)
    how = {
        "length": 0.03,
        "out": tmp_path / "runs",
        "results": folder / "results",
        "extractor": "pixels",
    }
    with pytest.raises(poise.InputError, match="is of other settings or images: move it away"):
        reproduce("mnist", data=tmp_path / "others.npz", options=QUIET, **how)
    assert path.read_bytes() == before


def test_a_piece_of_the_work_is_kept_although_its_run_is_not_measured_whole(small, monkeypatch):
    """Two of three protocols were done: only the third is measured, with the same result."""
    comparison, _ = small
    (result,) = comparison.results
    run = poise.load(comparison.folder / "computed-length-0.03-0")
    kept = sorted((run.folder / "measured").iterdir())
    kept[-1].unlink()
    asked = []
    monkeypatch.setattr(poise.Run, "evaluate", spy(poise.Run.evaluate, asked))
    protocols, priors = protocols_for(RECIPES["mnist"]), available_priors("vae")
    how = measuring_for(run.dataset(), protocols, "pixels", priors, run.device)
    evaluation = measured(run, how, 0)
    assert len(kept) == 3 and len(asked) == 1
    del evaluation["seconds"]
    assert json.loads(json.dumps(evaluation)) == result.evaluation and how.covers(result)


def test_what_another_extractor_measured_of_the_same_weights_stays_in_the_result(small, tmp_path):
    comparison, _ = small
    folder = shutil.copytree(comparison.folder / "computed-length-0.03-0", tmp_path / "run")
    run = poise.load(folder)
    part = json.loads(min((folder / "measured").iterdir()).read_text())
    part["request"]["protocol"]["extractor"] = "another"
    for measurement in part["evaluation"]["measurements"]:
        measurement["metric"] = measurement["metric"].replace("pixels", "another")
    (folder / "measured" / "default-another.json").write_text(json.dumps(part))
    part["request"]["weights"] = {"model.safetensors": "of another training"}
    part["evaluation"]["measurements"] = [
        {"metric": "FD-stale", "of": "REC", "protocol": "0", "value": 0.0}
    ]
    (folder / "measured" / "default-stale.json").write_text(json.dumps(part))
    protocols, priors = protocols_for(RECIPES["mnist"]), available_priors("vae")
    how = measuring_for(run.dataset(), protocols, "pixels", priors, run.device)
    found = {m["metric"] for m in measured(run, how, 0)["measurements"]}
    assert {"FD-pixels", "FD-another"} <= found and "FD-stale" not in found


def spy(method, asked: list):
    def spied(self, **options):
        asked.append(options["protocol"].name)
        return method(self, **options)

    return spied


def sleeping(share: Share, lease: Path) -> list[Ended]:
    while is_held(lease):
        time.sleep(0.05)
    return [Ended(task, "interrupted") for task in share.tasks]


def test_when_the_minutes_are_over_it_says_how_to_go_on_and_ends_well(
    images, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(execution, "work", sleeping)
    monkeypatch.chdir(tmp_path)
    arguments = [
        "poise",
        "reproduce",
        "fashion-mnist",
        "--data",
        str(images),
        "--stop-after",
        "0.02",
        "--length",
        "0.1",
        "--jobs",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, "--extractor", "pixels", "--device", "cpu"])
    began = time.monotonic()
    cli.main()
    out, errors = capsys.readouterr()
    assert (
        out == "stopped after 0.02 minutes; run the same command again to go on\n"
        and time.monotonic() - began < 40
    )
    assert "in full stage 1: about 2 hours" in errors and "1 run (labels: 1, seeds: 1)" in errors
    assert not Path("results").exists()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_its_recipe_but_for_the_label(name):
    experiment = experiment_of(name, None, None, 2, 1.0, "auto")
    own = RECIPES[name].first.balance
    assert experiment.planned() == [(own, replace(RECIPES[name], seed=seed)) for seed in (0, 1)]
    several = experiment_of(name, None, ["computed", "learned"], 1, 1.0, "auto")
    other = experiment_of(name, None, ["computed"], 1, 1.0, "auto", "optimal")
    ((label, recipe),) = other.planned()
    assert label == "computed (stage 2 optimal)" and recipe.second.balance == "optimal"
    assert [recipe.first.balance for _, recipe in several.planned()] == ["computed", "learned"]
    assert all(
        replace(recipe, first=RECIPES[name].first, cost=RECIPES[name].cost) == RECIPES[name]
        for _, recipe in several.planned()
    )


def test_every_protocol_of_an_experiment_is_another_and_renormalisation_is_measured_both_ways():
    for name in EXPERIMENTS:
        recipe = RECIPES[name]
        protocols = [
            replace(p, generation=p.generation or recipe.generation) for p in protocols_for(recipe)
        ]
        assert len({p.hash for p in protocols}) == len(protocols)
        rules = {p.generation.renormalise for p in protocols if p.name.startswith("default")}
        assert {"always", "never"} <= rules
        authors = [p.name for p in protocols if p.name.startswith("released")]
        assert authors == {"cifar10": ["released"], "celeba64": ["released-celeba"]}.get(
            recipe.data.source, []
        )


def test_a_share_of_the_length_halves_rates_at_the_same_share():
    recipe = shortened(RECIPES["cifar10"], 0.1)
    assert (recipe.first.epochs, recipe.first.halve_every) == (70, 25) and (
        recipe.second.epochs,
        recipe.second.halve_every,
    ) == (140, 40)
    assert (
        shortened(RECIPES["celeba64"], 1e-6).first.epochs == 1
        and shortened(RECIPES["cifar10"], 1) == RECIPES["cifar10"]
    )


def test_a_file_has_its_own_order_of_images(images):
    assert (
        experiment_of("celeba64-released", images, None, 1, 1, "auto").base.data.file_order
        == "sorted"
    )
    assert (
        experiment_of("celeba64-released", images.parent, None, 1, 1, "auto").base.data.file_order
        == "listing"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits"], "there is no experiment 'digits'"),
        (["mnist", "--length", "0"], "length must be a share"),
        (["mnist", "--length", "1.5"], "length must be a share"),
        (["mnist", "--stop-after", "0"], "stop_after must be greater than 0"),
        (["mnist", "--seeds", "0"], "seeds must be at least 1"),
        (["mnist", "--balances", "computd"], "unknown balance"),
        (["mnist", "--data", "nowhere"], "'nowhere' does not exist"),
        ([], "NAME"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["poise", "reproduce", *arguments, "--device", "cpu"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    complaint = [line for line in capsys.readouterr().err.splitlines() if line]
    assert exit.value.code == 2 and len(complaint) == 1 and message in complaint[0]
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
