"""Recipes: complete settings of a run, by name.

`settings` defines the settings, `presets` the recipes. `RECIPES["cifar10"]` is a `Recipe`.
"""

from poise.errors import InputError
from poise.recipes.presets import (
    CELEBA64,
    CELEBA64_RELEASED,
    CIFAR10,
    CIFAR10_RELEASED,
    DIGITS,
    FASHION_MNIST,
    FASHION_MNIST_PUBLISHED,
    IMAGES,
    IMAGES_LARGE,
    IMAGES_RESNET,
    MNIST,
    MNIST_PUBLISHED,
)
from poise.recipes.settings import CHANGES, Data, Generation, Network, Recipe, Stage

__all__ = [
    "CHANGES",
    "EXPERIMENTS",
    "RECIPES",
    "Data",
    "Generation",
    "Network",
    "Recipe",
    "Stage",
    "find_recipe",
]

_OF_DATA_SETS = (
    MNIST,
    MNIST_PUBLISHED,
    FASHION_MNIST,
    FASHION_MNIST_PUBLISHED,
    CIFAR10,
    CIFAR10_RELEASED,
    CELEBA64,
    CELEBA64_RELEASED,
)
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (DIGITS, *_OF_DATA_SETS, IMAGES, IMAGES_LARGE, IMAGES_RESNET)
}
EXPERIMENTS = tuple(recipe.name for recipe in _OF_DATA_SETS)
"""Recipes of published experiments, and shorter recipes on the same data."""


def find_recipe(name: str | None, data: str | None = None) -> Recipe:
    """Return the recipe of a name.

    Args:
        name: name of the recipe. None: the recipe with the name of the data set, else "images".
        data: name of a data set, or a path.

    Raises:
        InputError: no such recipe.
    """
    name = name or (data if data in RECIPES else IMAGES.name)
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]
