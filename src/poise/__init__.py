"""Poise trains variational autoencoders that balance themselves.

    balance = poise.ComputedBalance()
    terms = balance(reconstruction, images, mean, logvar)
    terms.loss.backward()

Names are loaded when first used: the balances need torch and numpy only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from poise.version import __version__ as __version__

if TYPE_CHECKING:
    from poise import balance, features, metrics, networks, priors, protocols, recipes, report
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
    from poise.comparison import Comparison, compare
    from poise.diagnosis import Diagnosis, diagnose
    from poise.errors import InputError, Interrupted, RunError
    from poise.estimator import VAEEstimator
    from poise.evaluation import Evaluation, evaluate
    from poise.latent import DiagonalGaussian
    from poise.pipeline import Options, train
    from poise.protocols import Measurement, Protocol
    from poise.recipes import Recipe
    from poise.reproduction import reproduce
    from poise.results import Result, read_results
    from poise.run import Run, load
    from poise.vae import VAE

__all__ = [
    "VAE",
    "Balance",
    "Comparison",
    "ComputedBalance",
    "ConstrainedBalance",
    "ControlledBalance",
    "Diagnosis",
    "DiagonalGaussian",
    "Evaluation",
    "FixedBalance",
    "InputError",
    "Interrupted",
    "LearnedBalance",
    "LossTerms",
    "Measurement",
    "OptimalBalance",
    "Options",
    "Protocol",
    "Recipe",
    "Result",
    "Run",
    "RunError",
    "ScheduledBalance",
    "VAEEstimator",
    "balance",
    "compare",
    "diagnose",
    "evaluate",
    "features",
    "load",
    "metrics",
    "networks",
    "priors",
    "protocols",
    "read_results",
    "recipes",
    "report",
    "reproduce",
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
    "comparison": ("Comparison", "compare"),
    "diagnosis": ("Diagnosis", "diagnose"),
    "errors": ("InputError", "Interrupted", "RunError"),
    "estimator": ("VAEEstimator",),
    "evaluation": ("Evaluation", "evaluate"),
    "latent": ("DiagonalGaussian",),
    "pipeline": ("Options", "train"),
    "protocols": ("Measurement", "Protocol"),
    "recipes": ("Recipe",),
    "reproduction": ("reproduce",),
    "results": ("Result", "read_results"),
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
