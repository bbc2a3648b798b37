"""Part 5: a million images, a report of 10,000 results, 200,000 evaluated images.

Each runs in a process of its own, whose peak memory is stated, with the memory of the imports. A
ceiling above the measured memory fails the case.

million images    a folder of 1,000,000 names of JPEG files (hard links to 2,000 pictures of 32
                  pixels): list, decode at 8 pixels to a mapped file, split, train 200 steps
10,000 results    five labels of 2,000 seeds, in one page
200,000 images    two files of 200,000 grey images of 4 pixels, compared by pixels
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import poise
from benchmarks.torture.cases import ENVIRONMENT, OK, Case, Ended, forked
from benchmarks.torture.material import IMAGES, OPTIONS, RECIPE, make_results
from poise import data as datasets
from poise.report import write_report

COUNTS = {"images in a folder": 1_000_000, "results in a page": 10_000, "images compared": 200_000}
CEILINGS = {
    "images in a folder": 3_072,
    "results in a page": 3_072,
    "images compared": 3_072,
}  # MiB
PICTURES = 2_000  # an inode may have 65,000 names
LONG = 3_600.0


def cases(seed: int, jobs: int, scale: float = 1.0) -> tuple[list[Case], dict[str, Any]]:
    os.environ.update(ENVIRONMENT)
    found, figures = list[Case](), dict[str, Any]()
    works: dict[str, Callable[[int, int, Path], Ended]] = {
        "images in a folder": many_files,
        "results in a page": many_results,
        "images compared": many_compared,
    }
    for name, work in works.items():
        count = max(100, round(COUNTS[name] * scale))
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["POISE_CACHE"] = str(Path(scratch, "cache"))
            ended = work(seed, count, Path(scratch))
        outcome, detail = ended.outcome, ended.err[-300:] if ended.outcome != OK else ""
        if outcome == "memory":  # its limit is that of small files
            outcome, detail = OK, ""
        if outcome == OK and ended.mib > CEILINGS[name]:
            outcome, detail = "memory", f"{ended.mib:.0f} MiB"
        what = f"{count:,} {name}"
        found.append(Case("sizes", what, outcome, detail))
        figures[what] = {
            "MiB above the imports": round(ended.mib),
            "ceiling, MiB": CEILINGS[name],
            "seconds": round(ended.seconds),
        }
    return found, figures


def many_files(seed: int, count: int, scratch: Path) -> Ended:
    """Train on a folder of so many names of files."""
    generator = np.random.default_rng(seed)
    folder = scratch / "photos"
    pictures = min(PICTURES, count)
    for number in range(pictures):
        place = folder / f"{number:04d}"
        place.mkdir(parents=True)
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "0000.jpg")
        for copy in range(1, len(range(number, count, pictures))):
            os.link(place / "0000.jpg", place / f"{copy:04d}.jpg")

    def work() -> int:
        dataset = datasets.load(folder, size=8, channels=1, memory_budget=2**20, cache=scratch)
        recipe = replace(RECIPE, first=replace(RECIPE.first, steps=200), second=None)
        poise.train(dataset, recipe=recipe, out=scratch / "run", options=OPTIONS)
        assert len(dataset.train) + len(dataset.test) == count
        return count

    return forked(work, seconds=LONG)


def many_results(seed: int, count: int, scratch: Path) -> Ended:
    """Write a page of so many results."""
    run = poise.train(IMAGES, recipe=RECIPE, out=scratch / "run", options=OPTIONS)
    make_results(run, scratch / "made")
    one = json.loads(next((scratch / "made").rglob("other.json")).read_text())
    (scratch / "results").mkdir()
    labels = ("computed", "learned", "optimal", "fixed:gamma2=1", "fixed:beta=4")
    for number in range(count):
        content = one | {"seed": number // len(labels), "label": labels[number % len(labels)]}
        (scratch / "results" / f"{number}.json").write_text(json.dumps(content))

    def work() -> int:
        write_report([scratch / "results"], scratch / "page.html", device="cpu")
        return (scratch / "page.html").stat().st_size

    return forked(work, seconds=LONG)


def many_compared(seed: int, count: int, scratch: Path) -> Ended:
    """Compare two files of so many images."""
    generator = np.random.default_rng(seed)
    for name in ("real.npy", "generated.npy"):
        np.save(scratch / name, generator.integers(0, 256, (count, 4, 4), dtype=np.uint8))

    def work() -> float:
        sys.stderr.flush()
        torch.set_num_threads(os.cpu_count() or 1)  # no other process runs beside this one
        measured = poise.evaluate(
            scratch / "real.npy", scratch / "generated.npy", extractor="pixels", count=count
        )
        return measured.distance()

    return forked(work, seconds=LONG)
