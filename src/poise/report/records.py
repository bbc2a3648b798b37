"""Read the files of each run, and say what is missing in a sentence each."""

import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from poise.errors import InputError, MissingInputError
from poise.metrics.pages import check_pages
from poise.objectives import is_deterministic
from poise.runs.folder import read_config
from poise.runs.log import read_log
from poise.studies.comparison.experiment import DESCRIPTION
from poise.studies.results import Result, read_results, safe_name
from poise.support.files import read_json
from poise.support.progress import warn

REFERENCE = "computed"  # label that others are compared with, if it is among the runs


@dataclass(frozen=True)
class Description:
    """The part of an experiment's description that a report reads."""

    name: str
    labels: dict[str, Any] = field(default_factory=dict)
    results: str | None = None


@dataclass(frozen=True)
class Record:
    """Contents of the files of one run.

    Attributes:
        label: common name of runs that differ only by their seed. They share a colour.
        seed: seed of the run.
        folder: folder of the run. If only the result exists: its name in the experiment's folder.
        config: config.json: "recipe", "data", "versions".
        entries: metrics.jsonl, line by line. If only the result exists: the points of its curves.
        summary: summary.json; None: training is not finished.
        evaluation: evaluation.json, or the evaluation in the result; None: nothing was measured.
        missing: a sentence for each thing that is missing.
        result: result of the run, written by `poise compare` or `poise reproduce`.
        alone: whether only the result exists, without log and model.
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
        """Figures of the model by page, from the last evaluation or else from the summary."""
        return (self.summary or {}) | {
            key: value for key, value in (self.evaluation or {}).items() if isinstance(value, dict)
        }

    @property
    def has_kl(self) -> bool:
        """Whether the model is a VAE. Deterministic models have neither KL nor likelihood."""
        return not is_deterministic(self.recipe["first"].get("objective", "vae"))


def read_records(paths: Sequence[Path]) -> list[Record]:
    """Read the runs at these paths, sorted by label and seed, those of the reference first.

    Args:
        paths: folders of runs, folders with runs in them, results, or folders of results.

    A damaged run or result is left out with a warning, if there are others.

    Raises:
        InputError: `paths` is empty, a path has neither runs nor results, or all are damaged.
    """
    complaints: list[InputError] = []
    if not paths:
        raise InputError("give the folder of a run or of a comparison, or results")
    results = [found for path in paths for found in _results_in(path, complaints.append)]
    folders = dict.fromkeys(folder.resolve() for path in paths for folder in run_folders(path))
    of = dict(results)
    found: list[Record] = []
    for folder in folders:
        try:
            found.append(read_record(folder, of.get(folder)))
        except InputError as error:
            complaints.append(error)
    # Compare only results of one label and seed: a report may have thousands.
    known: dict[tuple[str, int], list[Result]] = {}
    for result in filter(None, (record.result for record in found)):
        known.setdefault((result.label, result.seed), []).append(result)
    for folder, result in results:
        equals = known.setdefault((result.label, result.seed), [])
        if folder not in folders and result not in equals:
            equals.append(result)
            found.append(record_of(result, folder))
    if not found:
        raise complaints[0] if complaints else InputError(f"{paths[0]} holds no run yet")
    for error in complaints:
        warn(f"{error}; left out")
    return sorted(
        _with_distinct_labels(found),
        key=lambda record: (record.label != REFERENCE, record.label, record.seed),
    )


def _results_in(path: Path, damaged: Callable[[InputError], None]) -> list[tuple[Path, Result]]:
    """Return the results in a folder with the folders of their runs.

    The folder of a comparison or a reproduction names the place of its results.
    """
    own, described = path / "results", path / DESCRIPTION
    if not (run_folders(path) or described.exists()):
        alone = _only_results(path, damaged)
        return [(path.resolve() / r.experiment / safe_name(r.label, r.seed), r) for r in alone]
    try:
        said = read_json(described, Description) if described.exists() else None
        place = own if own.is_dir() or said is None or said.results is None else Path(said.results)
        written = read_results([place], damaged)
    except MissingInputError:  # no run has a result yet
        return []
    except InputError as error:  # the runs may be intact
        damaged(error)
        return []
    mine = [
        r for r in written if said is None or (r.experiment == said.name and r.label in said.labels)
    ]
    return [(path.resolve() / safe_name(result.label, result.seed), result) for result in mine]


def _only_results(path: Path, damaged: Callable[[InputError], None]) -> list[Result]:
    if path.is_dir() and not any([*path.glob("*.json"), *path.glob("results/*.json")]):
        runs = "no run (no config.json, in it or one folder below): give what `poise train` wrote"
        raise InputError(f"{path} holds {runs}, or results of `poise compare`")
    return read_results([path], damaged)


def run_folders(path: Path) -> list[Path]:
    """Return the folder itself if it is a run, or else the folders of runs in it.

    Raises:
        InputError: the path does not exist.
    """
    if not path.exists():
        raise MissingInputError(
            f"{path}: no such folder; give the folder that `poise train` or `poise compare` wrote"
        )
    if (path / "config.json").exists():
        return [path]
    return sorted(config.parent for config in path.glob("*/config.json"))


def read_record(folder: Path, result: Result | None = None) -> Record:
    """Read the files of a run, and add the result that a comparison wrote for it.

    Raises:
        InputError: config.json is damaged, or does not belong to a run.
    """
    config = read_config(folder)
    seed = config["recipe"]["seed"]
    summary, evaluation = _optional(folder / "summary.json"), _optional(folder / "evaluation.json")
    evaluation = evaluation or (result and result.evaluation)
    entries = tuple(read_log(folder / "metrics.jsonl"))
    missing = tuple(_missing(folder, config, entries, summary, evaluation))
    label = result.label if result else _label(folder.name, seed)
    return Record(label, seed, folder, config, entries, summary, evaluation, missing, result)


def record_of(result: Result, folder: Path) -> Record:
    """Make the record of a run from its result, without its folder."""
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
    """Yield the points of a curve as entries of a log."""
    seen, elapsed = curve["images_seen"], curve["seconds"]
    for number, values in enumerate(zip(*curve.values(), strict=True)):
        images = seen[number] - (seen[number - 1] if number else 0)
        seconds = elapsed[number] - (elapsed[number - 1] if number else 0)
        rate = images / seconds if seconds > 0 else math.inf
        yield dict(zip(curve, values, strict=True)) | {"stage": stage, "images_per_second": rate}


def _label(name: str, seed: int) -> str:
    """Return the folder's name without the seed at its end."""
    return re.sub(rf"[-_.=](seed[-_=]?)?{seed}$", "", name) or name


def _optional(path: Path) -> dict[str, Any] | None:
    """Return the figures in a JSON file, or None if it is missing or damaged."""
    try:
        values = read_json(path, dict[str, Any])
        check_pages(values, str(path))
    except InputError:
        return None
    return values


def _missing(
    folder: Path, config: dict[str, Any], entries: Sequence[Any], *files: dict[str, Any] | None
) -> Iterable[str]:
    summary, evaluation = files
    quoted = shlex.quote(str(folder))
    if summary is None:
        resume = f"to resume it, run `poise train` with the same options and --out {quoted}"
        yield f"Training is not finished (there is no readable summary.json): {resume}."
    if not entries:
        yield "There is no log (metrics.jsonl), so no curves can be drawn."
    if config["recipe"].get("second") is None:
        yield "The run has one stage only, so there is no second-stage prior (GEN-2)."
    if evaluation is None and summary is not None:
        yield (
            "Samples were not compared with real images. "
            f"`poise evaluate {quoted}` measures FID and similar metrics."
        )


def _with_distinct_labels(records: list[Record]) -> list[Record]:
    """Prefix labels with the parent folder's name if two runs share label and seed.

    Raises:
        InputError: two runs still share label and seed.
    """
    twice = _repeated(records)
    labels = {label for label, _ in twice}
    renamed = [
        replace(r, label=f"{r.folder.parent.name}/{r.label}") if r.label in labels else r
        for r in records
    ]
    if again := _repeated(renamed):
        label, seed = min(again)
        raise InputError(
            f"there are several runs of {label}, seed {seed}: "
            "make a report of each, or rename their folders"
        )
    return renamed


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
    """Return the run with the first seed of each label."""
    found: dict[str, Record] = {}
    for record in records:
        found.setdefault(record.label, record)
    return list(found.values())
