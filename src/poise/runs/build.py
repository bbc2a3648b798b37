"""From settings to modules: networks whose weights are a function of the seed, and balances."""

from poise import networks
from poise.balance import Balance, make_balance
from poise.errors import InputError
from poise.objectives import Deterministic, is_deterministic
from poise.recipes.settings import Network, Recipe, Stage
from poise.support.seeds import derive, seeded
from poise.vae import VAE


def first_stage(recipe: Recipe, shape: list[int], given: VAE | None = None) -> VAE:
    """Stage 1's network, its weights a function of the recipe's seed. Its posterior vanishes where the objective has none.

    Args:
        recipe: its network, objective and seed.
        shape: channels, height, width.
        given: a network of the user's own in place of the recipe's.

    Raises:
        InputError: a size that the network cannot take.
    """
    with seeded(derive("weights", recipe.seed, 1)):
        vae = given or VAE(*_first_pair(recipe.network, shape))
    return (
        VAE(Deterministic(vae.encoder), vae.decoder)
        if is_deterministic(recipe.first.objective)
        else vae
    )


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
        case "custom":
            raise InputError("this run has a network of your own: pass it as vae=...")


def second_stage(recipe: Recipe) -> VAE:
    """Stage 2's network, its weights a function of the recipe's seed."""
    with seeded(derive("weights", recipe.seed, 2)):
        return VAE(*networks.second_stage(recipe.network.latent_dim, recipe.network.second_hidden))


def stage_balance(stage: Stage, recipe: Recipe, shape: list[int]) -> Balance:
    """The balance that a stage names; "released" takes image size and latents from the run."""
    return make_balance(stage.balance, image_size=shape[1], latent_dim=recipe.network.latent_dim)
