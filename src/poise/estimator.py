"""Two-stage VAEs of tables, as a scikit-learn estimator.

Model. A row x is Gaussian around the output of the decoder f for its latents z,

    p(x|z) = N(x; m + s f(z), s^2 gamma2 I),        z ~ N(0, I),                                (1)

where m is the mean row and s is one scale for all columns, the root of their mean variance. As in
principal component analysis, a column of large variance counts more than others. If all columns
should count equally, use a StandardScaler first. Without hidden layers, the optimum of this model
is probabilistic PCA (Tipping & Bishop 1999).

Linear path. Encoder and decoder are each the sum of a linear map and a network. The maps start at
probabilistic PCA, in closed form, and the networks start at zero.

Early stopping. Tables are small, and a network overfits them. gamma2 then follows the error of the
training rows, and other rows get a very low likelihood. So some rows are held out, and the weights
with the highest ELBO on these rows are kept. A scheduled, constrained or controlled balance trains
for all steps: its ELBO may be higher on the way than at its target.

Kept line. With a computed balance, these weights have to beat probabilistic PCA on the held-out
rows: a higher density (see `score`) by a paired t-test at `LEVEL`, and a reconstruction error that
is lower by one standard error of the difference. Otherwise PCA is kept and fitted to all rows, as
always with fewer than ten held-out rows. The ELBO does not compare them: it equals the density for
PCA only.

Reconstruction. Posterior means are shrunk towards 0 by the factor 1 - s^2, where s^2 is the mean
posterior variance of a latent. `inverse_transform` divides by it if this reconstructs the rows of
the fit better. For probabilistic PCA this gives the projection of PCA (Tipping & Bishop 1999,
section 3.3).
"""

import copy
import math
import warnings
from collections.abc import Sequence
from functools import cache
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from scipy.stats import t as student
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from poise import networks
from poise.balance import Balance, ComputedBalance, make_balance, negative_log_likelihood
from poise.errors import InputError, RunError
from poise.flow import Flow
from poise.latent import DiagonalGaussian
from poise.metrics import CHUNK, encode_all
from poise.metrics.encoding import encoded
from poise.metrics.likelihood import (
    ADAPTATION_SAMPLES,
    CERTAIN_NATS,
    ENOUGH_CERTAIN,
    LogPrior,
    NLLPerImage,
    Proposal,
    nll_of_values,
)
from poise.priors import MixturePrior, Prior, TrainedModel, make_prior
from poise.recipes.settings import Stage
from poise.sampling import sample
from poise.support.progress import progress
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

MOST_STEPS = 50  # maximum number of steps between evaluations of the held-out rows
FEWEST_TO_SPLIT = 4  # minimum number of rows for a split; two of them are held out
PATIENCE_ROWS = 100_000  # rows trained on without a higher ELBO after which training stops
LEAST_PATIENCE = 200  # the same in steps, for large batches
LEVEL = 0.05  # of the one-sided test that a network is better than PCA
# Rows of this test. Of fewer rows a t-test says nothing if the densities have heavy tails.
FEWEST_COMPARED, MOST_COMPARED = 10, 1_000
RISING_NATS = 0.1  # rise of the ELBO in the last steps that causes a ConvergenceWarning
WIDTHS = (16, 128)  # smallest and largest width of hidden="auto"
COMPONENTS = 10  # mixture components, if there are ten rows per latent and component
LARGEST_ROW = 1e30  # bound of scaled values in float32, whose products must be finite
MOST = 1e140  # bound of scaled values in float64, whose squares must be finite
ROW_VALUES = 2**21  # latents of importance samples held in memory
LARGEST_LOGVAR = 20.0  # bound of the posterior's logvar, infinite for a row far from all others
FLOW_AVERAGE = 0.99  # decay of the averaged weights of a flow
DRAWS = 1_000  # minimum number of noise rows for the held-out error of a flow
DTYPES: Any = [np.float64, np.float32]


class VAEEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Fit a VAE with a computed balance to the rows of a table (eq. 1).

    Args:
        latent_dim: number of latents, >= 1: the number of columns of `transform`.
        hidden: widths of the encoder's hidden layers, >= 1 each. The decoder has them in reverse
            order. Empty: a linear VAE. "auto": two layers whose width is the root of the number of
            values of the table, rounded down to a power of two, from 16 to 128.
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
            With refined proposals, rows that need more take up to ten times as many.
        score_prior: prior of the latents in `score`: "normal" is N(0, I). "mixture" is the fitted
            mixture, with `prior="mixture"` only.
        score_proposal: where these latents are drawn from: "refined" fits a proposal to each row;
            "encoder" is the posterior of the encoder, which is several times faster, and too low
            for rows unlike those of the fit (see `poise.metrics.likelihood`).
        device: device of training: "auto", "cpu", "cuda", ... The fitted model is on the CPU.
        random_state: seed of weights, order, noise and samples, as in scikit-learn. An integer
            gives the same model every time on one machine.
        verbose: show progress.

    Attributes:
        hidden_: the widths of the hidden layers.
        mean_: m of eq. 1, (features,).
        scale_: s of eq. 1.
        noise_variance_: s^2 gamma2 of eq. 1, the maximum likelihood estimate. scikit-learn's `PCA`
            divides by n - 1: its value is n / (n - 1) times that of a trained model without hidden
            layers. If PCA was kept, it is PCA's value.
        vae_, balance_: the trained VAE and balance, for rows (x - m) / s.
        n_iter_: training step of the weights that were kept. 0: probabilistic PCA was kept.
        n_latents_: the `latent_dim` of the fit.
        prior_: prior of the latents, for `sample`.
        stretch_: factor on each latent in `inverse_transform`, (latents,).
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
        hidden: Sequence[int] | Literal["auto"] = "auto",
        balance: str = "computed",
        prior: PriorName = "mixture",
        steps: int = 5_000,
        second_steps: int = 5_000,
        batch_size: int = 100,
        learning_rate: float = 1e-3,
        validation_fraction: float = 0.1,
        importance_samples: int = 100,
        score_prior: str = "normal",
        score_proposal: Proposal = "refined",
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
        self.score_prior = score_prior
        self.score_proposal: Proposal = score_proposal
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "VAEEstimator":
        """Train on the rows of a table.

        After Ctrl-C the model has the best weights so far, and KeyboardInterrupt is raised.

        Args:
            X: (rows, features), finite numbers, two rows or more. There may be more latents than
                rows or columns. Those that the rows cannot determine stay N(0, 1).
            y: not used.
            sample_weight: (rows,), >= 0. A weight of 2 counts as two equal rows. Weights that are
                not whole are rounded, up or down in proportion, so that as many rows are trained on
                as X has. None: 1 for each row.

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
        counts = _counts(table, sample_weight)
        repeated = np.repeat(table, counts, 0)
        self.mean_, self.scale_ = repeated.mean(0, dtype=np.float64), _scale(repeated)
        hidden: Any = self.hidden
        self.hidden_: tuple[int, ...] = (
            _widths(repeated.shape) if hidden == "auto" else tuple(hidden)
        )
        self.history_: list[dict[str, float]] = []
        seed = _seed(self.random_state)
        with denormals_as_zero():
            interrupted = self._train(self._scaled(table[counts > 0]), counts[counts > 0], seed)
        if interrupted:
            raise KeyboardInterrupt
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
            if not isinstance(value, Integral) or isinstance(value, bool) or value < bound:
                raise InputError(
                    f"{name} must be a whole number of at least {bound}, not {value!r}"
                )
        widths = self.hidden if isinstance(self.hidden, (list, tuple)) else None
        if self.hidden != "auto" and (
            widths is None
            or not all(isinstance(width, Integral) and width >= 1 for width in widths)
        ):
            raise InputError(
                'hidden must be "auto" or a tuple of widths of at least 1, such as (256, 256), '
                f"not {self.hidden!r}"
            )
        if not isinstance(self.learning_rate, Real) or not 0 < self.learning_rate < math.inf:
            raise InputError(
                f"learning_rate must be greater than 0 and finite, not {self.learning_rate!r}"
            )
        if self.score_proposal not in get_args(Proposal):
            raise InputError(
                f"score_proposal must be {' or '.join(get_args(Proposal))}, "
                f"not {self.score_proposal!r}"
            )
        if self.score_prior not in {"normal", self.prior if self.prior == "mixture" else "normal"}:
            raise InputError(
                'score_prior must be "normal", or "mixture" with prior="mixture", '
                f"not {self.score_prior!r} with prior={self.prior!r}"
            )
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

    def _train(self, rows: Tensor, counts: np.ndarray, seed: int) -> bool:
        """Train stage 1, then fit the prior. Return whether Ctrl-C ended the training."""
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
        # Rows are repeated after the split, so that equal rows are not on both sides of it.
        repeats = torch.from_numpy(counts)
        rows = rows.repeat_interleave(repeats, 0)
        number = torch.arange(len(counts)).repeat_interleave(repeats)
        held_out, kept = (torch.isin(number, part).nonzero()[:, 0] for part in (held_out, kept))
        if (counts == 1).all():  # in the order of the split, as without weights
            held_out, kept = _split(len(rows), fraction, seed)
        line = Line.fitted(rows[kept], self.latent_dim)
        with seeded(derive("weights", seed, 1)):
            vae = line.beside(self.hidden_)
        stage = Stage(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            balance=self.balance,
        )
        data = VectorBatches(rows[kept], choose_device(self.device))
        unseen = rows[held_out]
        state, interrupted = self._train_stage(1, stage, vae, data, ElboOf(unseen), seed)
        if len(unseen) and _is_elbo(state.balance):
            trained = HeldOut.of(state.network, state.balance, unseen)
            if not trained.is_better_than(HeldOut.of(*line.model(state.balance), unseen)):
                line = Line.fitted(rows, self.latent_dim)
                state.step, (state.network, state.balance) = 0, line.model(state.balance)
        self.stretch_ = _stretch(state.network, rows).double().numpy()
        self.noise_variance_ = self.scale_**2 * float(state.balance.gamma2)
        self.balance_, self.n_iter_, self.n_latents_ = state.balance, state.step, self.latent_dim
        self.prior_ = self._fit_prior(state.network, rows, (held_out, kept), seed)
        self.vae_ = state.network
        return interrupted

    def _train_stage(
        self,
        number: int,
        stage: Stage,
        network: Network,
        data: Batches,
        score: "ElboOf | VelocityErrorOf",
        seed: int,
    ) -> tuple[TrainingState[Network], bool]:
        """Return the state with the best score, on the CPU, and whether Ctrl-C ended training."""
        balance = self._new_balance(stage.balance)
        state = new_state(network, balance, stage, choose_device(self.device))
        batch = min(stage.batch_size, len(data))
        stopping = EarlyStopping(
            state, score, steps=stage.total_steps(len(data)), batch=batch, rows=len(data)
        )
        interrupted = False
        with progress(f"stage {number}", stopping.steps, quiet=not self.verbose) as display:

            def log(entry: dict[str, float]) -> None:
                entry = {key.replace("images", "rows"): value for key, value in entry.items()}
                self.history_.append(entry)
                rate = f"{entry['rows_per_second']:.0f}"
                display.update(state.step, {"loss": f"{entry['loss']:.3f}", "rows/s": rate})

            watch = Watch(log=log, stop=stopping.should_stop, quiet=True)
            try:
                fit(state, data, stage, number=number, seed=seed, watch=watch)
            except KeyboardInterrupt:
                interrupted = True
            except RunError:
                raise RunError(
                    f"the loss or its gradient is not finite at step {state.step} of stage "
                    f"{number}: try a lower learning rate, such as "
                    f"learning_rate={self.learning_rate / 10:g}, or standardise the columns "
                    "(StandardScaler)"
                ) from None
        stopping.restore()
        for module in (state.network, state.balance):
            module.cpu().eval().requires_grad_(False)
        return state, interrupted

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
        width, shape = max(self.hidden_, default=256), (self.latent_dim,)
        with seeded(derive("weights", seed, 2)):
            if kind == "flow":
                second = Flow(networks.flow(shape, width=8 * math.ceil(width / 8)), shape)
            else:
                second = VAE(*networks.second_stage(self.latent_dim, width))
        data = CodeBatches(codes.mean[kept], codes.logvar[kept], choose_device(self.device))
        noise = noise_per_image(len(codes.mean), self.latent_dim, derive("codes", seed))
        others = codes.sample(noise)[held_out]
        if not isinstance(second, Flow):
            return self._train_stage(2, stage, second, data, ElboOf(others), seed)[0]
        second.set_statistics(DiagonalGaussian(codes.mean[kept], codes.logvar[kept]))
        return self._train_stage(2, stage, second, data, VelocityErrorOf(others, seed), seed)[0]

    def transform(self, X: Any) -> np.ndarray:
        """Return the posterior means of rows, (rows, latent_dim), in the precision of `X`.

        Args:
            X: (rows, features), finite numbers.
        """
        table = self._checked(X)
        return encode_all(self.vae_, self._scaled(table)).mean.numpy().astype(table.dtype)

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Return the rows decoded from latents, (rows, features).

        For the latents of `transform` these are the reconstructions. Latents are multiplied by
        `stretch_` before they are decoded.

        Args:
            X: (rows, latent_dim).

        Raises:
            InputError: the number of columns is not the number of latents.
        """
        check_is_fitted(self)
        latents: np.ndarray = check_array(X, dtype=DTYPES, order="C")
        if latents.shape[1] != self.n_latents_:
            raise InputError(
                f"X has {latents.shape[1]} columns, but the model has {self.n_latents_} latents"
            )
        stretched = torch.tensor(latents * self.stretch_, dtype=torch.float32)
        with torch.no_grad():
            rows = [self.vae_.decode(part) for part in stretched.split(CHUNK)]
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

        The prior is `score_prior`. Equal rows have equal values, whatever the other rows.

        Args:
            X: (rows, features), finite numbers.

        Warns:
            ConvergenceWarning: more than a tenth of the rows is not certain, see `score_details`.
        """
        scores = self.score_details(X)
        uncertain = int((~scores.certain).sum())
        if self.score_proposal == "refined" and scores.certain.mean() < ENOUGH_CERTAIN:
            text = (
                f"the density of {uncertain} of {len(scores.certain)} rows has a standard error "
                f"above {CERTAIN_NATS} nats: use more importance_samples than "
                f"{self.importance_samples}, or fewer latents"
            )
            warnings.warn(text, ConvergenceWarning, stacklevel=2)
        return scores.log_density

    def score_details(self, X: Any) -> "Scores":
        """Return the log-likelihood of each row, and how certain it is.

        Args:
            X: (rows, features), finite numbers.

        Source: importance sampling, see `poise.metrics.likelihood`.
        """
        table = self._checked(X)
        mixture = self.prior_ if self.score_prior == "mixture" else None
        found = _nll(
            self.vae_,
            self.balance_,
            torch.from_numpy((table - self.mean_) / self.scale_),
            samples=self.importance_samples,
            most=10 * self.importance_samples,
            proposal=self.score_proposal,
            log_prior=mixture.log_density if isinstance(mixture, MixturePrior) else None,
        )
        nll, share, error = (values.numpy() for values in found)
        density = -nll - table.shape[1] * math.log(self.scale_)
        return Scores(density, share, error, error <= CERTAIN_NATS)

    def score(self, X: Any, y: Any = None) -> float:
        """Return the mean log-likelihood of rows, in nats per row, under the prior `score_prior`.

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
        scaled = ((table - self.mean_) / self.scale_).clip(-LARGEST_ROW, LARGEST_ROW)
        return torch.from_numpy(scaled.astype(np.float32))

    def _unscaled(self, rows: Tensor) -> np.ndarray:
        return self.mean_ + self.scale_ * rows.double().numpy()

    @property
    def _n_features_out(self) -> int:
        return self.n_latents_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class Scores(NamedTuple):
    """Log-likelihood of rows and its certainty, each (rows,).

    Attributes:
        log_density: log p(x), in nats.
        effective_share: effective sample size over the number of samples, in [0, 1].
        standard_error: of `log_density`, in nats, from the spread of the importance weights.
        certain: whether the standard error is at most `poise.metrics.likelihood.CERTAIN_NATS`.
    """

    log_density: np.ndarray
    effective_share: np.ndarray
    standard_error: np.ndarray
    certain: np.ndarray


class Line(NamedTuple):
    """Probabilistic PCA as encoder and decoder: x = W z + b + noise.

    Attributes:
        weight: W, (features, latents), orthogonal columns.
        mean: b, (features,).
        variances: of the rows along each column of W, noise included, (latents,).
        noise_variance: sigma^2.

    Source: Tipping & Bishop 1999, eq. 7 and 8.
    """

    weight: Tensor
    mean: Tensor
    variances: Tensor
    noise_variance: float

    @classmethod
    def fitted(cls, rows: Tensor, latents: int) -> "Line":
        """Fit the model to rows. Latents beyond their rank have columns of zeros in W."""
        table = rows.double().numpy()
        number = min(latents, table.shape[1] - 1, len(table) - 2)
        if number < 1 or table.var(0).max() < 1e-20:  # PCA divides by the variance
            noise = max(float(table.var(0).mean()), 1e-12)
            zeros = torch.zeros(table.shape[1], latents, dtype=torch.float64)
            mean, ones = torch.from_numpy(table.mean(0)), torch.ones(latents, dtype=torch.float64)
            return cls(zeros, mean, noise * ones, noise)
        pca = PCA(number, svd_solver="full").fit(table)
        noise = max(float(pca.noise_variance_), 1e-12)
        variances = np.full(latents, noise)
        variances[:number] = pca.explained_variance_.clip(noise)
        weight = np.zeros((table.shape[1], latents))
        axes: Any = pca.components_
        weight[:, :number] = axes.T * np.sqrt(variances[:number] - noise)
        of_weight, of_mean = torch.from_numpy(weight), torch.from_numpy(pca.mean_)
        return cls(of_weight, of_mean, torch.from_numpy(variances), noise)

    def beside(self, hidden: Sequence[int]) -> VAE:
        """Return a VAE of this model plus networks that return zeros, or without hidden layers."""
        features, latents = self.weight.shape
        encoder = decoder = None
        if hidden:
            encoder, decoder = networks.mlp(features, latents, hidden=hidden, output="linear")
            # The heads of the encoder, and the output layer of the decoder.
            for layer in [*_dense(encoder)[-2:], _dense(decoder)[-1]]:
                nn.init.zeros_(layer.weight)
        return VAE(LineEncoder(self, encoder), LineDecoder(self, decoder))

    def model(self, balance: Balance) -> tuple[VAE, Balance]:
        """Return this model as a VAE and a copy of a balance."""
        balance = copy.deepcopy(balance)
        balance.gamma2.fill_(max(self.noise_variance, balance.floor or 0.0))
        return self.beside(()).eval().requires_grad_(False), balance


def _dense(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


class LineEncoder(nn.Module):
    """Encode rows with a linear map plus a network.

    Log variances are bounded, so that they are finite for rows far from all others.

    Args:
        line: where the linear map and the log variances start.
        network: maps rows to `(mean, logvar)`, which are added. None: the log variance is the same
            for all rows.
    """

    def __init__(self, line: Line, network: nn.Module | None) -> None:
        super().__init__()
        weight = line.weight.T / line.variances[:, None]
        self.line = _linear(weight, -weight @ line.mean)
        self.logvar = nn.Parameter((line.noise_variance / line.variances).log().float())
        self.network = network

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.line(rows), self.logvar.expand(len(rows), -1)
        if self.network is not None:
            more, more_logvar = self.network(rows)
            mean, logvar = mean + more, logvar + more_logvar
        return mean, logvar.clamp(-LARGEST_LOGVAR, LARGEST_LOGVAR)


class LineDecoder(nn.Module):
    """Decode latents with a linear map plus a network, if any."""

    def __init__(self, line: Line, network: nn.Module | None) -> None:
        super().__init__()
        self.line = _linear(line.weight, line.mean)
        self.network = network

    def forward(self, latents: Tensor) -> Tensor:
        rows = self.line(latents)
        return rows if self.network is None else rows + self.network(latents)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer: Any = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


class ElboOf:
    """Score of a VAE: the ELBO of held-out rows (n, features), in nats per row."""

    rising: ClassVar[str] = "the ELBO of held-out rows rose by {:.2f} nats"

    def __init__(self, held_out: Tensor) -> None:
        self.held_out = held_out

    def __call__(self, state: TrainingState[VAE]) -> float:
        return _elbo(state.network, state.balance, self.held_out)


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

    Held-out rows are scored every epoch at first, later after each twentieth of the steps so
    far, and at least every `MOST_STEPS` steps, whatever the length of training.

    Args:
        state: the state that is trained.
        score: score of the state, higher is better. If no rows are held out, training does not stop
            early and keeps the last weights.
        steps: length of training, in steps.
        batch: rows per step.
        rows: number of training rows.
    """

    def __init__(
        self,
        state: TrainingState[Any],
        score: ElboOf | VelocityErrorOf,
        *,
        steps: int,
        batch: int,
        rows: int,
    ) -> None:
        self.state, self.score, self.steps = state, score, steps
        self.epoch = math.ceil(rows / batch)
        self.patience = max(LEAST_PATIENCE, math.ceil(PATIENCE_ROWS / batch))
        self.next = min(MOST_STEPS, self.epoch)
        self.checked = 0
        self.scores: list[tuple[int, float]] = []  # step and score
        self.best, self.best_step = -math.inf, 0
        self.kept: tuple[dict[str, Any], dict[str, Any]] | None = None

    def should_stop(self) -> bool:
        """Return whether the score has not risen for long. Call it after every step."""
        step = self.state.step
        if step >= self.next and step > self.checked:  # may be called twice in one step
            self.check()
            self.next = step + min(MOST_STEPS, max(self.epoch, step // 20))
        return bool(len(self.score.held_out)) and step - self.best_step > self.patience

    def check(self) -> None:
        """Compute the score, and keep a copy of the weights if they are the best so far."""
        state, self.checked = self.state, self.state.step
        if not len(self.score.held_out):
            return
        score = self.score(state)
        state.network.train()
        self.scores.append((state.step, score))
        if score > self.best:
            self.best, self.best_step = score, state.step
            self.kept = (
                copy.deepcopy(state.trained.state_dict()),
                copy.deepcopy(state.balance.state_dict()),
            )

    def restore(self) -> None:
        """Restore the best weights, and warn if the ELBO was still rising at the last step.

        Without held-out rows, the weights are the last ones, averaged if the stage keeps averages.
        """
        if self.state.step > self.checked:
            self.check()
        self._warn_if_rising()
        weights = self.state.trained.state_dict()
        if self.kept is not None:
            self.state.step = self.best_step
            weights, balance = self.kept
            self.state.balance.load_state_dict(balance)
        self.state.network.load_state_dict(weights)

    def _warn_if_rising(self) -> None:
        late = 0.8 * self.steps
        before = [score for step, score in self.scores if step <= late]
        after = [score for step, score in self.scores if step > late]
        if not (self.score.rising and self.state.step == self.steps and before and after):
            return
        if (rise := max(after) - max(before)) > RISING_NATS:
            text = (
                f"{self.score.rising.format(rise)} in the last fifth of "
                f"{self.steps} steps: train for more steps"
            )
            warnings.warn(text, ConvergenceWarning, stacklevel=6)  # at the caller of `fit`


class HeldOut(NamedTuple):
    """Figures of held-out rows, (n,): log densities in nats, and squared reconstruction errors."""

    densities: Tensor
    errors: Tensor

    @classmethod
    def of(cls, vae: VAE, balance: Balance, rows: Tensor) -> "HeldOut":
        """Compute the figures of at most `MOST_COMPARED` rows."""
        rows = rows[:MOST_COMPARED]
        density = -_nll(vae, balance, rows.double(), samples=100, most=1_000).nll_nats
        latents = encode_all(vae, rows).mean * _stretch(vae, rows)
        return cls(density, _errors(vae, rows, latents))

    def is_better_than(self, line: "HeldOut") -> bool:
        """Return whether the density is higher and the error lower, both beyond their noise."""
        if len(self.densities) < FEWEST_COMPARED:
            return False
        quantile = float(student.ppf(1 - LEVEL, len(self.densities) - 1))
        return (
            _standardised(self.densities - line.densities) > quantile
            and _standardised(line.errors - self.errors) > 1
        )


def _standardised(differences: Tensor) -> float:
    """Return the mean over its standard error, for two values or more."""
    error = float(differences.std()) / math.sqrt(len(differences))
    return float(differences.mean()) / max(error, 1e-300)


def _is_elbo(balance: Balance) -> bool:
    """Return whether training maximises the ELBO, gamma2 included."""
    return isinstance(balance, ComputedBalance) and balance.kl_weight == 1


@torch.no_grad()
def _nll(
    vae: VAE,
    balance: Balance,
    rows: Tensor,
    *,
    samples: int,
    most: int,
    proposal: Proposal = "refined",
    log_prior: LogPrior | None = None,
) -> NLLPerImage:
    """Return -log p(x) of scaled rows, float64; see `poise.metrics.likelihood.nll_of_values`."""
    # A float32 decoder loses several nats for rows far from all others. The encoder's posterior
    # loses more for them.
    refined = proposal == "refined"
    kind, bound = (torch.float64, MOST) if refined else (torch.float32, LARGEST_ROW)
    vae, rows = copy.deepcopy(vae).to(kind), rows.clamp(-bound, bound).to(kind)
    latents = vae.encode(rows[:1]).mean.shape[1]
    many = max(1, ROW_VALUES // (max(samples, ADAPTATION_SAMPLES) * latents))
    found = [
        nll_of_values(
            vae,
            balance,
            part,
            vae.encode(part),
            samples=samples,
            most=most,
            proposal=proposal,
            log_prior=log_prior,
        )
        for part in rows.split(many)
    ]
    return NLLPerImage(*(torch.cat(values) for values in zip(*found, strict=True)))


@torch.no_grad()
def _elbo(vae: VAE, balance: Balance, rows: Tensor) -> float:
    """Return the mean ELBO of rows in nats, with one posterior sample each."""
    elbos = []
    for batch, posterior, noise in encoded(vae, rows, 0):
        error = (vae.decode(posterior.sample(noise)) - batch).double().square().sum(1)
        nll = negative_log_likelihood(error, balance.gamma2.double(), rows.shape[1])
        elbos.append(-nll - posterior.kl().double())
    return float(torch.cat(elbos).mean())


def _stretch(vae: VAE, rows: Tensor) -> Tensor:
    """Return the factors on posterior means that reconstruct rows better: 1 / (1 - s^2), or 1."""
    codes = encode_all(vae, rows)
    variance = codes.logvar.exp().mean(0)
    factors = torch.where(variance < 0.99, 1 / (1 - variance), 1.0)
    better = _errors(vae, rows, codes.mean * factors).mean() < _errors(vae, rows, codes.mean).mean()
    return factors if better else torch.ones_like(factors)


@torch.no_grad()
def _errors(vae: VAE, rows: Tensor, latents: Tensor) -> Tensor:
    """Return the squared error of each decoded row, (n,)."""
    device = next(vae.parameters()).device
    decoded = torch.cat([vae.decode(part.to(device)).cpu() for part in latents.split(CHUNK)])
    return (decoded - rows).double().square().sum(1)


def _split(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the held-out rows, chosen at random, and of the training rows.

    No row is held out of fewer than four, and two rows at least are trained on.
    """
    order = torch.randperm(count, generator=generator("held out", seed))
    number = max(2, math.ceil(fraction * count)) if fraction and count >= FEWEST_TO_SPLIT else 0
    number = min(number, count - 2)
    return order[:number], order[number:]


def _widths(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the widths of hidden="auto" for a table of this shape."""
    least, most = WIDTHS
    width = min(most, max(least, 2 ** int(math.log2(math.prod(shape)) / 2)))
    return width, width


def _counts(table: np.ndarray, sample_weight: Any) -> np.ndarray:
    """Return how often each row is trained on.

    Whole weights are these numbers. Other weights are scaled to the sum n, and their running sum is
    rounded.

    Raises:
        InputError: a weight is negative, or fewer than two rows are left.
    """
    if sample_weight is None:
        return np.ones(len(table), np.int64)
    weights = np.asarray(_check_sample_weight(sample_weight, table, dtype=np.float64))
    if (weights < 0).any():
        raise InputError(f"sample_weight must be at least 0, not {weights.min():g}")
    whole = bool((weights == np.round(weights)).all()) and weights.sum() < 1e9
    total = max(weights.sum(), np.finfo(float).tiny)
    sums = weights.cumsum() if whole else weights.cumsum() / total * len(weights)
    counts = np.diff(np.round(sums), prepend=0).astype(np.int64)
    if (counts > 0).sum() < 2:
        raise InputError("sample_weight must leave at least two rows with a weight above 0")
    return counts


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
