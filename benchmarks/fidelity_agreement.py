"""Compare our FID, KID, precision and recall with torch-fidelity's, on real images.

    python benchmarks/fidelity_agreement.py cifar10.npz --inception FILE [--count 2000]
        [--end-to-end] [--out FILE]

The first COUNT test images stand for generated ones, the first COUNT training images for real ones.
Both libraries compute from the same features, which our extractor makes with the Inception weights
in FILE. With --end-to-end, torch-fidelity also starts from the images, with its own resize and
network; FILE must then have its format.
"""

import argparse
import json
import os
import platform
import tempfile
import unittest.mock
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poise import data as datasets
from poise.evaluation import Produced, chunks_of, compare
from poise.features import make_extractor
from poise.protocols import PROTOCOLS

NAMES = {
    "FID": "frechet_inception_distance",
    "KID": "kernel_inception_distance_mean",
    "precision": "precision",
    "recall": "recall",
    "IS": "inception_score_mean",
}
SETTINGS = {
    "kid_subsets": 100,
    "kid_subset_size": 1000,
    "kid_kernel": "poly",
    "kid_kernel_poly_degree": 3,
} | {
    "kid_kernel_poly_gamma": None,
    "kid_kernel_poly_coef0": 1,
    "rng_seed": 2020,
    "prc_neighborhood": 3,
    "prc_batch_size": 10_000,
    "save_cpu_ram": True,
    "verbose": False,
}


def on_the_same_features(generated: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    """Return torch-fidelity's metrics of the given features."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric  # pyright: ignore
    from torch_fidelity.metric_kid import kid_features_to_metric  # pyright: ignore
    from torch_fidelity.metric_prc import prc_features_to_metric  # pyright: ignore

    both = [features.double() for features in (generated, real)]
    statistics = [fid_features_to_statistics(features) for features in both]
    figures = fid_statistics_to_metric(*statistics, verbose=False)
    return (
        figures
        | kid_features_to_metric(*both, **SETTINGS)
        | prc_features_to_metric(*both, **SETTINGS)
    )


def from_images(generated: np.ndarray, real: np.ndarray, weights: Path) -> dict[str, float]:
    """Return torch-fidelity's metrics of images, with its own resize and network."""
    import torch_fidelity  # pyright: ignore

    class Images(torch.utils.data.Dataset):
        def __init__(self, images: np.ndarray) -> None:
            self.images = torch.from_numpy(np.ascontiguousarray(images))

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> torch.Tensor:
            return self.images[index]

    return torch_fidelity.calculate_metrics(
        input1=Images(generated),
        input2=Images(real),
        feature_extractor_weights_path=str(weights),
        cuda=torch.cuda.is_available(),
        fid=True,
        kid=True,
        isc=True,  # precision and recall are left out: it computes them from VGG features
        samples_shuffle=True,
        rng_seed=2020,
        verbose=False,
    )


def beside(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, dict[str, float]]:
    pairs = {
        name: (ours[name], theirs[known])
        for name, known in NAMES.items()
        if name in ours and known in theirs
    }
    return {
        name: {"ours": a, "torch_fidelity": b, "relative": abs(a - b) / abs(b)}
        for name, (a, b) in pairs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--inception", required=True)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--end-to-end", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("results/fidelity-agreement.json"))
    options = parser.parse_args()
    data = datasets.load(options.data)
    generated, real = (np.asarray(side[: options.count]) for side in (data.test, data.train))
    extractor = make_extractor(options.inception)
    produced = Produced("test", lambda count: chunks_of(generated, count), len(generated))
    known = {
        "extractor": extractor.name,
        "extractor_checksum": extractor.checksum,
        "resize": extractor.resize,
    }
    protocol = replace(PROTOCOLS["every-image"], **known)
    kept: list[torch.Tensor] = []
    recording = replace(
        extractor, network=lambda levels: kept.append(extractor.network(levels)) or kept[-1]
    )
    with (
        tempfile.TemporaryDirectory() as cache,
        unittest.mock.patch.dict(os.environ, POISE_CACHE=cache),
    ):
        measured = compare(real, [produced], protocol, recording, quiet=False)
    ours = {m.metric: m.value for m in measured}
    features = dict(zip(("real", "generated"), torch.cat(kept).split(options.count), strict=True))
    report: dict[str, Any] = {
        "experiment": "fidelity-agreement",
        "data": data.checksum,
        "images": f"{options.count} test images against {options.count} training images",
        "protocol": measured[0].protocol.hash,
        "versions": {name: version(name) for name in ("poise", "torch", "torch-fidelity")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "same_features": beside(
            ours, on_the_same_features(features["generated"], features["real"])
        ),
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    if options.end_to_end:
        report["end_to_end"] = beside(ours, from_images(generated, real, Path(options.inception)))
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
