"""Plot the training curves against images seen: error, KL, decoder variance, held-out ELBO."""

import io
import math
from pathlib import Path
from typing import Any

from poise.errors import InputError, MissingExtraError
from poise.runs.log import HELD_OUT, TRAINING, read_log

COLUMNS = 3
# The log of a deterministic autoencoder has a penalty in place of the KL, that of a flow neither.
CURVES = (
    ("mse", "MSE", "log"),
    ("mae", "mean absolute error", "log"),
    ("error", "mean error", "log"),
    ("velocity_mse", "MSE of the velocity", "log"),
    ("kl_nats", "KL (nats per image)", "linear"),
    ("penalty", "penalty", "linear"),
    ("gamma2", "gamma2", "log"),
    (HELD_OUT, "ELBO (nats per image)", "linear"),
)


def training_curves(log: Path) -> bytes:
    """Return a PNG with MSE, KL and gamma2 during training, one row per stage.

    If images were held out, their ELBO and that of training images follow.

    Args:
        log: metrics.jsonl of a run.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputError: the log has no entries.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("training.png", "plots") from error

    entries = read_log(log)
    stages = sorted({int(entry["stage"]) for entry in entries})
    if not stages:
        raise InputError(f"{log} has no entries: there is nothing to plot")
    columns = COLUMNS + any(HELD_OUT in entry for entry in entries)
    width = 11 * columns / COLUMNS
    figure = Figure(figsize=(width, 2.8 * len(stages)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(stages), columns, squeeze=False)
    for row, stage in zip(axes, stages, strict=True):
        of_stage = [entry for entry in entries if entry["stage"] == stage]
        curves = [curve for curve in CURVES if any(curve[0] in entry for entry in of_stage)]
        for axis, curve in zip(row, curves, strict=False):
            _curve(axis, of_stage, stage, *curve)
        for axis in row[len(curves) :]:
            axis.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _curve(
    axis: Any, entries: list[dict[str, float]], stage: int, key: str, label: str, scale: str
) -> None:
    lines = {key: ("#1f5fa8", "-", "held-out images")}
    if key == HELD_OUT:
        lines[TRAINING] = ("#d9632a", "--", "training images")
        entries = [entry for entry in entries if HELD_OUT in entry]
    for name, (colour, style, of) in lines.items():
        axis.plot(
            [e["images_seen"] / 1000 for e in entries],
            [e.get(name, math.nan) for e in entries],
            style,
            linewidth=1.3,
            color=colour,
            label=of,
        )
    if key == HELD_OUT:
        axis.legend(fontsize=8)
    axis.set_yscale(scale)
    axis.set_title(f"stage {stage}: {label}", fontsize=10)
    axis.set_xlabel("thousand images seen", fontsize=9)
    axis.grid(True, which="both", alpha=0.25)
    axis.tick_params(labelsize=8)
