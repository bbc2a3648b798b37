"""Folders -> what the files of each run say, with a sentence for each thing that is missing."""

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from poise.errors import InputError, MissingInputError
from poise.objectives import is_deterministic
from poise.runs.folder import read_config
from poise.studies.comparison.experiment import DESCRIPTION
from poise.studies.results import Result, read_results, safe_name

REFERENCE = "computed"  # what others are compared with, where it is among them


@dataclass(frozen=True)
class Record:
    """What the files of one run say.

    Attributes:
        label: what runs that differ by their seed alone have in common; they share a colour.
        seed: of the run.
        folder: of the run; if only its result is there, its name in its experiment's.
        config: config.json: "recipe", "data", "versions".
        entries: metrics.jsonl, line by line; if only the result is there, the points of its curves.
        summary: summary.json; None: there is none, training is not finished.
        evaluation: evaluation.json, or of the comparison's result; None: nothing was measured.
        result: what `poise compare` or `poise reproduce` wrote of the run.
        missing: a sentence for each thing that is not there.
        alone: whether only the result is there, and neither the log nor the model.
    """

    label: str
    seed: int
    folder: Path
    config: dict[str, Any]
    entries: tuple[dict[str, float], ...]
    summary: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    missing: tuple[str, ...] = ()
    result: Result | None = None
    alone: bool = False

    @property
    def name(self) -> str:
        return f"{self.label}, seed {self.seed}"

    @property
    def recipe(self) -> dict[str, Any]:
        return self.config["recipe"]

    @property
    def data(self) -> dict[str, Any]:
        return self.config["data"]

    @property
    def figures(self) -> dict[str, Any]:
        """Figures of the model by page: of the last evaluation, or else of the summary."""
        return (self.summary or {}) | {
            key: value for key, value in (self.evaluation or {}).items() if isinstance(value, dict)
        }

    @property
    def has_kl(self) -> bool:
        """Whether it is a VAE: deterministic models have neither KL nor likelihood."""
        return not is_deterministic(self.recipe["first"].get("objective", "vae"))


def read_records(paths: Sequence[Path]) -> list[Record]:
    """Return the runs in these places, by label and seed, those of the reference first.

    Args:
        paths: folders of runs, or folders with runs in them; or else results, or folders of them.

    Raises:
        InputError: `paths` is empty, or a place has neither runs nor results.
    """
    if not paths:
        raise InputError("give the folder of a run or of a comparison, or results")
    results = [found for path in paths for found in _results_in(path)]
    folders = dict.fromkeys(folder.resolve() for path in paths for folder in run_folders(path))
    of = dict(results)
    found = [read_record(folder, of.get(folder)) for folder in folders]
    for folder, result in results:
        if folder not in folders and all(record.result != result for record in found):
            found.append(record_of(result, folder))
    if not found:
        raise InputError(f"{paths[0]} holds no run yet")
    return sorted(
        _told_apart(found),
        key=lambda record: (record.label != REFERENCE, record.label, record.seed),
    )


def _results_in(path: Path) -> list[tuple[Path, Result]]:
    """Return the results in a folder with the folders of their runs.

    A comparison or a reproduction says where its results are.
    """
    own, described = path / "results", path / DESCRIPTION
    if not (run_folders(path) or described.exists()):
        alone = _only_results(path)
        return [(path.resolve() / r.experiment / safe_name(r.label, r.seed), r) for r in alone]
    said = json.loads(described.read_text(encoding="utf-8")) if described.exists() else {}
    try:
        written = read_results([own if own.is_dir() else Path(said.get("results", own))])
    except MissingInputError:  # of no run yet
        return []
    mine = [
        r
        for r in written
        if not said or (r.experiment == said["name"] and r.label in said["labels"])
    ]
    return [(path.resolve() / safe_name(result.label, result.seed), result) for result in mine]


def _only_results(path: Path) -> list[Result]:
    if path.is_dir() and not any([*path.glob("*.json"), *path.glob("results/*.json")]):
        runs = "no run (no config.json, in it or one folder below): give what `poise train` wrote"
        raise InputError(f"{path} holds {runs}, or results of `poise compare`")
    return read_results([path])


def run_folders(path: Path) -> list[Path]:
    """Return the folder itself if it is a run's, or else the runs' folders in it.

    Raises:
        InputError: there is no such folder or file.
    """
    if not path.exists():
        raise MissingInputError(
            f"{path}: no such folder; give the folder that `poise train` or `poise compare` wrote"
        )
    if (path / "config.json").exists():
        return [path]
    return sorted(config.parent for config in path.glob("*/config.json"))


def read_record(folder: Path, result: Result | None = None) -> Record:
    """Read the files of a run, and take over the result that a comparison wrote of it.

    Raises:
        InputError: config.json is damaged, or not a run's.
    """
    config = read_config(folder)
    seed = config["recipe"]["seed"]
    summary, evaluation = _optional(folder / "summary.json"), _optional(folder / "evaluation.json")
    evaluation = evaluation or (result and result.evaluation)
    entries = tuple(_entries(folder / "metrics.jsonl"))
    missing = tuple(_missing(folder, config, entries, summary, evaluation))
    label = result.label if result else _label(folder.name, seed)
    return Record(label, seed, folder, config, entries, summary, evaluation, missing, result)


def record_of(result: Result, folder: Path) -> Record:
    """Make the record of a run from its result alone, without its folder."""
    made = result.provenance
    versions = {
        name: value
        for name, value in made.items()
        if isinstance(value, str) and name not in ("device", "finished")
    }
    config = {"recipe": result.settings, "data": result.data, "versions": versions}
    summary = {"seconds": result.seconds.get("training"), "device": made.get("device", "–")}
    entries = tuple(
        entry for stage, curve in result.curves.items() for entry in _points(int(stage), curve)
    )
    return Record(
        result.label,
        result.seed,
        folder,
        config,
        entries,
        summary,
        result.evaluation,
        (),
        result,
        alone=True,
    )


def _points(stage: int, curve: dict[str, list[float]]) -> Iterable[dict[str, float]]:
    """Return the points of a curve as entries of a log."""
    seen, elapsed = curve["images_seen"], curve["seconds"]
    for number, values in enumerate(zip(*curve.values(), strict=True)):
        images = seen[number] - (seen[number - 1] if number else 0)
        seconds = elapsed[number] - (elapsed[number - 1] if number else 0)
        rate = images / seconds if seconds > 0 else math.inf
        yield dict(zip(curve, values, strict=True)) | {"stage": stage, "images_per_second": rate}


def _label(name: str, seed: int) -> str:
    """Return the folder's name without the run's seed at its end."""
    return re.sub(rf"[-_.]?(seed)?[-_=]?\b{seed}$", "", name) or name


def _optional(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _entries(path: Path) -> Iterable[dict[str, float]]:
    for line in (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    ):
        try:
            yield json.loads(line)
        except ValueError:
            return  # torn by a kill, or still being written


def _missing(
    folder: Path, config: dict[str, Any], entries: Sequence[Any], *files: dict[str, Any] | None
) -> Iterable[str]:
    summary, evaluation = files
    quoted = shlex.quote(str(folder))
    if summary is None:
        goes_on = f"`poise train` with the same options and --out {quoted} goes on"
        yield f"Training is not finished (there is no readable summary.json): {goes_on}."
    if not entries:
        yield "There is no log (metrics.jsonl): no curves can be drawn."
    if config["recipe"].get("second") is None:
        yield "The run has one stage only, so there is no second-stage prior (GEN-2)."
    if evaluation is None and summary is not None:
        yield f"Samples were not compared with real images: `poise evaluate {quoted}` measures FID and its relatives."


def _told_apart(records: list[Record]) -> list[Record]:
    """Put the parent folder's name before the label if two runs share label and seed.

    Raises:
        InputError: the folders' names do not tell them apart either.
    """
    twice = _repeated(records)
    labels = {label for label, _ in twice}
    told = [
        replace(r, label=f"{r.folder.parent.name}/{r.label}") if r.label in labels else r
        for r in records
    ]
    if again := _repeated(told):
        label, seed = min(again)
        raise InputError(
            f"there are several runs of {label}, seed {seed}: make a report of each, or rename their folders"
        )
    return told


def _repeated(records: Iterable[Record]) -> set[tuple[str, int]]:
    return {
        key
        for key, count in Counter((record.label, record.seed) for record in records).items()
        if count > 1
    }


def labels_of(records: Iterable[Record]) -> list[str]:
    """Return each label once, in order."""
    return list(dict.fromkeys(record.label for record in records))


def first_of_each(records: Iterable[Record]) -> list[Record]:
    """Return the run of the first seed of each label."""
    found: dict[str, Record] = {}
    for record in records:
        found.setdefault(record.label, record)
    return list(found.values())
