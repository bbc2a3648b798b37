"""Test the integrations that need no other library, and the page that shows their figures.

`make integrations` runs the others.
"""

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # integrations are not in src

from integrations import action_chunks, comparing, table_loop  # noqa: E402
from integrations.__main__ import HERE, INTEGRATIONS, PAGE  # noqa: E402


@pytest.mark.parametrize("module", [table_loop, action_chunks])
def test_both_losses_train_on_the_same_rows(module):
    assert module.own(0, 0) == module.balanced(0, 0), "other rows, weights or noise"
    for train in (module.own, module.balanced):
        figures = train(0, 20)
        assert set(figures) == {"error", "kl_nats", "elbo"}
        assert all(map(math.isfinite, figures.values()))


def test_an_integration_changes_at_most_fifteen_lines():
    modules = {module for module, _, _ in INTEGRATIONS.values()}
    shared = {"__init__", "__main__", "comparing"}
    assert {path.stem for path in HERE.glob("*.py")} == modules | shared
    for module in modules:
        assert 1 <= comparing.changed_lines(HERE / f"{module}.py") <= 15, module


def test_the_table_of_the_page_on_your_own_loop_is_that_of_the_results():
    report = json.loads((ROOT / "results" / "integrations.json").read_text())
    assert list(report["integrations"]) == list(INTEGRATIONS)
    assert comparing.tables(report) in PAGE.read_text()


def test_the_scaling_factors_of_the_page_on_training_are_those_of_the_results():
    report = json.loads((ROOT / "results" / "integrations.json").read_text())
    found = report["integrations"]["diffusers AutoencoderKL"]
    page = " ".join((ROOT / "docs" / "training.md").read_text().split())
    for loss in ("own", "balanced"):
        factors = [figures["scaling_factor"] for figures in found[loss]]
        assert comparing.spread(factors, ".2f") in page
