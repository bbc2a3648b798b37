"""Measure time and memory of training against batch size, image size and number of images.

    python benchmarks/scaling.py [--steps 20] [--most 1000000] [--folder FOLDER]
        [--only batch size images]

Each row runs in its own process. Images are noise, grey values of 0 to 255, in an .npy file of
bytes that is memory-mapped and streamed. Reading includes the split (a hash of every image), the
checksum and the standard deviation of the pixels, as in `poise train`. Training is stage 1 alone,
timed after the first few steps. Memory is the process's peak anonymous memory. Pages of the mapped
file do not count, because the system may reclaim them at any time.

batch: the network of the CIFAR-10 recipe on 32x32 RGB, 10,000 images.
size: the same with batch 32 and larger images.
images: a dense network on 28x28 grey images, batch 100, so that the cost of the data dominates.
"""

import argparse
import math
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import PeakMemory, anonymous_mib, machine, seconds, show, write_report

from poise import data as datasets
from poise.balance import ComputedBalance
from poise.metrics import pixel_std
from poise.recipes import Network, Stage
from poise.recipes.presets import IMAGES_RESNET
from poise.runs.build import first_stage
from poise.training import ImageBatches, Watch, fit, new_state

WARM_UP = 3  # steps
BLOCK = 1_000  # images written at once


@dataclass(frozen=True)
class Case:
    """Settings of one row."""

    network: str
    batch_size: int
    size: int
    channels: int
    images: int


def cases(most: int) -> dict[str, list[Case]]:
    few = min(10_000, most)
    counts = sorted({min(count, most) for count in (10_000, 100_000, 1_000_000)})
    return {
        "batch": [Case("resnet", batch_size, 32, 3, few) for batch_size in (16, 32, 64, 128, 256)],
        "size": [Case("resnet", 32, size, 3, min(2_000, most)) for size in (16, 32, 64, 128)],
        "images": [Case("mlp", 100, 28, 1, count) for count in counts],
    }


def write_noise(path: Path, case: Case) -> None:
    """Write an .npy file of random bytes, in blocks."""
    shape = (case.images, case.size, case.size, case.channels)
    source = np.random.default_rng(0)
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    for start in range(0, case.images, BLOCK):
        block = array[start : start + BLOCK]
        block[:] = source.integers(0, 256, block.shape, dtype=np.uint8)
    array.flush()


def train(path: Path, case: Case, steps: int, device_name: str) -> dict[str, float]:
    """Measure seconds and memory of reading the file and of training on it."""
    device, at_start = torch.device(device_name), anonymous_mib()
    network = Network(case.network, 64, hidden=(512, 512) if case.network == "mlp" else ())  # pyright: ignore[reportArgumentType]
    stage = Stage(steps=WARM_UP, batch_size=case.batch_size)
    with PeakMemory() as reading:
        began = time.perf_counter()
        data = datasets.load(path)
        _ = data.checksum, pixel_std(data.train)
        read = time.perf_counter() - began
    with PeakMemory() as training:
        vae = first_stage(replace(IMAGES_RESNET, network=network), list(data.shape))
        state, batches = (
            new_state(vae, ComputedBalance(), stage, device),
            ImageBatches(data.train, device),
        )
        watch = Watch(quiet=True, save_seconds=math.inf)
        fit(state, batches, stage, number=1, seed=0, watch=watch)
        longer = replace(stage, steps=WARM_UP + steps)
        taken = seconds(lambda: fit(state, batches, longer, number=1, seed=0, watch=watch), device)
    return {
        "reading_seconds": round(read, 2),
        "seconds_per_step": round(taken / steps, 5),
        "images_per_second": round(steps * case.batch_size / taken, 1),
        "reading_mib": round(reading.mib - at_start, 1),
        "training_mib": round(training.mib - at_start, 1),
    }


def measure(case: Case, steps: int, device: str, folder: Path) -> dict[str, Any]:
    path = folder / "images.npy"
    write_noise(path, case)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        figures = pool.submit(train, path, case, steps, device).result()
    path.unlink()
    return {**asdict(case), **figures}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="*",
        choices=("batch", "size", "images"),
        default=["batch", "size", "images"],
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=20,
        help="timed steps of each row; ten times as many for the dense network",
    )
    parser.add_argument(
        "--most", type=int, default=1_000_000, help="number of images in the largest data set"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder for the images, 784 MB (default: the system's temporary folder)",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=Path("results/bench-scaling.json"))
    options = parser.parse_args()
    report: dict[str, Any] = machine(torch.device(options.device))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name in options.only:
            steps = options.steps * (10 if name == "images" else 1)
            report[name] = [
                measure(case, steps, options.device, Path(folder))
                for case in cases(options.most)[name]
            ]
            show([list(report[name][0]), *[list(row.values()) for row in report[name]]])
    write_report(options.json, report)


if __name__ == "__main__":
    main()
