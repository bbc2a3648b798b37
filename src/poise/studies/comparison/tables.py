"""Tables of a comparison as rows of cells, and the Markdown page with all conditions."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from poise.protocols import Protocol
from poise.recipes.settings import from_json
from poise.runs.log import error_among
from poise.studies.comparison.statistics import (
    COVERED,
    FEWEST,
    NEAR,
    Difference,
    Reached,
    Spread,
    by_label,
    difference,
    figures,
    namesakes,
    paired,
    reached,
    spread,
    threshold,
)
from poise.studies.results import Result

ABSENT = "-"
Rows = list[list[str]]


def table(results: Iterable[Result], failed: Mapping[str, int] | None = None) -> Rows:
    """Return the table of means ± sample standard deviations over seeds.

    Args:
        results: results of one experiment.
        failed: number of failed runs, by label.

    Returns:
        One row per figure and one column per label, below a head row.
    """
    results = list(results)
    groups, failed, several = by_label(results), failed or {}, namesakes(results)
    labels = list(dict.fromkeys([*groups, *failed]))
    measured = {
        label: [figures(result, several) for result in groups.get(label, {}).values()]
        for label in labels
    }
    names = _union(values for runs in measured.values() for values in runs)
    counts = [
        str(len(measured[label])) + (f" ({failed[label]} failed)" if failed.get(label) else "")
        for label in labels
    ]
    cells = [
        [
            _cell([run[name] for run in measured[label] if name in run], measured[label])
            for label in labels
        ]
        for name in names
    ]
    return [
        ["", *labels],
        ["seeds", *counts],
        *([name, *row] for name, row in zip(names, cells, strict=True)),
    ]


def _cell(values: Sequence[float], runs: Sequence[object]) -> str:
    """Return mean and spread, with the number of values if it is not that of the runs."""
    return show(spread(values)) + (f" (of {len(values)})" if 0 < len(values) < len(runs) else "")


def _union(groups: Iterable[Mapping[str, float]]) -> list[str]:
    """Return all names, in the order of the largest groups."""
    ordered = sorted(groups, key=len, reverse=True)
    names = list(dict.fromkeys(name for values in ordered for name in values))
    return sorted(names, key=lambda name: name == "training seconds")


def differences(results: Iterable[Result], reference: str) -> Rows:
    """Return the table of mean differences from the reference, paired by seed.

    Args:
        results: results of one experiment.
        reference: the label that others are compared with.

    Returns:
        One row per figure and one column per other label, below a head row. Each cell has the
        interval if there are at least three pairs.
    """
    results = list(results)
    groups, several = by_label(results), namesakes(results)
    measured = {
        label: {seed: figures(result, several) for seed, result in runs.items()}
        for label, runs in groups.items()
    }
    others = [label for label in groups if label != reference]
    names = _union(values for runs in measured.values() for values in runs.values())
    rows = [["", *(f"{label} - {reference}" for label in others)]]
    columns = {
        label: _paired_figures(measured[label], measured.get(reference, {}), names)
        for label in others
    }
    pairs = {label: len(set(groups[label]) & set(groups.get(reference, {}))) for label in others}
    rows.append(["pairs", *(str(pairs[label]) for label in others)])
    return rows + [
        [name, *(_difference(columns[label][name], pairs[label]) for label in others)]
        for name in names
    ]


def _difference(value: Difference | None, pairs: int) -> str:
    return show(value) + (f" (of {value.n})" if value is not None and value.n < pairs else "")


def _paired_figures(
    mine: Mapping[int, Mapping[str, float]],
    theirs: Mapping[int, Mapping[str, float]],
    names: Sequence[str],
) -> dict[str, Difference | None]:
    def column(runs: Mapping[int, Mapping[str, float]], name: str) -> dict[int, float]:
        return {seed: values[name] for seed, values in runs.items() if name in values}

    return {name: difference(paired(column(mine, name), column(theirs, name))) for name in names}


def speed(results: Iterable[Result], reference: str) -> Rows:
    """Return the table of training images and seconds until an error is reached.

    The error is 1.1 times the reference's final training error: see `statistics.threshold`. Runs
    with another kind of error are not compared.

    Args:
        results: results of one experiment.
        reference: the label that others are compared with.

    Returns:
        Three rows and one column per label, below a head row. No rows if the reference has no runs.
    """
    groups = by_label(results)
    ours = [*groups.get(reference, {}).values()]
    error = threshold(ours)
    if error is None:
        return []
    name = error_among(ours[0].curves["1"])
    found = {
        label: [reached(result, name, error) for result in runs.values()]
        for label, runs in groups.items()
    }
    alike = {
        label: all(name in r.curves["1"] for r in runs.values()) for label, runs in groups.items()
    }
    counts = [
        f"{sum(r is not None for r in places)} of {len(places)}" if alike[label] else ABSENT
        for label, places in found.items()
    ]
    images = [_over_places(places, lambda place: place.images / 1000) for places in found.values()]
    seconds = [_over_places(places, lambda place: place.seconds) for places in found.values()]
    words = {"mse": "MSE", "mae": "MAE"}.get(name, name)
    head = [f"until training {words} <= {error:.4g}", *groups]
    return [
        head,
        ["runs that reached it", *counts],
        ["thousand training images", *images],
        ["training seconds", *seconds],
    ]


def _over_places(places: Sequence[Reached | None], value: Callable[[Reached], float]) -> str:
    return show(spread([value(place) for place in places if place is not None]))


def show(value: Spread | Difference | None) -> str:
    """Format a mean with four significant digits, and its spread or interval to the same digit."""
    if value is None:
        return ABSENT
    if isinstance(value, Spread):
        digits = _digits(value.mean)
        return f"{value.mean:.{digits}f}" + (
            f" ± {value.deviation:.{digits}f}" if value.deviation is not None else ""
        )
    if value.interval is None:
        return f"{value.mean:+.{_digits(value.mean)}f}"
    digits = _digits(max(map(abs, value.interval)))
    low, high = value.interval
    return f"{value.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _digits(value: float) -> int:
    """Return the digits after the point for four significant digits; 0 for large numbers."""
    return 2 if value == 0 else min(max(3 - math.floor(math.log10(abs(value))), 0), 8)


def markdown(rows: Rows) -> str:
    """Format rows as a Markdown table whose columns also align as plain text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in rows
    ]
    rule = (
        "|"
        + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
        + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]])


def page(
    title: str,
    results: Sequence[Result],
    reference: str,
    failed: Mapping[str, str],
    labels: Mapping[str, int],
) -> str:
    """Return the page of a comparison as Markdown: all tables and conditions.

    Args:
        title: title of the page.
        results: results of one experiment.
        reference: the label that others are compared with.
        failed: messages of failed runs, by the run's name.
        labels: number of failed runs, by label.
    """
    parts = [
        f"# {title}",
        markdown(table(results, labels)),
        "Mean ± sample standard deviation over seeds, on test images.",
    ]
    groups = by_label(results)
    if len(groups) > 1 and reference in groups:
        parts += [markdown(differences(results, reference)), _about_differences(groups, reference)]
    if rows := speed(results, reference):
        parts += [markdown(rows), ABOUT_SPEED.format(near=NEAR, reference=reference)]
    parts += (
        ["\n".join(f"- failed: {name}: {message}" for name, message in failed.items())]
        if failed
        else []
    )
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in conditions(results))]) + "\n"


ABOUT_SPEED = (
    "Training MSE: mean over each hundredth of stage 1. The threshold is {near} times the training "
    "MSE of {reference} at the end of its stage 1, averaged over its seeds. Seconds depend on what "
    "else the machine does."
)


def _about_differences(groups: Mapping[str, Mapping[int, Result]], reference: str) -> str:
    fewest = min(
        len(set(runs) & set(groups[reference]))
        for label, runs in groups.items()
        if label != reference
    )
    text = f"Mean difference from {reference}, paired by seed"
    if fewest < FEWEST:
        return f"{text}. Fewer than {FEWEST} pairs give no interval."
    how = f"Student's, over n = {fewest} pairs or more, or as many as a cell names"
    return f"{text}, and its {COVERED:.0%} interval ({how})."


def conditions(results: Iterable[Result]) -> list[str]:
    """Return the conditions: protocols, notes, versions and machines, without repetition.

    A line that does not apply to all labels names its labels.
    """
    of: dict[str, dict[str, None]] = {}
    results = [*results]
    everyone = {result.label for result in results}
    for result in results:
        notes = [*result.data.get("notes", []), *result.evaluation["notes"]]
        for line in [*_protocols(result), *notes, made_by(result)]:
            of.setdefault(line, {})[result.label] = None
    return [
        line if len(labels) == len(everyone) else f"{', '.join(labels)}: {line}"
        for line, labels in of.items()
    ]


def _protocols(result: Result) -> list[str]:
    evaluation, distances = result.evaluation, result.distance_names
    used = dict.fromkeys(
        m["protocol"] for m in evaluation["measurements"] if m["metric"] in distances
    )
    return [
        f"protocol {from_json(Protocol, evaluation['protocols'][code], 'protocol')}"
        for code in used
    ]


def made_by(result: Result) -> str:
    """Return versions and machine in one line."""
    made = result.provenance
    versions = ", ".join(
        f"{name} {made[name]}"
        for name in ("poise", "commit", "torch", "python", "numpy")
        if name in made
    )
    machine = made["machine"]
    return (
        f"{versions}; {machine['processor']}, {machine['threads']} threads a run, "
        f"device {made['device']}"
    )
