"""Test which distances between sets of images rank damaged images rightly, at which size.

    python benchmarks/distances.py features DATA --set fashion --features FOLDER
    python benchmarks/distances.py rank --features FOLDER
    python benchmarks/distances.py table

No image is generated. Training images are compared with all test images, as they are and damaged
in fixed grades. (The first 2,000 test images of MNIST have 7 % less ink than the training images,
so that a reference of the first ones rewards paler images.) A distance ranks a damage rightly in a
draw if it grows from undamaged images over each grade. A distance *qualifies* at a size if it ranks
every damage rightly in every draw. The finest grade of a damage may be too small to be seen: it is
left out of this rule, and the table says where it is not ranked rightly.

`features` extracts features (about 170,000 images, 50 minutes of a core for each set). `rank`
computes all distances from them and writes results/bench-distances.json. DATA is a folder with
fashion.npz and mnist.npz; each set is "another set" for the other.

Damages of images in [0, 1], rounded to 8 bits: shrunk about the mean image by a share; blurred by a
Gaussian of a standard deviation in pixels; Gaussian noise of a standard deviation, clipped;
saturated: multiplied by 1 + a share, clipped. Damages of a set: classes left out, and replaced by
images of the others; a share replaced by copies of others; a share replaced by images of another
set.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine, write_report
from scipy.ndimage import gaussian_filter
from torch import Tensor

from poise.features import extract, make_extractor
from poise.metrics import frechet_distance, frechet_infinity, kernel_distance
from poise.studies.comparison.tables import markdown

DRAWS = 5
MOST = 2_000  # images of a draw, and of the principal components
SIZES = (500, 1_000, 2_000)
EXTRACTORS = ("light", "pixels")
REPORT = Path("results/bench-distances.json")
OTHER = {"fashion": "mnist", "mnist": "fashion"}

OF_IMAGES = {
    "shrunk": (0.02, 0.05, 0.1, 0.2),
    "blurred": (0.25, 0.5, 1.0, 2.0),
    "noise": (0.01, 0.02, 0.05, 0.1),
    "saturated": (0.05, 0.1, 0.2),
}
OF_SETS = {
    "classes dropped": (1, 2, 4),
    "duplicates": (0.05, 0.2, 0.5),
    "another set": (0.02, 0.05, 0.2),
}
DAMAGES = OF_IMAGES | OF_SETS

# Real test features, compared features, and the centre and axes of real training features.
Distance = Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], float]


def kernel(test: Tensor, compared: Tensor, frame: tuple[Tensor, Tensor]) -> float:
    """Return the unbiased kernel distance (Binkowski et al. 2018), over parts of the test set."""
    return kernel_distance(test, compared, subsets=4, subset_size=len(compared)).mean


def leading(
    number: int,
    test: Tensor,
    compared: Tensor,
    frame: tuple[Tensor, Tensor],
    *,
    extrapolated: bool = False,
) -> float:
    """Return the Frechet distance in the leading principal components of training features."""
    centre, axes = frame
    found = [(features.double() - centre) @ axes[:, :number] for features in (test, compared)]
    if extrapolated:
        return frechet_infinity(*found, points=7, smallest=len(compared) // 4).value
    return frechet_distance(*found)


def frame_of(train: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of features and their principal components, (d,) and (d, d)."""
    centre = train.double().mean(0)
    return centre, torch.linalg.svd(train.double() - centre, full_matrices=False).Vh.T


def of_equal_sets(test: Tensor, compared: Tensor, frame: tuple[Tensor, Tensor]) -> float:
    """Return the Frechet distance to as many test images as are compared, evenly spaced."""
    return frechet_distance(test[:: len(test) // len(compared)][: len(compared)], compared)


DISTANCES: dict[str, Distance] = {
    "Frechet": lambda test, compared, frame: frechet_distance(test, compared),
    "Frechet, as few test images": of_equal_sets,
    "Frechet, 32 components": partial(leading, 32),
    "Frechet, 64 components": partial(leading, 64),
    "Frechet, 64 components, extrapolated": partial(leading, 64, extrapolated=True),
    "kernel": kernel,
}


def damaged(images: np.ndarray, damage: str, grade: float, mean: np.ndarray) -> np.ndarray:
    """Return damaged images, uint8 (n, h, w).

    Args:
        images: uint8 (n, h, w).
        damage, grade: a key of `OF_IMAGES` and one of its grades.
        mean: the mean training image, (h, w), in [0, 255].
    """
    values = images / 255
    match damage:
        case "shrunk":
            values = mean / 255 + (1 - grade) * (values - mean / 255)
        case "blurred":
            values = gaussian_filter(values, (0, grade, grade), mode="nearest")
        case "noise":
            values = values + np.random.default_rng(0).normal(0, grade, values.shape)
        case _:
            values = values * (1 + grade)
    return (255 * values.clip(0, 1)).round().astype(np.uint8)


def extract_all(data: Path, name: str, folder: Path, draws: int, most: int) -> None:
    """Write the features of all images and their damaged versions, one file per version."""
    real, other = (np.load(data / f"{which}.npz") for which in (name, OTHER[name]))
    train, labels, test = real["x_train"].squeeze(), real["y_train"], real["x_test"].squeeze()
    order = np.random.default_rng(0).permutation(len(train))
    pool, axes = order[: draws * most], order[draws * most : (draws + 1) * most]
    mean = train.mean(0)
    versions: dict[str, Callable[[], np.ndarray]] = {
        "test": lambda: test,
        "axes": lambda: train[axes],
        "other": lambda: other["x_train"].squeeze()[:most],
        "undamaged": lambda: train[pool],
    }
    for damage, grades in OF_IMAGES.items():
        for grade in grades:
            versions[f"{damage} {grade}"] = partial(damaged, train[pool], damage, grade, mean)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "labels.npy", labels[pool].astype(np.int64).ravel())
    for extractor in EXTRACTORS:
        network = make_extractor(extractor, "cpu")
        for version, make in versions.items():
            path = folder / f"{extractor} {version}.npy"
            if not path.exists():
                images = torch.from_numpy(make())[:, None]
                found = extract(
                    network, images.split(100), total=len(images), title=version, quiet=True
                )
                np.save(path, found.numpy())


def sets_of(
    folder: Path, extractor: str, draw: int, most: int
) -> Iterator[tuple[str, Any, Tensor]]:
    """Yield damage, grade and features of each version of a draw, the undamaged one first."""

    def read(version: str) -> Tensor:
        return torch.from_numpy(np.load(folder / f"{extractor} {version}.npy", mmap_mode="r"))

    pool, labels = read("undamaged"), np.load(folder / "labels.npy")
    mine = slice(draw * most, (draw + 1) * most)
    plain = pool[mine].clone()
    yield "undamaged", 0, plain
    for damage, grades in OF_IMAGES.items():
        for grade in grades:
            yield damage, grade, read(f"{damage} {grade}")[mine].clone()
    chance = np.random.default_rng(draw)
    classes, shuffled = chance.permutation(10), chance.permutation(most)
    ranked = np.roll(np.arange(len(pool)), -draw * most)  # this draw's images, then the others
    for number in OF_SETS["classes dropped"]:
        kept = ranked[~np.isin(labels[ranked], classes[:number])][:most]
        yield "classes dropped", number, pool[torch.from_numpy(kept)]
    for share in OF_SETS["duplicates"]:
        copies, count = np.arange(most), round(share * most)
        copies[shuffled[:count]] = chance.choice(shuffled[count:], count)
        yield "duplicates", share, plain[torch.from_numpy(copies)]
    for share in OF_SETS["another set"]:
        mixed, chosen = plain.clone(), torch.from_numpy(shuffled[: round(share * most)].copy())
        mixed[chosen] = read("other")[chosen]
        yield "another set", share, mixed


def rank(folder: Path, most: int, draws: int) -> dict[str, Any]:
    """Return every distance by extractor, size, distance, damage and grade: a value per draw.

    A smaller size takes every other, or every fourth, image of a draw.
    """
    found: dict[str, Any] = {}
    for extractor in EXTRACTORS:
        test, train = (
            torch.from_numpy(np.load(folder / f"{extractor} {version}.npy"))
            for version in ("test", "axes")
        )
        frame = frame_of(train)
        for draw in range(draws):
            for damage, grade, features in sets_of(folder, extractor, draw, most):
                for size in (size for size in SIZES if size <= most):
                    step = most // size
                    for name, distance in DISTANCES.items():
                        value = distance(test, features[::step], frame)
                        place = found.setdefault(extractor, {}).setdefault(str(size), {})
                        place = place.setdefault(name, {}).setdefault(damage, {})
                        place.setdefault(str(grade), []).append(float(f"{value:.6g}"))
    return found


def outcomes(of_damage: dict[str, dict[str, list[float]]]) -> dict[str, tuple[int, int]]:
    """Return for each damage the draws ranked rightly, without and with the finest grade."""
    plain = of_damage["undamaged"]["0"]
    rightly = {}
    for damage in DAMAGES:
        grades = list(of_damage[damage].values())
        rightly[damage] = tuple(
            sum(
                all(a < b for a, b in pairwise(values))
                for values in zip(plain, *which, strict=True)
            )
            for which in (grades[1:], grades)
        )
    return rightly


def table(report: dict[str, Any]) -> str:
    """Return the table of distances: whether each qualifies at each size, and what it misses."""
    rows = [["set", "features", "distance", *(f"{size:,} images" for size in SIZES)]]
    for name, found in report["distances"].items():
        for extractor, sizes in found.items():
            for distance in DISTANCES:
                cells = [verdict(sizes[str(size)][distance], report["draws"]) for size in SIZES]
                rows.append([name, extractor, distance, *cells])
    return markdown(rows)


def verdict(of_damage: dict[str, dict[str, list[float]]], draws: int) -> str:
    """Return "yes", or "no" with the damages and in how many draws they are ranked rightly."""
    rightly = outcomes(of_damage)
    wrong = [f"{damage} {coarse}" for damage, (coarse, _) in rightly.items() if coarse < draws]
    unseen = [damage for damage, (coarse, fine) in rightly.items() if coarse == draws > fine]
    if wrong:
        return f"no: {', '.join(wrong)}"
    return "yes" + (f"; finest: {', '.join(unseen)}" if unseen else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("features", "rank", "table"))
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--set", choices=tuple(OTHER), default="fashion")
    parser.add_argument("--features", type=Path, default=Path("runs/distances"))
    parser.add_argument("--json", type=Path, default=REPORT)
    parser.add_argument("--images", type=int, default=MOST, help="images of a draw")
    parser.add_argument("--draws", type=int, default=DRAWS)
    options = parser.parse_args()
    folder = options.features / options.set
    if options.action == "features":
        if options.data is None:
            parser.error("features needs DATA, a folder with fashion.npz and mnist.npz")
        extract_all(options.data, options.set, folder, options.draws, options.images)
    elif options.action == "rank":
        found = {
            name: rank(options.features / name, options.images, options.draws)
            for name in OTHER
            if (options.features / name).is_dir()
        }
        report = machine(torch.device("cpu")) | {"draws": options.draws, "distances": found}
        write_report(options.json, report)
    else:
        print(table(json.loads(options.json.read_text())))


if __name__ == "__main__":
    main()
