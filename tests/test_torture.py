"""Test the short form of `make torture`, its page, and what the source must not call."""

import json
import random
import sys
from pathlib import Path

import pytest

import forking

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks are not in src

from benchmarks.torture import dependencies, mutations, page  # noqa: E402

SHORT = """
import json, sys
from dataclasses import asdict
from pathlib import Path
sys.path.insert(0, sys.argv[0])
from benchmarks.torture import cases, fuzzing
cases.import_what_commands_import()
folder = Path(sys.argv[1])
found = fuzzing.cases(seed=0, jobs=1, scale=0.003)[0]
(folder / "cases.json").write_text(json.dumps([asdict(case) for case in found]))
"""


def test_the_source_calls_nothing_that_runs_what_a_file_says():
    assert [*dependencies.forbidden_calls(dependencies.SOURCE)] == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import pickle", "import pickle"),
        ("from yaml import load", "import yaml.load"),
        ("from joblib import load", "import joblib.load"),
        ("eval('1')", "eval()"),
        ("exec('1')", "exec()"),
        ("torch.load(path)", "torch.load() without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load() without weights_only=True"),
        ("np.load(path)", "np.load() without allow_pickle=False"),
        ("np.load(path, allow_pickle=False)", ""),
        ("network.eval()", ""),
    ],
)
def test_what_runs_code_is_found_in_a_source(line, found, tmp_path):
    (tmp_path / "a.py").write_text(line)
    expected = [f"a.py:1: {found}"] if found else []
    assert [*dependencies.forbidden_calls(tmp_path)] == expected


@pytest.mark.slow
def test_the_short_form_finds_no_fault(tmp_path):
    forking.run(SHORT, [str(ROOT), str(tmp_path)], tmp_path)
    cases = json.loads((tmp_path / "cases.json").read_text())
    assert len(cases) == 6 and len({case["group"] for case in cases}) > 1
    assert [case for case in cases if case["outcome"] not in ("ok", "one line")] == []


def test_the_tables_on_reliability_are_those_of_the_results():
    text = (ROOT / page.PAGE).read_text(encoding="utf-8")
    reports = page.read_reports(ROOT / page.RESULTS)
    assert text == page.with_tables(text, reports), "python -m benchmarks.torture --page"
    assert not any(report["failed"] for report in reports.values())


@pytest.mark.parametrize("kind", ["bytes", "values"])
def test_mutations_are_those_of_the_seed(kind, tmp_path):
    written = []
    for seed in (1, 1, 2):
        (tmp_path / "a.json").write_text('{"a": [1, 2, {"b": 3}], "c": "text"}')
        mutations.MUTATIONS[kind](tmp_path / "a.json", random.Random(seed))
        written.append((tmp_path / "a.json").read_bytes())
    assert written[0] == written[1] != written[2]
