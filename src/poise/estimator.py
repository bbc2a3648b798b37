"""Two-stage VAEs for tables, as a scikit-learn estimator: fit, transform, inverse_transform, sample, score.

A row x is modelled as Gaussian about what the decoder f makes of its latents,

    p(x|z) = N(x; m + s f(z), s^2 gamma2 I),        z ~ N(0, I),                                                  (1)

with the mean row m, and one scale s for all columns: the root of their mean variance. As in principal component analysis a
column of large variance counts for more than others; put a StandardScaler before it where all should count alike. Without
hidden layers the best such model is probabilistic PCA (Tipping & Bishop 1999).

Tables are small, and a network learns them by heart: gamma2 follows the error of the rows trained on, and rows never seen
then look impossible. So some rows are held out, and the weights kept are those that gave them the highest ELBO.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from poise import networks
from poise.balance import make_balance
from poise.build import choose_device, seeded
from poise.errors import InputError
from poise.metrics import encode_all, nll_per_image, reconstruction
from poise.priors import NormalPrior, Prior, SecondStagePrior, fit_mixture
from poise.recipes.settings import Stage
from poise.sampling import sample
from poise.seeds import derive, generator, noise_per_image
from poise.training import Batches, CodeBatches, TrainingState, VectorBatches, Watch, denormals_as_zero, fit, new_state
from poise.vae import VAE

PRIORS = ("normal", "second-stage", "mixture")
CHECKS = 50  # of the rows held out, over the length of training
PATIENCE = 10  # checks without a higher ELBO, after which training ends
CHUNK = 100  # latents decoded together: a product may round differently in a batch of another size
DTYPES: Any = [np.float64, np.float32]


class VAEEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """A self-balanced VAE of the rows of a table (eq. 1).

    Args:
        latent_dim: number of latents, which `transform` gives.
        hidden: widths of the encoder's hidden layers, mirrored in the decoder; empty: a linear VAE.
        balance: see `poise.balance.make_balance`; "computed" needs no tuning.
        prior: what `sample` draws latents from. "mixture": of Gaussians, fitted to the training rows' codes; "second-stage": a
            second VAE that learns the codes; "normal": N(0, I).
        steps: length of training, in batches, at most.
        second_steps: of the second stage, where there is one.
        batch_size: rows a step.
        learning_rate: Adam's.
        validation_fraction: of the rows, held out to see when to stop; 0: train for all the steps.
        importance_samples: latents per row that `score` and `score_samples` average over.
        device: where it is trained: "auto", "cpu", "cuda", ... The fitted model lies on the CPU.
        random_state: of weights, order, noise and samples; an integer gives the same model every time on one machine.
        verbose: show progress.

    Attributes:
        mean_: m of eq. 1, (features,).
        scale_: s of eq. 1.
        noise_variance_: s^2 gamma2 of eq. 1, as of scikit-learn's `PCA`.
        vae_, balance_: trained, of rows from which m is taken and which are divided by s.
        n_iter_: the step from which their weights are.
        prior_: what latents are drawn from.
        history_: the log: loss, reconstruction_nats, kl_nats, mse, gamma2 over steps, of both stages.
        n_features_in_, feature_names_in_: as of any estimator.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> table = load_iris().data
        >>> model = VAEEstimator(latent_dim=2, hidden=(32,), steps=500, random_state=0).fit(table)
        >>> model.transform(table).shape, model.sample(5).shape
        ((150, 2), (5, 4))
    """

    def __init__(
        self,
        latent_dim: int = 16,
        *,
        hidden: Sequence[int] = (256, 256),
        balance: str = "computed",
        prior: Literal["normal", "second-stage", "mixture"] = "mixture",
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

        Raises:
            InputError: a parameter that cannot be (a ValueError, as scikit-learn raises for tables that cannot be).
            RunError: the loss is not finite.
        """
        self._check_parameters()
        table: np.ndarray = _validated(self, X, ensure_min_samples=2)
        self.mean_ = table.mean(0, dtype=np.float64)
        self.scale_ = math.sqrt(table.var(0, dtype=np.float64).mean()) or 1.0
        self.history_: list[dict[str, float]] = []
        seed = _seed(self.random_state)
        with denormals_as_zero():
            self._train(self._scaled(table), seed)
        return self

    def _check_parameters(self) -> None:
        if self.prior not in PRIORS:
            raise InputError(f"prior must be one of {', '.join(PRIORS)}, not {self.prior!r}")
        for name in ("latent_dim", "importance_samples"):
            if not getattr(self, name) >= 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"validation_fraction must be at least 0 and less than 1, not {self.validation_fraction}")

    def _train(self, rows: Tensor, seed: int) -> None:
        """Stage 1, and of the prior what is learned."""
        held_out, kept = _split(len(rows), self.validation_fraction, seed)
        with seeded(derive("weights", seed, 1)):
            vae = VAE(*networks.mlp(rows.shape[1], self.latent_dim, hidden=tuple(self.hidden), output="linear"))
        data = VectorBatches(rows[kept], choose_device(self.device))
        state = self._stage(1, self.steps, vae, data, rows[held_out], seed)
        self.vae_, self.balance_, self.n_iter_ = state.vae, state.balance, state.step
        self.noise_variance_ = self.scale_**2 * float(self.balance_.gamma2)
        self.prior_ = self._fit_prior(rows, held_out, kept, seed)

    def _stage(self, number: int, steps: int, vae: VAE, data: Batches, held_out: Tensor, seed: int) -> TrainingState:
        """What was best for the rows held out, on the CPU."""
        stage = Stage(steps=steps, batch_size=self.batch_size, learning_rate=self.learning_rate, balance=self.balance)
        balance = make_balance(stage.balance, latent_dim=self.latent_dim)
        state = new_state(vae, balance, stage, choose_device(self.device))
        best = Best(state, held_out, every=max(1, steps // CHECKS))
        watch = Watch(log=self.history_.append, stop=best.is_over, quiet=not self.verbose)
        fit(state, data, stage, number=number, seed=seed, watch=watch)
        best.restore()
        for module in (state.vae, state.balance):
            module.cpu().eval().requires_grad_(False)
        return state

    def _fit_prior(self, rows: Tensor, held_out: Tensor, kept: Tensor, seed: int) -> Prior:
        if self.prior == "normal":
            return NormalPrior(self.latent_dim)
        codes = encode_all(self.vae_, rows)
        if self.prior == "mixture":
            return fit_mixture(codes, seed=seed)
        with seeded(derive("weights", seed, 2)):
            vae = VAE(*networks.second_stage(self.latent_dim, max(self.hidden, default=256)))
        data = CodeBatches(codes.mean[kept], codes.logvar[kept], choose_device(self.device))
        latents = codes.sample(noise_per_image(len(rows), self.latent_dim, derive("codes", seed)))
        state = self._stage(2, self.second_steps, vae, data, latents[held_out], seed)
        return SecondStagePrior(state.vae, self.latent_dim, state.balance.gamma2)

    def transform(self, X: Any) -> np.ndarray:
        """The means of the rows' posteriors, (rows, latent_dim), in the table's precision.

        Args:
            X: (rows, features).
        """
        table = self._checked(X)
        return encode_all(self.vae_, self._scaled(table)).mean.numpy().astype(table.dtype)

    def inverse_transform(self, X: Any) -> np.ndarray:
        """The rows that the decoder makes of latents, (rows, features): of `transform`'s the reconstructions.

        Args:
            X: (rows, latent_dim).

        Raises:
            InputError: another number of latents.
        """
        check_is_fitted(self)
        latents: np.ndarray = check_array(X, dtype=DTYPES)
        if latents.shape[1] != self.latent_dim:
            raise InputError(f"X has {latents.shape[1]} columns, but the model {self.latent_dim} latents")
        with torch.no_grad():
            rows = [self.vae_.decode(part) for part in torch.from_numpy(latents).float().split(CHUNK)]
        return self._unscaled(torch.cat(rows)).astype(latents.dtype)

    def sample(self, n_samples: int = 1, *, noise: bool = True, random_state: Any = None) -> np.ndarray:
        """New rows, (n_samples, features).

        Args:
            n_samples: how many, at least 1.
            noise: whether with the noise of eq. 1, as the rows of the table have it; without, the decoder's output alone.
            random_state: None: the estimator's own.

        Raises:
            InputError: n_samples < 1.
        """
        check_is_fitted(self)
        if n_samples < 1:
            raise InputError(f"n_samples must be at least 1, not {n_samples}")
        seed = _seed(self.random_state if random_state is None else random_state)
        rows = sample(self.vae_, self.prior_, n_samples, seed=seed)
        if noise:
            rows = rows + float(self.balance_.gamma2) ** 0.5 * noise_per_image(*rows.shape, derive("rows", seed))
        return self._unscaled(rows)

    def score_samples(self, X: Any) -> np.ndarray:
        """log p(x) of each row, (rows,), nats, estimated with importance weights, so that its expectation is a lower bound.

        The prior is N(0, I) here, whatever `sample` draws from (see `poise.metrics.importance_weighted_nll`).

        Args:
            X: (rows, features).
        """
        table = self._checked(X)
        values = [self._log_density(row) for row in self._scaled(table)]
        return np.array(values) - table.shape[1] * math.log(self.scale_)

    def _log_density(self, row: Tensor) -> float:
        """Its noise is a function of the row, so that its value is one whatever other rows stand beside it."""
        seed = derive("row", row.numpy().tobytes().hex())
        nll, _ = nll_per_image(self.vae_, self.balance_, row[None], samples=self.importance_samples, seed=seed)
        return -float(nll)

    def score(self, X: Any, y: Any = None) -> float:
        """Mean of `score_samples`: comparable with `PCA.score` and `GaussianMixture.score` of the same rows."""
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
        return self.latent_dim

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class Best:
    """The weights that gave rows held out the highest ELBO so far.

    Args:
        state: in training.
        held_out: (n, features), rows that are not trained on; none: the last weights count as the best.
        every: steps between checks.
    """

    def __init__(self, state: TrainingState, held_out: Tensor, *, every: int) -> None:
        self.state, self.held_out, self.every = state, held_out, every
        self.elbo, self.since, self.checked = -math.inf, 0, 0
        self.kept: tuple[int, dict[str, Any], dict[str, Any]] | None = None

    def is_over(self) -> bool:
        """Whether the ELBO has not risen for long; asked after every step."""
        if self.state.step % self.every == 0 and self.state.step > self.checked:
            self.check()
        return self.since >= PATIENCE

    def check(self) -> None:
        """Keep the weights of now if they are better."""
        state, self.checked = self.state, self.state.step
        if not len(self.held_out):
            return
        elbo = reconstruction(state.vae, state.balance, self.held_out).elbo_nats
        state.vae.train()
        assert elbo is not None
        self.since += 1
        if elbo > self.elbo:
            self.elbo, self.since = elbo, 0
            self.kept = (state.step, copy.deepcopy(state.vae.state_dict()), copy.deepcopy(state.balance.state_dict()))

    def restore(self) -> None:
        """Put the best weights back."""
        if self.state.step > self.checked:
            self.check()
        if self.kept is not None:
            self.state.step, weights, balance = self.kept
            self.state.vae.load_state_dict(weights)
            self.state.balance.load_state_dict(balance)


def _split(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the rows held out, and of the others: at random, and none held out if it would be fewer than two."""
    order = torch.randperm(count, generator=generator("held out", seed))
    number = int(fraction * count)
    number = number if number > 1 else 0
    return order[:number], order[number:]


def _validated(estimator: VAEEstimator, X: Any, **options: Any) -> Any:
    return validate_data(estimator, X, dtype=DTYPES, **options)


def _seed(random_state: Any) -> int:
    """An integer of whatever scikit-learn takes for randomness; the same one for the same integer."""
    return int(check_random_state(random_state).randint(2**31 - 1))
