"""Run benchmarks/kill_and_resume.py, which kills real processes, with few kills (default: ten)."""

from pathlib import Path

import pytest

import forking

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kill_and_resume.py"


@pytest.mark.slow
def test_a_process_killed_at_random_moments_ends_bit_identical(tmp_path):
    arguments = [str(SCRIPT), "--kills", "2", "--epochs", "4"]
    assert "bit-identical" in forking.run(forking.SCRIPT, arguments, tmp_path)
