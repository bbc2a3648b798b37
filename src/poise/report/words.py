"""Numbers and sentences of a report."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from poise.diagnosis import Diagnosis
from poise.metrics.listed import is_frechet
from poise.report.curves import stage_entries
from poise.report.records import Record, labels_of
from poise.runs.log import mean_error
from poise.studies.comparison.statistics import spread as spread_of
from poise.studies.comparison.tables import show
from poise.support.progress import duration, plural

NETWORKS = {
    "mlp": "an MLP",
    "resnet": "a ResNet",
    "infogan": "an InfoGAN-type network",
    "wae": "a WAE-type network",
    "conv": "a convolutional network with latent maps",
}


def listed(words: Sequence[str]) -> str:
    """Join words as in "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def number(value: float | None, style: str = ".4g") -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, style)


def spread(values: Sequence[float]) -> str:
    """Format mean and sample standard deviation, as in the tables of a comparison."""
    return show(spread_of(values))


def images_word(shape: Sequence[int]) -> str:
    """Format the shape of images, as in "8×8, grey"."""
    channels, height, width = shape
    return (
        f"{height}×{width}, "
        f"{'grey' if channels == 1 else 'colour' if channels == 3 else f'{channels} channels'}"
    )


def source_word(record: Record) -> str:
    return "an array" if record.data["source"] == "array" else str(record.data["source"])


def model_sentence(record: Record) -> str:
    """Say which model was trained, on which data, and for how long."""
    recipe, data = record.recipe, record.data
    network = recipe["network"]
    kind = NETWORKS.get(network["kind"], "a custom network")
    second = recipe.get("second")
    what = "A two-stage model" if second else "A one-stage model"
    if second and second.get("objective") == "flow":
        what = "A model with a flow as stage 2"
    if record.has_kl:
        what = what.replace("model", "VAE")
    images = (
        f"{plural(data['train'], 'image')} of {source_word(record)} ({images_word(data['shape'])})"
    )
    return (
        f"{what} ({kind}, {plural(network['latent_dim'], 'latent')}; recipe {recipe['name']}), "
        f"trained on {images}. {_lengths(recipe)}{_time(record)}"
    )


def _lengths(recipe: dict[str, Any]) -> str:
    parts = [
        f"stage {k}: {_length(recipe[name])}"
        for k, name in ((1, "first"), (2, "second"))
        if recipe.get(name)
    ]
    return "; ".join(parts)[:1].upper() + "; ".join(parts)[1:] + "."


def _length(stage: dict[str, Any]) -> str:
    unit = "epochs" if stage.get("epochs") else "steps"
    long = plural(stage.get(unit) or 0, unit[:-1])
    objective = stage.get("objective", "vae")
    goal = f"balance {stage['balance']}" if objective == "vae" else f"objective {objective}"
    return f"{long} of batches of {stage['batch_size']}, {goal}"


def _time(record: Record) -> str:
    if not record.summary or record.summary.get("seconds") is None:
        return ""
    return (
        f" Training took {duration(record.summary['seconds'])} "
        f"on {record.summary.get('device', 'an unnamed device')}."
    )


def result_sentences(record: Record) -> list[str]:
    """Return sentences with the error, the codes and the distances of a run."""
    figures = record.figures
    codes = f"{_latents(figures)} {_balance(record)}".strip() if record.has_kl else ""
    return [line for line in (_error(figures), codes, _distances(record)) if line]


def _error(figures: dict[str, Any]) -> str:
    page = figures.get("reconstruction")
    if not page:
        return "Nothing was measured yet."
    images = f" of {page['images']:,} test images" if page.get("images") else ""
    return (
        f"Reconstructions{images} have a mean squared error of {number(page.get('mse'))} "
        f"(PSNR {number(page.get('psnr_db'), '.2f')} dB, SSIM {number(page.get('ssim'), '.3f')})."
    )


def _latents(figures: dict[str, Any]) -> str:
    page, codes = figures.get("reconstruction", {}), figures.get("latents", {})
    if not page:
        return ""
    active = (
        f", over {codes['active_units']} active latents of {codes['latent_dim']}" if codes else ""
    )
    return f"The codes carry {number(page.get('kl_nats'))} nats per image{active}."


def _balance(record: Record) -> str:
    """Say how balanced the last tenth of the log of stage 1 is."""
    entries = stage_entries(record, 1)
    shares = [
        mean_error(entry) / entry["gamma2"]
        for entry in entries[-max(1, len(entries) // 10) :]
        if entry.get("gamma2")
    ]
    if not shares:
        return ""
    return (
        f"At the end of stage 1's log, the mean error was {number(fmean(shares), '.3g')} times γ²; "
        "1 is balanced."
    )


def _distances(record: Record) -> str:
    name = distance_name([record])
    found = {of: value for of, value, _ in distances(record, name)}
    if not found:
        return ""
    best = min((of for of in found if of.startswith("GEN")), key=lambda of: found[of], default=None)
    tail = (
        f" (lower is better). Of the priors, {best} is closest to the real images" if best else ""
    )
    return f"{name}: {listed([f'{of} {number(value)}' for of, value in found.items()])}{tail}."


def distances(record: Record, name: str | None) -> list[tuple[str, float, str]]:
    """Return (set of images, value, protocol hash) for each measurement of a distance.

    If a run was measured under several protocols, only the first is used.
    """
    measured = [m for m in (record.evaluation or {}).get("measurements", []) if m["metric"] == name]
    return [
        (m["of"], m["value"], m["protocol"])
        for m in measured
        if m["value"] is not None and m["protocol"] == measured[0]["protocol"]
    ]


def advice(record: Record, diagnosis: Diagnosis | None) -> list[str]:
    """Return the next steps: the first remedy of the diagnosis, and what is missing."""
    lines = [] if diagnosis is None else [_remedy(diagnosis)]
    return [*lines, *(line for line in record.missing if "one stage only" not in line)] or [
        "No fault is known, but the model was not diagnosed."
    ]


def group_advice(record: Record, diagnosis: Diagnosis | None) -> str:
    """Return the next step for one of several runs, in one line."""
    if diagnosis is None or diagnosis.cause is None:
        return f"{record.label}: {advice(record, diagnosis)[0]}"
    return f"{record.label}: {diagnosis.cause.name}. Try: {diagnosis.cause.remedy}"


def _remedy(diagnosis: Diagnosis) -> str:
    if diagnosis.cause is None:
        return "Nothing wrong was found. The diagnosis gives the threshold of each figure."
    return f"{diagnosis.cause.name}: {diagnosis.cause.sentence} Try: {diagnosis.cause.remedy}"


def group_sentence(records: Sequence[Record]) -> str:
    """Say which labels, seeds and data several runs have."""
    labels, seeds = labels_of(records), sorted({record.seed for record in records})
    sources = listed(list(dict.fromkeys(map(source_word, records))))
    several = f"seed{'s' if len(seeds) > 1 else ''} {listed(list(map(str, seeds)))}"
    return f"{len(records)} runs on {sources}: {listed(labels)} ({several})."


def group_results(records: Sequence[Record]) -> list[str]:
    """Say which label has the smallest error and the best samples; ± is over seeds."""
    lines = [_best(records, "The smallest error is that of", "an MSE of", _mse)]
    name = distance_name(records)
    if name:
        lines.append(
            _best(
                records,
                "The best samples are those of",
                f"a {name} of",
                lambda r: best_distance(r, name),
            )
        )
    return [line for line in lines if line]


def _best(records: Sequence[Record], head: str, unit: str, value: Any) -> str:
    groups = {
        label: [v for r in records if r.label == label and (v := value(r)) is not None]
        for label in labels_of(records)
    }
    ranked = sorted((fmean(values), label) for label, values in groups.items() if values)
    if not ranked:
        return ""
    others = [f"{label} {spread(groups[label])}" for _, label in ranked[1:]]
    tail = f"; then {listed(others)}" if others else ""
    return f"{head} {ranked[0][1]}, {unit} {spread(groups[ranked[0][1]])}{tail}."


def _mse(record: Record) -> float | None:
    return record.figures.get("reconstruction", {}).get("mse")


def distance_name(records: Sequence[Record]) -> str | None:
    """Return the name of a Frechet distance that all evaluated runs share, or None."""
    names = [
        {m["metric"] for m in r.evaluation.get("measurements", [])} for r in records if r.evaluation
    ]
    common = set.intersection(*names) if names else set()
    return min(
        filter(is_frechet, common),
        default=None,
    )


def best_distance(record: Record, name: str) -> float | None:
    """Return the smallest distance among the priors of a run, or None."""
    return min(
        (value for of, value, _ in distances(record, name) if of.startswith("GEN")), default=None
    )
