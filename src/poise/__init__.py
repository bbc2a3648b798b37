"""Poise trains variational autoencoders that balance themselves.

    balance = poise.ComputedBalance()
    terms = balance(reconstruction, images, mean, logvar)
    terms.loss.backward()

Names are loaded when first used: the balances need torch and numpy only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poise import balance, metrics, networks, recipes
    from poise.balance import (
        Balance,
        ComputedBalance,
        ConstrainedBalance,
        ControlledBalance,
        FixedBalance,
        LearnedBalance,
        LossTerms,
        OptimalBalance,
        ScheduledBalance,
    )
    from poise.errors import InputError, Interrupted, RunError
    from poise.latent import DiagonalGaussian
    from poise.pipeline import Options, train
    from poise.recipes import Recipe
    from poise.run import Run, load
    from poise.vae import VAE

__all__ = [
    "VAE",
    "Balance",
    "ComputedBalance",
    "ConstrainedBalance",
    "ControlledBalance",
    "DiagonalGaussian",
    "FixedBalance",
    "InputError",
    "Interrupted",
    "LearnedBalance",
    "LossTerms",
    "OptimalBalance",
    "Options",
    "Recipe",
    "Run",
    "RunError",
    "ScheduledBalance",
    "balance",
    "load",
    "metrics",
    "networks",
    "recipes",
    "train",
]

_HOMES = {
    "balance": (
        "Balance",
        "ComputedBalance",
        "ConstrainedBalance",
        "ControlledBalance",
        "FixedBalance",
        "LearnedBalance",
        "LossTerms",
        "OptimalBalance",
        "ScheduledBalance",
    ),
    "errors": ("InputError", "Interrupted", "RunError"),
    "latent": ("DiagonalGaussian",),
    "pipeline": ("Options", "train"),
    "recipes": ("Recipe",),
    "run": ("Run", "load"),
    "vae": ("VAE",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f"poise.{_HOME_OF[name]}"), name)
    if name in __all__:
        return import_module(f"poise.{name}")
    raise AttributeError(f"module 'poise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
