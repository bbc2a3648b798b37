"""Measure images per second of sampling relative to the bare decoder, and its peak memory.

    python benchmarks/sampling_rate.py [RUN] [--images 500] [--rounds 7] [--many 100000]

Processes take turns, round by round. They measure the decoder alone, on latents on its device, in
batches of the size that sampling uses; `run.sample_chunks` from each prior; and sampling into an
.npz file and into a folder of PNGs. Without RUN, an untrained network of the CIFAR-10 recipe is
used, which is as fast as a trained one.

Memory: a dense network for 32x32 RGB images (12,288 bytes each as floats) writes `--many` images
and a hundredth of them to an .npz, each in its own process. The report has the peak of anonymous
memory of both. If they are alike, memory does not grow with the number of images.
"""

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import (
    PeakMemory,
    Worker,
    machine,
    over,
    send,
    serve,
    show,
    summary,
    take_turns,
    write_report,
)

import poise
from poise.runs.export import write_images
from poise.runs.options import Options
from poise.runs.run import Run, load
from poise.sampling import CHUNK


def untrained(folder: Path, **changes: Any) -> Path:
    """Train for a few steps on noise and return the run's folder."""
    images = np.random.default_rng(0).integers(0, 256, (220, 32, 32, 3), dtype=np.uint8)
    options = Options(device="cpu", quiet=True)
    poise.train(images, recipe="cifar10", out=folder, epochs=1, options=options, **changes)
    return folder


def bare_decoder(run: Run, count: int) -> Callable[[], None]:
    decoder = run.first.vae.decoder.eval()
    latents = torch.randn(CHUNK, run.recipe.network.latent_dim, device=run.device)

    @torch.no_grad()
    def decode() -> None:
        for _ in range(count // CHUNK):
            decoder(latents)

    return decode


def sampling(run: Run, count: int, prior: Any) -> Callable[[], None]:
    def draw() -> None:
        for _ in run.sample_chunks(count, prior=prior):
            pass

    return draw


def tasks_of(run: Run, count: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return the compared tasks by name; each produces `count` images."""

    def write(out: Path) -> Callable[[], None]:
        return lambda: write_images(run.sample_chunks(count, prior="normal"), out, count)

    tasks = {
        "decoder alone": bare_decoder(run, count),
        "sample, normal": sampling(run, count, "normal"),
    }
    if run.second_stage is not None:
        tasks[f"sample, {run.default_prior}"] = sampling(run, count, run.default_prior)
    return tasks | {
        "into an .npz": write(folder / "images.npz"),
        "into a folder of PNGs": write(folder / "images"),
    }


def work(run: Run, task: str) -> None:
    """Serve the turns of one task, in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        send({})
        serve(lambda count: tasks_of(run, count, Path(folder))[task], run.device)


def measure_rates(run: Run, count: int, rounds: int) -> dict[str, Any]:
    command = [__file__, str(run.folder), "--device", str(run.device)]
    workers = {
        name: Worker([*command, "--task", name]) for name in tasks_of(run, count, run.folder)
    }
    counts = dict.fromkeys(workers, count)
    take_turns(workers, counts, 1)
    times = take_turns(workers, counts, rounds)
    for process in workers.values():
        process.end()
    return {
        name: {
            "images_per_second": summary([count / second for second in values], 1),
            "share_of_decoder": over(times["decoder alone"], values),
        }
        for name, values in times.items()
    }


def peak_memory(folder: Path, count: int) -> float:
    """Return the peak memory in MiB of writing `count` images, in the calling process."""
    run = load(folder)
    with PeakMemory() as memory:
        write_images(run.sample_chunks(count, prior="normal"), folder / "many.npz", count)
    (folder / "many.npz").unlink()
    return round(memory.mib, 1)


def in_a_process_of_its_own(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument(
        "--images", type=int, default=500, help="images per round; a multiple of 100"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--many", type=int, default=100_000, help="number of images for the memory measurement"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=Path("results/bench-sampling-rate.json"))
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        work(load(options.run, device=options.device), options.task)
        return
    with tempfile.TemporaryDirectory() as folder:
        run = load(
            options.run or untrained(Path(folder, "run"), second_epochs=1), device=options.device
        )
        rates = measure_rates(run, options.images, options.rounds)
        dense = untrained(Path(folder, "dense"), network="mlp", latent_dim=32, stages=1)
        counts = (options.many // 100, options.many)
        memory = {
            str(count): in_a_process_of_its_own(peak_memory, dense, count) for count in counts
        }
    show(
        [["", "images per second", "share of the decoder's rate"]]
        + [[name, row["images_per_second"], row["share_of_decoder"]] for name, row in rates.items()]
    )
    print(
        "\npeak memory: "
        + ", ".join(f"{mib} MiB for {count} images" for count, mib in memory.items())
    )
    report = {
        **machine(run.device),
        "network": run.recipe.network.kind,
        "shape": run.data["shape"],
        "rounds": options.rounds,
    }
    write_report(
        options.json,
        {
            **report,
            "images_in_a_round": options.images,
            "rates": rates,
            "peak_mib_of_images": memory,
        },
    )


if __name__ == "__main__":
    main()
