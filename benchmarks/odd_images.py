"""Measure how well scores find odd images: areas under the ROC curve, beside a plain autoencoder.

    python benchmarks/odd_images.py --data FOLDER [--json results/bench-odd-images.json]
    python benchmarks/odd_images.py --table results/bench-odd-images.json

FOLDER holds fashion.npz, mnist.npz and celeba64.npz. A VAE with the computed balance and a plain
autoencoder of the same network are trained on clothes (Fashion-MNIST) and on faces (CelebA at 32
pixels), for each seed. Held-out images of the set are then told from two simulated kinds of odd
images each, by the scores of `Run.score`:

    clothes   handwritten digits (MNIST); clothes with a grey square of a quarter of the side
    faces     faces upside down; faces with a grey square of a quarter of the side

The area is the probability that an odd image has a higher score of oddness than a held-out one:
0.5 is chance. log p(x) is estimated with both proposals. The ELBO is not used. The last column is
the share of held-out images below the 5th percentile of log p(x) of the training images, which is
0.05 without overfitting.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine, write_report
from sklearn.metrics import roc_auc_score

import poise
from poise.runs.scores import Scores
from poise.studies.comparison.tables import markdown
from poise.studies.results import provenance
from poise.variants import Proposal

SCORES = {
    "log p(x)": lambda by: -by["encoder"].log_likelihood,
    "log p(x), refined": lambda by: -by["refined"].log_likelihood,
    "MSE": lambda by: by["encoder"].mse,
    "MSE, autoencoder": lambda by: by["autoencoder"].mse,
}
# Name of the scores, objective of the run, proposal.
SCORED: tuple[tuple[str, str, Proposal], ...] = (
    ("encoder", "vae", "encoder"),
    ("refined", "vae", "refined"),
    ("autoencoder", "autoencoder", "encoder"),
)
SETS = {"clothes": ("digits", "a grey square"), "faces": ("upside down", "a grey square")}
OPTIONS = poise.Options(device="cpu", quiet=True)


def with_square(images: np.ndarray, seed: int) -> np.ndarray:
    """Return images with a grey square at a random place."""
    draws, side, changed = np.random.default_rng(seed), images.shape[-1] // 4, images.copy()
    for image in changed:
        top, left = draws.integers(0, images.shape[-1] - side + 1, 2)
        image[..., top : top + side, left : left + side] = 128
    return changed


def images_of(name: str, folder: Path, train: int, test: int) -> dict[str, np.ndarray]:
    """Return training images, held-out images, and both kinds of odd images."""
    if name == "clothes":
        with np.load(folder / "fashion.npz") as stored:
            learned, held_out = grey(stored["x_train"][:train]), grey(stored["x_test"][:test])
        with np.load(folder / "mnist.npz") as stored:
            other = grey(stored["x_test"][:test])
    else:
        with np.load(folder / "celeba64.npz") as stored:
            learned, held_out = (
                halved(stored[side][:number])
                for side, number in (("x_train", train), ("x_test", test))
            )
        other = held_out[:, :, ::-1].copy()
    kinds = dict(zip(SETS[name], (other, with_square(held_out, 0)), strict=True))
    return {"train": learned, "held out": held_out} | kinds


def grey(images: np.ndarray) -> np.ndarray:
    """Return grey images (n, 28, 28) or (n, 28, 28, 1) as (n, 1, 28, 28)."""
    return images.reshape(-1, 1, 28, 28)


def halved(images: np.ndarray) -> np.ndarray:
    """Return colour images (n, 64, 64, 3) as (n, 3, 32, 32): means of four pixels."""
    means = images.reshape(len(images), 32, 2, 32, 2, 3).astype(np.float32).mean((2, 4))
    return np.round(means).astype(np.uint8).transpose(0, 3, 1, 2).copy()


def trained(images: np.ndarray, objective: str, seed: int, options: argparse.Namespace) -> Any:
    out = Path(tempfile.mkdtemp()) / objective
    settings: dict[str, Any] = {"network": "mlp", "latent_dim": options.latents, "stages": 1}
    settings |= {"epochs": options.epochs, "objective": objective, "seed": seed}
    return poise.train(images, out=out, options=OPTIONS, **settings)


def scored(
    run: Any, sets: dict[str, np.ndarray], samples: int, proposal: Proposal
) -> dict[str, Scores]:
    training = {"training": sets["train"], "training_images": len(sets["held out"])}
    return {
        name: run.score(images, samples=samples, proposal=proposal, **training)
        for name, images in sets.items()
        if name != "train"
    }


def measured(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    sets = images_of(name, options.data, options.train, options.test)
    began = time.monotonic()
    runs = {kind: trained(sets["train"], kind, seed, options) for kind in ("vae", "autoencoder")}
    found: dict[str, Any] = {"seed": seed, "set": name, "areas": {}}
    found["training_seconds"] = round(time.monotonic() - began, 1)
    by, found["scoring_seconds"] = dict[str, dict[str, Scores]](), {}
    for how, kind, proposal in SCORED:
        began = time.monotonic()
        by[how] = scored(runs[kind], sets, options.samples, proposal)
        found["scoring_seconds"][how] = round(time.monotonic() - began, 1)
    found["below_5"], found["effective_share"] = {}, {}
    for how in ("encoder", "refined"):
        normal = by[how]["held out"]
        assert normal.log_likelihood_percentile is not None and normal.effective_share is not None
        found["below_5"][how] = float((normal.log_likelihood_percentile < 5).double().mean())
        found["effective_share"][how] = float(normal.effective_share.mean())
    for kind in SETS[name]:
        truth = np.repeat([0, 1], [len(sets["held out"]), len(sets[kind])])
        found["areas"][kind] = {
            score: float(
                roc_auc_score(
                    truth,
                    torch.cat(
                        [
                            oddness({how: scores[which] for how, scores in by.items()})
                            for which in ("held out", kind)
                        ]
                    ).numpy(),
                )
            )
            for score, oddness in SCORES.items()
        }
    return found


def tables(report: dict[str, Any]) -> str:
    """Return a table with a row for each kind of odd images, over seeds."""
    rows = [
        [
            "trained on",
            "odd images",
            "seeds",
            *SCORES,
            "share of held-out images below the 5th percentile",
        ]
    ]
    for name, kinds in SETS.items():
        runs = [run for run in report["runs"] if run["set"] == name]
        for kind in kinds if runs else ():
            cells = [spread([run["areas"][kind][score] for run in runs]) for score in SCORES]
            below = spread([run["below_5"]["encoder"] for run in runs])
            rows.append([name, kind, str(len(runs)), *cells, below])
    return markdown(rows)


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--sets", nargs="+", default=[*SETS], choices=[*SETS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=4_000)
    parser.add_argument("--test", type=int, default=150)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--latents", type=int, default=16)
    parser.add_argument("--samples", type=int, default=20)
    options = parser.parse_args()
    if options.table:
        print(tables(json.loads(options.table.read_text())))
        return
    if options.data is None:
        parser.error("give --data FOLDER or --table FILE")
    report: dict[str, Any] = machine(torch.device("cpu"))
    report |= {"provenance": provenance(torch.device("cpu"))}
    names = ("train", "test", "epochs", "latents", "samples")
    report |= {name: getattr(options, name) for name in names} | {"runs": []}
    for seed in options.seeds:
        for name in options.sets:
            report["runs"].append(measured(name, seed, options))
            print(json.dumps(report["runs"][-1]), flush=True)
            if options.json:
                write_report(options.json, report)
    print(tables(report))


if __name__ == "__main__":
    main()
