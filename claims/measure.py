"""One trial: trained (or gone on with), measured, and written as a result."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import poise
from claims.design import NOISELESS, NOISELESS_RENORMALISED, RENORMALISED, Compared, Trial
from poise.data import gather, head
from poise.errors import InputError
from poise.evaluation import Evaluation, Produced, choose_extractor, compare
from poise.features import Extractor
from poise.latent import variance_law
from poise.metrics import reconstruction
from poise.protocols import DEFAULT, Measurement, Protocol
from poise.recipes.settings import Generation, Recipe, from_json, to_json
from poise.runs.pipeline import prepare
from poise.runs.run import PriorName, Run
from poise.studies.results import (
    Result,
    read_results,
    result_of,
    safe_name,
    source_commit,
    write_result,
)
from poise.support.guards import locked, stop_signals

WAYS: dict[str, tuple[PriorName, Generation]] = {
    "GEN-1": ("normal", Generation()),
    "GEN-2": ("second-stage", Generation()),
    "GEN-mixture": ("mixture", Generation()),
    RENORMALISED: ("second-stage", Generation(renormalise="always")),
    NOISELESS: ("second-stage", Generation(second_stage_noise=False)),
    NOISELESS_RENORMALISED: (
        "second-stage",
        Generation(second_stage_noise=False, renormalise="always"),
    ),
}
KEPT = ("FD-", "KID-")  # the rest would be most of the results' bytes


def perform(
    trial: Trial, runs: Path, results: Path, sources: dict[str, str], *, keep: bool = False
) -> Path:
    """The result's file of a trial, trained and measured from wherever it stands.

    Args:
        trial: to do.
        runs: the folder for its run, which is removed when the result is written.
        results: the folder for its result.
        sources: where a data set is that is not found by its name.
        keep: keep the run.
    """
    torch.set_num_threads(1)
    source_commit()  # of what was imported: by the end of the run the clone may have moved on
    folder, named = runs / safe_name(*trial.key), trial.recipe.data
    located = replace(named, source=sources.get(named.source, named.source))
    training = train(replace(trial.recipe, data=located), folder)
    began = time.monotonic()
    run = poise.load(folder, device="cpu")
    measured = evaluation(run, trial.compared)
    seconds = {"training": round(training, 1), "evaluation": round(time.monotonic() - began, 1)}
    result = result_of(
        run, measured, experiment=trial.experiment, label=trial.label, seconds=seconds
    )
    settings, data = (
        result.settings | {"data": to_json(named)},
        result.data | {"source": named.source},
    )
    path = write_result(replace(result, settings=settings, data=data), results)
    if not keep:
        shutil.rmtree(folder)
    return path


def train(recipe: Recipe, folder: Path) -> float:
    """Seconds that both stages took: `poise.train` without its pictures, which take longer to draw than the digits to learn."""
    with locked(folder):
        options = poise.Options(device="cpu", quiet=True)
        job = prepare(folder, recipe, None, torch.device("cpu"), options, None, time.monotonic())
        if not job.meta["finished"]:
            with stop_signals() as stop:
                job.run_stages(stop)
        return job.meta["seconds"]


def finished(trial: Trial, results: Path) -> bool:
    """Whether a result of this very trial is there: the same settings, and every set measured as the design says.

    Raises:
        InputError: a result of other settings lies in its place.
    """
    path = results / f"{safe_name(*trial.key)}.json"
    if not path.exists():
        return False
    (found,) = read_results([path])
    if not belongs(found, trial):
        raise InputError(
            f"{path} is of other settings than the design's: remove it, or take another --results"
        )
    return True


def belongs(result: Result, trial: Trial) -> bool:
    """Whether a result is of the design's recipe, and every set was compared with as many real images of that side as it says.

    A setting that is newer than the result counts as at its default.
    """
    same = to_json(from_json(Recipe, result.settings)) == to_json(trial.recipe)
    wanted = {
        (f"FD-{c.extractor}", of, c.reference, c.number) for c in trial.compared for of in c.sets
    }
    return same and wanted <= set(_compared(result))


def _compared(result: Result) -> Iterator[tuple[str, str, str, int]]:
    protocols = result.evaluation["protocols"]
    for m in result.evaluation["measurements"]:
        yield (
            m["metric"],
            m["of"],
            protocols[m["protocol"]]["reference"],
            protocols[m["protocol"]]["real"],
        )


def evaluation(run: Run, compared: tuple[Compared, ...]) -> Evaluation:
    """The run's own figures on every test image, and sets of images compared with real ones."""
    own = run.evaluate(extractor="none")
    measured = [measurement for wanted in compared for measurement in comparisons(run, wanted)]
    return Evaluation((*own.measurements, *measured), own.pages | {"claims": page(run)}, own.notes)


def page(run: Run) -> dict[str, Any]:
    """What no page of the package has: the released variance law; error and variance of training images; parameters."""
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


def comparisons(run: Run, wanted: Compared) -> Iterator[Measurement]:
    """The distances of each set; sets that are made in the same way are compared together."""
    data = run.dataset()
    real = head(data.train if wanted.reference == "train" else data.test, wanted.number)
    protocol, network = conditions(wanted)
    for of in wanted.sets:
        prior, generation = WAYS.get(of, (None, Generation()))
        produced = produced_set(run, of, prior, real, generation)
        measured = compare(real, [produced], replace(protocol, generation=generation), network)
        yield from (m for m in measured if m.metric.startswith(KEPT))


def conditions(wanted: Compared) -> tuple[Protocol, Extractor]:
    """The protocol of a comparison, and its network."""
    plain = replace(
        DEFAULT,
        name="claims",
        reference=wanted.reference,
        real=wanted.number,
        kid_subsets=1,
        kid_subset_size=wanted.number,
    )
    protocol, network, _ = choose_extractor(plain, wanted.extractor, torch.device("cpu"))
    assert network is not None
    return protocol, network


def produced_set(
    run: Run, of: str, prior: PriorName | None, real: Any, generation: Generation
) -> Produced:
    """A set of images by its name. Every label of a seed draws the same noise."""
    seed = run.recipe.seed
    if prior is None:
        chunks = partial(_restored, run, real, generation)
        return Produced(of, chunks, len(real), seed)
    return Produced(
        of, partial(run.sample_chunks, prior=prior, seed=seed, generation=generation), seed=seed
    )


def _restored(run: Run, real: Any, generation: Generation, count: int) -> Iterator[Any]:
    return run.reconstruct_chunks(head(real, count), generation=generation)
