"""The benchmarks run: what they call has not moved away beneath them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


def report(script: str, folder: Path, *options: str) -> dict:
    path = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, str(SCRIPTS / script), *options, "--json", str(folder / "report.json")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text())


@pytest.mark.slow
def test_training_is_measured_beside_a_bare_loop(tmp_path):
    digits = report("training_rate.py", tmp_path, "--only", "digits", "--rounds", "1", "--seconds", "0.05")["networks"][
        "digits"
    ]
    assert set(digits["poise_over"]) == {"bare", "bare, channels_last"}
    # forward: two products of 64x256, 256x256 and 256x10 or 256x20 weights; backward: twice that, without the first input's
    weights = 64 * 256 + 256 * 256 + 256 * 20 + 10 * 256 + 256 * 256 + 256 * 64
    assert digits["gflop_per_step"] == pytest.approx(2 * 50 * (3 * weights - 64 * 256) / 1e9, rel=1e-3)


@pytest.mark.slow
def test_a_mapped_data_set_is_trained_on(tmp_path):
    rows = report("scaling.py", tmp_path, "--only", "images", "--most", "200", "--steps", "1")["images"]
    assert [row["images"] for row in rows] == [200] and rows[0]["images_per_second"] > 0
