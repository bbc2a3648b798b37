"""Training curves as plain values that page.js draws.

There is one figure for each quantity and stage, with one line for each run.

The loss is c SE + k KL. The log holds gamma2 = 1/(2c), and k follows from
loss = reconstruction + k KL. The quadratic term SE/(2 gamma2) over D/2 is MSE/gamma2. The
equivalent beta is k gamma2 / MSE, as in `poise.diagnosis`. It is 1 at balance.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from poise.report.records import Record, labels_of
from poise.runs.log import HELD_OUT, TRAINING, mean_error

POINTS = 200  # maximum number of points in a curve; a screen shows no more
WIDE = 5.0  # a quantity that varies by more than this factor is drawn on a logarithmic axis
MEASURED = "|measured"  # ending of the axes of values that few entries have
FALLBACK_RATE = 1.0  # images per second for a log entry that lacks them
# Distinguishable by readers with colour vision deficiency too.
COLOURS = (
    "#3b7dd8",
    "#d9632a",
    "#1f9e77",
    "#b65fb0",
    "#c28f00",
    "#4fa9d8",
    "#8a8f98",
    "#9a5b3a",
)
DASHES = ("solid", "dash", "dot", "dashdot")

Entry = dict[str, float]
Styles = dict[str, dict[str, str]]  # colour and dash of each label


@dataclass(frozen=True)
class Quantity:
    """A quantity that is drawn over training.

    Attributes:
        key: short name.
        title: name with unit.
        value: function that computes it from a log entry.
        caption: explanation under the figure.
        scale: scale of the axis: "linear", or "log" if the values are positive and vary widely.
        line: a value to mark in the figure, or None.
        needs_kl: whether it needs a KL, so that deterministic models lack it.
        of_training: the same quantity of training images, drawn as a dotted line beside it, where
            both were measured. None: the quantity is in every entry and has one line.
    """

    key: str
    title: str
    value: Callable[[Entry], float]
    caption: str
    scale: str = "linear"
    line: float | None = None
    needs_kl: bool = False
    of_training: Callable[[Entry], float] | None = None


def kl_weight(entry: Entry) -> float:
    """Return k from loss = reconstruction + k KL; NaN if the KL is at most 1e-6."""
    kl = entry["kl_nats"]
    return (entry["loss"] - entry["reconstruction_nats"]) / kl if kl > 1e-6 else math.nan


def equivalent_beta(entry: Entry) -> float:
    """Return the equivalent beta, k gamma2 / MSE."""
    return kl_weight(entry) * entry["gamma2"] / mean_error(entry)


QUANTITIES = (
    Quantity(
        "mse",
        "MSE per dimension",
        lambda e: e["mse"],
        "Mean squared error of reconstructions from posterior samples.",
        "log",
    ),
    Quantity(
        "mae",
        "Mean absolute error per dimension",
        lambda e: e["mae"],
        "Mean absolute error of reconstructions from posterior samples.",
        "log",
    ),
    Quantity(
        "error",
        "Mean error per dimension",
        lambda e: e["error"],
        "Mean of |x − x̂| to the power of the balance, of reconstructions from posterior samples.",
        "log",
    ),
    Quantity(
        "velocity",
        "MSE of the velocity, per latent",
        lambda e: e["velocity_mse"],
        "Mean squared error of the flow's velocity. It cannot reach 0: the target is random.",
        "log",
    ),
    Quantity(
        "reconstruction",
        "Reconstruction, nats",
        lambda e: e["reconstruction_nats"],
        "−log p(x|z) per image, for the squared error SE/(2γ²) + D/2·log(2πγ²). It can be "
        "negative, because p is a density.",
    ),
    Quantity(
        "kl",
        "KL, nats",
        lambda e: e["kl_nats"],
        "KL divergence of the posterior from N(0, I), per image.",
        needs_kl=True,
    ),
    Quantity(
        "gamma2",
        "γ², decoder variance",
        lambda e: e["gamma2"],
        "The loss divides the squared error SE by 2γ², an absolute error by γ².",
        "log",
    ),
    Quantity(
        "share",
        "Quadratic term over D/2",
        lambda e: mean_error(e) / e["gamma2"],
        "SE/(2γ²) over D/2, which is the mean error over γ². It is 1 at balance, for any error.",
        "log",
        1.0,
    ),
    Quantity(
        "beta",
        "Equivalent β",
        equivalent_beta,
        "KL weight over the balanced KL weight: k·γ² over the mean error, where k is the factor of "
        "the KL. 1 is balanced, more is over-regularised. (In the form SE/2 + β·KL, β is k·γ².)",
        "log",
        1.0,
        needs_kl=True,
    ),
    Quantity(
        "elbo",
        "ELBO, nats",
        lambda e: e[HELD_OUT],
        "ELBO per image of held-out images, and of training images (dotted), measured alike. "
        "The run has the weights of the highest held-out ELBO. If it falls while that of training "
        "images rises, the model overfits.",
        of_training=lambda e: e[TRAINING],
    ),
)


def styles_of(labels: Sequence[str]) -> Styles:
    """Return a colour and a dash for each label. The dash changes when all colours are used."""
    count = len(COLOURS)
    return {
        label: {"color": COLOURS[k % count], "dash": DASHES[k // count % 4]}
        for k, label in enumerate(labels)
    }


def stage_entries(record: Record, stage: int) -> list[Entry]:
    return [entry for entry in record.entries if entry.get("stage") == stage]


def training_figures(
    records: Sequence[Record],
) -> tuple[dict[str, dict[str, list[float]]], list[dict[str, Any]]]:
    """Return the x values of each run and stage ("images", "seconds"), and the figures.

    A figure has an id, a stage, a title, a caption, an axis and traces. Each trace names its x
    values by key.
    """
    axes = {
        _axis(r, stage): progress_of(stage_entries(r, stage)) for r in records for stage in (1, 2)
    } | {_axis(r, 1) + MEASURED: progress_of(stage_entries(r, 1), having=HELD_OUT) for r in records}
    figures = [_figure(quantity, stage, records) for stage in (1, 2) for quantity in QUANTITIES]
    return {key: axis for key, axis in axes.items() if axis["images"]}, [
        figure for figure in figures if figure["traces"]
    ]


def _axis(record: Record, stage: int) -> str:
    return f"{record.label}|{record.seed}|{stage}"


def progress_of(entries: Sequence[Entry], *, having: str = "stage") -> dict[str, list[float]]:
    """Return images seen and seconds of training since the start of the stage, for each point.

    Args:
        entries: of a stage.
        having: points are those entries that have this value.
    """
    chosen = np.array([having in entry for entry in entries], bool)
    images = np.array([entry["images_seen"] for entry in entries], float)
    rates = np.array([entry.get("images_per_second") or FALLBACK_RATE for entry in entries])
    seconds = np.cumsum(np.diff(images, prepend=0.0) / rates)  # correct after interruptions too
    return {
        "images": _last_of_parts(images[chosen]),
        "seconds": [round(value, 2) for value in _last_of_parts(seconds[chosen])],
    }


def _last_of_parts(values: np.ndarray) -> list[float]:
    return [
        float(part[-1])
        for part in np.array_split(values, min(POINTS, len(values)) or 1)
        if len(part)
    ]


def thinned(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """Return means over at most `POINTS` equal parts, to five digits.

    A mean is over finite values only, and None if a part has none.
    """
    parts = np.array_split(np.asarray(values, float), min(POINTS, len(values)) or 1)
    finite = (part[np.isfinite(part)] for part in parts)
    return [float(f"{part.mean():.5g}") if len(part) else None for part in finite]


def _figure(quantity: Quantity, stage: int, records: Sequence[Record]) -> dict[str, Any]:
    colours = styles_of(labels_of(records))
    lacking = stage == 1 and quantity.needs_kl  # a VAE as stage 2 has one, whatever stage 1 is
    shown = [r for r in records if stage_entries(r, stage) and (r.has_kl or not lacking)]
    thin = len(records) > 1
    traces = [_trace(record, stage, quantity, colours[record.label], thin=thin) for record in shown]
    if quantity.of_training is not None:
        dotted = replace(quantity, value=quantity.of_training)
        traces += [
            _trace(record, stage, dotted, colours[record.label] | {"dash": "dot"}, thin=thin)
            | {"of": ", training images"}
            for record in shown
        ]
    traces = [trace for trace in traces if any(value is not None for value in trace["y"])]
    values = [value for trace in traces for value in trace["y"] if value is not None]
    return {
        "id": f"stage{stage}-{quantity.key}",
        "stage": stage,
        "title": quantity.title,
        "caption": quantity.caption,
        "traces": traces,
        "axis": _scale(quantity, values),
        "line": quantity.line,
    }


def _trace(
    record: Record, stage: int, quantity: Quantity, style: dict[str, str], *, thin: bool
) -> dict[str, Any]:
    entries = stage_entries(record, stage)
    sparse = quantity.of_training is not None
    if sparse:
        entries = [entry for entry in entries if HELD_OUT in entry]
    values = [_value(quantity, entry) for entry in entries]
    line = style | {"width": 1.2 if thin else 1.8}
    return {
        "label": record.label,
        "seed": record.seed,
        "axis": _axis(record, stage) + (MEASURED if sparse else ""),
        "y": thinned(values),
        "line": line,
    }


def _value(quantity: Quantity, entry: Entry) -> float:
    try:
        return float(quantity.value(entry))
    except (KeyError, TypeError, ZeroDivisionError):
        return math.nan  # the log lacks it


def _scale(quantity: Quantity, values: Sequence[float]) -> str:
    if quantity.scale == "linear" or not values or min(values) <= 0:
        return "linear"
    return "log" if max([*values, quantity.line or 0]) > WIDE * min(values) else "linear"
