"""Figures of the latents of both stages (KL, variances, spectrum), as values for page.js."""

import math
from collections.abc import Sequence
from typing import Any

from poise.latent import ACTIVE_VARIANCE
from poise.report.curves import Styles
from poise.report.records import Record

Page = dict[str, Any]  # LatentStatistics as a dictionary
Shown = Sequence[tuple[Record, Page]]


def latent_figures(
    pages: Sequence[tuple[Record, dict[str, Page]]], styles: Styles
) -> list[dict[str, Any]]:
    """Return three figures for each stage: bars for one run, lines for several runs.

    Args:
        pages: each run with its latent statistics by name, "latents" and "second_stage".
        styles: colour and dash of each label.
    """
    figures = []
    for stage, name in ((1, "latents"), (2, "second_stage")):
        shown = [(record, page[name]) for record, page in pages if name in page]
        with_kl = [(record, page) for record, page in shown if page.get("kl_nats_per_latent")]
        figures += [
            make(stage, with_kl, styles) for make in (_kl_figure, _variance_figure) if with_kl
        ]
        figures += [_spectrum_figure(stage, shown, styles)] if shown else []
    return figures


def _kl_figure(stage: int, shown: Shown, styles: Styles) -> dict[str, Any]:
    values = [sorted(page["kl_nats_per_latent"], key=_known, reverse=True) for _, page in shown]
    traces = [
        _trace(styles[record.label], record, kl)
        for (record, _), kl in zip(shown, values, strict=True)
    ]
    if len(shown) == 1:
        label = shown[0][0].label
        name = label if len(styles) > 1 else ""
        traces = [_bars(name, values[0], styles[label]["color"], label)]
    caption = (
        "KL of each latent, sorted. Their sum is the KL term of the loss. A latent with zero KL is "
        "inactive: the decoder ignores it."
    )
    return _figure(stage, "kl", "KL of each latent, nats", caption, traces)


def _variance_figure(stage: int, shown: Shown, styles: Styles) -> dict[str, Any]:
    caption = (
        "Var(μ) + E[s²] of each latent, in the order of the KL. It is 1 if the codes match the "
        f"prior. A latent is active if Var(μ) is above {ACTIVE_VARIANCE:g}. An inactive latent has "
        "E[s²] near 1."
    )
    if len(shown) > 1:
        traces = [
            _trace(styles[record.label], record, [a + b for a, b in _variances(page)])
            for record, page in shown
        ]
        return _figure(stage, "law", "Variance law of each latent", caption, traces, line=1.0)
    record, page = shown[0]
    mean, noise = zip(*_variances(page), strict=True)
    colour = styles[record.label]["color"]
    parts = [
        _bars("Var(μ)", mean, colour, record.label),
        _bars("E[s²]", noise, "#a9b4c2", record.label),
    ]
    return _figure(
        stage, "law", "Variance law of each latent", caption, parts, line=1.0, stacked=True
    )


def _variances(page: Page) -> list[tuple[float, float]]:
    """Return (Var(mu), E[s^2]) of each latent, the largest KL first."""
    columns = zip(
        page["kl_nats_per_latent"], page["variance_of_mean"], page["mean_variance"], strict=True
    )
    ordered = sorted(columns, key=lambda column: _known(column[0]), reverse=True)
    return [(mean, noise) for _, mean, noise in ordered]


def _known(kl: float | None) -> float:
    """Return a KL to sort by. JSON has null for one that is infinite or not a number."""
    return math.inf if kl is None or math.isnan(kl) else kl


def _spectrum_figure(stage: int, shown: Shown, styles: Styles) -> dict[str, Any]:
    traces = [
        _trace(styles[record.label], record, page["aggregate"]["covariance_eigenvalues"])
        for record, page in shown
    ]
    caption = (
        "Eigenvalues of the covariance of all codes, Cov(μ) + diag(E[s²]). For the prior, all are "
        "1. Far from 1, samples from N(0, I) give latents that the decoder has not learned."
    )
    return _figure(
        stage,
        "spectrum",
        "Spectrum of the codes' covariance",
        caption,
        traces,
        line=1.0,
        axis="log",
        ranks="eigenvalue, largest first",
    )


def _trace(style: dict[str, str], record: Record, values: Sequence[float | None]) -> dict[str, Any]:
    line = style | {"width": 1.6}
    return {
        "label": record.label,
        "seed": record.seed,
        "x": _ranks(values),
        "y": _rounded(values),
        "line": line,
    }


def _bars(name: str, values: Sequence[float | None], colour: str, label: str) -> dict[str, Any]:
    return {
        "label": label,
        "name": name,
        "type": "bar",
        "x": _ranks(values),
        "y": _rounded(values),
        "colour": colour,
    }


def _ranks(values: Sequence[Any]) -> list[int]:
    return list(range(1, len(values) + 1))


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    finite = [value is not None and math.isfinite(value) for value in values]
    return [float(f"{v:.5g}") if known else None for v, known in zip(values, finite, strict=True)]


def _figure(
    stage: int, key: str, title: str, caption: str, traces: list[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    head = {
        "id": f"latents{stage}-{key}",
        "stage": stage,
        "title": title,
        "caption": caption,
        "traces": traces,
    }
    return head | {"axis": "linear", "line": None, "ranks": "rank by KL, largest first"} | more
