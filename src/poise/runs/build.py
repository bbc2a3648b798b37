"""Build networks and balances from settings. Initial weights depend on the seed only."""

import math
from dataclasses import replace
from typing import Any

from poise import networks
from poise.balance import Balance, make_balance
from poise.balance.kinds import make_error
from poise.errors import InputError
from poise.flow import Flow
from poise.objectives import Deterministic, is_deterministic, make_objective
from poise.recipes.settings import VAE_OBJECTIVE, Network, Recipe, Stage
from poise.support.seeds import derive, seeded
from poise.training import ImageBatches, check_groups, count_latents
from poise.vae import VAE, standardised

SQUARED_STAGE_2 = "stage 2 has a squared error, because its decoder's noise is Gaussian"


def with_latents_counted(recipe: Recipe, vae: VAE, images: Any) -> Recipe:
    """Return the recipe with the number of latents that stage 1's network has.

    That of a latent map depends on the size of the images.

    Args:
        recipe: its number may be another one.
        vae: the network.
        images: uint8 or float images, of which one is encoded.
    """
    data = ImageBatches(images, next(vae.parameters()).device)
    return replace(recipe, network=replace(recipe.network, latent_dim=count_latents(vae, data)))


def first_stage(recipe: Recipe, shape: list[int], given: VAE | None = None) -> VAE:
    """Return stage 1's network, with initial weights that depend on the recipe's seed only.

    If the objective is deterministic, the encoder is wrapped in `Deterministic`. If the stage
    standardises latents, both networks are wrapped (see `poise.vae.standardised`).

    Args:
        recipe: its network, objective and seed are used.
        shape: channels, height, width.
        given: a network of your own, used instead of the recipe's.

    Raises:
        InputError: the network does not support this image size, or the objective no standard
            latents.
    """
    with seeded(derive("weights", recipe.seed, 1)):
        vae = given or VAE(*_first_pair(recipe.network, shape))
    standardise, objective = recipe.first.standardise, recipe.first.objective
    if standardise != "never" and objective != VAE_OBJECTIVE:
        raise InputError(
            f"standardise={standardise} is for the objective vae, not for {objective}: leave it out"
        )
    if is_deterministic(objective):
        return VAE(Deterministic(vae.encoder), vae.decoder)
    if standardise == "never":
        return vae
    latent_shape = getattr(vae.decoder, "latent_shape", (recipe.network.latent_dim,))
    every = recipe.first.standardise_every if standardise == "during" else None
    return standardised(vae, latent_shape, every=every)


def _first_pair(network: Network, shape: list[int]) -> networks.Pair:
    channels, size, decay = shape[0], shape[1], network.norm_decay
    match network.kind:
        case "resnet":
            return networks.resnet(
                size,
                channels,
                network.latent_dim,
                norm_decay=decay,
                initialisation=network.initialisation,
            )
        case "infogan":
            return networks.infogan(size, channels, network.latent_dim, norm_decay=decay)
        case "wae":
            return networks.wae(
                size,
                channels,
                network.latent_dim,
                norm_decay=decay,
                initialisation=network.initialisation,
            )
        case "mlp":
            return networks.mlp(shape, network.latent_dim, hidden=network.hidden)
        case "conv":
            return networks.conv(size, channels, network.latent_channels, width=network.conv_width)
        case "custom":
            raise InputError("this run has a network of your own: pass it as vae=...")


def second_stage(recipe: Recipe, first: VAE, classes: int = 0) -> VAE | Flow:
    """Return stage 2's network, with initial weights that depend on the recipe's seed only.

    Args:
        recipe: its network, kind of stage 2 and seed are used.
        first: stage 1's network. If its decoder has an attribute `latent_shape`, its latents are a
            map of this shape.
        classes: number of classes of a run with labels, which a flow is conditioned on.

    Raises:
        InputError: the decoder's latent map has another number of latents.
    """
    network = recipe.network
    with seeded(derive("weights", recipe.seed, 2)):
        if recipe.second_stage == "flow":
            shape = getattr(first.decoder, "latent_shape", (network.latent_dim,))
            if math.prod(shape) != network.latent_dim:
                raise InputError(
                    f"the decoder's latent_shape {tuple(shape)} has {math.prod(shape)} values, but "
                    f"the encoder returns {network.latent_dim} latents"
                )
            sizes = {"width": network.flow_width, "blocks": network.flow_blocks}
            return Flow(networks.flow(shape, **sizes, classes=classes), shape, classes)
        return VAE(*networks.second_stage(network.latent_dim, network.second_hidden))


def check_specs(recipe: Recipe) -> None:
    """Check that the balances and objectives of a recipe can be made, before images are read.

    Raises:
        InputError: one of them cannot.
    """
    for stage in recipe.stages:
        stage_balance(stage, recipe, [1, 1, 1])
        make_objective(stage.objective)


def stage_balance(stage: Stage, recipe: Recipe, shape: list[int]) -> Balance:
    """Return the balance that a stage names.

    The balance "released" depends on the image size and the number of latents. In stage 2 its KL
    weight is 1, as in the released code.

    Raises:
        InputError: the balance cannot weigh the stage's error, or has groups; or stage 2 has
            another error than the squared one.
    """
    latents = recipe.network.latent_dim
    second = stage is recipe.second and stage is not recipe.first
    known = {"image_size": latents / 2 if second else shape[1], "latent_dim": latents}
    if second and stage.error != "squared":
        raise InputError(f"{SQUARED_STAGE_2}: give it no error {stage.error!r}")
    if stage.error == "squared":  # or the power that the balance's text has
        balance = make_balance(stage.balance, **known)
        check_groups(balance)
        if second and balance.power != 2:
            raise InputError(f"{SQUARED_STAGE_2}: leave power out of its balance")
        return balance
    error = make_error(stage.error, shape[0])
    known |= {} if error.groups is None else {"groups": error.groups}
    return make_balance(stage.balance, **known).measuring(error)
