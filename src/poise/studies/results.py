"""Results: one small JSON file per finished run, the source of all tables, pages and claims.

A file is written completely or not at all. It is strict JSON (no NaN) and small enough for a
repository. Each point of a curve is the mean over an equal part of a stage, so every log entry
counts.
"""

import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from poise.errors import InputError, MissingInputError
from poise.metrics.listed import is_frechet
from poise.metrics.pages import Measured, check_pages
from poise.protocols import Protocol
from poise.recipes.settings import Recipe, from_json, to_json
from poise.runs.folder import Described
from poise.runs.log import ERRORS, Entry, read_log
from poise.support.files import convert, read_json, write_json
from poise.support.version import __version__
from poise.variants import DATA_SETS

if TYPE_CHECKING:
    from poise.evaluation import Evaluation
    from poise.runs.run import Run

Page = dict[str, Any]
FORMAT = 1
POINTS = 100  # at most, per curve
# Objectives without KL log "penalty" in place of "kl_nats".
CURVES = (*ERRORS, "velocity_mse", "kl_nats", "penalty", "gamma2", "reconstruction_nats")


@dataclass(frozen=True)
class Result:
    """Numbers of one run, with all that is needed to repeat it.

    Attributes:
        experiment: name of its experiment: "compare-digits", "cifar10-released".
        label: what differs within the experiment: "computed", "fixed:beta=4", "rae-l2".
        seed: seed of weights, order of images, noise and generated images.
        settings: the complete recipe, as in config.json.
        data: source, shape, counts and checksum of the images, as in config.json.
        provenance: versions, commit, machine, device and date: see `provenance`.
        seconds: "training" and "evaluation".
        curves: curves by stage ("1", "2"): `images_seen`, `seconds` of training since the stage
            began, and the means of mse, kl_nats, gamma2 and reconstruction_nats since the previous
            point. Objectives without KL have `penalty` in place of kl_nats.
        evaluation: output of `Evaluation.to_json`: measurements, their protocols, pages and notes.
    """

    experiment: str
    label: str
    seed: int
    settings: dict[str, Any]
    data: dict[str, Any]
    provenance: dict[str, Any]
    seconds: dict[str, float]
    curves: dict[str, dict[str, list[float]]]
    evaluation: dict[str, Any]

    def value(self, metric: str, of: str | None = None, protocol: str | None = None) -> float:
        """Return one number: a measurement, a figure of a page or a time.

        Args:
            metric: a metric ("FID", "MSE", ...), or the dotted name of a figure or time
                ("reconstruction.gamma2", "latents.active_units", "seconds.training").
            of: REC, GEN-1, ...; optional if the metric was measured on one set.
            protocol: name or hash; optional if the metric was measured under one protocol.

        Returns:
            The value, NaN if it is undefined.

        Raises:
            InputError: no number has this name, or several have it.

        Example:
            >>> result.value("FID", "GEN-2")      # doctest: +SKIP
        """
        value = (
            self._on_page(metric)
            if "." in metric
            else self._measured(metric, of, protocol)["value"]
        )
        return math.nan if value is None else float(value)

    def _on_page(self, name: str) -> Any:
        value: Any = self.evaluation | {"seconds": self.seconds}
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise InputError(f"{self.name} has no {name}")
            value = value[part]
        if value is not None and not isinstance(value, (int, float)):
            raise InputError(
                f"{name} is not one number: it holds "
                f"{', '.join(value) if isinstance(value, dict) else 'several'}"
            )
        return value

    def _measured(self, metric: str, of: str | None, protocol: str | None) -> dict[str, Any]:
        found = [
            m
            for m in self.measurements(protocol)
            if m["metric"] == metric and of in (None, m["of"])
        ]
        if len(found) != 1:
            problem = (
                "measured on several sets or under several protocols: say which"
                if found
                else "not measured"
            )
            known = ", ".join(
                dict.fromkeys(f"{m['metric']} of {m['of']}" for m in self.measurements(protocol))
            )
            raise InputError(
                f"{self.name}: {metric} of {of or 'what'} is {problem}; there are {known or 'none'}"
            )
        return found[0]

    def measurements(self, protocol: str | None = None) -> list[dict[str, Any]]:
        """Return the measurements in the format of `Measurement.to_json`.

        Args:
            protocol: name or hash of a protocol; None: measurements under any protocol.
        """
        named = {
            code: (code, settings["name"])
            for code, settings in self.evaluation["protocols"].items()
        }
        return [
            m
            for m in self.evaluation["measurements"]
            if protocol is None or protocol in named[m["protocol"]]
        ]

    @property
    def distance_names(self) -> tuple[str, ...]:
        """Return the names of the measured Frechet distances: "FID", "FD-light", ..."""
        names = dict.fromkeys(m["metric"] for m in self.evaluation["measurements"])
        return tuple(filter(is_frechet, names))

    @property
    def name(self) -> str:
        """Return experiment, label and seed as a file name without suffix."""
        return safe_name(self.experiment, self.label, self.seed)


def safe_name(*parts: str | int) -> str:
    """Join words by "-", and replace characters that are not safe in file names.

    Example:
        >>> safe_name("compare-digits", "fixed:beta=4", 0)
        'compare-digits-fixed-beta=4-0'
    """
    plain = re.sub(r"[^\w.,=+-]+", "-", "-".join(map(str, parts)), flags=re.ASCII)
    return re.sub("-{2,}", "-", plain).strip("-.")


def result_of(
    run: "Run",
    evaluation: "Evaluation | dict[str, Any]",
    *,
    experiment: str,
    label: str,
    seconds: dict[str, float] | None = None,
) -> Result:
    """Return the result of a finished run.

    Args:
        run: the trained run.
        evaluation: its evaluation, or the output of `Evaluation.to_json`.
        experiment, label: see `Result`.
        seconds: times to add beside "training", which the run's summary has.
    """
    source = run.recipe.data.source
    return Result(
        experiment,
        label,
        run.recipe.seed,
        settings=json.loads(json.dumps(to_json(run.recipe))),
        data=run.data | ({"source": source} if source in DATA_SETS else {}),  # not its path
        provenance=provenance(run.device),
        seconds=_training_seconds(run.folder) | (seconds or {}),
        curves=curves(run.folder / "metrics.jsonl"),
        evaluation=evaluation if isinstance(evaluation, dict) else evaluation.to_json(),
    )


def _training_seconds(folder: Path) -> dict[str, float]:
    summary = folder / "summary.json"
    if not summary.exists():
        return {}
    return {
        "training": convert(read_json(summary, Page).get("seconds"), float, f"{summary}: seconds")
    }


def provenance(device: torch.device) -> dict[str, Any]:
    """Return versions, the commit of Poise's source, machine, device and date.

    The commit is included only if the package is in a clone of its repository. "-dirty" is added if
    the source has uncommitted changes.
    """
    versions = {
        "poise": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "numpy": np.__version__,
    }
    commit = {"commit": source_commit()} if source_commit() else {}
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    return versions | commit | {"machine": machine, "device": name, "finished": finished}


@cache
def source_commit() -> str | None:
    """Return the commit of the package's source, or None outside a clone or without git."""
    file = Path(__file__)
    source, own = file.parents[1], file.relative_to(file.parents[1]).as_posix()
    commit = _git(source, "rev-parse", "--short=12", "HEAD")
    # An installed copy may be in a folder of some other repository, which does not list this file.
    if not commit or _git(source, "ls-files", own) != own:
        return None
    return commit + ("-dirty" if _git(source, "status", "--porcelain", ".") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@cache
def processor() -> str:
    """Return the processor's name, from /proc/cpuinfo if it exists."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def curves(log: Path) -> dict[str, dict[str, list[float]]]:
    """Return the curves of each stage, by its number. A curve has at most 100 points.

    Args:
        log: metrics.jsonl of a run.
    """
    entries = read_log(log)
    stages = sorted({int(entry["stage"]) for entry in entries})
    return {
        str(stage): _curve([entry for entry in entries if entry["stage"] == stage])
        for stage in stages
    }


def _curve(entries: list[Entry]) -> dict[str, list[float]]:
    # Images since the previous entry.
    images = np.diff([entry["images_seen"] for entry in entries], prepend=0).clip(1)
    elapsed: list[float] = np.cumsum(
        images / np.maximum([entry["images_per_second"] for entry in entries], 1e-9)
    ).tolist()
    groups = np.array_split(np.arange(len(entries)), min(POINTS, len(entries)))
    ends = [group[-1] for group in groups]
    curve = {
        "images_seen": [entries[end]["images_seen"] for end in ends],
        "seconds": [_short(elapsed[end]) for end in ends],
    }
    for name in [name for name in CURVES if any(name in entry for entry in entries)]:
        values = np.array([entry.get(name, math.nan) for entry in entries])
        curve[name] = [_short(np.average(values[group], weights=images[group])) for group in groups]
    return curve


def _short(value: float) -> float:
    """Round to six digits, to keep the files small."""
    return float(f"{value:.6g}")


def write_result(result: Result, folder: Path) -> Path:
    """Write EXPERIMENT-LABEL-SEED.json, completely or not at all, and return its path.

    Raises:
        RunError: the disk is full or cannot be written.
    """
    path = Path(folder) / f"{result.name}.json"
    write_json(path, {"result": FORMAT} | asdict(result))
    return path


@dataclass(frozen=True)
class Evaluated:
    """The part of an evaluation in a result's file that all evaluations have."""

    protocols: dict[str, Page]
    measurements: list[Measured]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for code, settings in self.protocols.items():
            from_json(Protocol, settings, f"protocol {code}")
        if unknown := {m.protocol for m in self.measurements} - set(self.protocols):
            raise ValueError(f"the protocols {', '.join(sorted(unknown))} are missing")


@dataclass(frozen=True)
class ResultFile:
    """Contents of a result's file, see `Result`."""

    result: Literal[1]
    experiment: str
    label: str
    seed: int
    settings: Page
    data: Described
    provenance: Page
    seconds: dict[str, float]
    curves: dict[Literal["1", "2"], dict[str, list[float | None]]]
    evaluation: Evaluated

    def __post_init__(self) -> None:
        from_json(Recipe, self.settings, "settings")
        for stage, curves in self.curves.items():
            missing = {"images_seen", "seconds"} - set(curves)
            if missing or len(set(map(len, curves.values()))) != 1:
                raise ValueError(f"the curves of stage {stage} have no points or unequal lengths")


def read_results(
    paths: str | Path | Iterable[str | Path], damaged: Callable[[InputError], None] | None = None
) -> list[Result]:
    """Return the results in files and folders, in the given order, and by name within a folder.

    Args:
        paths: files of `write_result`; folders of them (other JSON there is ignored); or folders of
            a comparison, whose results are in `results/`.
        damaged: called with the error of each damaged result, which is then left out. None: raise
            the first of these errors.

    Raises:
        InputError: a path does not exist, a file is not a result, or a folder has no results.
    """
    several = [paths] if isinstance(paths, (str, Path)) else paths
    return [result for path in several for result in _read(Path(path), damaged)]


def _read(path: Path, damaged: Callable[[InputError], None] | None) -> list[Result]:
    alone = path.is_file()
    if not alone and not path.is_dir():
        raise MissingInputError(
            f"{path}: no such file or folder; give results, or the folder of a comparison"
        )
    folder = path / "results" if (path / "results").is_dir() else path
    found: list[Result] = []
    complaints = 0
    for file in [path] if alone else sorted(folder.glob("*.json")):
        try:
            values = read_json(file, Any)
            if alone or (isinstance(values, dict) and "result" in values):
                found.append(_restore(file, values))
        except InputError as error:
            if damaged is None:
                raise
            damaged(error)
            complaints += 1
    if not found and not complaints:
        raise MissingInputError(
            f"{path} holds no results: give files that poise compare or poise reproduce wrote, "
            "or their folder"
        )
    return found


def _restore(path: Path, values: Any) -> Result:
    names = {field.name for field in fields(Result)}
    if (
        not isinstance(values, dict)
        or values.get("result") != FORMAT
        or set(values) != names | {"result"}
    ):
        raise InputError(
            f"{path} is not a result of poise (format {FORMAT}): "
            "give files that poise compare or reproduce wrote"
        )
    convert(values, ResultFile, str(path))
    check_pages(values["evaluation"], str(path))
    known = {name: values[name] for name in names}
    known["curves"] = {
        stage: {
            name: [math.nan if value is None else value for value in curve]
            for name, curve in curves.items()
        }
        for stage, curves in values["curves"].items()
    }
    return Result(**known)
