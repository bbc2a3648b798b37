"""Measure the effect of each choice of an evaluation protocol, and compare FD-light with FID.

    python benchmarks/protocol_study.py RUN [--extractors inception light] [--count 1000]
        [--work runs/protocol-study] [--out results/protocol-study.json]
    python benchmarks/protocol_study.py --tables results/protocol-study.json

Features of each set of images are computed once per extractor and cached under --work, so that an
interrupted study continues where it stopped. A row has the Frechet distance of reconstructions and
of GEN-2 with one choice changed; everything else stays the same, including the noise of the images.
"other samples" repeats GEN-2 with other seeds: a smaller change than theirs is no effect.

The study also reports whether FD-light ranks sets of images as FID does.
"""

import argparse
import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import kendalltau, spearmanr

import poise
from poise.data.decoding import stretch_each, to_bytes
from poise.evaluation import chunks_of, through_jpeg
from poise.features import Extractor, extract, make_extractor
from poise.features.prepared import Prepared
from poise.metrics import frechet_distance

Chunks = Iterator[torch.Tensor]
RESIZES: dict[str, dict[str, Any]] = {
    "half-pixel bilinear": {"mode": "bilinear"},
    "bicubic": {"mode": "bicubic", "antialias": True},
}
SEEDS = (0, 1, 2)
RANKED = (  # one of each kind: sets that differ only by noise have no true order
    "train",
    "REC",
    "REC sampled",
    "REC, stretched",
    "GEN-1",
    "GEN-2 seed 0",
    "GEN-2 without noise",
    "GEN-2 renormalised",
    "GEN-2 seed 0, stretched",
    "GEN-mixture",
)


@dataclass(frozen=True)
class Sets:
    """Sources of the study's images: each yields `count` images in chunks."""

    run: poise.Run
    count: int

    def all(self) -> dict[str, Callable[[], Chunks]]:
        run, count = self.run, self.count
        data = run.dataset()
        test, train = data.test[:count], data.train[:count]
        generation = run.recipe.generation
        noiseless, renormalised = (
            replace(generation, second_stage_noise=False),
            replace(generation, renormalise="always"),
        )
        sampled = replace(generation, reconstruct_from="sample")
        produced = {
            "REC": lambda: run.reconstruct_chunks(test),
            "REC sampled": lambda: run.reconstruct_chunks(test, generation=sampled),
            "GEN-1": lambda: run.sample_chunks(count, prior="normal"),
            "GEN-mixture": lambda: run.sample_chunks(count, prior="mixture"),
            "GEN-2 without noise": lambda: run.sample_chunks(
                count, prior="second-stage", generation=noiseless
            ),
            "GEN-2 renormalised": lambda: run.sample_chunks(
                count, prior="second-stage", generation=renormalised
            ),
            **{
                f"GEN-2 seed {seed}": lambda seed=seed: run.sample_chunks(
                    count, prior="second-stage", seed=seed
                )
                for seed in SEEDS
            },
        }
        sets: dict[str, Callable[[], Chunks]] = {
            "test": lambda: chunks_of(test, count),
            "train": lambda: chunks_of(train, count),
            "test after JPEG": lambda: chunks_of(through_jpeg(test, 75), count),
        }
        sets |= {name: lambda make=make: map(to_bytes, make()) for name, make in produced.items()}
        for name in ("REC", "GEN-2 seed 0"):
            sets[f"{name}, floats"] = produced[name]
            sets[f"{name}, stretched"] = lambda make=produced[name]: (
                to_bytes(stretch_each(part)) for part in make()
            )
        return sets


def features_of(
    name: str, make: Callable[[], Chunks], extractor: Extractor, count: int, work: Path
) -> torch.Tensor:
    path = work / (
        f"{extractor.name}-{extractor.checksum[:8]}-{extractor.resize}-{count}-{name}.npy".replace(
            " ", "_"
        )
    )
    if not path.exists():
        features = extract(
            extractor, make(), total=count, title=f"{extractor.name}: {name}", quiet=False
        )
        work.mkdir(parents=True, exist_ok=True)
        np.save(work / "writing.npy", features.numpy())
        (work / "writing.npy").replace(path)
    return torch.from_numpy(np.load(path))


def resized_otherwise(extractor: Extractor, name: str) -> Extractor:
    """Return the extractor with another resize before the same network."""
    prepared = extractor.network
    assert isinstance(prepared, Prepared)
    side = int(extractor.resize.split()[-1])
    other = Prepared(
        prepared.network,
        lambda levels: F.interpolate(levels, (side, side), **RESIZES[name]).clamp(0, 255),
        shift=float(prepared.shift.flatten()[0]),
        divisor=float(prepared.divisor.flatten()[0]),
    )
    return replace(extractor, network=other, resize=f"{name} to {side}")


def study(run: poise.Run, extractor: Extractor, count: int, work: Path) -> dict[str, Any]:
    """Return the distances of each table row, and of each ranked set from the test images."""
    sets = Sets(run, count).all()
    known = {name: features_of(name, make, extractor, count, work) for name, make in sets.items()}
    rec, gen, test = known["REC"], known["GEN-2 seed 0"], known["test"]
    half = count // 2
    rows: dict[str, dict[str, float | None]] = {}

    def row(
        name: str,
        reference: torch.Tensor,
        restored: torch.Tensor | None,
        generated: torch.Tensor | None,
    ) -> None:
        pair = {"REC": restored, "GEN-2": generated}
        rows[name] = {
            key: None if x is None else frechet_distance(reference, x) for key, x in pair.items()
        }

    row("default", test, rec, gen)
    for seed in SEEDS[1:]:
        row(f"other samples (seed {seed})", test, None, known[f"GEN-2 seed {seed}"])
    row("floats, not rounded to bytes", test, known["REC, floats"], known["GEN-2 seed 0, floats"])
    row(
        "each image stretched to its own range",
        test,
        known["REC, stretched"],
        known["GEN-2 seed 0, stretched"],
    )
    row("reference after JPEG, quality 75", known["test after JPEG"], rec, gen)
    row("training images as the reference", known["train"], rec, gen)
    row(f"half as many images ({half})", test[:half], rec[:half], gen[:half])
    dropped = count // 64 * 64
    row(
        f"only whole batches of 64 ({dropped} images)", test[:dropped], rec[:dropped], gen[:dropped]
    )
    row("reconstructions from a posterior sample", test, known["REC sampled"], None)
    row("stage 2 without its noise (as released)", test, None, known["GEN-2 without noise"])
    row("latents renormalised", test, None, known["GEN-2 renormalised"])
    if extractor.name == "inception":
        for name in RESIZES:
            other = resized_otherwise(extractor, name)
            again = {
                key: features_of(key, sets[key], other, count, work)
                for key in ("test", "REC", "GEN-2 seed 0")
            }
            row(f"resize: {name}", again["test"], again["REC"], again["GEN-2 seed 0"])
    ranked = {name: frechet_distance(test, known[name]) for name in RANKED}
    return {
        "checksum": extractor.checksum,
        "resize": extractor.resize,
        "rows": rows,
        "ranked": ranked,
    }


def tables(report: dict[str, Any]) -> str:
    """Return the Markdown table of effects, with the extractors side by side."""
    names = list(report["studies"])
    heads = [f"{label} {poise_name(name)}" for name in names for label in ("REC", "GEN-2")]
    lines = ["| one choice changed | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in report["studies"][names[0]]["rows"]:
        cells = [
            cell(report["studies"][name]["rows"], row, label)
            for name in names
            for label in ("REC", "GEN-2")
        ]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def poise_name(extractor: str) -> str:
    return "FID" if extractor == "inception" else f"FD-{extractor}"


def cell(rows: dict[str, Any], row: str, label: str) -> str:
    value, base = rows.get(row, {}).get(label), rows["default"][label]
    if value is None:
        return ""
    return f"{value:.2f}" if row == "default" else f"{value:.2f} ({value - base:+.2f})"


def agreement(studies: dict[str, Any]) -> dict[str, float]:
    """Return how far FID and FD-light agree on the order of image sets."""
    first, second = (studies[name]["ranked"] for name in ("inception", "light"))
    a, b = ([ranked[name] for name in first] for ranked in (first, second))
    within = [
        (x < y) == (p < q)
        for k, (x, p) in enumerate(zip(a, b, strict=True))
        for y, q in list(zip(a, b, strict=True))[:k]
    ]
    return {
        "sets": len(a),
        "pairs": len(within),
        "spearman": float(spearmanr(a, b).statistic),  # pyright: ignore[reportAttributeAccessIssue]
        "kendall": float(kendalltau(a, b).statistic),  # pyright: ignore[reportAttributeAccessIssue]
        "pairs_in_the_same_order": sum(within) / len(within),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--extractors", nargs="+", default=["inception", "light"])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--work", type=Path, default=Path("runs/protocol-study"))
    parser.add_argument("--out", type=Path, default=Path("results/protocol-study.json"))
    parser.add_argument("--tables", type=Path, help="print the tables of a finished study")
    options = parser.parse_args()
    if options.tables:
        print(tables(json.loads(options.tables.read_text())))
        return
    run = poise.load(options.run)
    config = json.loads((run.folder / "config.json").read_text())
    work = (
        options.work
        / f"{run.folder.name}-{hashlib.sha256(json.dumps(config).encode()).hexdigest()[:8]}"
    )
    studies = {
        spec: study(run, make_extractor(spec, run.device), options.count, work)
        for spec in options.extractors
    }
    report = {
        "experiment": "protocol-study",
        "settings": config["recipe"],
        "data": config["data"]["checksum"],
        "versions": config["versions"],
        "machine": f"{platform.machine()}, {run.device}",
        "count": options.count,
        "studies": studies,
    }
    if {"inception", "light"} <= set(studies):
        report["agreement"] = agreement(studies)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(tables(report))


if __name__ == "__main__":
    main()
