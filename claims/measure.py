"""Figures that only the claims measure, and the check that results belong to the design."""

from dataclasses import replace
from typing import Any

from poise.data import gather, head
from poise.latent import variance_law
from poise.metrics import reconstruction
from poise.protocols import NO_EXTRACTOR
from poise.recipes.settings import Recipe, from_json, to_json
from poise.runs.run import Run
from poise.studies.comparison.experiment import Experiment
from poise.studies.results import Result
from poise.variants import PRIORS


def figures_of_run(run: Run) -> dict[str, Any]:
    """Return the released variance law, training error, pixel variance and parameter counts."""
    codes, vae, balance = run.codes, run.first.vae, run.first.balance
    some = head(run.dataset().train, 10_000)
    law = variance_law(codes.mean, codes.logvar, released=True)
    pixels = gather(some, range(len(some)))
    return {
        "variance_law_released": float(law.mean()),
        "pixel_variance": float(pixels.var(0, correction=0).mean()),
        "train_mse_sampled": reconstruction(vae, balance, some, seed=run.recipe.seed).mse_sampled,
        "parameters": sum(p.numel() for p in vae.parameters()),
        "second_parameters": sum(p.numel() for p in run.second.vae.parameters())
        if run.second
        else 0,
    }


def belongs(result: Result, experiment: Experiment) -> bool:
    """Return whether a result is of a run of the experiment and has every set it compares.

    No data are needed. A setting that is newer than the result counts as its default.
    """
    recipe = experiment.recipe(result.label, result.seed)
    if recipe is None or to_json(from_json(Recipe, result.settings)) != to_json(recipe):
        return False
    protocols = result.evaluation["protocols"]
    there = {
        (m["metric"], m["of"], p["reference"], p["generated"], real)
        for m in result.evaluation["measurements"]
        for p in [protocols[m["protocol"]]]
        for real in (p["real"], None)  # None: all of them
    }
    needed = [
        (images.name, protocol)
        for compared in experiment.compared.get(result.label, ())
        for images, protocol in compared.protocols(recipe.generation)
    ]
    if experiment.extractor != NO_EXTRACTOR:
        sets = ("REC", *(PRIORS[prior].label for prior in experiment.priors))
        needed += [
            (of, replace(protocol, extractor=experiment.extractor, generated=protocol.real))
            for protocol in experiment.protocols
            for of in sets
        ]
    return there >= {
        (_distance(p.extractor), of, p.reference, p.generated, p.real) for of, p in needed
    }


def _distance(extractor: str) -> str:
    return "FID" if extractor == "inception" else f"FD-{extractor}"


def is_finished(experiment: Experiment, results: list[Result]) -> bool:
    """Return whether the results include all runs of an experiment."""
    mine = [r for r in results if r.experiment == experiment.name and belongs(r, experiment)]
    return len({(r.label, r.seed) for r in mine}) == len(experiment.planned())
