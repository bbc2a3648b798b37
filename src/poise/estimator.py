"""Two-stage VAEs of tables, as a scikit-learn estimator.

Model. A row x is Gaussian around the output of the decoder f for its latents z,

    p(x|z) = N(x; m + s f(z), s^2 gamma2 I),        z ~ N(0, I),                                (1)

where m is the mean row and s is one scale for all columns, the root of their mean variance. As in
principal component analysis, a column of large variance counts more than others. If all columns
should count equally, use a StandardScaler first. Without hidden layers, the optimum of this model
is probabilistic PCA (Tipping & Bishop 1999). Training approaches it if it has enough steps.

Early stopping. Tables are small, and a network overfits them. gamma2 then follows the error of the
training rows, and other rows get a very low likelihood. So some rows are held out, and the weights
with the highest ELBO on these rows are kept. A scheduled, constrained or controlled balance trains
for all steps: its ELBO may be higher on the way than at its target.
"""

import copy
import math
import warnings
from collections.abc import Sequence
from functools import cache
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from poise import networks
from poise.balance import Balance, make_balance
from poise.errors import InputError
from poise.flow import Flow
from poise.latent import DiagonalGaussian
from poise.metrics import CHUNK, encode_all, nll_per_image, reconstruction
from poise.priors import Prior, TrainedModel, make_prior
from poise.recipes.settings import Stage
from poise.sampling import sample
from poise.support.seeds import derive, generator, noise_per_image, seeded
from poise.training import (
    Batches,
    CodeBatches,
    TrainingState,
    VectorBatches,
    Watch,
    denormals_as_zero,
    fit,
    new_state,
)
from poise.training.machine import choose_device
from poise.training.state import Network
from poise.vae import VAE
from poise.variants import PRIORS, PriorName, SecondStage, find_prior

CHECKS = 50  # evaluations of the held-out rows over the length of training
FEWEST_TO_SPLIT = 4  # minimum number of rows for a split; two of them are held out
PATIENCE = 10  # checks without a higher ELBO after which training stops
RISING_NATS = 0.1  # rise of the ELBO in the last checks that causes a ConvergenceWarning
COMPONENTS = 10  # mixture components, if there are ten rows per latent and component
LARGEST_LOGVAR = 20.0  # bound of the posterior's logvar, infinite for a row far from all others
FLOW_AVERAGE = 0.99  # decay of the averaged weights of a flow
DRAWS = 1_000  # minimum number of noise rows for the held-out error of a flow
DTYPES: Any = [np.float64, np.float32]


class VAEEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Fit a VAE with a computed balance to the rows of a table (eq. 1).

    Args:
        latent_dim: number of latents, >= 1: the number of columns of `transform`.
        hidden: widths of the encoder's hidden layers, >= 1 each. The decoder has them in reverse
            order. Empty: a linear VAE.
        balance: balance of stage 1, see `poise.balance.make_balance`. "computed" needs no tuning.
        prior: prior of the latents for `sample`, a key of `poise.variants.PRIORS`. Priors are
            fitted to the codes of all rows. "second-stage" is a second VAE with a computed balance,
            "flow" a flow (`poise.flow`).
        steps: maximum number of training steps (batches), >= 1.
        second_steps: maximum number of training steps of the second stage, if any, >= 1.
        batch_size: rows per step, >= 2.
        learning_rate: learning rate of Adam, > 0.
        validation_fraction: share of the rows that is held out for early stopping, in [0, 1). Of
            four rows or more, at least two are held out. With 0, and with a scheduled, constrained
            or controlled balance, training runs for all steps.
        importance_samples: latents per row that `score` and `score_samples` average over, >= 1.
        device: device of training: "auto", "cpu", "cuda", ... The fitted model is on the CPU.
        random_state: seed of weights, order, noise and samples, as in scikit-learn. An integer
            gives the same model every time on one machine.
        verbose: show progress.

    Attributes:
        mean_: m of eq. 1, (features,).
        scale_: s of eq. 1.
        noise_variance_: s^2 gamma2 of eq. 1, the maximum likelihood estimate. scikit-learn's `PCA`
            divides by n - 1: its value is n / (n - 1) times that of a model without hidden layers.
        vae_, balance_: the trained VAE and balance, for rows (x - m) / s.
        n_iter_: training step of the weights that were kept.
        n_latents_: the `latent_dim` of the fit.
        prior_: prior of the latents, for `sample`.
        history_: training log of both stages, a list of entries with loss, reconstruction_nats,
            kl_nats, mse and gamma2. Those of a flow have loss, velocity_mse and gamma2.
        n_features_in_, feature_names_in_: as in any scikit-learn estimator.

    Source: Asperti & Trentin 2020, arXiv 2002.07514 (the computed balance).

    Example:
        >>> from sklearn.datasets import load_iris
        >>> table = load_iris().data
        >>> model = VAEEstimator(latent_dim=2, hidden=(32,), learning_rate=5e-3, random_state=0)
        >>> model.fit(table).transform(table).shape, model.sample(5).shape
        ((150, 2), (5, 4))
    """

    def __init__(
        self,
        latent_dim: int = 16,
        *,
        hidden: Sequence[int] = (256, 256),
        balance: str = "computed",
        prior: PriorName = "mixture",
        steps: int = 5_000,
        second_steps: int = 5_000,
        batch_size: int = 100,
        learning_rate: float = 1e-3,
        validation_fraction: float = 0.1,
        importance_samples: int = 100,
        device: str = "auto",
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.latent_dim = latent_dim
        self.hidden = hidden
        self.balance = balance
        self.prior = prior
        self.steps = steps
        self.second_steps = second_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.validation_fraction = validation_fraction
        self.importance_samples = importance_samples
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> "VAEEstimator":
        """Train on the rows of a table.

        Args:
            X: (rows, features), finite numbers, two rows or more.
            y: not used.

        Returns:
            The estimator itself.

        Raises:
            InputError: a parameter is out of range, or values are too large to be squared. It is a
                ValueError, as scikit-learn raises for invalid tables.
            RunError: the loss is not finite.
        """
        self._check_parameters()
        # A fit that fails leaves no model, instead of parts of an earlier one.
        vars(self).pop("vae_", None)
        table: np.ndarray = _validated(self, X, ensure_min_samples=2)
        self.mean_, self.scale_ = table.mean(0, dtype=np.float64), _scale(table)
        self.history_: list[dict[str, float]] = []
        seed = _seed(self.random_state)
        with denormals_as_zero():
            self._train(self._scaled(table), seed)
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "vae_")

    def _check_parameters(self) -> None:
        if self.prior not in PRIORS:
            raise InputError(f"prior must be one of {', '.join(PRIORS)}, not {self.prior!r}")
        least = {
            "latent_dim": 1,
            "steps": 1,
            "second_steps": 1,
            "batch_size": 2,
            "importance_samples": 1,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < bound:
                raise InputError(
                    f"{name} must be a whole number of at least {bound}, not {value!r}"
                )
        widths = self.hidden if isinstance(self.hidden, (list, tuple)) else None
        if widths is None or not all(
            isinstance(width, Integral) and width >= 1 for width in widths
        ):
            raise InputError(
                "hidden must be a tuple of widths of at least 1, such as (256, 256), "
                f"not {self.hidden!r}"
            )
        if not isinstance(self.learning_rate, Real) or not self.learning_rate > 0:
            raise InputError(f"learning_rate must be greater than 0, not {self.learning_rate!r}")
        if not isinstance(self.validation_fraction, Real) or not 0 <= self.validation_fraction < 1:
            raise InputError(
                "validation_fraction must be at least 0 and less than 1, "
                f"not {self.validation_fraction!r}"
            )
        if not isinstance(self.balance, str) or self._new_balance(self.balance).power != 2:
            raise InputError(
                f"balance must be the name of a balance with a squared error, not {self.balance!r}"
            )

    def _new_balance(self, spec: str) -> Balance:
        return make_balance(spec, latent_dim=self.latent_dim)

    def _train(self, rows: Tensor, seed: int) -> None:
        """Train stage 1, then fit the prior."""
        stops_early = self._new_balance(self.balance).early_stopping
        fraction = self.validation_fraction if stops_early else 0
        held_out, kept = _split(len(rows), fraction, seed)
        if fraction and not len(held_out):
            text = (
                f"{len(rows)} rows are too few to hold some out: training runs for all "
                f"{self.steps} steps and overfits; give at least {FEWEST_TO_SPLIT} rows, "
                "better hundreds"
            )
            warnings.warn(text, UserWarning, stacklevel=3)  # at the caller of `fit`
        with seeded(derive("weights", seed, 1)):
            encoder, decoder = networks.mlp(
                rows.shape[1], self.latent_dim, hidden=tuple(self.hidden), output="linear"
            )
        stage = Stage(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            balance=self.balance,
        )
        data = VectorBatches(rows[kept], choose_device(self.device))
        state = self._train_stage(
            1, stage, VAE(Bounded(encoder), decoder), data, ElboOf(rows[held_out]), seed
        )
        prior = self._fit_prior(state.network, rows, (held_out, kept), seed)
        self.noise_variance_ = self.scale_**2 * float(state.balance.gamma2)
        self.balance_, self.n_iter_, self.n_latents_, self.prior_ = (
            state.balance,
            state.step,
            self.latent_dim,
            prior,
        )
        self.vae_ = state.network

    def _train_stage(
        self,
        number: int,
        stage: Stage,
        network: Network,
        data: Batches,
        score: "ElboOf | VelocityErrorOf",
        seed: int,
    ) -> TrainingState[Network]:
        """Train one stage and return the state with the best score, on the CPU."""
        balance = self._new_balance(stage.balance)
        state = new_state(network, balance, stage, choose_device(self.device))
        stopping = EarlyStopping(state, score, steps=stage.total_steps(len(data)))
        watch = Watch(log=self.history_.append, stop=stopping.should_stop, quiet=not self.verbose)
        fit(state, data, stage, number=number, seed=seed, watch=watch)
        stopping.restore()
        for module in (state.network, state.balance):
            module.cpu().eval().requires_grad_(False)
        return state

    def _fit_prior(self, vae: VAE, rows: Tensor, split: tuple[Tensor, Tensor], seed: int) -> Prior:
        codes = cache(lambda: encode_all(vae, rows))
        second = None
        if kind := find_prior(self.prior).second_stage:
            second = self._second_stage(kind, codes(), split, seed)
        model = TrainedModel(
            self.latent_dim,
            codes,
            second=second and second.network,
            gamma2=second and second.balance.gamma2,
            components=min(COMPONENTS, max(1, len(rows) // (10 * self.latent_dim))),
            seed=seed,
        )
        return make_prior(self.prior, model)

    def _second_stage(
        self, kind: SecondStage, codes: DiagonalGaussian, split: tuple[Tensor, Tensor], seed: int
    ) -> TrainingState[Any]:
        held_out, kept = split
        stage = Stage(
            steps=self.second_steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            objective=kind,
            ema_decay=FLOW_AVERAGE if kind == "flow" else None,
        )
        width, shape = max(self.hidden, default=256), (self.latent_dim,)
        with seeded(derive("weights", seed, 2)):
            if kind == "flow":
                second = Flow(networks.flow(shape, width=8 * math.ceil(width / 8)), shape)
            else:
                second = VAE(*networks.second_stage(self.latent_dim, width))
        data = CodeBatches(codes.mean[kept], codes.logvar[kept], choose_device(self.device))
        noise = noise_per_image(len(codes.mean), self.latent_dim, derive("codes", seed))
        others = codes.sample(noise)[held_out]
        if not isinstance(second, Flow):
            return self._train_stage(2, stage, second, data, ElboOf(others), seed)
        second.set_statistics(DiagonalGaussian(codes.mean[kept], codes.logvar[kept]))
        return self._train_stage(2, stage, second, data, VelocityErrorOf(others, seed), seed)

    def transform(self, X: Any) -> np.ndarray:
        """Return the posterior means of rows, (rows, latent_dim), in the precision of `X`.

        Args:
            X: (rows, features), finite numbers.
        """
        table = self._checked(X)
        return encode_all(self.vae_, self._scaled(table)).mean.numpy().astype(table.dtype)

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Return the rows decoded from latents, (rows, features).

        For the latents of `transform` these are the reconstructions.

        Args:
            X: (rows, latent_dim).

        Raises:
            InputError: the number of columns is not the number of latents.
        """
        check_is_fitted(self)
        latents: np.ndarray = check_array(X, dtype=DTYPES)
        if latents.shape[1] != self.n_latents_:
            raise InputError(
                f"X has {latents.shape[1]} columns, but the model has {self.n_latents_} latents"
            )
        with torch.no_grad():
            rows = [
                self.vae_.decode(part)
                for part in torch.tensor(latents, dtype=torch.float32).split(CHUNK)
            ]
        return self._unscaled(torch.cat(rows)).astype(latents.dtype)

    def sample(
        self, n_samples: int = 1, *, noise: bool = True, random_state: Any = None
    ) -> np.ndarray:
        """Generate new rows, (n_samples, features).

        Args:
            n_samples: number of rows, >= 1.
            noise: add the Gaussian noise of eq. 1, which the rows of the table have. False: return
                the output of the decoder.
            random_state: seed of the rows, as in scikit-learn. None: that of the estimator.

        Raises:
            InputError: n_samples < 1.
        """
        check_is_fitted(self)
        if n_samples < 1:
            raise InputError(f"n_samples must be at least 1, not {n_samples}")
        seed = _seed(self.random_state if random_state is None else random_state)
        rows = sample(self.vae_, self.prior_, n_samples, seed=seed)
        if noise:
            rows = rows + float(self.balance_.gamma2) ** 0.5 * noise_per_image(
                *rows.shape, derive("rows", seed)
            )
        return self._unscaled(rows)

    def score_samples(self, X: Any) -> np.ndarray:
        """Return the log-likelihood log p(x) of each row, in nats, (rows,).

        It is estimated with importance weights. The expectation of the estimate is a lower bound of
        log p(x). The prior is N(0, I), not the `prior` of the estimator (see
        `poise.metrics.importance_weighted_nll`).

        Args:
            X: (rows, features), finite numbers.
        """
        table = self._checked(X)
        values = [self._log_density(row) for row in self._scaled(table)]
        return np.array(values) - table.shape[1] * math.log(self.scale_)

    def _log_density(self, row: Tensor) -> float:
        """Return log p(x) of one scaled row.

        Its noise is a function of the row, so that the value does not depend on other rows.
        """
        seed = derive("row", row.numpy().tobytes().hex())
        nll, _ = nll_per_image(
            self.vae_, self.balance_, row[None], samples=self.importance_samples, seed=seed
        )
        return -float(nll)

    def score(self, X: Any, y: Any = None) -> float:
        """Return the mean log-likelihood of rows, in nats per row.

        It is comparable with `PCA.score` and `GaussianMixture.score` on the same rows.

        Args:
            X: (rows, features), finite numbers.
            y: not used.
        """
        return float(self.score_samples(X).mean())

    def _checked(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return _validated(self, X, reset=False)

    def _scaled(self, table: np.ndarray) -> Tensor:
        return torch.from_numpy(((table - self.mean_) / self.scale_).astype(np.float32))

    def _unscaled(self, rows: Tensor) -> np.ndarray:
        return self.mean_ + self.scale_ * rows.double().numpy()

    @property
    def _n_features_out(self) -> int:
        return self.n_latents_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class Bounded(nn.Module):
    """Clamp the log variances of an encoder, so that they are finite for rows far from all others.

    Args:
        encoder: the encoder to wrap, which returns `(mean, logvar)`.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.encoder(rows)
        return mean, logvar.clamp(-LARGEST_LOGVAR, LARGEST_LOGVAR)


class ElboOf:
    """Score of a VAE: the ELBO of held-out rows (n, features), in nats per row."""

    rising: ClassVar[str] = "the ELBO of held-out rows rose by {:.2f} nats"

    def __init__(self, held_out: Tensor) -> None:
        self.held_out = held_out

    def __call__(self, state: TrainingState[VAE]) -> float:
        elbo = reconstruction(state.network, state.balance, self.held_out).elbo_nats
        assert elbo is not None
        return elbo


class VelocityErrorOf:
    """Score of a flow: minus the mean squared error of the velocity, for held-out codes (n, L).

    The noise is the same at each call. Codes are repeated, so that it has at least `DRAWS` rows.
    """

    rising: ClassVar[None] = None

    def __init__(self, held_out: Tensor, seed: int) -> None:
        self.held_out = held_out.repeat(max(1, DRAWS // max(1, len(held_out))), 1)
        self.noise = torch.randn(
            len(self.held_out), held_out.shape[1] + 1, generator=generator("held-out noise", seed)
        )

    @torch.no_grad()
    def __call__(self, state: TrainingState[Flow]) -> float:
        flow = state.trained.eval()
        between, time, target = flow.target(
            self.held_out.to(flow.mean.device), self.noise.to(flow.mean.device)
        )
        return -float((flow(between, time) - target).square().mean())


class EarlyStopping:
    """Stop training when the score of held-out rows stops rising, and keep the best weights.

    Args:
        state: the state that is trained.
        score: score of the state, higher is better. If no rows are held out, training does not stop
            early and keeps the last weights.
        steps: length of training, in steps.
    """

    def __init__(
        self, state: TrainingState[Any], score: ElboOf | VelocityErrorOf, *, steps: int
    ) -> None:
        self.state, self.score = state, score
        self.steps, self.every = steps, max(1, steps // CHECKS)
        self.scores: list[float] = []
        self.checked = 0
        self.kept: tuple[int, dict[str, Any], dict[str, Any]] | None = None

    def should_stop(self) -> bool:
        """Return whether the score has not risen in `PATIENCE` checks. Call it after every step."""
        if self.state.step % self.every:
            return False
        if self.state.step > self.checked:  # may be called twice in one step
            self.check()
        return max(self.scores[-PATIENCE:], default=0.0) < max(self.scores, default=0.0)

    def check(self) -> None:
        """Compute the score, and keep a copy of the weights if it is the highest so far."""
        state, self.checked = self.state, self.state.step
        if not len(self.score.held_out):
            return
        score = self.score(state)
        state.network.train()
        if score > max(self.scores, default=-math.inf):
            self.kept = (
                state.step,
                copy.deepcopy(state.trained.state_dict()),
                copy.deepcopy(state.balance.state_dict()),
            )
        self.scores.append(score)

    def restore(self) -> None:
        """Restore the best weights, and warn if the ELBO was still rising at the last step.

        Without held-out rows, the weights are the last ones, averaged if the stage keeps averages.
        """
        if self.state.step > self.checked:
            self.check()
        self._warn_if_rising()
        weights = self.state.trained.state_dict()
        if self.kept is not None:
            self.state.step, weights, balance = self.kept
            self.state.balance.load_state_dict(balance)
        self.state.network.load_state_dict(weights)

    def _warn_if_rising(self) -> None:
        rise = max(self.scores[-PATIENCE:], default=0.0) - max(self.scores[:-PATIENCE], default=0.0)
        if (
            self.score.rising
            and self.state.step == self.steps
            and len(self.scores) > PATIENCE
            and rise > RISING_NATS
        ):
            text = (
                f"{self.score.rising.format(rise)} in the last fifth of "
                f"{self.steps} steps: train for more steps"
            )
            warnings.warn(text, ConvergenceWarning, stacklevel=6)  # at the caller of `fit`


def _split(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the held-out rows, chosen at random, and of the training rows.

    No row is held out of fewer than four.
    """
    order = torch.randperm(count, generator=generator("held out", seed))
    number = max(2, math.ceil(fraction * count)) if fraction and count >= FEWEST_TO_SPLIT else 0
    return order[:number], order[number:]


def _scale(table: np.ndarray) -> float:
    """Return the root of the columns' mean variance, or 1 if they vary only by rounding.

    Raises:
        InputError: the variance is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scale = math.sqrt(table.var(0, dtype=np.float64).mean())
    if not math.isfinite(scale):
        raise InputError(
            "the table's values are too large to be squared: scale them first (StandardScaler)"
        )
    return scale if scale > 1e-12 * float(np.abs(table).max()) else 1.0


def _validated(estimator: VAEEstimator, X: Any, **options: Any) -> Any:
    return validate_data(estimator, X, dtype=DTYPES, **options)


def _seed(random_state: Any) -> int:
    """Return a seed for a `random_state` of scikit-learn. Equal integers give equal seeds."""
    return int(check_random_state(random_state).randint(2**31 - 1))
