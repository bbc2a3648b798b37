"""Kill a training process (SIGKILL) at random moments, resume it each time, compare the weights.

    python benchmarks/kill_and_resume.py [--kills 10] [--seed 0] [--epochs 20]
        [--continued] [--options IMAGES --stream ...]

With `--continued`, a finished run is continued for as many epochs, and that is killed. Prints the
position of each kill in the two stages. Exits with 1 unless the final weights are bit-identical to
those of an undisturbed run.
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


def command(folder: Path, epochs: int, options: Sequence[str], *, more: bool = False) -> list[str]:
    """Return the command that trains for some epochs, or continues a finished run for as many."""
    lengths = ["--epochs", str(epochs), "--second-epochs", str(epochs)]
    arguments = ["--more-epochs", str(epochs)] if more else [*options, *lengths]
    common = ["--device", "cpu", "--save-seconds", "0.05", "--out", str(folder)]
    return [sys.executable, "-m", "poise", "train", *arguments, *common]


def train(
    folder: Path,
    epochs: int,
    options: Sequence[str],
    seconds: float | None = None,
    *,
    more: bool = False,
) -> bool:
    """Train, but kill the process after `seconds`; return whether training finished."""
    process = subprocess.Popen(
        command(folder, epochs, options, more=more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, complaints = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return more and (folder / "summary.json").exists()  # again would be one more continuation
    if process.returncode != 0:
        sys.exit(f"training failed: {complaints}")
    return True


def position(folder: Path) -> str:
    """Describe the step and stage of the newest checkpoint."""
    manifests = sorted((folder / "checkpoints").glob("[0-9]*/manifest.json"))
    if not manifests:
        return "before the first checkpoint"
    meta = json.loads(manifests[-1].read_text())["meta"]
    return f"after step {meta['step']} of stage {meta['stage']}" + (
        ", finished" if meta["finished"] else ""
    )


def final_hash(folder: Path) -> str:
    newest = sorted((folder / "checkpoints").glob("[0-9]*"))[-1]
    return hashlib.sha256((newest / "tensors.safetensors").read_bytes()).hexdigest()


def compare(folder: Path, scratch: str) -> str:
    """Return "bit-identical", or exit with an error if the weights differ."""
    if final_hash(folder) != final_hash(Path(scratch, "undisturbed")):
        sys.exit(f"the weights of {folder.name} DIFFER from those of the undisturbed run")
    return "bit-identical"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--continued", action="store_true")
    parser.add_argument(
        "--options", nargs=argparse.REMAINDER, default=["digits"], help="of poise train; the last"
    )
    options = parser.parse_args()
    epochs, more = options.epochs, options.continued
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        finished, folder = Path(scratch, "finished"), Path(scratch, "killed")
        if more:
            train(finished, epochs, options.options)
            for name in ("undisturbed", "killed"):
                shutil.copytree(finished, finished.with_name(name))
        began = time.monotonic()
        train(Path(scratch, "undisturbed"), epochs, options.options, more=more)
        whole = time.monotonic() - began
        print(f"undisturbed: {whole:.1f} s")
        killed = 0
        while killed < options.kills:
            # Long enough for the start and part of the work, so that a kill may strike in either.
            life = moments.uniform(0.2 * whole, 0.45 * whole)
            if train(folder, epochs, options.options, life, more=more):
                print(f"finished after {killed} kills, {compare(folder, scratch)}; starting anew")
                folder = folder.with_name(folder.name + "-again")
                if more:
                    shutil.copytree(finished, folder)
                continue
            killed += 1
            print(f"kill {killed} after {life:.1f} s: {position(folder)}")
        train(folder, epochs, options.options, more=more)
        print(f"{killed} kills: final weights {compare(folder, scratch)}")


if __name__ == "__main__":
    main()
