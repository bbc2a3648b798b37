"""Damage the files that Poise reads, read them, and count what happens.

    python benchmarks/torture.py [--cases 600] [--seed 0] [--json FILE] [--show]

Each case copies intact material, applies one mutation of a seeded generator to one file, and calls
one reader in a process of its own. The mutations:

    bytes      bits are flipped, the file is cut, zeroed, emptied or extended
    values     a value of a JSON file is replaced, deleted or added
    rehashed   a tensor is replaced, and the hashes are made right again
    hostile    a named pipe, a folder, a symbolic link or nothing in place of the file, or a copy of
               a checkpoint beside it

The outcomes:

    ok         the reader returned what it returns for intact material, or the values changed to
               other possible ones that no hash protects
    typed      InputError or RunError
    wrong      the reader returned other numbers than it should, without an error
    traceback  another exception, or the process died
    hang       more than 10 seconds

Exits with 1 unless all outcomes are ok or typed.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import poise
from poise.data import load as load_data
from poise.errors import InputError, RunError
from poise.features import cache, cached_features, make_extractor
from poise.features.weights import load_tensors
from poise.recipes import Data, Network, Recipe, Stage
from poise.report import write_report
from poise.report.records import read_records
from poise.runs.checkpoint import newest_intact_checkpoint, read_folder, write_folder
from poise.runs.options import Options
from poise.studies.results import read_results, result_of, write_result
from poise.training import engines

SECONDS = 10.0  # more is a hang
OUTCOMES = ("ok", "typed", "wrong", "traceback", "hang")
IMAGES = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
RECIPE = Recipe(
    name="torture",
    data=Data("array"),
    network=Network("mlp", latent_dim=2, hidden=(8,), second_hidden=8),
    first=Stage(steps=8, batch_size=10, learning_rate=1e-2),
    second=Stage(steps=8, batch_size=10, learning_rate=1e-2),
)
OPTIONS = Options(device="cpu", quiet=True, save_seconds=0.0)
ODD_VALUES = ("null", "{}", "[]", '"x"', "-1", "1e308", "1e999", "NaN", "true", '{"a": 1}', "0.5")
DEEP = "[" * 200_000


# Material


class Stopped(BaseException):
    """Ends a training run as a kill does."""


def make_material(folder: Path) -> None:
    """Write a finished run, an unfinished one, a result, features, images and weights."""
    run = poise.train(IMAGES, recipe=RECIPE, out=folder / "run", options=OPTIONS)
    evaluation = run.evaluate(IMAGES, extractor="pixels", priors=["normal"])
    for seed in (0, 1):
        result = result_of(run, evaluation, experiment="torture", label="computed")
        path = write_result(result, folder / "results")
        if seed == 0:
            content = json.loads(path.read_text())
            (folder / "results" / "other.json").write_text(json.dumps(content | {"seed": 7}))
    with stopping_after(11), suppress(Stopped):
        poise.train(IMAGES, recipe=RECIPE, out=folder / "unfinished", options=OPTIONS)
    features(folder)
    np.save(folder / "images.npy", IMAGES[:, 0])
    np.savez(folder / "images.npz", train=IMAGES[:50, 0], test=IMAGES[50:, 0])
    poise.data.decoding.save_png(folder / "photos" / "0.png", IMAGES[0].transpose(1, 2, 0))
    for number in range(1, 12):
        path = folder / "photos" / f"{number}.png"
        poise.data.decoding.save_png(path, IMAGES[number].transpose(1, 2, 0))
    torch.save({"weight": torch.arange(12.0), "bias": torch.ones(3)}, folder / "weights.pth")
    torch.jit.script(Averages()).save(str(folder / "network.pt"))


class Averages(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.arange(1.0, 4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) * self.scale


@contextmanager
def stopping_after(count: int) -> Iterator[None]:
    def step(*arguments: Any) -> None:
        if len(taken) == count:
            raise Stopped
        taken.append(1)
        real(*arguments)

    taken: list[int] = []
    real = engines.training_step
    engines.training_step = step
    try:
        yield
    finally:
        engines.training_step = real


# Readers. Each returns the numbers that must not change silently.


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
    """Resume a run and return its final weights, and the steps in its log."""
    out = folder / "unfinished"
    recipe = RECIPE
    poise.train(IMAGES, recipe=recipe, out=out, options=OPTIONS)
    saved, _ = newest_intact_checkpoint(out / "checkpoints")
    assert saved is not None
    return [saved.tensors[name].numpy() for name in sorted(saved.tensors)]


def plotted(folder: Path) -> Any:
    poise.load(folder / "run", device="cpu").plot()
    return []


def reported(folder: Path) -> Any:
    """Read the records of a folder: one damaged file must not hide the other runs."""
    records = read_records([folder / "run"])
    return [record.seed for record in records]


def page_of_results(folder: Path) -> Any:
    """Write a page of two results, of which one is intact."""
    write_report([folder / "results"], folder / "page.html")
    return []


def results(folder: Path) -> Any:
    return [result.seed for result in read_results([folder / "results"])]


def features(folder: Path) -> Any:
    pixels = make_extractor("pixels")
    return [cached_features(pixels, IMAGES, "content", cache=folder / "cache").numpy()]


def images_of(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        dataset = load_data(str(folder / name))
        return [len(dataset.train), len(dataset.test)]

    return read


def weights(folder: Path) -> Any:
    return sorted(load_tensors(folder / "weights.pth"))


def extractor(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = make_extractor(f"{folder / 'network.pt'}:range=0..1")
        return [network(IMAGES[:2]).numpy()]


@dataclass(frozen=True)
class Target:
    """A kind of file, and a reader of it.

    Attributes:
        files: pattern of the files in the material.
        read: the reader.
        hashed: whether a hash protects the files, so that another result is wrong.
        kinds: mutations to apply.
    """

    files: str
    read: Callable[[Path], Any]
    hashed: bool
    kinds: tuple[str, ...] = ("bytes", "hostile")


JSON = ("bytes", "values", "hostile")
TARGETS = (
    Target("run/config.json", sampled, False, JSON),
    Target("run/config.json", reported, False, JSON),
    Target("run/config.json", evaluated, False, JSON),
    Target("run/checkpoints/*/manifest.json", sampled, True, JSON),
    Target(
        "run/checkpoints/*/tensors.safetensors", sampled, True, ("bytes", "rehashed", "hostile")
    ),
    Target("run/codes/manifest.json", sampled, True, JSON),
    Target("run/codes/tensors.safetensors", sampled, True, ("bytes", "rehashed", "hostile")),
    Target("run/summary.json", reported, False, JSON),
    Target("run/metrics.jsonl", plotted, False),
    Target("run/metrics.jsonl", reported, False),
    Target("unfinished/metrics.jsonl", resumed, True, JSON),
    Target("unfinished/config.json", resumed, True, JSON),
    Target("unfinished/checkpoints/*/manifest.json", resumed, True, JSON),
    Target("unfinished/codes/tensors.safetensors", resumed, True, ("bytes", "rehashed", "hostile")),
    Target("results/other.json", results, False, JSON),
    Target("results/other.json", page_of_results, False, ("values", "bytes")),
    Target("cache/*.safetensors", features, True, ("bytes", "rehashed", "hostile")),
    Target("images.npy", images_of("images.npy"), False),
    Target("images.npz", images_of("images.npz"), False),
    Target("photos/3.png", images_of("photos"), False),
    Target("weights.pth", weights, False),
    Target("network.pt", extractor, False),
)


# Mutations


def damage_bytes(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    kind = rng.choice(("flip", "cut", "zero", "empty", "extend", "latin", "deep"))
    place = rng.randrange(len(content))
    if kind == "flip":
        for _ in range(rng.choice((1, 8))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "zero":
        content[place : place + 16] = bytes(len(content[place : place + 16]))
    elif kind == "empty":
        content.clear()
    elif kind == "extend":
        content += rng.randbytes(rng.choice((1, 100)))
    elif kind == "latin":
        content[place:place] = b"\xff\xfe"
    else:
        content = bytearray(DEEP, "ascii")
    path.write_bytes(bytes(content))
    return kind


def damage_values(path: Path, rng: random.Random) -> str:
    """Change one value of a JSON file, or of one line of a log."""
    if path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        number = rng.randrange(len(lines))
        lines[number], what = changed_json(json.loads(lines[number]), rng)
        path.write_text("\n".join(lines) + "\n")
        return f"line {number}: {what}"
    text, what = changed_json(json.loads(path.read_text()), rng)
    path.write_text(text)
    return what


def changed_json(content: Any, rng: random.Random) -> tuple[str, str]:
    places = list(places_in(content))
    outer, key = rng.choice(places)
    action = rng.choice(("replace",) * 4 + ("delete", "add"))
    mark = "@odd value@"
    value = rng.choice(ODD_VALUES + ((DEEP,) if rng.random() < 0.05 else ()))
    if action == "delete":
        del outer[key]
    elif action == "add" and isinstance(outer, dict):
        outer["added"] = mark
    else:
        outer[key] = mark
    what = f"{action} {key!r} {value[:12]}"
    return json.dumps(content).replace(json.dumps(mark), value), what


def places_in(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of all values."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(pairs):
        yield content, key
        if isinstance(value, (dict, list)):
            yield from places_in(value)


def damage_rehashed(path: Path, rng: random.Random) -> str:
    if path.parent.name == "cache":
        return damage_features(path, rng)
    saved = read_folder(path.parent)
    name = rng.choice(sorted(saved.tensors))
    tensor, what = changed_tensor(saved.tensors[name], rng)
    tensors = {key: value for key, value in saved.tensors.items() if key != name}
    write_folder(path.parent, tensors | ({} if tensor is None else {name: tensor}), saved.meta)
    return f"{name}: {what}"


def damage_features(path: Path, rng: random.Random) -> str:
    from safetensors.torch import load, save

    features, what = changed_tensor(load(path.read_bytes())["features"], rng)
    if features is None:
        path.write_bytes(save({}))
    else:
        digest = cache._digest(path, features)
        path.write_bytes(save({"features": features.contiguous(), "sha256": digest}))
    return what


def changed_tensor(tensor: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor | None, str]:
    kind = rng.choice(("nan", "inf", "rows", "flat", "integers", "double", "dropped"))
    if kind in ("nan", "inf"):
        changed = tensor.clone()
        if changed.is_floating_point() and changed.numel():
            changed.view(-1)[rng.randrange(changed.numel())] = (
                math.nan if kind == "nan" else math.inf
            )
        return changed, kind
    flat = tensor.reshape(-1)
    return {
        "rows": (tensor[: max(1, len(tensor) // 3)] if tensor.dim() else flat).clone(),
        "flat": flat.clone(),
        "integers": tensor.to(torch.int32),
        "double": tensor.double(),
        "dropped": None,
    }[kind], kind


def make_hostile(path: Path, rng: random.Random) -> str:
    kind = rng.choice(("pipe", "folder", "link", "gone", "copy"))
    checkpoint = path.parent
    if kind == "copy" and checkpoint.parent.name == "checkpoints":
        name = rng.choice(("5abc", "999", "9999999999", f"{checkpoint.name} copy", "x"))
        shutil.copytree(sorted(checkpoint.parent.iterdir())[0], checkpoint.parent / name)
        return f"copy as {name}"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    return kind


MUTATIONS = {
    "bytes": damage_bytes,
    "values": damage_values,
    "rehashed": damage_rehashed,
    "hostile": make_hostile,
}


# Cases


def digest(value: Any) -> str:
    """Return a hash of a reader's result, or "not finite" if it holds NaN or infinity."""
    numbers = [part for part in leaves(value) if isinstance(part, (float, np.ndarray))]
    if not all(np.isfinite(part).all() for part in numbers):
        return "not finite"
    found = hashlib.sha256()
    for part in leaves(value):
        found.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return found.hexdigest()


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def outcome_of(read: Callable[[Path], Any], folder: Path) -> tuple[str, str]:
    """Call a reader in a forked process; return its outcome and a digest or message."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        answer(read, folder, writing)
    os.close(writing)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.005)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        return "hang", ""
    with os.fdopen(reading) as pipe:
        outcome, _, detail = pipe.read().partition("\n")
    return outcome or "traceback", detail or "the process died"


def answer(read: Callable[[Path], Any], folder: Path, writing: int) -> None:
    """Write the outcome of a reader to a pipe, and end the process."""
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
        try:
            found = f"ok\n{digest(read(folder))}"
        except (InputError, RunError) as error:
            found = f"typed\n{error}"
        except BaseException as error:
            found = f"traceback\n{type(error).__name__}: {error}"
        os.write(writing, found[:2000].encode(errors="replace"))
        os._exit(0)


def run_case(number: int, seed: int, material: Path, intact: dict[int, str]) -> dict[str, str]:
    rng = random.Random(f"{seed}/{number}")
    place = number % len(TARGETS)
    target = TARGETS[place]
    kind = rng.choice(target.kinds)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(material, Path(scratch, "m"), symlinks=True))
        path = rng.choice(sorted(folder.glob(target.files)))
        what = MUTATIONS[kind](path, rng)
        outcome, detail = outcome_of(target.read, folder)
    changed = outcome == "ok" and detail != intact[place]
    protected = target.hashed and kind != "rehashed"
    if changed and (protected or detail == "not finite" or path.parent.name == "cache"):
        outcome = "wrong"
    return {
        "kind": kind,
        "outcome": outcome,
        "what": f"{target.files} ({target.read.__name__}): {what}",
        "detail": detail[:300],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--show", action="store_true", help="list the cases that went wrong")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        material = Path(scratch, "material")
        make_material(material)
        intact = {}
        for place, target in enumerate(TARGETS):
            copied = Path(shutil.copytree(material, Path(scratch, f"intact{place}")))
            outcome, intact[place] = outcome_of(target.read, copied)
            if outcome != "ok":
                sys.exit(f"{target.files} is intact and cannot be read: {intact[place]}")
        cases = [
            run_case(number, options.seed, material, intact) for number in range(options.cases)
        ]
    counts = {kind: Counter(c["outcome"] for c in cases if c["kind"] == kind) for kind in MUTATIONS}
    print("| mutation | tried | " + " | ".join(OUTCOMES) + " |")
    print("|---|---|" + "---|" * len(OUTCOMES))
    for kind, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        row = [str(count[outcome]) for outcome in OUTCOMES]
        print(f"| {kind} | {sum(count.values())} | " + " | ".join(row) + " |")
    failed = [case for case in cases if case["outcome"] not in ("ok", "typed")]
    for case in failed if options.show else ():
        print(f"{case['outcome']}: {case['what']}: {case['detail']}")
    if options.json:
        report = {"seed": options.seed, "counts": counts, "failed": failed}
        options.json.write_text(json.dumps(report, indent=1))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
