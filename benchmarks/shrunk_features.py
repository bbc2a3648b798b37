"""Test whether a Frechet distance of few images rewards low diversity.

    python benchmarks/shrunk_features.py --fashion fashion.npz

Compares training images of Fashion-MNIST with as many test images, in FD-light's 1,280 features. No
image is generated. The distance of perfect samples would be 0, so the measured distance is the bias
of few images. The training features are then shrunk about their mean by a factor, which makes them
worse. If the distance falls nevertheless, the bias differs between sets of images: it is larger for
more diverse sets. Takes about two minutes of one core.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from measuring import machine, show, write_report
from torch import Tensor

from poise.data import load
from poise.features import extract, make_extractor
from poise.metrics import frechet_distance

FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
NUMBERS = (500, 2_000)
DRAWS = 3
DEFAULT = Path("results/bench-shrunk-features.json")


def shrunk(features: Tensor, factor: float) -> Tensor:
    """Return features with `factor` times their deviation from the mean."""
    centre = features.mean(0)
    return centre + factor * (features - centre)


def measure(source: str, numbers: Sequence[int]) -> dict[str, Any]:
    """Return the distances by number of images and factor, one per draw of training images."""
    data, light = load(source), make_extractor("light", "cpu")

    def features(images: Any) -> Tensor:
        chunks = (
            torch.from_numpy(np.ascontiguousarray(images[k : k + 100]))
            for k in range(0, len(images), 100)
        )
        return extract(light, chunks, total=len(images), title="images", quiet=True)

    most = max(numbers)
    order = np.random.default_rng(0).permutation(len(data.train))[: DRAWS * most]
    test, train = features(data.test[:most]), features(data.train[order])
    found: dict[str, Any] = {}
    for number in numbers:
        count = min(DRAWS, len(train) // number)
        sets = [train[k * number : (k + 1) * number] for k in range(count)]
        found[str(number)] = {
            str(factor): [frechet_distance(test[:number], shrunk(some, factor)) for some in sets]
            for factor in FACTORS
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--fashion", default="fashion-mnist", help="an .npz file, or a name under POISE_DATA"
    )
    parser.add_argument(
        "--numbers", type=int, nargs="+", default=NUMBERS, help="numbers of images per set"
    )
    parser.add_argument("--json", type=Path, default=DEFAULT)
    options = parser.parse_args()
    found = measure(options.fashion, options.numbers)
    write_report(options.json, machine(torch.device("cpu")) | {"draws": DRAWS, "distance": found})
    rows = [["images of each set", *(f"shrunk by {factor:g}" for factor in FACTORS)]]
    rows += [
        [number, *(_spread(values) for values in of_factor.values())]
        for number, of_factor in found.items()
    ]
    show(rows)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
