"""Measure seconds and peak memory of loading folders of photographs, and of loading them again.

    python benchmarks/decoding.py [--sets small large] [--small 100000] [--large 2000] [--cores N]
        [--rounds 3] [--other SRC] [--folder FOLDER] [--json results/bench-decoding.json]

The sets are JPEG files of random shapes with noise: `small` has 160x160 pixels, `large` 4000x3000.
There are 50 different files and hard links to them, so that the disk does not fill. Every load is a
process of its own, which decodes to 64x64 pixels. "again" loads the same folder with the images
that the first load kept. With --other, a package in another source folder takes turns with this
one. --cores limits the processes to so many cores; a package that ignores the limit starts as many
threads as the machine has cores. Memory is the peak of the whole process, in MiB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine, show, summary, write_report
from PIL import Image, ImageDraw

SETS = {"small": (160, 160), "large": (4000, 3000)}
DIFFERENT = 50
SIDE = 64
LOAD = """
import json, sys, time
from pathlib import Path
from poise.data import load
folder, side, cache = sys.argv[1:]
began = time.perf_counter()
data = load(folder, size=int(side), channels=3, cache=Path(cache))
seconds = time.perf_counter() - began
# Unlike ru_maxrss, VmHWM does not begin at the peak of the process that started this one.
lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({"seconds": seconds, "images": len(data.train),
    "mib": int(lines["VmHWM"].split()[0]) / 1024, "sum": data.checksum}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[*SETS])
    parser.add_argument("--small", type=int, default=100_000)
    parser.add_argument("--large", type=int, default=2_000)
    parser.add_argument("--cores", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--folder", type=Path, help="where the files are made")
    parser.add_argument("--json", type=Path, default=Path("results/bench-decoding.json"))
    options = parser.parse_args()
    sources = {"this": Path(__file__).parent.parent / "src"}
    if options.other:
        sources["other"] = options.other
    report: dict[str, Any] = {"sets": {}} | machine(torch.device("cpu"))
    rows = [["set", "images", "package", "seconds", "seconds again", "peak MiB", "peak MiB again"]]
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        for name in options.sets:
            number = getattr(options, name)
            folder = make(Path(place) / name, number, *SETS[name])
            found = measure(folder, sources, options.rounds, options.cores)
            report["sets"][name] = {"images": number} | found
            for package, figures in found.items():
                values = [figures[key] for key in ("seconds", "again", "mib", "mib_again")]
                rows.append([name, str(number), package, *values])
    show(rows)
    write_report(options.json, report)


def make(folder: Path, number: int, width: int, height: int) -> Path:
    """Write `number` JPEG files, of which `DIFFERENT` differ."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(min(number, DIFFERENT)):
        colour = tuple(rng.integers(0, 256, 3).tolist())
        picture = Image.new("RGB", (width, height), colour)
        draw = ImageDraw.Draw(picture)
        for _ in range(30):
            x, y, radius = rng.integers((0, 0, 5), (width, height, height // 3)).tolist()
            colour = tuple(rng.integers(0, 256, 3).tolist())
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        noise = rng.normal(0, 6, (height, width, 1))
        pixels = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:06}.jpg", quality=85)
    for k in range(DIFFERENT, number):
        os.link(folder / f"{k % DIFFERENT:06}.jpg", folder / f"{k:06}.jpg")
    return folder


def measure(
    folder: Path, sources: dict[str, Path], rounds: int, cores: int | None
) -> dict[str, dict[str, Any]]:
    """Return the figures of each package. The packages take turns."""
    runs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in sources}
    for _ in range(rounds):
        for name, source in sources.items():
            with tempfile.TemporaryDirectory(dir=folder.parent) as cache:
                first, again = (load(folder, source, cache, cores) for _ in range(2))
            assert first["sum"] == again["sum"], "the kept images differ"
            runs[name].append((first, again))
    sums = {first["sum"] for pairs in runs.values() for first, _ in pairs}
    assert len(sums) == 1, "the packages decode different images"
    return {
        name: {
            "seconds": summary([first["seconds"] for first, _ in pairs]),
            "again": summary([again["seconds"] for _, again in pairs]),
            "mib": summary([first["mib"] for first, _ in pairs]),
            "mib_again": summary([again["mib"] for _, again in pairs]),
        }
        for name, pairs in runs.items()
    }


def load(folder: Path, source: Path, cache: str, cores: int | None) -> dict[str, Any]:
    command = [sys.executable, "-c", LOAD, str(folder), str(SIDE), cache]
    environment = os.environ | {"PYTHONPATH": str(source)}
    limit = None
    if cores is not None:
        allowed = sorted(os.sched_getaffinity(0))[:cores]
        limit = lambda: os.sched_setaffinity(0, allowed)  # noqa: E731
    done = subprocess.run(
        command, env=environment, preexec_fn=limit, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
