"""Evaluate a run: its error, likelihood and latents, and its images beside real ones."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.data import spread
from poise.errors import InputError, RunError
from poise.evaluation import (
    Evaluation,
    Produced,
    choose_extractor,
    chunks_of,
    compare,
    data_of,
    likelihood_measurements,
    prepare_statistics,
    real_images,
    remarks,
    restored_measurements,
)
from poise.features import Extractor
from poise.metrics import encode_all, importance_weighted_nll, latent_statistics, reconstruction
from poise.metrics.likelihood import CERTAIN_NATS, ENOUGH_CERTAIN, MOST_LATENTS, no_refined
from poise.metrics.reference_statistics import ReferenceStatistics
from poise.protocols import (
    Measurement,
    Protocol,
    find_protocol,
    of_unseen_images,
    with_count,
    with_real,
)
from poise.variants import PRIORS, PriorName, available_priors, find_prior

if TYPE_CHECKING:
    from poise.runs.run import Run

NO_POSTERIOR = (
    "a deterministic autoencoder: its codes are points, "
    "and it has no KL, ELBO, likelihood or variance law"
)
NO_LIKELIHOOD = (
    "the error of features is no likelihood of the images, so there is no ELBO and no NLL"
)


def evaluate_run(
    run: "Run",
    images: Any,
    *,
    statistics: ReferenceStatistics | str | Path | None,
    protocol: str | Protocol,
    extractor: str | Extractor,
    priors: Sequence[PriorName] | None,
    count: int | None,
    infinity: bool,
    nll_samples: int,
    seed: int,
    quiet: bool,
) -> Evaluation:
    """Return all results of an evaluation of a run: see `Run.evaluate`."""
    if nll_samples and run.deterministic:
        raise InputError(
            f"objective {run.recipe.first.objective} has no likelihood to estimate: "
            "leave nll_samples out"
        )
    if nll_samples and not run.first.balance.error.is_likelihood:
        raise InputError(f"{NO_LIKELIHOOD}: leave nll_samples out")
    conditions, network, notes = choose_extractor(
        _completed(run, with_count(find_protocol(protocol), count), images),
        extractor,
        run.device,
    )
    if images is None:
        conditions = with_real(conditions, run.data[conditions.reference])
        images = run.images_for(conditions)
    else:
        images = run.checked(images)
        conditions = with_real(conditions, len(images))
        images = real_images(images, conditions)
    conditions = replace(conditions, side=images.shape[-1])
    of_model = of_unseen_images(conditions, run.data["test"])
    test = images if of_model == conditions else run.images_for(of_model)
    pages, measured, unmeasured = _model_figures(run, test, of_model, nll_samples, quiet)
    reference = images
    if statistics is not None:
        wanted = replace(find_protocol(protocol), real=None, generated=count)
        wanted = replace(wanted, generation=conditions.generation)
        reference, conditions, network, notes = prepare_statistics(
            statistics, wanted, extractor, run.device, images.shape[-1]
        )
        infinity = False  # the note says that it is left out
    if network is not None:
        produced, left_out = _produced(run, images, conditions, priors, seed)
        measured += compare(
            reference, produced, conditions, network, infinity=infinity, quiet=quiet
        )
        notes += left_out
    notes += unmeasured
    notes += (NO_POSTERIOR,) if run.deterministic else ()
    notes += () if run.first.balance.error.is_likelihood else (NO_LIKELIHOOD,)
    latents = run.recipe.network.latent_dim
    notes += (no_refined(latents),) if nll_samples and latents > MOST_LATENTS else ()
    certain = pages["likelihood"]["certain_share"] if nll_samples else 1.0
    if certain < ENOUGH_CERTAIN:
        notes += (
            f"the log likelihood of {1 - certain:.0%} of the images has a standard error above "
            f"{CERTAIN_NATS} nats: use more nll_samples than {nll_samples}",
        )
    return Evaluation(tuple(measured), pages, (*notes, *remarks(measured, infinity)))


def _completed(run: "Run", protocol: str | Protocol, images: Any) -> Protocol:
    """Return the protocol with its generation and reference filled in.

    A generation that the protocol leaves open is the recipe's.
    """
    found = find_protocol(protocol)
    found = replace(found, generation=found.generation or run.recipe.generation)
    if images is not None:
        return replace(found, reference="given")
    return replace(found, reference="test") if found.reference == "given" else found


def _model_figures(
    run: "Run", images: Any, protocol: Protocol, nll_samples: int, quiet: bool
) -> tuple[dict[str, dict[str, Any]], list[Measurement], tuple[str, ...]]:
    """Return pages of figures, measurements, and a note on what cannot be computed."""
    generation, vae, balance = protocol.generation, run.first.vae, run.first.balance
    assert generation is not None
    released = generation.variance_law == "released"
    common = {
        "seed": run.recipe.seed,
        "device": str(run.device),
        "data": data_of(images, protocol),
    }
    figures, nll = reconstruction(vae, balance, images, seed=run.recipe.seed), None
    figures = figures.without_posterior() if run.deterministic else figures
    restored = run.reconstruct_chunks(images, generation=generation)
    measured = restored_measurements(chunks_of(images, len(images)), restored, protocol, **common)
    pages: dict[str, dict[str, Any]] = {
        "reconstruction": asdict(figures)
        | {"mse_as_shown": measured[0].value, "images": len(images)}
    }
    if nll_samples:
        nll = importance_weighted_nll(
            vae, balance, images, samples=nll_samples, seed=run.recipe.seed, quiet=quiet
        )
        pages["likelihood"] = asdict(nll)
    notes: tuple[str, ...] = ()
    try:
        if run.has_codes:
            statistics = latent_statistics(run.codes, released=released)
            pages["latents"] = asdict(
                statistics.without_posterior() if run.deterministic else statistics
            )
        if run.second is not None and run.has_codes:
            pages["second_stage"] = _second_stage_page(run, released)
    except InputError as error:  # they are not finite, but the run is finished
        notes = (f"no statistics of the latents: {error}",)
    return pages, measured + likelihood_measurements(figures, nll, protocol, **common), notes


def _second_stage_page(run: "Run", released: bool) -> dict[str, Any]:
    assert run.second is not None
    latents = run.latents()
    figures = reconstruction(run.second.vae, run.second.balance, latents, seed=run.recipe.seed)
    return asdict(figures) | asdict(
        latent_statistics(encode_all(run.second.vae, latents), released=released)
    )


def _produced(
    run: "Run", images: Any, protocol: Protocol, priors: Sequence[PriorName] | None, seed: int
) -> tuple[list[Produced], tuple[str, ...]]:
    """Return the sets of images to compare, and a note if priors are left out."""
    generation = protocol.generation
    assert generation is not None
    for name in priors or ():
        find_prior(name)
    restored = Produced(
        "REC",
        lambda count: run.reconstruct_chunks(spread(images, count), generation=generation),
        len(images),
        run.recipe.seed,
    )
    names = [
        name for name in available_priors(run.second_stage) if priors is None or name in priors
    ]
    notes: tuple[str, ...] = ()
    produced = [restored]
    for name in names:
        try:
            run._plain_prior(name, generation)
            if generation.renormalise != "never":
                _ = run.codes
        except (InputError, RunError) as error:
            if isinstance(error, RunError) and run.has_codes:
                raise  # they are damaged
            # Too many latents for a mixture, or no codes.
            notes += (f"no {PRIORS[name].label}: {error}",)
            continue
        draw = partial(run.sample_chunks, prior=name, seed=seed, generation=generation)
        produced.append(Produced(PRIORS[name].label, draw, seed=seed))
    return produced, notes
