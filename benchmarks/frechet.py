"""Compare our Frechet distance with torch-fidelity's and scipy's: time, agreement and memory.

    python benchmarks/frechet.py [--dims 2048] [--samples 10000] [--repeats 3] [--results results]

The input is two sets of float32 features with a power-law spectrum. Two parts are timed: the
covariances of both sets from features, and the trace term from both covariances. The methods take
turns, so that a change of the machine's speed affects all of them. Peak memory is that of a fresh
process that compares a set of 50,000 with one of 10,000, beyond the features themselves.
torch-fidelity imports torchvision; it is left out where either is not installed.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from poise.metrics.blocks import mean_of
from poise.metrics.distances import Gaussian, covariance, covariance_factor, distance_between

try:
    from torch_fidelity import metric_fid
except ImportError:
    metric_fid: Any = None

Moments = tuple[Any, Any]  # mean and covariance
Method = tuple[Callable[[Tensor], Moments], Callable[[Moments, Moments], float]]

PEAK = """
import resource, sys, torch
from poise.metrics.distances import frechet_distance
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
samples, dims = map(int, sys.argv[1:])
few = torch.randn(500, dims)
frechet_distance(few, few)  # loads the libraries, whose own memory does not count
real, generated = torch.empty(samples, dims).normal_(), torch.empty(10_000, dims).normal_()
before = peak()
frechet_distance(real, generated)
print((peak() - before) / (2**20 if sys.platform == "darwin" else 2**10))
"""


def made_up(samples: int, dims: int, seed: int) -> Tensor:
    """Return float32 features (samples, dims) whose covariance has eigenvalues 1/i.

    A few directions hold most of the variance.
    """
    source = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(dims, dims, generator=source)).Q
    scales = torch.arange(1, dims + 1) ** -0.5
    return (torch.randn(samples, dims, generator=source) * scales) @ turn + 0.3 + 0.01 * seed


def moments_by_poise(features: Tensor) -> Moments:
    mean = mean_of(features)
    return mean, covariance(features, mean)


def distance_by_poise(a: Moments, b: Moments) -> float:
    return distance_between(
        Gaussian(a[0], covariance_factor(a[1])), Gaussian(b[0], covariance_factor(b[1]))
    )


def moments_by_numpy(features: Tensor) -> Moments:
    return features.double().mean(0).numpy(), np.cov(features.numpy(), rowvar=False)


def distance_by_scipy(a: Moments, b: Moments) -> float:
    root = np.real(np.asarray(scipy.linalg.sqrtm(a[1] @ b[1])))
    return float(np.square(a[0] - b[0]).sum() + np.trace(a[1] + b[1] - 2 * root))


def moments_by_torch_fidelity(features: Tensor) -> Moments:
    statistics = metric_fid.fid_features_to_statistics(features)
    return statistics["mu"].astype(np.float64), statistics["sigma"]


def distance_by_torch_fidelity(a: Moments, b: Moments) -> float:
    sides = [{"mu": mean, "sigma": covariance} for mean, covariance in (a, b)]
    return metric_fid.fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]


def methods() -> dict[str, Method]:
    found: dict[str, Method] = {
        "poise": (moments_by_poise, distance_by_poise),
        "scipy sqrtm": (moments_by_numpy, distance_by_scipy),
    }
    if metric_fid:
        found["torch-fidelity"] = (moments_by_torch_fidelity, distance_by_torch_fidelity)
    else:
        print("torch-fidelity with torchvision is not installed: left out", file=sys.stderr)
    return found


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    done = work(*arguments)
    return done, time.perf_counter() - began


def compare(sets: tuple[Tensor, Tensor], repeats: int) -> dict[str, dict[str, Any]]:
    """Return each method's seconds per part, and its distance's relative difference from ours."""
    found, values = methods(), {}
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"covariances": [], "trace_term": []} for name in found
    }
    for _ in range(repeats):
        for name, (moments, distance) in found.items():
            both, taken = timed(lambda moments=moments: [moments(features) for features in sets])
            seconds[name]["covariances"].append(taken)
            values[name], taken = timed(distance, *both)
            seconds[name]["trace_term"].append(taken)
    return {
        name: {part: summary(taken) for part, taken in parts.items()}
        | {"distance": values[name], "relative_difference": values[name] / values["poise"] - 1}
        for name, parts in seconds.items()
    }


def summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def peak_extra_mib(samples: int, dims: int) -> float:
    """Return the peak memory of `frechet_distance` beyond its features, in MiB.

    Measured in a fresh process.
    """
    command = [sys.executable, "-c", PEAK, str(samples), str(dims)]
    return round(
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout), 1
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dims", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    # Measure this first: a process inherits the peak of the one that started it.
    peak = peak_extra_mib(50_000, options.dims)
    sets = made_up(options.samples, options.dims, 0), made_up(options.samples, options.dims, 1)
    packages = ["poise", "torch", "numpy", "scipy"] + ["torch-fidelity"] * bool(metric_fid)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    report = {
        "experiment": "bench-frechet",
        "settings": {"samples": options.samples, "dims": options.dims, "repeats": options.repeats},
        "seconds": "medians over repeats, both sets; distances relative to poise",
        "methods": compare(sets, options.repeats),
        "peak_extra_mib": {"samples": [50_000, 10_000], "poise": peak},
        "versions": {package: metadata.version(package) for package in packages},
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, "
        f"{torch.get_num_threads()} threads",
    }
    print(json.dumps(report, indent=2))
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "bench-frechet.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
