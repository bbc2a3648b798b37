"""The readers of Poise, and the files that are damaged before they read.

A reader returns the numbers that must not change silently.
"""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import poise
from benchmarks.torture.material import IMAGES, OPTIONS, RECIPE, make_features, read_decoded
from poise.data import load as load_data
from poise.errors import RunError
from poise.features import make_extractor
from poise.features.weights import load_tensors
from poise.report import write_report
from poise.report.records import read_records
from poise.runs.checkpoint import newest_intact_checkpoint
from poise.studies.results import read_results


def sampled(folder: Path) -> Any:
    run = poise.load(folder / "run", device="cpu")
    if run.warnings:  # the checkpoint before is used, and the user is told
        raise RunError(run.warnings[0])
    drawn = [run.sample(3, prior=prior) for prior in ("normal", "mixture")]
    drawn += [run.sample(3)] if run.second is not None else []
    return [run.finished, run.second is not None, *[images.numpy() for images in drawn]]


def evaluated(folder: Path) -> Any:
    return poise.load(folder / "run", device="cpu").evaluate(IMAGES, extractor="none").pages


def resumed(folder: Path) -> Any:
    """Resume a run and return its final weights."""
    out = folder / "run"
    poise.train(IMAGES, recipe=RECIPE, out=out, options=OPTIONS)
    saved, _ = newest_intact_checkpoint(out / "checkpoints")
    assert saved is not None
    return [saved.tensors[name].numpy() for name in sorted(saved.tensors)]


def plotted(folder: Path) -> Any:
    poise.load(folder / "run", device="cpu").plot()
    return []


def reported(folder: Path) -> Any:
    return [record.seed for record in read_records([folder / "run"])]


def page_of_run(folder: Path) -> Any:
    write_report([folder / "run"], folder / "page.html", device="cpu")
    return []


def page_of_results(folder: Path) -> Any:
    """Write a page of two results, of which one is intact."""
    write_report([folder / "results"], folder / "page.html", device="cpu")
    return []


def results(folder: Path) -> Any:
    return [result.seed for result in read_results([folder / "results"])]


def shared(folder: Path) -> Any:
    run = poise.load(f"hf:{folder / 'run'}", device="cpu")
    return [run.sample(3).numpy()]


def carded(folder: Path) -> Any:
    """Share a run again: the model card shows its figures."""
    poise.load(folder / "run", device="cpu").save_pretrained(folder / "again")
    return []


def features(folder: Path) -> Any:
    return [make_features(folder)]


def decoded(folder: Path) -> Any:
    return [read_decoded(folder)]


def images_of(name: str) -> Callable[[Path], Any]:
    def images(folder: Path) -> Any:
        dataset = load_data(folder / name)
        return [len(dataset.train), len(dataset.test)]

    return images


def skipping(folder: Path) -> Any:
    dataset = load_data(folder, skip_unreadable=True, size=8, channels=3)
    return [len(dataset.train), len(dataset.test)]


def weights(folder: Path) -> Any:
    return [tensor.numpy() for _, tensor in sorted(load_tensors(folder / "weights.pth").items())]


def extractor(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = make_extractor(f"{folder / 'network.pt'}:range=0..1")
        return [network(IMAGES[:2]).numpy()]


def compared(folder: Path) -> Any:
    """Go on with a comparison, of which some runs are finished."""
    with contextlib.redirect_stdout(None):
        found = poise.compare(
            IMAGES,
            recipe=replace(RECIPE, second=None),
            balances=("computed", "learned"),
            seeds=1,
            extractor="pixels",
            jobs=1,
            out=folder / "compared",
            options=OPTIONS,
        )
    return [result.evaluation["reconstruction"]["mse"] for result in found.results]


@dataclass(frozen=True)
class Target:
    """A kind of file, and a reader of it.

    Attributes:
        folder: folder of the material that the reader gets.
        files: pattern of the damaged files in it.
        read: the reader.
        hashed: whether a hash protects the files, so that another result is wrong.
        kinds: mutations to apply.
    """

    folder: str
    files: str
    read: Callable[[Path], Any]
    hashed: bool = False
    kinds: tuple[str, ...] = ("bytes", "hostile")


JSON = ("bytes", "values", "hostile")
TENSORS = ("bytes", "rehashed", "hostile")
MANIFEST = ("bytes", "values", "rehashed", "hostile")
CODE = ("bytes", "code", "code", "hostile")
TARGETS = (
    Target("run", "run/config.json", sampled, False, JSON),
    Target("run", "run/config.json", reported, False, JSON),
    Target("run", "run/config.json", evaluated, False, JSON),
    Target("run", "run/checkpoints/*/manifest.json", sampled, True, MANIFEST),
    Target("run", "run/checkpoints/*/tensors.safetensors", sampled, True, TENSORS),
    Target("run", "run/codes/manifest.json", sampled, True, MANIFEST),
    Target("run", "run/codes/tensors.safetensors", sampled, True, TENSORS),
    Target("run", "run/mixture/manifest.json", sampled, True, MANIFEST),
    Target("run", "run/mixture/tensors.safetensors", sampled, True, TENSORS),
    Target("run", "run/diagnosis.json", sampled, False, JSON),
    Target("run", "run/summary.json", reported, False, JSON),
    Target("run", "run/summary.json", page_of_run, False, JSON),
    Target("run", "run/evaluation.json", page_of_run, False, JSON),
    Target("run", "run/evaluation.json", carded, False, JSON),
    Target("run", "run/latents.json", carded, False, JSON),
    Target("run", "run/*.png", page_of_run),
    Target("run", "run/metrics.jsonl", plotted, False, JSON),
    Target("run", "run/metrics.jsonl", reported, False, JSON),
    Target("shared", "run/README.md", shared),
    Target("shared", "run/*/tensors.safetensors", shared, True, TENSORS),
    Target("unfinished", "run/metrics.jsonl", resumed, True, JSON),
    Target("unfinished", "run/config.json", resumed, True, JSON),
    Target("unfinished", "run/checkpoints/*/manifest.json", resumed, True, MANIFEST),
    Target("unfinished", "run/checkpoints/*/tensors.safetensors", resumed, True, TENSORS),
    Target("unfinished", "run/codes/tensors.safetensors", resumed, True, TENSORS),
    Target("unfinished", "run/progress.png", resumed, True),
    Target("comparison", "compared/experiment.json", compared, False, JSON),
    Target("comparison", "compared/results/*.json", compared, False, JSON),
    Target("comparison", "compared/*/config.json", compared, False, JSON),
    Target("comparison", "compared/images-*", compared, True),
    Target("results", "results/other.json", results, False, JSON),
    Target("results", "results/other.json", page_of_results, False, ("values", "bytes")),
    Target("cache", "*.safetensors", features, True, TENSORS),
    Target("decoded", "cache/decoded-*.npy", decoded, True),
    Target("decoded", "cache/decoded-*.json", decoded, True, JSON),
    Target("npy", "images.npy", images_of("images.npy")),
    Target("npz", "images.npz", images_of("images.npz"), False, ("bytes", "bomb", "hostile")),
    Target("photos", "3.png", images_of("")),
    Target("album", "*.*", images_of("")),
    Target("album", "*.*", skipping),
    Target("mnist", "*-ubyte*", images_of(""), False, ("bytes", "bomb", "hostile")),
    Target("cifar", "*_batch*", images_of(""), False, CODE),
    Target("celeba", "list_eval_partition.txt", images_of("")),
    Target("celeba", "img_align_celeba/*.jpg", images_of("")),
    Target("weights", "weights.pth", weights, False, CODE),
    Target("weights", "network.pt", extractor),
)


def leaves(value: Any) -> Any:
    """Yield the values in nested lists and dictionaries."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def are_finite(value: Any) -> bool:
    numbers = [part for part in leaves(value) if isinstance(part, (float, np.ndarray))]
    return all(np.isfinite(part).all() for part in numbers)
