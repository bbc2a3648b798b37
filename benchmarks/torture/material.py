"""Intact material for the fuzzer: runs, results, data sets and weights, all tiny."""

import gzip
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features

import poise
from poise.data import cached
from poise.data import load as load_data
from poise.data.decoding import save_png
from poise.features import cached_features, make_extractor
from poise.recipes import Data, Network, Recipe, Stage
from poise.runs.options import Options
from poise.runs.run import DIAGNOSIS, Run
from poise.studies.results import result_of, write_result
from poise.training import engines

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
RECIPE = Recipe(
    name="torture",
    data=Data("array"),
    network=Network("mlp", latent_dim=2, hidden=(8,), second_hidden=8),
    first=Stage(steps=8, batch_size=10, learning_rate=1e-2),
    second=Stage(steps=8, batch_size=10, learning_rate=1e-2),
)
OPTIONS = Options(device="cpu", quiet=True, save_seconds=0.0, threads=1)
FORMATS = {"a.jpg": "RGB", "b.webp": "RGB", "c.gif": "P", "d.bmp": "RGB", "e.ppm": "RGB"} | (
    {"f.avif": "RGB"} if features.check("avif") else {}
)


class Stopped(BaseException):
    """Ends a training run as a kill does."""


def make_material(folder: Path) -> None:
    """Write a folder for each kind of file that Poise reads."""
    run = poise.train(IMAGES, recipe=RECIPE, out=folder / "run" / "run", options=OPTIONS)
    make_results(run, folder)
    found = poise.diagnose(run).to_json() | {"checkpoint": run.position}
    (run.folder / DIAGNOSIS).write_text(json.dumps(found))
    share = folder / "shared"
    run.save_pretrained(share / "run", license="mit")
    with stopping_after(11), suppress(Stopped):
        out = folder / "unfinished" / "run"
        poise.train(IMAGES, recipe=RECIPE, out=out, options=OPTIONS)
    make_features(folder / "cache")
    make_arrays(folder)
    make_pictures(folder / "photos")
    make_album(folder / "album")
    make_decoded(folder / "decoded")
    make_layouts(folder)
    make_weights(folder / "weights")


def make_results(run: Run, folder: Path) -> None:
    evaluation = run.evaluate(IMAGES, extractor="pixels", priors=["normal"])
    (run.folder / "evaluation.json").write_text(json.dumps(evaluation.to_json()))
    path = write_result(
        result_of(run, evaluation, experiment="torture", label="computed"),
        folder / "results" / "results",
    )
    content = json.loads(path.read_text())
    path.with_name("other.json").write_text(json.dumps(content | {"seed": 7}))


@contextmanager
def stopping_after(count: int) -> Iterator[None]:
    """Raise `Stopped` in place of a training step after so many steps."""

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


def make_features(folder: Path) -> np.ndarray:
    return cached_features(make_extractor("pixels"), IMAGES, "content", cache=folder).numpy()


def make_arrays(folder: Path) -> None:
    for name in ("npy", "npz"):
        (folder / name).mkdir()
    np.save(folder / "npy" / "images.npy", IMAGES[:, 0])
    np.savez_compressed(folder / "npz" / "images.npz", train=IMAGES[:50, 0], test=IMAGES[50:, 0])


def make_pictures(folder: Path, count: int = 12) -> None:
    for number in range(count):
        picture = IMAGES[number].transpose(1, 2, 0)
        save_png(folder / f"{number}.png", picture)


def make_album(folder: Path) -> None:
    """Write a picture of each format, pages of 16 bits among them."""
    folder.mkdir()
    colours = np.random.default_rng(1).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    for number, (name, mode) in enumerate(FORMATS.items()):
        Image.fromarray(colours[number]).convert(mode).save(folder / name)
    deep = np.random.default_rng(2).integers(0, 4096, (5, 8, 8)).astype(np.uint16)
    pages = [Image.fromarray(page) for page in deep]
    pages[0].save(folder / "g.tiff", save_all=True, append_images=pages[1:])
    pages[0].save(folder / "h.png")
    for number in range(6):
        Image.fromarray(colours[10 + number]).save(folder / f"plain-{number}.png")


def make_decoded(folder: Path) -> None:
    """Write a folder of images, and the file that keeps them decoded."""
    make_pictures(folder / "photos")
    read_decoded(folder)


def read_decoded(folder: Path) -> np.ndarray:
    cached.WORTH_SECONDS = 0.0
    dataset = load_data(folder / "photos", cache=folder / "cache")
    return np.concatenate([np.asarray(dataset.train), np.asarray(dataset.test)])


def make_layouts(folder: Path) -> None:
    """Write MNIST's idx files, plain and compressed, CIFAR-10's batches, and CelebA."""
    mnist, cifar, celeba = (folder / name for name in ("mnist", "cifar", "celeba"))
    (celeba / "img_align_celeba").mkdir(parents=True)
    for place in (mnist, cifar):
        place.mkdir()
    for part, count in (("train-images", 12), ("t10k-images", 6)):
        header = np.array([0x803, count, 8, 8], ">u4").tobytes()
        (mnist / f"{part}-idx3-ubyte").write_bytes(header + IMAGES[:count].tobytes())
    packed = gzip.compress((mnist / "t10k-images-idx3-ubyte").read_bytes())
    (mnist / "t10k-images-idx3-ubyte").unlink()
    (mnist / "t10k-images-idx3-ubyte.gz").write_bytes(packed)
    rows = np.random.default_rng(3).integers(0, 256, (4, 3072), dtype=np.uint8)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        batch = {b"data": rows, b"labels": [0] * 4, b"batch_label": name.encode()}
        (cifar / name).write_bytes(pickle.dumps(batch, protocol=3))
    face = Image.fromarray(np.zeros((218, 178, 3), np.uint8))
    for number in range(15):
        face.save(celeba / "img_align_celeba" / f"{number:06d}.jpg")
    lines = [f"{number:06d}.jpg {number % 3}" for number in range(15)]
    (celeba / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")


class Averages(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.arange(1.0, 4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) * self.scale


def make_weights(folder: Path) -> None:
    folder.mkdir()
    torch.save({"weight": torch.arange(12.0), "bias": torch.ones(3)}, folder / "weights.pth")
    torch.jit.script(Averages()).save(str(folder / "network.pt"))
