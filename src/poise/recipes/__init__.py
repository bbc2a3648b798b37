"""Complete runs by name, one module per data set. `poise.recipes.RECIPES["cifar10"]` is a frozen `Recipe`."""

from poise.errors import InputError
from poise.recipes import celeba64, cifar10, digits, fashion_mnist, images, mnist
from poise.recipes.settings import Data, Generation, Network, Recipe, Stage

__all__ = ["EXPERIMENTS", "RECIPES", "Data", "Generation", "Network", "Recipe", "Stage", "find_recipe"]

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        digits.DIGITS,
        mnist.MNIST,
        mnist.MNIST_PUBLISHED,
        fashion_mnist.FASHION_MNIST,
        fashion_mnist.FASHION_MNIST_PUBLISHED,
        cifar10.CIFAR10,
        cifar10.CIFAR10_RELEASED,
        celeba64.CELEBA64,
        celeba64.CELEBA64_RELEASED,
        images.IMAGES,
    )
}

EXPERIMENTS = tuple(name for name in RECIPES if name not in (digits.DIGITS.name, images.IMAGES.name))
"""Recipes of published experiments, and shorter ones on the same data."""


def find_recipe(name: str | None, data: str | None = None) -> Recipe:
    """The recipe of a name; without one, the recipe that the data's name names; otherwise "images".

    Raises:
        InputError: no such recipe.
    """
    name = name or (data if data in RECIPES else images.IMAGES.name)
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]
