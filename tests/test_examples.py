"""Run the examples as they are, in a process without hooks."""

import re
from pathlib import Path

from PIL import Image

import forking

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_minimal_example_learns_both_stages_and_draws(tmp_path):
    arguments = [str(EXAMPLES / "minimal.py"), str(tmp_path / "samples.png"), "10"]
    out = forking.run(forking.SCRIPT, arguments, tmp_path)
    gamma2 = [float(value) for value in re.findall(r"gamma2 (\S+)", out)]
    assert gamma2[4] < gamma2[0] < 0.2
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (16 * 50, 8 * 50)
    assert len((EXAMPLES / "minimal.py").read_text().splitlines()) <= 120


def test_the_balance_works_in_a_loop_of_ones_own(tmp_path):
    out = forking.run(forking.SCRIPT, [str(EXAMPLES / "your_own_loop.py"), "4"], tmp_path)
    gamma2 = [float(value) for value in re.findall(r"gamma2 (\S+)", out)]
    assert len(gamma2) == 4 and gamma2[-1] < gamma2[0]
