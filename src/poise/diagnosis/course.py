"""The course of training: late spikes, and an error that was still falling at the end."""

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from poise.errors import InputError
from poise.runs.log import read_log

FEWEST_POINTS = 20  # entries of a log
MOST_POINTS = 2_000  # the medians of more take long
LATE = 5  # not in the first fifth of training, where a KL weight may rise within a few steps
SPIKED = 1.5  # median error after a spike over the lowest before it

Course = Sequence[tuple[float, float]]  # steps with the training error of each


def read_courses(log: Path) -> dict[int, Course]:
    """Return the training MSE of each stage of a run, by stage."""
    found: dict[int, list[tuple[float, float]]] = {}
    for entry in read_log(log, {"stage", "step", "mse"}):  # a flow has no MSE
        found.setdefault(int(entry["stage"]), []).append(
            (float(entry["step"]), float(entry["mse"]))
        )
    return dict(found)


def as_course(history: Any) -> Course:
    """Check the argument `history` of `diagnose` and return it with its steps.

    Raises:
        InputError: not numbers (n,) or (n, 2), or an error is negative.
    """
    try:
        values = torch.as_tensor(history, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0)
    if values.dim() not in (1, 2) or not len(values) or (values.dim() == 2 and values.size(1) != 2):
        raise InputError(
            "history must be the training MSE of each step, (n,), or pairs (step, MSE), (n, 2)"
        )
    if values.dim() == 1:
        values = torch.stack([torch.arange(1.0, len(values) + 1), values], 1)
    values = values[values.isfinite().all(1)]
    if (values[:, 1] < 0).any():
        raise InputError(
            "history holds negative numbers, but an MSE is >= 0: pass terms.error, not terms.loss"
        )
    return [(float(step), float(error)) for step, error in values]


def late_fall(course: Course) -> tuple[float, float] | None:
    """Return the mean error at 65 to 75 % of training, and in its last tenth.

    None: the log has too few entries to tell.
    """
    if len(course) < FEWEST_POINTS:
        return None
    end = course[-1][0]
    before = [error for step, error in course if 0.65 * end < step <= 0.75 * end]
    after = [error for step, error in course if 0.9 * end < step]
    return (fmean(before), fmean(after)) if before else None


def late_spike(course: Course) -> tuple[float, float, float] | None:
    """Return the step of a sudden rise that training did not recover from, and the errors.

    Errors are medians over 2 % of the log, so that one bad batch is no spike. A slow rise, as under
    a KL weight that grows, is none either.

    Returns:
        The step, the lowest error before it, and the error at the end; None: no such rise.
    """
    course = _thinned(course)
    errors = [error for _, error in course]
    width = max(3, len(errors) // 50)
    if len(errors) < max(FEWEST_POINTS, 4 * width):
        return None
    medians = [median(errors[i : i + width]) for i in range(len(errors) - width + 1)]
    lowest_so_far = list(accumulate(medians, min))
    end = median(errors[-max(width, len(errors) // 10) :])
    for i in range(max(2 * width, len(errors) // LATE), len(medians)):
        lowest = lowest_so_far[i - width]
        if medians[i] > SPIKED * medians[i - 2 * width] and min(medians[i], end) > SPIKED * lowest:
            jump = next(k for k in range(i - width, i + width) if errors[k] > SPIKED * lowest)
            return course[jump][0], lowest, end
    return None


def _thinned(course: Course) -> Course:
    """Return means over equal parts of a course with more than `MOST_POINTS` points."""
    size = -(-len(course) // MOST_POINTS)
    parts = [course[i : i + size] for i in range(0, len(course), size)] if size > 1 else []
    return [(part[0][0], fmean(e for _, e in part)) for part in parts] or course


def relative_fall(fall: tuple[float, float]) -> float:
    """Return the late fall of the error as a share of the error before it."""
    before, after = fall
    return (before - after) / before if before > 0 and math.isfinite(before) else 0.0
