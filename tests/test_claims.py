"""Test the claims: rules, figures of curves, and a page that agrees with the results."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import poise  # noqa: E402
from benchmarks.measuring import between  # noqa: E402
from claims import design, figures, questions, statements  # noqa: E402
from claims.__main__ import main, there, work  # noqa: E402
from claims.measure import belongs, is_finished  # noqa: E402
from claims.page import BEGIN, END, PAGE, README, RESULTS, in_readme, page  # noqa: E402
from claims.rules import (  # noqa: E402
    Check,
    Outcome,
    above,
    below,
    decided_by_chance,
    less,
    near,
    no_worse,
    verdict,
    verdict_text,
)
from poise.errors import InputError  # noqa: E402
from poise.objectives import make_objective  # noqa: E402
from poise.recipes.settings import Data, to_json  # noqa: E402
from poise.runs.build import first_stage  # noqa: E402
from poise.studies.results import Result, read_results  # noqa: E402

BEFORE, AFTER = design.NOISELESS, design.NOISELESS_RENORMALISED


def made(
    experiment: str,
    label: str,
    seed: int,
    *,
    rate: float = 2.0,
    gamma2: float | None = None,
    **values: float,
) -> Result:
    """Return a result whose training MSE falls as exp(-rate t) over stage 1.

    gamma2 equals the MSE, or is fixed. `values` are named by a figure of a page
    ("reconstruction.mse") or by the distance of a set ("light GEN-1").
    """
    times = [k / 100 for k in range(1, 101)]
    mse = [0.1 * math.exp(-rate * t) for t in times]
    pages: dict[str, dict] = {
        "reconstruction": {"mse": mse[-1]},
        "latents": {},
        "second_stage": {},
        "claims": {},
    }
    measurements = []
    for name, value in values.items():
        if "." in name:
            pages[name.split(".")[0]][name.split(".")[1]] = value
        else:
            extractor, of = name.split(" ", 1)
            measurements.append(
                {"metric": f"FD-{extractor}", "of": of, "value": value, "protocol": "p"}
            )
    curve = {
        "images_seen": [60_000 * t for t in times],
        "mse": mse,
        "gamma2": [gamma2 or m for m in mse],
    }
    evaluation = {
        "protocols": {"p": {"name": "p"}},
        "measurements": measurements,
        "notes": [],
    } | pages
    provenance = {"machine": {"processor": "x"}, "torch": "2", "finished": "2026-01-01T00:00:00"}
    data = {"shape": [1, 28, 28], "checksum": "c"}
    settings = {"first": {"batch_size": 100}}
    return Result(
        experiment,
        label,
        seed,
        settings,
        data,
        provenance,
        {"training": 60.0},
        {"1": curve},
        evaluation,
    )


def evidence_of(
    values: dict[str, dict[str, float]], *, experiments=statements.MAIN, seeds=range(3)
) -> figures.Evidence:
    """Return evidence with the same values in every experiment, varied slightly by the seed."""

    def varied(label: str, seed: int) -> dict[str, float]:
        return {name: value * (1 + 0.001 * seed) for name, value in values[label].items()}

    return figures.Evidence(
        made(e, label, s, **varied(label, s))
        for e in experiments
        for label in values
        for s in seeds
    )


def test_a_check_holds_beyond_its_bound_fails_on_the_other_side_and_is_open_between():
    values = [1.0, 2.0, 3.0, 2.0]
    assert [below("", values, bound).outcome.name for bound in (3.5, 2.0, 0.5)] == [
        "HOLDS",
        "OPEN",
        "FAILS",
    ]
    assert [above("", values, bound).outcome.name for bound in (3.5, 2.0, 0.5)] == [
        "FAILS",
        "OPEN",
        "HOLDS",
    ]
    assert [near("", values, 2, by).outcome.name for by in (1.5, 0.1)] == ["HOLDS", "OPEN"]
    assert near("", values, 9, 1).outcome is near("", values, -9, 1).outcome is Outcome.FAILS


def test_fewer_than_three_values_and_values_that_are_no_numbers_decide_nothing():
    assert below("", [1.0, 1.0], 5).outcome is Outcome.ABSENT
    assert below("", [1.0, 1.0, math.nan], 5).outcome is Outcome.ABSENT


def test_ratios_of_equal_things_are_neither_less_nor_worse():
    assert less("", [1.0, 1.0, 1.0]).outcome is Outcome.OPEN
    assert no_worse("", [1.0, 1.0, 1.0], 0.05).outcome is Outcome.HOLDS
    assert no_worse("", [1.2, 1.15, 1.2], 0.05).outcome is Outcome.FAILS


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ("HH", "holds"),
        ("FF", "does not hold"),
        ("FO", "undecided"),
        ("OO", "undecided"),
        ("HF", "mixed"),
        ("HFO", "mixed"),
        ("HO", "undecided"),
        ("HA", "holds"),
        ("AA", "not measured"),
    ],
)
def test_a_verdict_follows_from_the_checks_and_names_those_that_disagree(outcomes, expected):
    kinds = {"H": Outcome.HOLDS, "F": Outcome.FAILS, "O": Outcome.OPEN, "A": Outcome.ABSENT}
    checks = [Check(f"check {k}", "", "", kinds[letter]) for k, letter in enumerate(outcomes)]
    text = verdict_text(checks)
    assert verdict(checks).value == expected
    assert text.startswith(f"**{expected}")
    differ = len(set(outcomes) - {"A"}) > 1
    named = {letter: f"check {k}" in text for k, letter in enumerate(outcomes)}
    assert all(
        named[letter] == (differ or (letter == "A" and outcomes != "AA")) for letter in named
    )


def test_a_verdict_of_many_checks_counts_them():
    outcomes = [Outcome.FAILS] + 3 * [Outcome.OPEN] + 5 * [Outcome.HOLDS]
    checks = [Check(f"check {k}", "", "", outcome) for k, outcome in enumerate(outcomes)]
    assert verdict_text(checks) == (
        "**mixed**: does not hold for 1 check; undecided for 3 checks; holds for 5 checks"
    )


def test_a_check_at_its_bound_is_decided_by_chance_as_often_as_the_page_says():
    """With normal values whose mean is the bound, 5 % of checks hold or fail."""
    values = np.random.default_rng(0).normal(size=(2_000, 5))
    checks = [below("", row, 0) for row in values.tolist()]
    decided = sum(check.outcome is not Outcome.OPEN for check in checks)
    assert decided == pytest.approx(decided_by_chance(checks), abs=30)  # three standard errors
    assert decided_by_chance(checks) == pytest.approx(100)


def test_a_curve_that_falls_twice_as_fast_needs_half_the_images():
    slow, fast = made("e", "slow", 0, rate=2), made("e", "fast", 0, rate=4)
    for part in (0.25, 0.5, 1.0):
        assert figures.speed_up(slow, fast, part) == pytest.approx(2, rel=0.05)
        assert figures.speed_up(slow, slow, part) == 1
    assert figures.speed_up(fast, slow, 1.0) == 0
    assert figures.images_to(slow, 0.0) == math.inf


def test_the_gap_closed_is_none_at_the_slow_run_and_all_at_the_fast_one():
    slow, fast, between = (made("e", "x", 0, rate=rate) for rate in (2, 8, 3.2))
    assert figures.gap_closed(slow, fast, slow) == 0
    assert figures.gap_closed(slow, fast, fast) == 1
    assert figures.gap_closed(slow, fast, between) == pytest.approx(
        (1 - 2 / 3.2) / (1 - 2 / 8), abs=0.03
    )
    assert math.isnan(figures.gap_closed(slow, slow, fast))


def test_the_share_at_balance_counts_points_after_the_start():
    following, constant = made("e", "x", 0), made("e", "x", 0, gamma2=1.0)
    assert (
        figures.balanced_share(following, 0.1) == 1 and figures.balanced_share(constant, 0.1) == 0
    )
    # The start is 500 steps, more than the run has.
    early = replace(following, settings={"first": {"batch_size": 200}})
    assert math.isnan(figures.balanced_share(early, 0.1))


def test_the_rank_correlation_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    x, y = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0], [2.0, 7.0, 1.0, 8.0, 2.0, 8.0, 1.0, 8.0]
    assert figures.rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert math.isnan(figures.rank_correlation([1.0, 2.0], [1.0, 2.0]))


def test_the_elbo_at_the_best_variance_is_the_gaussian_density_of_the_errors():
    errors = torch.randn(28 * 28, dtype=torch.float64)
    mse = float(errors.square().mean())
    result = made("e", "x", 0, **{"reconstruction.mse_sampled": mse, "reconstruction.kl_nats": 7.0})
    densities = [
        torch.distributions.Normal(0, variance**0.5).log_prob(errors).sum()
        for variance in (mse, 0.9 * mse, 1.1 * mse)
    ]
    assert figures.evidence_bound(result) == pytest.approx(float(densities[0]) - 7)
    assert max(densities) == densities[0]


def test_verdicts_turn_round_with_the_figures():
    better = {f"{e} {of}": 50.0 for e in ("light", "pixels") for of in ("REC", "GEN-1", "GEN-2")}
    worse = dict.fromkeys(better, 70.0)
    holds = statements.no_worse_in_the_end(
        evidence_of({design.COMPUTED: better, design.LEARNED: worse})
    )
    fails = statements.no_worse_in_the_end(
        evidence_of({design.COMPUTED: worse, design.LEARNED: better})
    )
    distances = [[c for c in s.checks if "MSE" not in c.what] for s in (holds, fails)]
    assert [verdict(checks) for checks in distances] == [Outcome.HOLDS, Outcome.FAILS]


def test_the_runs_on_colour_images_differ_in_their_balance_only():
    experiment = design.colour()
    planned = [to_json(recipe) for _, recipe in experiment.planned()]
    assert len(planned) == 8
    balances = {(recipe["first"].pop("balance"), recipe.pop("seed")) for recipe in planned}
    assert len(balances) == 8 and all(recipe == planned[0] for recipe in planned)
    assert is_finished(experiment, there(RESULTS))


def test_a_second_stage_that_helps_on_one_data_set_only_is_said_to_be_mixed():
    good, bad = (
        {"light GEN-1": 60.0, "light GEN-2": 50.0},
        {"light GEN-1": 60.0, "light GEN-2": 66.0},
    )
    results = evidence_of({design.COMPUTED: good}, experiments=(design.MNIST,)).results
    results += evidence_of({design.COMPUTED: bad}, experiments=(design.FASHION,)).results
    text = verdict_text(statements.second_stage_is_better(figures.Evidence(results)).checks)
    assert text.startswith(
        "**mixed**: does not hold for Fashion-MNIST, FD-light; holds for MNIST, FD-light"
    )


def test_renormalisation_is_judged_where_much_variance_was_lost():
    def runs(change_at_large: float) -> figures.Evidence:
        lost = dict(zip(design.SECOND_STAGES, (0.3, 0.1, 0.6, 0.4, 0.05), strict=True))
        results = []
        for (steps, hidden), share in lost.items():
            after = 1 + change_at_large * share
            values = {
                "second_stage.variance_lost": share,
                f"pixels {BEFORE}": 1.0,
                f"pixels {AFTER}": after,
            }
            name = design.second_stages(steps, hidden)
            results += [made(name, design.COMPUTED, seed, **values) for seed in range(3)]
        return figures.Evidence(results)

    assert verdict(statements.renormalisation_helps(runs(-0.5)).checks) is Outcome.HOLDS
    assert verdict(statements.renormalisation_helps(runs(+0.5)).checks) is Outcome.FAILS


def test_rivals_are_sampled_in_their_better_way():
    values = {label: {"light GEN-mixture": 60.0} for label in design.RIVALS}
    values[design.WAE] = {"light GEN-1": 40.0, "light GEN-mixture": 60.0}
    values[design.COMPUTED] = {"light GEN-2": 50.0, "light GEN-mixture": 50.0}
    made_of = statements.better_than_rivals(evidence_of(values, experiments=(design.FASHION,)))
    outcomes = {check.what: check.outcome for check in made_of.checks}
    assert outcomes[f"{design.RIVALS[0]}, FD-light"] is Outcome.HOLDS
    assert outcomes[f"{design.WAE}, FD-light"] is Outcome.FAILS
    assert outcomes[f"{design.WAE}, both by a mixture, FD-light"] is Outcome.HOLDS


def test_the_ratchet_is_found_to_sink_with_smaller_batches():
    shares = dict(zip(design.BATCHES, (0.8, 0.9, 0.95), strict=True))
    results = []
    for batch, share in shares.items():
        for label, own in ((design.COMPUTED, 1.0), (design.RATCHET, share)):
            values = {"reconstruction.gamma2": own * 0.01, "claims.train_mse_sampled": 0.01}
            results += [
                made(f"{design.DIGITS}-batch-{batch}", label, seed, **values) for seed in range(3)
            ]
    assert verdict(questions.the_ratchet_sinks(figures.Evidence(results)).checks) is Outcome.HOLDS


def test_every_run_of_the_design_is_another_and_can_be_made():
    runs = [(e.name, label, recipe) for e in design.design() for label, recipe in e.planned()]
    assert len({(name, label, recipe.seed) for name, label, recipe in runs}) == len(runs) == 250
    assert len({name + str(to_json(recipe)) for name, _, recipe in runs}) == len(runs)
    for _, _, recipe in runs:
        assert make_objective(recipe.first.objective)


def test_all_models_of_a_comparison_have_stage_ones_of_one_size_and_schedule():
    (fashion,) = (e for e in design.design() if e.name == design.FASHION)
    mine = [recipe for _, recipe in fashion.planned() if recipe.seed == 0]
    sizes = {
        sum(p.numel() for p in first_stage(recipe, [1, 28, 28]).parameters()) for recipe in mine
    }
    schedules = {
        (r.first.epochs, r.first.batch_size, r.first.learning_rate, r.first.halve_every)
        for r in mine
    }
    assert len(mine) == 12 and len(sizes) == len(schedules) == 1


def test_published_results_belong_to_the_runs_of_the_design_and_to_no_other():
    results = [result for result in there(RESULTS) if result.experiment != design.COLOUR]
    experiments = {e.name: e for e in design.design()}
    assert len(results) == 250
    for result in results:
        mine = experiments[result.experiment]
        assert belongs(result, mine)
        for other in experiments.values():
            assert other is mine or not belongs(result, other), (result.name, other.name)
    assert all(is_finished(experiment, results) for experiment in experiments.values())
    assert not is_finished(experiments[results[0].experiment], results[1:])


def test_shorter_runs_are_beginnings_of_the_whole_ones():
    whole = design.IMAGES.first
    for epochs in design.LENGTHS:
        shorter = replace(whole, epochs=epochs)
        for step in range(0, shorter.total_steps(60_000), 100):
            assert shorter.learning_rate_at(step, 60_000) == whole.learning_rate_at(step, 60_000)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quick")
    main(["quick", "--out", str(out)])
    return out


def test_the_quick_set_trains_measures_and_writes_a_page(quick_run):
    results = read_results([quick_run / "results"])
    text = (quick_run / "claims.md").read_text()
    assert len(results) == 10 and "**10 of 10 runs**" in text and "Verdict: **" in text
    assert not list((quick_run / "runs").rglob("config.json"))
    assert all(result.data["source"] == "digits" for result in results)
    (experiment,) = design.quick()
    assert is_finished(experiment, results)
    sets = {m["of"] for m in results[0].measurements() if m["metric"] == "FD-pixels"}
    assert sets == set(design.EVERY_SET)


def test_finished_runs_are_not_done_again_though_their_data_are_gone(quick_run, monkeypatch):
    monkeypatch.setattr(poise.studies.comparison.experiment, "read_data", None)
    work(design.quick(), quick_run / "runs", quick_run / "results", jobs=1)


def test_a_result_of_other_settings_is_refused(quick_run, tmp_path):
    (experiment,) = design.quick()
    results = read_results([quick_run / "results"])
    first = replace(experiment.base.first, learning_rate=0.5)
    other = replace(experiment, base=replace(experiment.base, first=first))
    assert not any(belongs(result, other) for result in results)
    with pytest.raises(InputError, match="other settings"):
        work([other], tmp_path, quick_run / "results", jobs=1)
    with pytest.raises(InputError, match="other settings"):
        page(results)  # results of the quick design, page of the full one


def test_a_result_measured_with_other_images_than_the_design_says_does_not_belong(quick_run):
    (experiment,) = design.quick()
    result = read_results([quick_run / "results"])[0]
    assert belongs(result, experiment)
    for number, side in ((100, "train"), (200, "test")):
        sets = (design.compared("pixels", design.EVERY_SET, number, side),)
        other = replace(experiment, compared=dict.fromkeys(experiment.labels, sets))
        assert not belongs(result, other)


def test_a_result_does_not_say_where_its_images_lay(tmp_path, monkeypatch):
    images = np.zeros((40, 28, 28), np.uint8)
    images[::2, ::2], images[1::2, 1::2] = 255, 100
    monkeypatch.setenv("POISE_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "mnist.npz", x_train=images, x_test=images[:20])
    (experiment,) = design.quick()
    base = replace(
        experiment.base,
        data=Data("mnist"),
        first=replace(experiment.base.first, batch_size=20),
        second=None,
    )
    compared = {design.COMPUTED: ()}
    labels = {design.COMPUTED: {"balance": design.COMPUTED}}
    one = replace(experiment, base=base, labels=labels, compared=compared, seeds=1)
    work([one], tmp_path / "runs", tmp_path / "results", jobs=1)
    text = next((tmp_path / "results").iterdir()).read_text()
    assert str(tmp_path) not in text and text.count('"source": "mnist"') == 2
    assert is_finished(one, there(tmp_path / "results"))


def test_the_page_on_the_claims_is_what_the_results_make_of_it():
    assert PAGE.read_text(encoding="utf-8") == page(there(RESULTS)), "python -m claims page"


def test_the_readmes_table_is_what_the_results_make_of_it():
    readme = README.read_text(encoding="utf-8")
    assert readme == between(readme, BEGIN, END, in_readme(there(RESULTS))), "python -m claims page"
