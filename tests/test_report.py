"""Test the report: self-contained, equal to the run's files, and clear about missing parts."""

import base64
import html
import io
import json
import math
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from jinja2 import UndefinedError
from PIL import Image
from sklearn.neighbors import NearestNeighbors

import poise
from poise import cli
from poise.diagnosis.course import read_courses
from poise.errors import InputError
from poise.report import curves, models, pictures, sections, write_report
from poise.report import page as page_module
from poise.report.cells import results_of
from poise.report.curves import training_figures
from poise.report.latent_page import latent_figures
from poise.report.models import Exhibit
from poise.report.pictures import paired_sheet
from poise.report.records import read_record, read_records
from poise.report.words import model_sentence
from poise.studies.comparison import table
from poise.studies.results import write_result
from poise.support.html import templates
from poise.support.seeds import drawn

QUICK = {
    "epochs": 2,
    "second_epochs": 1,
    "batch_size": 100,
    "options": poise.Options(device="cpu", quiet=True),
}
SECTIONS = [
    "summary",
    "samples",
    "training",
    "latents",
    "diagnosis",
    "numbers",
    "settings",
    "data",
    "protocols",
    "versions",
]
HOSTILE = "<img src=x onerror=alert(1)>&\"'</script>"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of runs: two balances, one with two seeds and an evaluation."""
    folder = tmp_path_factory.mktemp("compared")
    for label, seed in (("computed", 0), ("computed", 1), ("fixed-beta=4", 0)):
        balance = label.replace("-", ":")
        run = poise.train(
            "digits", out=folder / f"{label}-{seed}", balance=balance, seed=seed, **QUICK
        )
    evaluation = poise.load(folder / "computed-0").evaluate(extractor="pixels")
    (folder / "computed-0" / "evaluation.json").write_text(json.dumps(evaluation.to_json()))
    assert run.finished
    return folder


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([runs / "computed-0"], tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def compared(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(runs, tmp_path_factory.mktemp("page") / "compared.html")


@pytest.fixture
def changed(runs: Path, tmp_path: Path) -> Path:
    """Return a copy of a run, from which a test may delete files."""
    return Path(shutil.copytree(runs / "computed-0", tmp_path / "run-0"))


def body(path: Path) -> str:
    """Return a page's HTML without the script of the plotting library."""
    content = path.read_text(encoding="utf-8")
    scripts = list(re.finditer(r"<script>.*?</script>", content, re.DOTALL))
    assert len(scripts) == 2
    return content[: scripts[0].start()] + content[scripts[0].end() :]


def words(path: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", body(path)))


def values(path: Path) -> dict:
    found = re.search(
        r'<script type="application/json" id="values">(.*?)</script>', body(path), re.DOTALL
    )
    assert found is not None
    return json.loads(found[1])


def cells(path: Path) -> dict[str, list[str]]:
    """Return the rows of all tables by their first cell; the first row of equal names wins."""
    rows = re.findall(r'<tr[^>]*><th scope="row">(.*?)</th>(.*?)</tr>', body(path))
    return {
        html.unescape(name): re.findall(r"<td>(.*?)</td>", rest) for name, rest in reversed(rows)
    }


class Elements(HTMLParser):
    """Count the elements of HTML, and collect its event handlers (attributes with code)."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags, self.handlers = Counter[str](), list[str]()
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def test_a_page_loads_nothing(page):
    content = body(page)
    assert "default-src 'none'" in content
    loaded = re.findall(r'(?:src|srcset|href|data|action)="([^"]*)"', content)
    assert loaded and all(target.startswith(("data:", "#")) for target in loaded)
    assert not re.search(
        r"@import|url\(|<link(?! rel=\"icon\" href=\"data:,\")|<iframe|<object", content
    )


def test_a_page_has_every_section_and_a_link_to_it(page, compared):
    assert re.findall(r'<section id="(\w+)"', body(page)) == SECTIONS
    assert re.findall(r'<section id="(\w+)"', body(compared)) == [
        SECTIONS[0],
        "comparison",
        *SECTIONS[1:],
    ]
    assert all(f'href="#{name}"' in body(compared) for name in [*SECTIONS, "comparison"])


def test_every_picture_has_an_alternative_text(page):
    shown = re.findall(r"<img [^>]*>", body(page))
    # Real images, three priors, two sheets of pairs, two of nearest images, the progress.
    assert len(shown) == 9
    assert all(re.search(r'alt="[^"]+"', picture) for picture in shown)


def test_numbers_are_those_of_the_summary(page, runs):
    summary = json.loads((runs / "computed-0" / "summary.json").read_text())
    stage1, rows = summary["reconstruction"], cells(page)
    for name, value in (
        ("MSE (per dimension)", stage1["mse"]),
        ("gamma2 (decoder variance)", stage1["gamma2"]),
    ):
        assert rows[name] == [f"{value:.5f}"]
    assert rows["KL (nats per image)"] == [f"{stage1['kl_nats']:.2f}"]
    figures = {figure["id"]: figure for figure in values(page)["figures"]}
    total = sum(summary["latents"]["kl_nats_per_latent"])
    assert sum(figures["latents1-kl"]["traces"][0]["y"]) == pytest.approx(total, rel=1e-4)
    bars = [trace["y"] for trace in figures["latents1-law"]["traces"]]
    assert np.mean(np.sum(bars, 0)) == pytest.approx(summary["latents"]["variance_law"], rel=1e-4)


def test_a_data_set_that_is_gone_for_one_run_may_be_there_for_another(unchecked):
    def gone():
        raise InputError("gone")

    cache = models.DataSetCache()
    data = {"source": "photos", "checksum": "1"}
    first = SimpleNamespace(data=data, dataset=gone)
    second = SimpleNamespace(data=data, dataset=lambda: "images")
    assert [cache.dataset(cast(Any, run)) for run in (first, second)] == ["gone", "images"]


def test_a_kl_that_is_infinite_comes_first_and_has_no_bar(runs):
    """JSON has null for it. Former defect: the report ended with a TypeError."""
    latents = {
        "kl_nats_per_latent": [1.0, None, 2.0],
        "variance_of_mean": [0.1, 0.2, 0.3],
        "mean_variance": [0.9, math.inf, 0.7],
        "aggregate": {"covariance_eigenvalues": [1.0, 1.0, 1.0]},
    }
    record, style = read_record(runs / "computed-0"), {"color": "#000", "dash": "solid"}
    kl, law, _ = latent_figures([(record, {"latents": latents})], {record.label: style})
    assert kl["traces"][0]["y"] == [None, 2.0, 1.0]
    assert [trace["y"] for trace in law["traces"]] == [[0.2, 0.3, 0.1], [None, 0.7, 0.9]]


def test_measurements_stand_with_their_protocols(page, runs):
    evaluation = json.loads((runs / "computed-0" / "evaluation.json").read_text())
    content = words(page)
    assert len(evaluation["protocols"]) > 1 and all(
        code in content for code in evaluation["protocols"]
    )
    distance = next(
        m for m in evaluation["measurements"] if m["metric"] == "FD-pixels" and m["of"] == "GEN-2"
    )
    assert f"GEN-2 {distance['value']:.4g}" in content


def test_settings_data_and_versions_are_those_of_the_config(page, runs):
    config, rows = json.loads((runs / "computed-0" / "config.json").read_text()), cells(page)
    assert rows["first.epochs"] == ["2"] and rows["network.hidden"] == ["256, 256"]
    assert config["data"]["checksum"] in body(page) and config["versions"]["torch"] in body(page)


def test_what_users_wrote_is_never_markup(runs, tmp_path):
    folder = tmp_path / "runs" / f"{HOSTILE.replace('/', '|')}-0"
    shutil.copytree(runs / "fixed-beta=4-0", folder)
    config = json.loads((folder / "config.json").read_text())
    config["data"] |= {"notes": [HOSTILE, "{{ 7 * 7 }}"], "source": HOSTILE}
    (folder / "config.json").write_text(json.dumps(config))
    out = write_report([folder, runs / "computed-0"], tmp_path / "report.html")
    assert "<img src=x" not in body(out) and "onerror" in words(out)
    assert html.unescape(body(out)).count(HOSTILE) == 3 and "{{ 7 * 7 }}" in words(out)
    seen = Elements(body(out))
    assert not seen.handlers and seen.tags["script"] == 2  # values and page.js
    assert values(out)["figures"][0]["traces"][1]["label"].startswith("<img src=x")


def test_labels_of_a_comparison_are_folders_without_their_seeds(runs):
    records = read_records([runs])
    assert [(record.label, record.seed) for record in records] == [
        ("computed", 0),
        ("computed", 1),
        ("fixed-beta=4", 0),
    ]


def test_a_run_given_twice_is_shown_once_and_equal_names_are_told_apart(runs, changed, tmp_path):
    assert len(read_records([runs, runs / "computed-0"])) == 3
    again = shutil.copytree(changed, tmp_path / "other" / changed.name)
    assert {record.label for record in read_records([changed, again])} == {
        f"{tmp_path.name}/run",
        "other/run",
    }


def test_the_comparison_is_that_of_poise_compare(compared, runs):
    results = results_of(read_records([runs]))
    assert cells(compared)["test MSE (per dimension)"] == table(results)[2][1:] and table(results)[
        1
    ][1:] == ["2", "1"]
    errors = [
        json.loads((runs / f"computed-{k}" / "summary.json").read_text())["reconstruction"]["mse"]
        for k in (0, 1)
    ]
    assert float(table(results)[2][1].split(" ± ")[0]) == pytest.approx(np.mean(errors), rel=1e-3)


def test_labels_and_numbers_are_those_that_a_comparison_wrote(changed, tmp_path):
    folder = Path(shutil.move(changed, tmp_path / "compared" / "fixed-beta=4-0"))
    evaluation = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").unlink()
    (record,) = read_records([folder.parent])
    assert record.evaluation is None and record.label == "fixed-beta=4"
    write_result(
        replace(results_of([record])[0], label="fixed:beta=4", evaluation=evaluation),
        folder.parent / "results",
    )
    (record,) = read_records([folder.parent])
    assert record.evaluation == evaluation and record.label == "fixed:beta=4"


def test_results_alone_make_a_page_with_the_numbers_and_curves_of_their_runs(
    compared, runs, tmp_path
):
    records = read_records([runs])
    for result in results_of(records):
        write_result(result, tmp_path / "results")
    shown = write_report([tmp_path], tmp_path / "alone.html")
    assert cells(shown)["test MSE (per dimension)"] == cells(compared)["test MSE (per dimension)"]
    assert "Only the result of this run is here" in words(shown) and "data:image/png" not in body(
        shown
    )
    drawn, expected = values(shown), values(compared)
    missing = {f"stage{k}-beta" for k in (1, 2)}  # results do not have the loss
    assert {f["id"] for f in drawn["figures"]} == {f["id"] for f in expected["figures"]} - missing
    for key, axis in expected["axes"].items():
        assert drawn["axes"][key]["images"][-1] == axis["images"][-1]
        assert drawn["axes"][key]["seconds"][-1] == pytest.approx(axis["seconds"][-1], abs=0.02)
    (one,) = read_records([tmp_path / "results" / f"{results_of(records)[0].name}.json"])
    assert (one.label, one.seed, one.alone) == (records[0].label, records[0].seed, True)


def test_results_of_several_experiments_are_told_apart_in_every_table(runs, tmp_path):
    for experiment, mse in (("one", 0.25), ("two", 0.75)):
        for found in results_of(read_records([runs]))[:2]:
            page = found.evaluation["reconstruction"] | {"mse": mse}
            write_result(
                replace(
                    found,
                    experiment=experiment,
                    evaluation=found.evaluation | {"reconstruction": page},
                ),
                tmp_path,
            )
    rows = {row[0]: row[1:] for row in table(results_of(read_records([tmp_path])))}
    assert rows["seeds"] == ["2", "2"] and rows["test MSE (per dimension)"] == [
        "0.2500 ± 0.0000",
        "0.7500 ± 0.0000",
    ]


def test_a_result_counts_once_and_of_two_that_contradict_each_other_none(runs, tmp_path):
    (found, *_) = results_of(read_records([runs]))
    one, other = write_result(found, tmp_path / "one"), tmp_path / "other" / "copy.json"
    other.parent.mkdir()
    shutil.copy(one, other)
    assert len(read_records([one, other.parent, tmp_path / "one"])) == 1
    later = {"training": found.seconds["training"] + 1}
    write_result(replace(found, seconds=later), other.parent)
    other.unlink()
    with pytest.raises(poise.InputError, match=r"there are several runs of .*computed, seed 0"):
        read_records([one, other.parent])


def test_of_a_run_that_is_gone_its_comparison_still_has_the_result(changed, tmp_path):
    folder = Path(shutil.move(changed, tmp_path / "compared" / "computed-0"))
    (found,) = results_of(read_records([folder]))
    for label, seed in (("computed", 0), ("computed", 1), ("another", 0)):
        write_result(
            replace(found, experiment="it", label=label, seed=seed), folder.parent / "results"
        )
    described = {"name": "it", "labels": {"computed": {}}, "results": "results"}
    (folder.parent / "experiment.json").write_text(json.dumps(described))
    assert [(r.label, r.seed, r.alone) for r in read_records([folder.parent])] == [
        ("computed", 0, False),
        ("computed", 1, True),
    ]


def entry(step: int, **more: float) -> dict[str, float]:
    terms = {"loss": 7.0, "reconstruction_nats": 3.0, "kl_nats": 1.0, "mse": 0.5, "gamma2": 1.0}
    return (
        {"stage": 1, "step": step, "images_seen": step * 10, "images_per_second": 5.0}
        | terms
        | more
    )


def test_time_is_that_of_training_whatever_lay_between():
    axis = curves.progress_of([entry(1), entry(2), entry(3, images_per_second=10.0)])
    assert axis == {"images": [10.0, 20.0, 30.0], "seconds": [2.0, 4.0, 5.0]}


def test_the_equivalent_beta_of_a_beta_vae_is_its_beta_over_the_error():
    assert curves.equivalent_beta(entry(1)) == pytest.approx(4 / 0.5)
    assert math.isnan(curves.equivalent_beta(entry(1, kl_nats=0.0)))


def test_a_thinned_curve_keeps_its_mean_and_has_gaps_where_nothing_is_finite():
    long = np.random.default_rng(0).normal(5, 1, 1000)
    assert np.mean(curves.thinned(long)) == pytest.approx(long.mean(), rel=1e-4)
    assert curves.thinned([1.0, math.nan, math.inf]) == [1.0, None, None]


def test_curves_end_where_the_log_ends(page, runs):
    lines = (runs / "computed-0" / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines if json.loads(line)["stage"] == 1][-1]
    axes, figures = values(page)["axes"], values(page)["figures"]
    trace = next(figure for figure in figures if figure["id"] == "stage1-gamma2")["traces"][0]
    assert axes[trace["axis"]]["images"][-1] == last["images_seen"] == 3200
    assert trace["y"][-1] == pytest.approx(last["gamma2"], rel=1e-3)


def test_the_elbo_of_held_out_and_of_training_images_are_drawn_where_they_were_measured(runs):
    measured = {2: (-9.0, -7.0), 4: (-10.0, -6.0)}
    entries = [
        entry(step)
        | dict(zip(("held_out_elbo_nats", "train_elbo_nats"), measured.get(step, ()), strict=False))
        for step in range(1, 5)
    ]
    record = replace(read_record(runs / "computed-0"), entries=tuple(entries))
    axes, figures = curves.training_figures([record])
    drawn = next(figure for figure in figures if figure["id"] == "stage1-elbo")["traces"]
    assert [trace["y"] for trace in drawn] == [[-9.0, -10.0], [-7.0, -6.0]]
    assert [trace.get("of", "") for trace in drawn] == ["", ", training images"]
    assert axes[drawn[0]["axis"]]["images"] == [20.0, 40.0]
    assert axes[drawn[0]["axis"]]["seconds"] == [4.0, 8.0]


def test_each_original_lies_above_its_reconstruction():
    originals, restored = torch.rand(3, 3, 64, 64), torch.rand(3, 3, 64, 64)
    uri = paired_sheet(originals, restored, columns=2)
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    rows = [pixels[:, top : top + 64, :64] for top in (0, 66, 132, 198)]
    for tile, image in zip(
        rows, (originals[0], restored[0], originals[2], restored[2]), strict=True
    ):
        assert torch.allclose(tile, image, atol=0.6 / 255)


def test_the_curves_of_a_flow_are_those_of_its_velocity(changed):
    log, config = changed / "metrics.jsonl", json.loads((changed / "config.json").read_text())
    config["recipe"]["second"]["objective"] = "flow"
    (changed / "config.json").write_text(json.dumps(config))
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    for entry in entries:
        if entry["stage"] == 2:
            entry["velocity_mse"] = entry.pop("mse")
            del entry["kl_nats"], entry["reconstruction_nats"]
    log.write_text("\n".join(map(json.dumps, entries)))
    record = read_record(changed)
    titles = [figure["title"] for figure in training_figures([record])[1] if figure["stage"] == 2]
    assert titles == ["MSE of the velocity, per latent", "γ², decoder variance"]
    assert model_sentence(record).startswith("A VAE with a flow as stage 2 (an MLP, ")
    assert set(read_courses(log)) <= {1}  # the diagnosis of a stage that was still improving


def test_a_large_picture_of_progress_is_reduced_and_a_damaged_one_is_said(tmp_path):
    path = tmp_path / "progress.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 1600, 3), np.uint8)).save(path)
    assert path.stat().st_size > pictures.LARGEST_PNG
    kind, _, content = pictures.picture_uri(path).partition(";base64,")
    with Image.open(io.BytesIO(base64.b64decode(content))) as shown:
        assert (kind, shown.format, shown.size) == ("data:image/jpeg", "JPEG", (1200, 300))
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(bytes(1000))
    with pytest.raises(InputError, match=r"progress\.png cannot be decoded"):
        pictures.picture_uri(path)


def test_distances_from_training_images_stand_beside_those_of_held_out_images(page, runs):
    data = poise.load(runs / "computed-0").dataset()
    test = data.test[drawn(len(data.test), models.TILES)].reshape(-1, 64) / 255
    neighbours = NearestNeighbors(n_neighbors=1).fit(data.train.reshape(-1, 64) / 255)
    distances = neighbours.kneighbors(test)[0][:, 0] / 8
    expected = [f"{np.median(distances):.4f}", f"{distances.min():.4f}"]
    rows = cells(page)
    assert rows["held-out test images"] == expected
    assert all(f"samples, {label}" in rows for label in ("GEN-1", "GEN-2", "GEN-mixture"))
    assert f"All {len(data.train):,} training images were searched." in words(page)


def test_latent_maps_are_the_mean_codes_channel_by_channel(tmp_path):
    vae = poise.VAE(*poise.networks.conv(8, 1, 2, width=8))
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    run = poise.train(images, vae=vae, out=tmp_path / "run", **QUICK)
    shown, test = Exhibit(read_record(tmp_path / "run")), torch.rand(3, 1, 8, 8)
    models._show_maps(shown, run, test)
    assert shown.maps is not None and "2 channels of 2×2 latents" in shown.about_maps
    content = base64.b64decode(shown.maps.partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(content))).astype(float)
    maps = run.encode(test).mean.unflatten(1, vae.decoder.latent_shape)
    for image in range(3):
        for channel in range(2):
            top, left = 66 * (channel + 1), 66 * image
            drawn_map = pixels[top : top + 64 : 32, left : left + 64 : 32]
            expected = (255 * (0.5 + maps[image, channel] / 6)).clamp(0, 255).numpy()
            assert np.abs(drawn_map - expected).max() <= 0.51


def test_pictures_of_a_sorted_data_set_show_every_part_of_it(tmp_path):
    """The data set begins with dark images, like a folder sorted by name or date."""
    values = np.linspace(0, 255, 400).astype(np.uint8)[:, None, None] + np.zeros(
        (1, 8, 8), np.uint8
    )
    values[:, 0, 0] = np.arange(400) % 256  # all images differ
    run = poise.train(values, out=tmp_path / "run", network="mlp", latent_dim=2, **QUICK)
    dataset = run.dataset()
    dataset = replace(dataset, test=dataset.train[:300])
    shown = Exhibit(read_record(run.folder))
    models._show_data(shown, run, dataset, {})
    for uris in ([shown.real], shown.pairs):
        sheets = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in uris]
        tones = np.concatenate([np.array(sheet).ravel() for sheet in sheets])
        dark, bright = np.quantile(tones[tones < 255], [0.05, 0.95])  # tones are 0 to 190, in order
        assert dark < 70 and bright > 140


def test_words_in_backticks_are_code_in_html(page):
    assert page_module.prose("Run `poise diagnose`.") == "Run <code>poise diagnose</code>."
    assert page_module.prose("`<b>`") == "<code>&lt;b&gt;</code>"
    assert "`" not in re.sub(r"<script.*?</script>", "", body(page), flags=re.DOTALL)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_phone_shows_the_second_column_of_a_comparison(compared, tmp_path):
    """The second column of each table of numbers fits on a screen of 360 pixels."""
    frame = tmp_path / "phone.html"
    probe = """<iframe id=f width=360 height=700 src="compared.html"></iframe><script>
    f.onload = () => {
      const tables = [...f.contentDocument.querySelectorAll('table.numbers')];
      const ends = tables.map(t => t.rows[1].cells[1].getBoundingClientRect().right);
      document.title = ends.filter(x => x).map(Math.round).join(' ') }</script>"""
    frame.write_text(probe)
    shutil.copy(compared, tmp_path / "compared.html")
    flags = (
        "--headless --no-sandbox --disable-gpu --allow-file-access-from-files "
        "--virtual-time-budget=20000 --dump-dom"
    )
    command = [
        str(CHROMIUM),
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        frame.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    edges = [int(edge) for edge in re.search(r"<title>([\d ]*)</title>", done.stdout)[1].split()]
    assert len(edges) >= 3 and max(edges) <= 360, edges


@pytest.mark.parametrize(
    "gone, sentences",
    [
        (["evaluation.json", "metrics.jsonl"], ["poise evaluate", "No curves: there is no log"]),
        (
            ["checkpoints", "summary.json", "codes"],
            ["Training is not finished", "The model cannot be loaded"],
        ),
    ],
    ids=["not evaluated, no log", "killed"],
)
def test_what_is_missing_is_said(gone, sentences, changed, tmp_path):
    for name in gone:
        shutil.rmtree(changed / name) if (changed / name).is_dir() else (changed / name).unlink()
    out = write_report([changed], tmp_path / "report.html")
    assert all(sentence in words(out) for sentence in sentences)
    assert re.findall(r'<section id="(\w+)"', body(out)) == SECTIONS


def test_commands_in_a_report_can_be_pasted_into_a_shell(changed, tmp_path):
    (changed / "evaluation.json").unlink()
    (record,) = read_records([shutil.copytree(changed, tmp_path / "my run")])
    assert any(f"`poise evaluate '{record.folder}'`" in sentence for sentence in record.missing)


def test_a_run_of_one_stage_on_colour_images_that_were_an_array(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    settings = QUICK | {"epochs": 1, "second_epochs": None, "batch_size": 20}
    poise.train(images, out=tmp_path / "run", network="mlp", latent_dim=3, stages=1, **settings)
    content = words(write_report([tmp_path / "run"], tmp_path / "report.html"))
    assert (
        "they were an array, which a run does not keep" in content and "one stage only" in content
    )
    assert "as drawn at the end of training" in content and "GEN-1: latents from N(0, I)" in content


def test_a_deterministic_rival_has_no_kl(tmp_path):
    run = poise.train("digits", out=tmp_path / "run", objective="autoencoder", **QUICK)
    out = write_report([run.folder], tmp_path / "report.html")
    assert "deterministic, without a KL" in words(out) and "objective autoencoder" in words(out)
    assert "reconstruction from the code" in words(out) and "posterior mean" not in words(out)
    drawn = {figure["id"] for figure in values(out)["figures"]}
    assert (
        not {"stage1-kl", "stage1-beta", "latents1-kl"} & drawn
        and {"stage2-kl", "latents1-spectrum"} <= drawn
    )


def test_wrong_paths_are_said_in_one_line(tmp_path, runs):
    with pytest.raises(poise.InputError, match="no such folder"):
        write_report([tmp_path / "nothing"])
    with pytest.raises(poise.InputError, match="holds no run"):
        write_report([tmp_path])
    others = tmp_path / "others"
    others.mkdir()
    (others / "bench.json").write_text("{}")
    (tmp_path / "experiment.json").write_text(json.dumps({"name": "begun", "results": str(others)}))
    with pytest.raises(poise.InputError, match="holds no run yet"):
        write_report([tmp_path])
    with pytest.raises(poise.InputError, match=r"config\.json is not a result"):
        write_report([runs / "computed-0" / "config.json"])
    with pytest.raises(poise.InputError, match=r"\.html file"):
        write_report([runs], tmp_path / "report.pdf")
    with pytest.raises(poise.InputError, match="give the folder"):
        write_report([])


def test_the_command_takes_several_folders_and_writes_where_it_says(
    runs, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        page_module,
        "_exhibits",
        lambda records, device, quiet: [Exhibit(record) for record in records],
    )
    cli.parse(["report", str(runs / "computed-0"), str(runs / "fixed-beta=4-0")]).run()
    assert capsys.readouterr().out == "report: report.html\n"
    assert all(
        f'data-label="{label}"' in body(tmp_path / "report.html")
        for label in ("computed", "fixed-beta=4")
    )


def test_a_name_that_a_template_lacks_is_an_error():
    with pytest.raises(UndefinedError, match="'deterministic' is undefined"):
        templates("poise.runs", autoescape=False).get_template("card.md").render()


def test_a_name_that_is_not_utf8_is_escaped(monkeypatch, tmp_path):
    monkeypatch.setattr(page_module, "read_records", lambda paths: [])
    monkeypatch.setattr(page_module, "page", lambda *parts: os.fsdecode(b"runs/caf\xe9"))
    write_report([tmp_path], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == b"runs/caf\\udce9"


def test_every_section_has_a_template_and_every_template_is_of_a_section():
    folder = Path(page_module.__file__).parent / "templates" / "sections"
    assert {path.stem for path in folder.iterdir()} == {part.name for part in sections.SECTIONS}


def test_the_libraries_of_a_report_are_imported_by_a_report_alone(run_python):
    code = """
import sys, poise.cli
poise.train, poise.load
print('jinja2' in sys.modules)
import poise.report
print('plotly' in sys.modules)
"""
    assert run_python(code).split() == ["False", "False"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_browser_draws_every_plot_without_a_complaint(compared, tmp_path):
    still = "--no-first-run --disable-background-networking"
    flags = (
        f"--headless --no-sandbox --disable-gpu {still} --disable-component-update --disable-sync"
    )
    further = [
        "--virtual-time-budget=20000",
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = [str(CHROMIUM), *flags.split(), *further, "--dump-dom", compared.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    complaints = [
        line for line in done.stderr.splitlines() if "CONSOLE" in line or "Uncaught" in line
    ]
    assert not complaints, complaints
    places = re.findall(r'<div class="plot[^"]*" id="([\w-]+)"', done.stdout)
    # plotly draws a figure as three layers, or two.
    drawn = done.stdout.count('class="main-svg"') / 3
    assert len(places) == len(values(compared)["figures"]) == 18 and drawn >= 2 / 3 * 18
