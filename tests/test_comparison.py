"""Test comparisons: statistics, workers, and that no finished work is repeated."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from PIL import Image

import doubles
import poise
from poise import cli
from poise.protocols import DEFAULT
from poise.recipes import Data, Network, Recipe, Stage
from poise.recipes.settings import Changes
from poise.runs.checkpoint import newest_intact_checkpoint, save_checkpoint
from poise.runs.options import Options
from poise.studies.comparison import (
    differences,
    execution,
    markdown,
    measuring,
    speed,
    table,
    worker,
)
from poise.studies.comparison.execution import execute
from poise.studies.comparison.measuring import Measuring, resolve_extractor
from poise.studies.comparison.plan import Crew, Share, Task, crew_for, variants
from poise.studies.comparison.statistics import mean_interval, reached, spread, threshold
from poise.studies.comparison.tables import conditions
from poise.studies.comparison.worker import is_held, leased
from poise.studies.results import Result, read_results, write_result
from poise.support.guards import locked

IMAGES = np.random.default_rng(0).integers(0, 256, (90, 8, 8), dtype=np.uint8)
TINY = Recipe(
    name="tiny",
    data=Data("array"),
    network=Network("mlp", latent_dim=3, hidden=(16,), second_hidden=8),
    first=Stage(epochs=4, batch_size=20, learning_rate=1e-2),
    second=Stage(epochs=3, batch_size=20, learning_rate=1e-2),
)
BROKEN = "fixed:gamma2=1e-38"  # the loss overflows float32
QUIET = Options(device="cpu", quiet=True)
OFTEN = replace(QUIET, save_seconds=0.05)


def result(label: str, seed: int, mse: float, curve: list[float] | None = None) -> Result:
    """Return a result whose only figure is an MSE."""
    curve = curve or [mse]
    points = {
        "images_seen": [1000 * (k + 1) for k in range(len(curve))],
        "seconds": [2.0 * (k + 1) for k in range(len(curve))],
    }
    made = {"poise": "0", "machine": {"processor": "p", "threads": 1}, "device": "cpu"}
    evaluation = {"protocols": {}, "measurements": [], "notes": [], "reconstruction": {"mse": mse}}
    return Result(
        "trial",
        label,
        seed,
        {},
        {},
        made,
        {"training": 5.0},
        {"1": points | {"mse": curve}},
        evaluation,
    )


# statistics


def test_the_interval_of_a_mean_is_scipys_and_covers_it_as_often_as_it_says():
    import scipy.stats  # not above: the tests' processes import this module too

    values = np.random.default_rng(3).normal(size=(2_000, 3))
    found = [mean_interval(row) for row in values.tolist()]
    theirs = scipy.stats.ttest_1samp(values[0], 0).confidence_interval(0.95)
    assert found[0] == pytest.approx(tuple(theirs))
    covered = sum(low <= 0 <= high for low, high in found) / len(found)
    assert covered == pytest.approx(0.95, abs=0.015)  # three standard errors


def test_a_spread_is_the_sample_standard_deviation():
    values = [1.0, 4.0, 9.0]
    found = spread(values)
    assert found is not None and (found.mean, found.n) == (np.mean(values), 3)
    assert (
        found.deviation == pytest.approx(np.std(values, ddof=1))
        and spread([2.0]).deviation is None
        and spread([]) is None
    )


def test_differences_are_paired_by_seed_so_that_what_a_seed_does_to_both_cancels():
    effects = {0: 0.0, 1: 50.0, 2: -30.0, 3: 7.0}
    mine = [result("b", seed, 2.0 + 0.5 * (seed % 2) + effect) for seed, effect in effects.items()]
    theirs = [result("a", seed, 1.0 + effect) for seed, effect in reversed(effects.items())] + [
        result("a", 9, 1e6)
    ]
    rows = dict(differences([*theirs, *mine], "a"))
    assert rows["pairs"] == "4" and rows["test MSE (per dimension)"] == "+1.250 [+0.791, +1.709]"
    assert differences([*theirs, *mine], "a")[0] == ["", "b - a"]


def test_of_fewer_than_three_pairs_there_is_no_interval():
    rows = dict(
        differences(
            [result(label, seed, ord(label) / 100) for label in "ab" for seed in (0, 1)], "a"
        )
    )
    assert rows["test MSE (per dimension)"] == "+0.01000" and rows["pairs"] == "2"


def test_a_table_has_mean_spread_and_number_of_seeds_and_says_what_failed():
    results = [result("a", 0, 0.1), result("a", 1, 0.3), result("b", 0, 0.01)]
    rows = table(results, {"b": 1, "c": 2})
    assert rows[0] == ["", "a", "b", "c"] and rows[1] == [
        "seeds",
        "2",
        "1 (1 failed)",
        "0 (2 failed)",
    ]
    assert rows[2] == ["test MSE (per dimension)", "0.2000 ± 0.1414", "0.01000", "-"]
    assert rows[-1][0] == "training seconds" and not any("GEN" in row[0] for row in rows)


def test_markdown_has_the_cells_of_the_table():
    rows = table([result("a", 0, 0.1), result("b", 0, 0.2)])
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown(rows).splitlines()
    ]
    assert [lines[0], *lines[2:]] == rows and set("".join(lines[1])) == {"-", ":"}


def test_speed_counts_images_until_the_error_is_near_the_references_last():
    fast, slow, never = [0.5, 0.2, 0.105, 0.1], [0.5, 0.4, 0.3, 0.11], [0.5, 0.4, 0.3, 0.2]
    results = [result("a", 0, 0, fast), result("b", 0, 0, slow), result("b", 1, 0, never)]
    assert threshold(results[:1]) == pytest.approx(0.11)
    first = reached(results[0], "mse", 0.11)
    assert first is not None and (first.images, first.seconds) == (3000, 6.0)
    assert reached(results[2], "mse", 0.11) is None
    assert speed(results, "a") == [
        ["until training MSE <= 0.11", "a", "b"],
        ["runs that reached it", "1 of 1", "1 of 2"],
        ["thousand training images", "3.000", "4.000"],
        ["training seconds", "6.000", "8.000"],
    ]


def test_conditions_that_hold_for_some_labels_name_them():
    one, other = result("a", 0, 0), result("b", 0, 0)
    other.provenance["poise"] = "1"
    assert [line[:3] for line in conditions([one, other])] == ["a: ", "b: "]


def test_speed_compares_errors_of_one_kind_only():
    one, other = result("a", 0, 0, [0.5, 0.1]), result("b", 0, 0, [0.9, 0.3])
    other.curves["1"]["mae"] = other.curves["1"].pop("mse")
    for reference, words in (("a", "MSE <= 0.11"), ("b", "MAE <= 0.33")):
        head, counts, *_ = speed([one, other], reference)
        assert head[0] == f"until training {words}"
        assert counts[1:] == (["1 of 1", "-"] if reference == "a" else ["-", "1 of 1"])


def measured_as(seed: int, *made: tuple[str, str, float], label: str = "a") -> Result:
    """Return a result with distances of REC by protocol hash: 11 and 22 are named default."""
    found = result(label, seed, 0.1)
    protocols = {
        code: {"name": name}
        for code, name in (("11", "default"), ("22", "default"), ("33", "other"))
    }
    measured = [
        {"metric": metric, "of": "REC", "protocol": code, "value": value}
        for metric, code, value in made
    ]
    found.evaluation.update(protocols=protocols, measurements=measured)
    return found


def test_a_number_has_one_name_in_all_results_of_a_table():
    """The default protocol gives the plain name; the hash is added only if a name is ambiguous."""
    one = measured_as(0, ("FID", "11", 1.0))
    other = measured_as(
        1,
        ("FID", "11", 2.0),
        ("FID", "33", 3.0),
        ("FD-light", "22", 4.0),
        ("FID-infinity", "11", 0.0),
    )
    assert table_of_distances([one, other]) == [
        ["FID of REC", "1.500 ± 0.707"],
        ["FID of REC, other", "3.000 (of 1)"],
        ["FD-light of REC", "4.000 (of 1)"],
    ]
    unlike = [measured_as(0, ("FID", "11", 1.0)), measured_as(0, ("FID", "22", 5.0), label="b")]
    assert table_of_distances(unlike) == [
        ["FID of REC 11", "1.000", "-"],
        ["FID of REC 22", "-", "5.000"],
    ]
    assert not [
        row for row in differences(unlike, "a") if row[0].startswith("FID") and row[1] != "-"
    ]


def table_of_distances(results: list[Result]) -> list[list[str]]:
    rows = [row for row in table(results) if row[0].startswith("F")]
    return sorted(rows, key=lambda row: (row[0].startswith("FD"), row[0]))


# plan


def test_labels_change_stage_1_and_nothing_else():
    labels = variants(["computed", "fixed:beta=4"], ["rae-l2"], None)
    made = {label: Changes(**changes).apply(TINY) for label, changes in labels.items()}
    assert [recipe.first.balance for recipe in made.values()] == [
        "computed",
        "fixed:beta=4",
        "fixed:gamma2=0.5",
    ]
    assert [recipe.first.objective for recipe in made.values()] == ["vae", "vae", "rae-l2"]
    assert all(replace(recipe, first=TINY.first) == TINY for recipe in made.values())


@pytest.mark.parametrize(
    ("second", "expected"), [("same", ["learned", "computed"]), ("optimal", ["optimal", "optimal"])]
)
def test_stage_2_may_follow_the_label_or_have_a_balance_for_all(second, expected):
    labels = variants(["learned"], ["autoencoder"], second)
    assert [
        Changes(**changes).apply(TINY).second.balance for changes in labels.values()
    ] == expected


def test_threads_depend_on_all_tasks_and_cores_are_not_shared_twice(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    cpu = torch.device("cpu")
    shapes = [
        (len(crew.devices), crew.threads)
        for crew in (crew_for(cpu, None, n) for n in (1, 2, 3, 8, 30))
    ]
    assert shapes == [(1, 8), (2, 4), (3, 2), (8, 1), (8, 1)]
    assert crew_for(cpu, 2, 30) == Crew(("cpu", "cpu"), 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert crew_for(torch.device("cuda"), None, 3).devices == ("cuda:0", "cuda:1")
    three = crew_for(torch.device("cuda"), 3, 3)
    assert three == Crew(("cuda:0", "cuda:1", "cuda:0"), 4) and three.processes == 2
    assert crew_for(cpu, 3, 30).processes == 3
    assert crew_for(torch.device("cuda:1"), 2, 3).devices == ("cuda:1", "cuda:1")


def test_runs_of_one_gpu_share_a_process_and_others_have_one_each(tmp_path):
    a, b, c, d = todo = tasks(tmp_path, *"abcd")
    assert Crew(("cuda:0", "cuda:1", "cuda:0"), 4).shares(todo) == [
        Share((a, c, d), "cuda:0", 2),
        Share((b,), "cuda:1", 1),
    ]
    assert Crew(("cpu", "cpu"), 1).shares(todo) == [Share((task,), "cpu") for task in todo]


def test_a_backend_of_joblib_that_the_user_chose_decides_how_many_runs_there_are_at_a_time():
    with joblib.parallel_config("threading", n_jobs=3):
        assert crew_for(torch.device("cpu"), None, 9) == Crew(("cpu",) * 3, None)
        assert crew_for(torch.device("cpu"), 2, 9) == Crew(("cpu",) * 2, None)


def test_small_images_are_compared_by_pixels_and_others_by_what_is_at_hand(monkeypatch):
    device = torch.device("cpu")
    assert resolve_extractor("light", 8, device) == ("light", ())
    assert resolve_extractor("auto", 8, device)[0] == "pixels"
    monkeypatch.setattr(
        measuring, "choose_extractor", lambda *arguments: (DEFAULT, None, ("nothing",))
    )
    spec, notes = resolve_extractor("auto", 32, device)
    assert spec == "pixels" and "poise[light]" in notes[0]


# execution (tasks train nothing)


def tasks(folder: Path, *labels: str) -> list[Task]:
    how = Measuring((DEFAULT,), "none", ())
    return [
        Task("trial", label, TINY, folder / label, folder / "results", how, num_images=90)
        for label in labels
    ]


@pytest.fixture
def double(monkeypatch):
    """Replace workers by doubles that end as the label says."""
    monkeypatch.setattr(execution, "work", doubles.work)


@pytest.mark.slow
def test_a_worker_that_is_killed_and_a_task_that_fails_stop_no_other(tmp_path, double, capfd):
    todo = tasks(tmp_path, "good", "dies", "fails", "better", "best")
    outcome = execute(todo, Crew(("cpu",) * 2, 1), title="trial")
    messages = {path.stem: message for path, message in outcome.failed.items()}
    assert messages.pop("trial-fails-0") == "too bad"
    assert "killed twice" in messages["trial-dies-0"] and "SIGKILL(-9)" in messages["trial-dies-0"]
    assert len(messages) == 1 and not outcome.late and "trial 145/145" in capfd.readouterr().err


def test_a_task_that_fails_stops_no_other_in_one_process(tmp_path, double, capfd):
    outcome = execute(tasks(tmp_path, "good", "fails", "better"), Crew(("cpu",), 1), title="trial")
    assert [path.stem for path in outcome.failed] == ["trial-fails-0"]
    assert "trial 87/87" in capfd.readouterr().err


def test_when_the_time_is_up_all_stop(tmp_path, double):
    todo, until = tasks(tmp_path, "good", "sleeps", "sleeps", "better"), time.monotonic() + 1
    outcome = execute(todo, Crew(("cpu",), 1), title="t", until=until, quiet=True)
    assert outcome.late and not outcome.failed


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_stops_all_and_says_how_to_go_on(jobs, tmp_path, double):
    todo = tasks(tmp_path, "sleeps", "sleeps", "sleeps")
    with (
        signalled_when(lambda: any(tmp_path.rglob(".going-*"))),
        pytest.raises(poise.Interrupted, match="run the same command to go on"),
    ):
        execute(todo, Crew(("cpu",) * jobs, 1), title="t", quiet=True)


@contextmanager
def signalled_when(begun: Callable[[], bool]) -> Iterator[None]:
    """Send SIGTERM to this process once a condition holds, unless the block ends before."""
    sent = []

    def send():
        if not sent and begun():
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "POLL_SECONDS", 0.01)
        with execution.repeated(send):
            yield


def test_a_lease_ends_when_it_is_released_and_when_its_process_is_killed(tmp_path):
    with leased(tmp_path) as lease:
        path = Path(lease.lock_file)
        assert is_held(path)
        lease.release()
        assert not is_held(path)
    assert not list(tmp_path.iterdir()) and not is_held(path)
    code = """
import sys, time
from pathlib import Path
from poise.studies.comparison.worker import leased
with leased(Path(sys.argv[1])) as lease:
    print(lease.lock_file, flush=True)
    time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        assert is_held(path)
        process.kill()
    assert path.exists() and not is_held(path)


# whole comparisons


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved, _ = newest_intact_checkpoint(folder / "checkpoints")
    assert saved is not None and saved.meta["finished"]
    return saved.tensors


def tiny(folder: Path, *balances: str, seeds: int = 1, **options) -> poise.Comparison:
    return poise.compare(
        IMAGES,
        recipe=TINY,
        balances=balances,
        seeds=seeds,
        out=folder,
        jobs=1,
        options=QUIET,
        **options,
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> poise.Comparison:
    return tiny(tmp_path_factory.mktemp("comparisons") / "one", "computed", BROKEN, "learned")


def test_runs_of_a_comparison_are_ordinary_runs(compared, tmp_path):
    run = poise.train(
        IMAGES,
        recipe=replace(TINY, first=replace(TINY.first, balance="learned")),
        out=tmp_path,
        options=QUIET,
    )
    mine, theirs = weights(compared.folder / "learned-0"), weights(tmp_path)
    assert mine.keys() == theirs.keys() and all(
        torch.equal(mine[name], theirs[name]) for name in mine
    )
    evaluation = run.evaluate(extractor="pixels")
    (found,) = [r for r in compared.results if r.label == "learned"]
    assert found.value("FD-pixels", "GEN-2") == evaluation.value("FD-pixels", "GEN-2")
    assert (
        found.measurements()[0]["protocol"] == evaluation.to_json()["measurements"][0]["protocol"]
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> poise.Comparison:
    """Return a comparison of longer runs, one after another, that nothing interrupted."""
    shared = {"recipe": LONGER, "balances": ["computed", "learned"], "seeds": 1, "jobs": 1}
    return poise.compare(IMAGES, out=tmp_path_factory.mktemp("whole"), options=QUIET, **shared)


@pytest.fixture
def one_process(monkeypatch):
    """Run all tasks of a CPU in threads of one process, as on a GPU."""
    monkeypatch.setattr(Crew, "_by_device", True)


def test_runs_side_by_side_in_one_process_are_as_those_of_processes_of_their_own(
    compared, one_process, tmp_path
):
    together = poise.compare(
        IMAGES,
        recipe=TINY,
        balances=["computed", BROKEN, "learned"],
        seeds=1,
        out=tmp_path,
        jobs=3,
        options=QUIET,
    )
    assert [(key, " ".join(message.split())) for key, message in together.failed.items()] == list(
        compared.failed.items()
    )
    for label in ("computed", "learned"):
        alone, beside = weights(compared.folder / f"{label}-0"), weights(tmp_path / f"{label}-0")
        assert all(torch.equal(alone[name], beside[name]) for name in alone)
    assert [r.measurements() for r in together.results] == [
        r.measurements() for r in compared.results
    ]


def test_few_of_the_runs_side_by_side_are_evaluated_at_once(one_process, tmp_path, monkeypatch):
    busy, most, evaluate = set[str](), 0, worker.measured

    def counted(run, *given):
        nonlocal most
        busy.add(run.folder.name)
        most = max(most, len(busy))
        time.sleep(0.2)
        found = evaluate(run, *given)
        busy.remove(run.folder.name)
        return found

    monkeypatch.setattr(worker, "measured", counted)
    monkeypatch.setattr(worker, "EVALUATED_AT_ONCE", threading.Semaphore(2))
    shared = {"balances": ["computed"], "seeds": 4, "jobs": 4, "out": tmp_path}
    together = poise.compare(IMAGES, recipe=TINY, **shared, options=QUIET)
    assert len(together.results) == 4 and most == 2


def test_runs_side_by_side_stop_together_and_go_on(whole, one_process, tmp_path, monkeypatch):
    shared = {
        "recipe": LONGER,
        "balances": ["computed", "learned"],
        "seeds": 1,
        "jobs": 2,
        "out": tmp_path / "stopped",
    }

    def both_have_begun() -> bool:
        return len(list((tmp_path / "stopped").glob("*/checkpoints/[0-9]*"))) >= 2

    def save_slowly(*given):  # so that neither run is over before the signal is noticed
        save_checkpoint(*given)
        time.sleep(0.2)

    with (
        signalled_when(both_have_begun),
        monkeypatch.context() as patch,
        pytest.raises(poise.Interrupted, match="run the same command to go on"),
    ):
        patch.setattr("poise.runs.job.save_checkpoint", save_slowly)
        poise.compare(IMAGES, **shared, options=OFTEN)
    assert not (tmp_path / "stopped" / "results").exists()
    went_on = poise.compare(IMAGES, **shared, options=QUIET)
    assert [r.measurements() for r in went_on.results] == [r.measurements() for r in whole.results]
    for label in ("computed-0", "learned-0"):
        expected, found = weights(whole.folder / label), weights(tmp_path / "stopped" / label)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_failed_run_is_in_the_table_and_the_others_are_finished(compared):
    assert [r.label for r in compared.results] == ["computed", "learned"]
    ((label, _), message), *others = compared.failed.items()
    assert label == BROKEN and "not finite" in message and not others
    assert compared.table()[1] == ["seeds", "1", "1", "0 (1 failed)"]
    page = (compared.folder / "table.md").read_text()
    assert (
        page == str(compared)
        and f"failed: {BROKEN}, seed 0: the loss" in page
        and "FD-pixels of GEN-mixture" in page
    )
    assert read_results([compared.folder]) == sorted(compared.results, key=lambda r: r.label)


def test_the_command_prints_the_table_writes_a_page_and_fails_if_a_run_did(
    compared, monkeypatch, capsys
):
    monkeypatch.setattr(poise.studies.comparison, "compare", lambda *arguments, **options: compared)
    monkeypatch.setattr(sys, "argv", ["poise", "compare", "--seeds", "1", "--device", "cpu"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    out, errors = capsys.readouterr()
    assert exit.value.code == 1 and errors.splitlines()[-1].startswith(
        "poise: error: 1 of 3 runs failed"
    )
    assert str(compared) in out and (compared.folder / "report.html").stat().st_size > 10_000


def test_what_is_finished_is_not_done_again_and_more_may_be_asked(compared, tmp_path, monkeypatch):
    def forbidden(*arguments, **options):
        raise AssertionError("nothing was left to do")

    monkeypatch.setattr(poise.studies.comparison.experiment, "execute", forbidden)
    path = compared.folder / "experiment.json"
    earlier = json.loads(path.read_text())
    del earlier["settings"]["data"]["labels"]  # a version without this setting wrote it
    path.write_text(json.dumps(earlier))
    again = tiny(compared.folder, "computed", "learned")
    assert again.results == compared.results and not again.failed
    for changed in ({"seeds": 2}, {"images": 5}, {"protocol": "dai-wipf"}, {"extractor": "light"}):
        with pytest.raises(AssertionError, match="nothing was left"):
            tiny(compared.folder, "computed", **changed)


@pytest.mark.parametrize(
    ("network", "mixture"),
    [
        (Network("conv", latent_channels=2, conv_width=8, second_hidden=8), True),
        (Network("mlp", latent_dim=513, hidden=(8,), second_hidden=8), False),
    ],
    ids=["latent map", "too many latents for a mixture"],
)
def test_a_network_whose_latents_are_counted_or_many_has_results(network, mixture, tmp_path):
    """Former defect: they were trained, and the comparison was empty without an error."""
    recipe = replace(TINY, network=network)
    how = {"recipe": recipe, "balances": ["computed"], "seeds": 1, "jobs": 1, "options": QUIET}
    compared = poise.compare(IMAGES, out=tmp_path / "one", **how)
    assert ("GEN-mixture" in str(compared)) and len(compared.results) == 1
    measured = {m["of"] for m in compared.results[0].measurements()}
    assert ("GEN-mixture" in measured) == mixture and "GEN-2" in measured
    assert poise.compare(IMAGES, out=tmp_path / "one", **how).results == compared.results


def test_a_prior_that_cannot_be_made_is_left_out_of_the_table(tmp_path):
    """Former defect: without the mixture, the result did not count as finished."""
    wild = replace(TINY, first=replace(TINY.first, learning_rate=1e4), second=None)
    how = {"recipe": wild, "out": tmp_path, "options": QUIET, "jobs": 1, "seeds": 1}
    (found,) = poise.compare(IMAGES, models=["autoencoder"], **how).results
    assert any(note.startswith("no GEN-mixture:") for note in found.evaluation["notes"])
    assert "GEN-mixture" not in {m["of"] for m in found.measurements()}


def test_figures_of_the_model_are_of_test_images_if_samples_are_compared_with_training_images(
    tmp_path,
):
    """Former defect: the runs were trained, and their results then counted as missing."""
    found = tiny(tmp_path, "computed", protocol="50k-train", extractor="pixels")
    (result,) = found.results
    counts = {m["metric"]: m["protocol"] for m in result.measurements() if m["of"] == "REC"}
    protocols = {m: result.evaluation["protocols"][code] for m, code in counts.items()}
    assert (protocols["MSE"]["reference"], protocols["MSE"]["real"]) == ("test", 9)
    assert (protocols["FD-pixels"]["reference"], protocols["FD-pixels"]["real"]) == ("train", 81)


def test_too_few_test_images_are_said_before_training(tmp_path):
    how = {"recipe": TINY, "balances": ["computed"], "seeds": 1, "options": QUIET, "jobs": 1}
    with pytest.raises(poise.InputError, match="1 test image cannot be compared with others"):
        poise.compare(IMAGES[:12], out=tmp_path / "a", extractor="pixels", **how)
    found = poise.compare(IMAGES[:12], out=tmp_path / "b", extractor="none", **how)
    assert found.results[0].value("MSE", "REC") > 0


def test_half_precision_tensors_are_compared_as_they_are_trained_on(tmp_path):
    images = torch.from_numpy(IMAGES[:30, None] / 255).bfloat16()
    how = {"recipe": TINY, "balances": ["computed"], "seeds": 1, "options": QUIET, "jobs": 1}
    found = poise.compare(images, out=tmp_path, extractor="none", **how)
    assert found.results[0].data["train"] == 27


def test_a_folder_called_like_a_data_set_is_compared_as_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    for number, image in enumerate(IMAGES[:30]):
        Image.fromarray(image).save(f"digits/{number:02}.png")
    how = {"recipe": TINY, "balances": ["computed"], "seeds": 1, "options": QUIET, "jobs": 1}
    found = poise.compare(Path("digits"), out="a", extractor="none", **how)
    assert found.results[0].data["train"] + found.results[0].data["test"] == 30


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        ({"balances": ["computed", "controlled:target_bits=9"]}, {"validation": 0.2}, "target of"),
        ({"models": ["rae-l2"]}, {"validation": 0.2}, "rae-l2 has no ELBO"),
        ({"models": ["rae-l2"]}, {"standardise": "after"}, "is for the objective vae"),
    ],
)
def test_a_label_that_cannot_be_trained_is_refused_before_any_is(
    labels, changes, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(poise.studies.comparison.experiment, "execute", None)
    with pytest.raises(poise.InputError, match=message):
        poise.compare(IMAGES, recipe=TINY, out=tmp_path, options=QUIET, **labels, **changes)


def test_an_array_is_compared_with_the_levels_that_it_is_trained_with(tmp_path):
    images = (IMAGES // 16).astype(float)
    how = {"recipe": TINY, "levels": 16, "out": tmp_path, "options": QUIET, "jobs": 1}
    assert len(poise.compare(images, balances=["computed"], seeds=1, **how).results) == 1


@pytest.mark.parametrize("changes", [{"epochs": 5}, {"latent_dim": 2}, {"second_balance": "same"}])
def test_another_comparison_in_the_same_folder_is_refused(compared, changes):
    with pytest.raises(poise.InputError, match="holds another experiment"):
        tiny(compared.folder, "learned", **changes)


def test_a_result_that_is_damaged_or_of_other_images_or_seeds_does_not_count(compared, tmp_path):
    (good, *_) = compared.results
    how = Measuring((), "pixels", ())
    recipe = replace(TINY, data=Data(good.settings["data"]["source"]))
    task = Task(
        good.experiment, good.label, recipe, tmp_path, tmp_path, how, checksum=good.data["checksum"]
    )
    path = write_result(good, tmp_path)
    assert task.result_path == path and task.result() == good
    assert replace(task, checksum="another").result() is None
    assert (
        replace(task, recipe=replace(recipe, first=replace(recipe.first, epochs=9))).result()
        is None
    )
    assert replace(task, recipe=replace(recipe, data=Data("elsewhere"))).result() == good
    path.write_text(path.read_text()[:-9])
    assert task.result() is None


def test_without_the_second_stage_among_the_priors_none_is_trained(tmp_path, monkeypatch):
    asked, nothing = [], poise.Comparison("compare-tiny", tmp_path, (), "computed", {})
    monkeypatch.setattr(
        poise.studies.comparison.comparing,
        "conduct",
        lambda experiment, **where: asked.append(experiment) or nothing,
    )
    one_stage = replace(TINY, second=None)
    for recipe, priors in (
        (TINY, ["mixture", "normal"]),
        (TINY, ["second-stage"]),
        (TINY, None),
        (one_stage, None),
    ):
        poise.compare("digits", recipe=recipe, priors=priors, out=tmp_path)
    trained = [experiment.base.second is not None for experiment in asked]
    measured = [experiment.priors for experiment in asked]
    assert trained == [False, True, True, False]
    assert measured == [
        ("normal", "mixture"),
        ("second-stage",),
        ("normal", "second-stage", "mixture"),
        ("normal", "mixture"),
    ]


WRONG = {
    "a balance": (["--balances", "computd"], "unknown balance 'computd'"),
    "an option of a balance": (
        ["--balances", "fixed:beta=x"],
        "beta='x' of balance 'fixed' is not a number: write fixed:beta=1",
    ),
    "a label twice": (["--balances", "fixed", "fixed"], "fixed is given twice"),
    "a model": (["--models", "gan"], "unknown objective 'gan'"),
    "no stage 2": (["--priors", "second-stage", "--stages", "1"], "needs a second stage"),
    "a stage 2 of nothing": (
        ["--priors", "normal", "--second-epochs", "3"],
        "makes no sense with one stage",
    ),
    "seeds": (["--seeds", "0"], "seeds must be at least 1"),
    "jobs": (["--jobs", "0"], "jobs must be at least 1"),
    "data": (["nowhere"], "'nowhere' does not exist"),
    "a recipe": (["--recipe", "nothing"], "unknown recipe"),
    "a protocol": (["--protocol", "nothing"], "no protocol 'nothing'"),
    "an extractor": (["--extractor", "nothing"], "no extractor 'nothing'"),
    "a number of images": (["--images", "0"], "real must be at least 1"),
    "a network": (["--network", "infogan", "--size", "9"], "not 9"),
    "an engine": (["--engine", "captured"], "a captured step is for one process on cuda"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_line_before_anything_starts(case, tmp_path, monkeypatch, capsys):
    arguments, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["poise", "compare", *arguments, "--device", "cpu", "--out", "it"]
    )
    with pytest.raises(SystemExit) as exit:
        cli.main()
    complaint = capsys.readouterr().err
    assert (
        exit.value.code == 2
        and complaint.count("\n") == 1
        and message in complaint
        and not list(tmp_path.iterdir())
    )


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(poise.InputError, match="not empty"):
        tiny(tmp_path, "computed")


# Without stage 2 the prior second-stage does not exist.
LONG = replace(TINY, first=replace(TINY.first, epochs=80), second=None)


LONGER = replace(LONG, first=replace(LONG.first, epochs=200))
SCRIPT = """
import poise, test_comparison as t
labels = dict(recipe=t.LONGER, balances=["computed", "learned"], seeds=1)
poise.compare(t.IMAGES, **labels, out={folder!r}, jobs=2, options=t.OFTEN)
"""  # no `if __name__ == "__main__"`


@pytest.mark.slow
@pytest.mark.parametrize(("how", "jobs"), [(signal.SIGKILL, 2), (signal.SIGTERM, 1)])
def test_runs_stop_with_the_process_that_leads_them_and_go_on_to_the_same_numbers(
    how, jobs, whole, tmp_path
):
    folder, script = tmp_path / "study", tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(folder)))
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    process = subprocess.Popen([sys.executable, script], env=os.environ | {"PYTHONPATH": path})
    runs = [folder / "computed-0", folder / "learned-0"]
    while not all(any((run / "checkpoints").glob("[0-9]*")) for run in runs):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    process.wait()
    finished = []
    for run in runs:
        free_within(run, 30)
        saved, _ = newest_intact_checkpoint(run / "checkpoints")
        assert saved is not None
        finished.append(saved.meta["finished"])
    assert not all(finished)
    shared = {"recipe": LONGER, "balances": ["computed", "learned"], "seeds": 1, "options": QUIET}
    again = poise.compare(IMAGES, out=folder, jobs=jobs, **shared)
    assert [r.measurements() for r in again.results] == [r.measurements() for r in whole.results]
    for run in runs:
        expected, found = weights(whole.folder / run.name), weights(run)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def free_within(run: Path, seconds: float) -> None:
    """Wait until no process holds the lock of a run's folder."""
    until = time.monotonic() + seconds
    while True:
        try:
            with locked(run):
                return
        except poise.InputError:
            assert time.monotonic() < until
            time.sleep(0.1)


ON_DASK = """
import sys
from multiprocessing import forkserver
import dask, joblib, poise, forking, test_comparison as t
from dask.distributed import Client, LocalCluster, get_task_stream

forkserver.ensure_running()  # before Dask chooses what its workers import
dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
labels = dict(recipe=t.TINY, balances=["computed", "learned"], seeds=2)
how = dict(**labels, out=sys.argv[1], options=t.QUIET)
with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
    with Client(cluster) as client, get_task_stream(client) as stream:
        with joblib.parallel_config("dask"):
            first = poise.compare(t.IMAGES, **how)
            again = poise.compare(t.IMAGES, **how)
    calls = [task["worker"] for task in stream.data if "work" in str(task["key"])]
print(len(first.results), len(calls), len(set(calls)), again.results == first.results)
"""


@pytest.mark.slow
def test_the_runs_of_a_comparison_are_done_once_by_the_workers_of_a_dask_cluster(
    tmp_path, run_forked
):
    pytest.importorskip("dask.distributed")
    assert run_forked(ON_DASK, str(tmp_path / "dask")).split() == ["4", "4", "2", "True"]
    here = poise.compare(
        IMAGES,
        recipe=TINY,
        balances=["computed", "learned"],
        seeds=2,
        out=tmp_path / "here",
        jobs=1,
        options=QUIET,
    )
    there = read_results([tmp_path / "dask"])
    assert {r.name: r.measurements() for r in there} == {
        r.name: r.measurements() for r in here.results
    }
