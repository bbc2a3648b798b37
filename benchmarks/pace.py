"""The times of a recipe's parts on this machine, for the benchmarks."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from poise.data import Dataset
from poise.recipes import Recipe
from poise.runs.build import first_stage
from poise.runs.options import Options
from poise.runs.pipeline import networks_and_balances
from poise.runs.timing import Timing, measure
from poise.training import ImageBatches
from poise.training.loop import count_latents
from poise.vae import VAE


def timing_of(
    recipe: Recipe,
    data: Dataset,
    device: torch.device,
    engine: str,
    vae: VAE | None = None,
    threads: int | None = None,
) -> Timing:
    """Return the times of a recipe's parts, as `poise train --minutes` measures them.

    Args:
        recipe: the recipe. Its minutes say how long to measure.
        data, device, engine: of the run.
        vae: a network of your own for stage 1.
        threads: number of CPU threads. None: the usual number.
    """
    shape = list(data.shape)
    if vae is not None or recipe.network.kind == "conv":
        images = ImageBatches(data.train, torch.device("cpu"))
        latents = count_latents(vae or first_stage(recipe, shape), images)
        recipe = replace(recipe, network=replace(recipe.network, latent_dim=latents))
    with tempfile.TemporaryDirectory() as folder:
        return measure(
            recipe,
            networks_and_balances(recipe, shape, vae, 0),
            data,
            Path(folder),
            device=device,
            engine=engine,  # pyright: ignore[reportArgumentType]
            count=threads,
            save_seconds=Options().save_seconds,
        )
