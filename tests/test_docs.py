"""Test that the documents agree with the results, and that their links exist."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest

import poise
from poise.protocols import PROTOCOLS
from poise.recipes import RECIPES, Stage
from poise.runs import pipeline

ROOT = Path(__file__).parent.parent


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section(page: str, title: str) -> str:
    return (ROOT / page).read_text().split(f"{title}\n")[1].split("\n## ")[0]


def rows(table: str) -> list[list[str]]:
    return [
        re.split(r"\s*\|\s*", line.strip("| "))
        for line in table.splitlines()
        if line.startswith("|")
    ][2:]


MNIST_COLUMNS = {
    "mse": ".4f",
    "kl_nats": ".2f",
    "gamma2": ".4f",
    "quadratic_share": ".3f",
    "elbo_nats": ".0f",
    "active_units": ".1f",
}


def test_the_mnist_table_in_the_log_is_that_of_the_results():
    log = (ROOT / "docs" / "log.md").read_text()
    table = rows(log[log.index("### MNIST") : log.index("### CIFAR-10")])
    assert [row[0] for row in table] == ["computed", "learned", "fixed:gamma2=1"]
    for balance, *cells in table:
        files = (ROOT / "results").glob(f"mnist-balances-{re.sub('[:=]', '-', balance)}-*.json")
        runs = [json.loads(path.read_text()) for path in files]
        figures = [run["reconstruction"] | run["latents"] for run in runs]
        values = {name: [row[name] for row in figures] for name in MNIST_COLUMNS}
        assert cells == ["3"] + [
            f"{mean(values[name]):{style}} ± {stdev(values[name]):{style}}"
            for name, style in MNIST_COLUMNS.items()
        ]


def test_the_page_on_metrics_lists_every_protocol_with_its_hash():
    listed = {row[0].strip("`"): row[1] for row in rows(section("docs/metrics.md", "## Protocols"))}
    assert listed == {name: protocol.hash for name, protocol in PROTOCOLS.items()}


def test_the_table_of_what_each_choice_moves_is_that_of_the_results():
    report = json.loads((ROOT / "results" / "protocol-study.json").read_text())
    assert rows(script("protocol_study").tables(report)) == rows(
        section("docs/metrics.md", "## What each choice moves")
    )
    assert (
        f"(Spearman) {report['agreement']['spearman']:.2f}"
        in (ROOT / "docs" / "metrics.md").read_text()
    )


def test_the_tables_of_weights_tuned_by_hand_are_those_of_the_results():
    report = json.loads((ROOT / "results" / "bench-groups.json").read_text())
    assert rows(script("groups").tables(report)) == rows(
        section("docs/balances.md", "## Several errors without weights")
    )


def test_the_tables_of_flows_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    page, results = (ROOT / "docs" / "training.md").read_text(), ROOT / "results"
    paths = sorted(results.glob("bench-flow-faces-*.json"))
    by_size = json.loads((results / "bench-image-sizes.json").read_text())
    assert script("flow_steps").tables([json.loads(path.read_text()) for path in paths]) in page
    assert script("image_sizes").tables(by_size) in page


def test_the_table_of_the_released_rule_is_that_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = json.loads((ROOT / "results" / "bench-released-rule.json").read_text())
    page = (ROOT / "docs" / "replication.md").read_text()
    assert script("released_rule").table(report["rows"]) in page


def test_the_table_of_continued_runs_is_that_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = json.loads((ROOT / "results" / "bench-continuing.json").read_text())
    assert script("continuing").table(report) in (ROOT / "docs" / "training.md").read_text()
    for run in report["runs"]["constant"]:
        assert run["continued"] == run["long"]


def test_the_table_of_exports_is_that_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = json.loads((ROOT / "results" / "bench-exports.json").read_text())
    assert script("exports").table(report["rows"]) in (ROOT / "docs" / "share.md").read_text()


def code_of(page: str) -> str:
    """Return the Python code of a page, each line with its number there."""
    lines, inside = [], False
    for line in (ROOT / "docs" / page).read_text().splitlines():
        inside = line == "```python" or (inside and line != "```")
        lines.append(line if inside and line != "```python" else "")
    return "\n".join(lines)


def test_the_code_of_the_page_on_your_own_loop_runs():
    code = code_of("your-loop.md")
    assert sum(line != "" for line in code.splitlines()) > 50
    exec(compile(code, "docs/your-loop.md", "exec"), {"__name__": "page"})


def test_the_code_of_the_pages_on_labels_scores_statistics_and_machines_runs(tmp_path, monkeypatch):
    digits = RECIPES["digits"]
    network = replace(digits.network, hidden=(16,), latent_dim=5, flow_width=8, flow_blocks=1)
    stages = {"first": replace(digits.first, epochs=1), "second": Stage(steps=20)}
    monkeypatch.setitem(RECIPES, "digits", replace(digits, network=network, **stages))
    monkeypatch.setattr(pipeline, "finish", lambda *_, **__: None)  # pictures and figures
    monkeypatch.setenv("POISE_CACHE", "off")
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "page"}
    for page in ("labels.md", "scores.md", "metrics.md", "machines.md"):  # in the order of use
        exec(compile(code_of(page), f"docs/{page}", "exec"), space)
    run, scores = space["run"], space["scores"]
    assert run.classes == tuple("0123456789") and space["sevens"].shape == (64, 1, 8, 8)
    assert (tmp_path / "scores.csv").read_text().count("\n") == len(scores) + 1 == 65
    assert [m.metric for m in space["evaluation"].measurements] == ["FD-pixels"]


def test_the_code_of_the_section_on_callbacks_runs(tmp_path, monkeypatch):
    page = section("docs/training.md", "## Callbacks and the history")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    quick = {"epochs": 1, "stages": 1, "options": poise.Options(device="cpu", quiet=True)}

    def train(*given, **changes):
        mine = quick if "out" in changes and "more_epochs" not in changes else {}
        return real(*given, **(mine | changes))

    real = poise.train
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(poise, "train", train)
    names: dict = {}
    exec(compile(code, "docs/training.md", "exec"), names)
    assert names["run"].finished and names["run"].data["validation"] > 100


def test_the_tables_of_densities_are_those_of_the_results():
    report = json.loads((ROOT / "results" / "bench-tables.json").read_text())
    assert list(report["tables"]) == list(script("tables").TABLES)
    assert rows(script("tables").tables(report)) == rows(
        section("docs/tables.md", "## Twenty tables")
    )


def test_the_table_of_distances_is_that_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = json.loads((ROOT / "results" / "bench-distances.json").read_text())
    assert script("distances").table(report) in (ROOT / "docs" / "metrics.md").read_text()


def test_the_tables_of_mixed_tables_and_of_their_uses_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    mixed = json.loads((ROOT / "results" / "bench-mixed-tables.json").read_text())
    page = (ROOT / "docs" / "tables.md").read_text()
    assert script("mixed_tables").tables(mixed) in page
    uses = json.loads((ROOT / "results" / "bench-table-uses.json").read_text())["parts"]
    page += (ROOT / "docs" / "outliers.md").read_text()
    for part, found in uses.items():
        assert script("table_uses").tables({"parts": {part: found}}) in page


def test_the_site_has_every_page_and_the_reference_every_name():
    docs = ROOT / "docs"
    index, reference = docs / "index.md", docs / "api" / "index.md"
    listed = {
        (page.parent / entry).relative_to(docs).as_posix()
        for page in (index, reference)
        for block in re.findall(r"```{toctree}\n(.*?)```", page.read_text(), re.DOTALL)
        for entry in re.findall(r"^[\w/-]+$", block, re.MULTILINE)
    }
    pages = {path.relative_to(docs).with_suffix("").as_posix() for path in docs.rglob("*.md")}
    assert listed == {page for page in pages if not page.startswith("_build/")} - {"index"}
    text = "".join(path.read_text() for path in (docs / "api").glob("*.md"))
    modules = {"balance", "data", "explore", "features", "metrics", "networks", "priors"}
    modules |= {"protocols", "recipes", "report"}
    modules |= {"InputError", "Interrupted", "RunError"}  # poise.errors
    missing = [name for name in poise.__all__ if f"poise.{name}\n" not in text]
    assert set(missing) == modules


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_the_site_leaves_out_no_line(page):
    """A line that begins with % is a comment of the site's Markdown, and so are its next lines."""
    parts = page.read_text(encoding="utf-8").split("```")
    assert not re.findall(r"(?m)^\s*%.*", "".join(parts[::2]))


def test_the_table_of_odd_images_is_that_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = json.loads((ROOT / "results" / "bench-odd-images.json").read_text())
    page = (ROOT / "docs" / "scores.md").read_text()
    assert script("odd_images").tables(report) in page
    assert f"{report['train']:,} images" in page and f"{report['test']} held-out" in page


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], ids=lambda path: path.name
)
def test_links_between_documents_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
