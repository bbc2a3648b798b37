"""Compare training on a file five times the memory limit with training on images in memory.

    python benchmarks/streaming.py [--cap 1024] [--times 5] [--only dense convolutional]
        [--rounds 10] [--seconds 4]
    python benchmarks/streaming.py --tars 100000 [--kept SHARE]
        [--json results/bench-streaming-tars.json]

First an .npy file of random bytes, 32x32 RGB, is written, `--times` as large as the cap. Two
processes then train the same network. One reads the file as `poise train` does (memory-mapped,
split by content, streamed). A memory control group of Linux (version 1 or 2; needs root) keeps its
memory below the cap, pages of the file included. The other has 20,000 images in memory and no cap.
They take turns of a few seconds, and one sleeps while the other works. Each is one loop from
beginning to end. Without control groups the comparison has no cap, and the report says so.

With `--tars N`, N generated images of 32x32 are JPEG files in tar files of 10,000. One process
streams them (`poise train --stream`), the other has the decoded images in memory. There is no cap.
With `--kept SHARE` the memory of the first holds this share of the images, and it decodes the
others whenever it reads them. Without, it holds as many as `poise train` does.

The report has:

- images per second of both, and the ratio round by round;
- processor time per image, including the system's work for the reading thread (steadier than the
  rates while others use the cores);
- anonymous memory of the streaming process during the split and in both halves of its turns;
- the group's peak memory, and the bytes read from the disk per byte of image.
"""

import argparse
import io
import math
import os
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from measuring import (
    PeakMemory,
    Worker,
    anonymous_mib,
    machine,
    over,
    send,
    show,
    summary,
    take_turns,
    wait_for_turn,
    write_report,
)

from poise import data as datasets
from poise.balance import ComputedBalance
from poise.recipes import Network, Stage
from poise.recipes.presets import IMAGES_RESNET
from poise.runs.build import first_stage
from poise.training import ImageBatches, TrainingState, Watch, fit, new_state

SHAPE = (32, 32, 3)
IN_MEMORY = 20_000
BLOCK = 5_000  # images written at once
PER_TAR = 10_000  # images
WARM_UP = 2.0  # seconds
FOREVER = 10_000_000  # steps
AS_IT_IS = -1  # as many images in memory as a stream keeps
NETWORKS = {
    "dense": (Network("mlp", 64, hidden=(256, 256)), 500),
    "convolutional": (Network("infogan", 64), 100),
}


def write_noise(path: Path, count: int) -> None:
    """Write an .npy file of random bytes to the disk and drop it from the page cache."""
    source = np.random.default_rng(0)
    with path.open("wb") as file:
        shape = {"descr": "|u1", "fortran_order": False, "shape": (count, *SHAPE)}
        np.lib.format.write_array_header_1_0(file, shape)
        for start in range(0, count, BLOCK):
            file.write(source.bytes(min(BLOCK, count - start) * math.prod(SHAPE)))
        file.flush()
        os.fsync(file.fileno())
    forget(path)


def write_tars(folder: Path, count: int) -> None:
    """Write JPEG files of coloured discs on gradients into tar files."""
    from PIL import Image

    source, (rows, columns) = np.random.default_rng(0), np.mgrid[0:32, 0:32]
    for start in range(0, count, PER_TAR):
        with tarfile.open(folder / f"images-{start // PER_TAR:04}.tar", "w") as archive:
            for number in range(start, min(start + PER_TAR, count)):
                centre, radius = source.uniform(8, 24, 2), source.uniform(4, 10)
                disc = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
                low, high, colour = source.uniform(0, 255, (3, 3))
                slope = (columns / 31)[..., None]
                picture = np.where(disc[..., None], colour, low + slope * (high - low))
                content = io.BytesIO()
                Image.fromarray(picture.astype(np.uint8)).save(content, "JPEG", quality=90)
                member = tarfile.TarInfo(f"{number:08}.jpg")
                member.size = content.tell()
                content.seek(0)
                archive.addfile(member, content)


def forget(path: Path) -> None:
    """Drop a file from the page cache: cached pages would not count against the cap."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Group:
    """A memory control group: its folder, and its version's file names of limit and peak."""

    folder: Path
    limit: str
    peak: str

    def read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def peak_mib(self) -> float | None:
        text = self.read(self.peak)
        return round(int(text) / 2**20, 1) if text else None


@contextmanager
def capped(mib: int) -> Iterator[Group | None]:
    """Yield a control group with a limit of `mib`, and remove it after the block.

    Yields None, with a note, if no group can be created.
    """
    group = make_group(mib) if mib else None
    if mib and group is None:
        print(
            "note: training has no memory cap: a control group needs Linux and root",
            file=sys.stderr,
        )
    try:
        yield group
    finally:
        if group is not None:
            group.folder.rmdir()


def make_group(mib: int) -> Group | None:
    own = dict(line.split(":", 2)[1:] for line in lines(Path("/proc/self/cgroup")))
    # Version 1: below our own group, within its limit.
    first = Path("/sys/fs/cgroup/memory" + own.get("memory", "/"))
    for parent, limit, peak in (
        (first, "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
        (Path("/sys/fs/cgroup" + own.get("", "/")), "memory.max", "memory.peak"),
        (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
    ):
        group = Group(parent / f"poise-{os.getpid()}", limit, peak)
        try:
            group.folder.mkdir()
        except OSError:
            continue
        try:
            (group.folder / limit).write_text(str(mib * 2**20))
            return group
        except OSError:
            group.folder.rmdir()
    return None


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def trainer(
    network: str, file: Path | None, group: Group | None, *, stream: int | None = None
) -> Worker:
    """Return a worker process of this script that trains in turns.

    Args:
        network: a name in `NETWORKS`.
        file: the file or folder with the images, or None for noise in memory.
        group: the control group of the process from its first instruction, or None.
        stream: number of images that the process streams. None: it decodes all before.
    """
    streamed = ["--file", str(file)] if file else []
    streamed += [] if stream is None else ["--stream", str(stream)]
    enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"']
    prefix = [*enter, str(group.folder / "cgroup.procs")] if group else []
    return Worker([__file__, "--train", network, *streamed], prefix=prefix)


def train(name: str, file: Path | None, stream: int | None) -> None:
    """Read the images and report it, then serve turns of some seconds of training."""
    network, batch_size = NETWORKS[name]
    began = time.perf_counter()
    with PeakMemory() as memory:
        if file is None:
            images: Any = np.random.default_rng(0).integers(
                0, 256, (IN_MEMORY, SHAPE[2], *SHAPE[:2]), dtype=np.uint8
            )
        else:
            # A stream keeps half as many bytes as others may have.
            budget = None if stream in (None, AS_IT_IS) else 2 * stream * math.prod(SHAPE)
            images = datasets.load(file, stream=stream is not None, memory_budget=budget).train
    read = round(time.perf_counter() - began, 1)
    send({"seconds": read, "peak_anonymous_mib": round(memory.mib, 1)})
    stage, device = Stage(steps=FOREVER, batch_size=batch_size), torch.device("cpu")
    vae = first_stage(replace(IMAGES_RESNET, network=network), list(images.shape[1:]))
    state = new_state(vae, ComputedBalance(), stage, device)
    watch = Watch(stop=Turns(state, batch_size).stop, quiet=True, save_seconds=math.inf)
    fit(state, ImageBatches(images, device), stage, number=1, seed=0, watch=watch)


class Turns:
    """`Watch.stop` of a worker: report each turn and wait for the next."""

    def __init__(self, state: TrainingState, batch_size: int) -> None:
        self.state, self.batch_size = state, batch_size
        self.step, self.ends, self.began, self.read, self.cpu = 0, 0.0, 0.0, 0, 0.0

    def stop(self) -> bool:
        now = time.perf_counter()
        if now < self.ends:
            return False
        if self.ends:
            images = (self.state.step - self.step) * self.batch_size
            answer = {
                "images_per_second": images / (now - self.began),
                "processor_us_per_image": 1e6 * (time.process_time() - self.cpu) / images,
                "anonymous_mib": anonymous_mib(),
                "read_per_byte": (disk_bytes() - self.read) / (images * math.prod(SHAPE)),
            }
            send(answer)
        seconds = wait_for_turn()
        self.step, self.began, self.read, self.cpu = (
            self.state.step,
            time.perf_counter(),
            disk_bytes(),
            time.process_time(),
        )
        self.ends = self.began + (seconds or 0)
        return seconds is None


def disk_bytes() -> int:
    """Return the bytes that this process has read from the disk (Linux; elsewhere 0)."""
    return next(
        (
            int(line.split()[1])
            for line in lines(Path("/proc/self/io"))
            if line.startswith("read_bytes")
        ),
        0,
    )


def measure(
    name: str, file: Path, cap: int, rounds: int, seconds: float, kept: int
) -> dict[str, Any]:
    """Compare the two processes on one network. `kept` images of tar files are in memory."""
    tars = sorted(file.glob("*.tar"))
    for path in tars or [file]:
        forget(path)
    with capped(cap) as group:
        trainers = {
            "streamed": trainer(name, file, group, stream=kept if tars else None),
            "in memory": trainer(name, file if tars else None, None),
        }
        for process in trainers.values():
            process.turn(WARM_UP)
        answers = take_turns(trainers, dict.fromkeys(trainers, seconds), rounds)
        for process in trainers.values():
            process.end()
        peak = group and group.peak_mib()
    rates, work = (
        {name: [answer[figure] for answer in given] for name, given in answers.items()}
        for figure in ("images_per_second", "processor_us_per_image")
    )
    memory = [answer["anonymous_mib"] for answer in answers["streamed"]]
    half = max(1, rounds // 2)
    return {
        "batch_size": NETWORKS[name][1],
        "file_mib": round(sum(path.stat().st_size for path in tars or [file]) / 2**20),
        "cap_mib": group and cap,
        "loading": trainers["streamed"].ready,
        "images_per_second": {name: summary(values, 1) for name, values in rates.items()},
        "streamed_over_in_memory": over(rates["streamed"], rates["in memory"]),
        "processor_us_per_image": {name: summary(values, 1) for name, values in work.items()},
        "anonymous_mib": {
            "first half": round(fmean(memory[:half]), 1),
            "second half": round(fmean(memory[-half:]), 1),
        },
        "anonymous_mib_by_round": [round(mib, 1) for mib in memory],
        "group_peak_mib": peak,
        "read_per_byte": summary([answer["read_per_byte"] for answer in answers["streamed"]]),
    }


def table(reports: dict[str, dict[str, Any]]) -> list[list[Any]]:
    rows: list[list[Any]] = [
        [
            "network",
            "streamed, images/s",
            "in memory",
            "ratio",
            "MiB, first half",
            "second",
            "group's peak",
        ]
    ]
    for name, report in reports.items():
        rate, memory = report["images_per_second"], report["anonymous_mib"]
        halves = [memory["first half"], memory["second half"]]
        ratio = report["streamed_over_in_memory"]
        rows.append(
            [name, rate["streamed"], rate["in memory"], ratio, *halves, report["group_peak_mib"]]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cap", type=int, default=1024, help="memory limit in MiB; 0 for none")
    parser.add_argument(
        "--times", type=float, default=5.0, help="size of the file in caps (without a cap, in MiB)"
    )
    parser.add_argument("--tars", type=int, default=0, help="stream so many images in tar files")
    parser.add_argument("--kept", type=float, help="share of the streamed images in memory")
    parser.add_argument("--only", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of a turn")
    parser.add_argument(
        "--folder", type=Path, help="folder for the images (default: the system's temporary folder)"
    )
    parser.add_argument("--json", type=Path, default=Path("results/bench-streaming.json"))
    parser.add_argument("--train", choices=NETWORKS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stream", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train, options.file, options.stream)
        return
    # Remove the file and the group after SIGTERM too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        file = Path(folder) if options.tars else Path(folder, "images.npy")
        cap = 0 if options.tars else options.cap
        if options.tars:
            write_tars(file, options.tars)
        else:
            write_noise(file, int(options.times * max(1, cap) * 2**20) // math.prod(SHAPE))
        kept = AS_IT_IS if options.kept is None else round(options.kept * options.tars)
        reports = {
            name: measure(name, file, cap, options.rounds, options.seconds, kept)
            for name in options.only
        }
    show(table(reports))
    write_report(
        options.json,
        {
            **machine(torch.device("cpu")),
            "images_in_tars": options.tars,
            "share_kept": options.kept,
            "rounds": options.rounds,
            "networks": reports,
        },
    )


if __name__ == "__main__":
    main()
