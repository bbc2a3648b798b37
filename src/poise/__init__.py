"""Train variational autoencoders that compute the balance of reconstruction and KL.

    balance = poise.ComputedBalance()
    terms = balance(reconstruction, images, mean, logvar)
    terms.loss.backward()

Names are imported at first use, so that the balances need torch and numpy only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from poise.support.version import __version__ as __version__

if TYPE_CHECKING:
    from poise import (
        balance,
        data,
        explore,
        features,
        metrics,
        networks,
        priors,
        protocols,
        recipes,
        report,
    )
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
    from poise.diagnosis import Diagnosis, diagnose
    from poise.errors import InputError, Interrupted, RunError
    from poise.estimator import VAEEstimator
    from poise.evaluation import Evaluation, evaluate
    from poise.latent import DiagonalGaussian
    from poise.protocols import Measurement, Protocol
    from poise.recipes import Recipe
    from poise.runs.callbacks import Callback, StopStage, TensorBoard, WandB
    from poise.runs.options import Options
    from poise.runs.pipeline import train
    from poise.runs.run import Run, load
    from poise.studies.comparison import Comparison, compare
    from poise.studies.reproduction import reproduce
    from poise.studies.results import Result, read_results
    from poise.vae import VAE

__all__ = [
    "VAE",
    "Balance",
    "Callback",
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
    "StopStage",
    "TensorBoard",
    "VAEEstimator",
    "WandB",
    "balance",
    "compare",
    "data",
    "diagnose",
    "evaluate",
    "explore",
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
    "studies.comparison": ("Comparison", "compare"),
    "diagnosis": ("Diagnosis", "diagnose"),
    "errors": ("InputError", "Interrupted", "RunError"),
    "estimator": ("VAEEstimator",),
    "evaluation": ("Evaluation", "evaluate"),
    "latent": ("DiagonalGaussian",),
    "runs.callbacks": ("Callback", "StopStage", "TensorBoard", "WandB"),
    "runs.options": ("Options",),
    "runs.pipeline": ("train",),
    "protocols": ("Measurement", "Protocol"),
    "recipes": ("Recipe",),
    "studies.reproduction": ("reproduce",),
    "studies.results": ("Result", "read_results"),
    "runs.run": ("Run", "load"),
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
