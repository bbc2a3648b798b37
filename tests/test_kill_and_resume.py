"""Run benchmarks/kill_and_resume.py, which kills real processes, with few kills (default: ten)."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kill_and_resume.py"


@pytest.mark.slow
def test_a_process_killed_at_random_moments_ends_bit_identical():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "2", "--epochs", "4"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "bit-identical" in done.stdout, done.stdout + done.stderr
