"""Two-stage VAEs of tables, as a scikit-learn estimator.

Model. A row x of numbers is Gaussian around the output of the decoder f for its latents z,

    p(x|z) = N(x; m + s f(z), s^2 diag(gamma2)),        z ~ N(0, I),                            (1)

with the mean row m. By default each column has a scale s of its own, the standard deviation of its
observed cells, and a gamma2 of its own. Without hidden layers, the optimum is then factor analysis.
With `noise="shared"` all columns share one scale, the root of their mean variance, and one gamma2.
As in principal component analysis, a column of large variance then counts more than others, and the
optimum is probabilistic PCA (Tipping & Bishop 1999).

Categories. A categorical column has the probabilities softmax(f(z)). Its cross-entropy is added to
the loss as it is.

Missing cells do not count: the likelihood of a row is that of its observed cells.

Linear path. Encoder and decoder are each the sum of a linear map and a network. The maps start at
factor analysis or probabilistic PCA (`poise.tables.line`), and the networks start at zero.

Early stopping. Tables are small, and a network overfits them. gamma2 then follows the error of the
training rows, and other rows get a very low likelihood. So some rows are held out, and the weights
with the highest ELBO on these rows are kept. A scheduled, constrained or controlled balance trains
for all steps: its ELBO may be higher on the way than at its target.

Kept line. With a computed balance, these weights have to beat the linear model on the held-out
rows: their density (see `score`) must be higher by one standard error of the difference. With
`noise="shared"` the density must be higher by a paired t-test at a nominal level of 0.05, and the
reconstruction error lower by one standard error. Otherwise the linear model is kept and fitted to
all rows, as always with fewer than ten held-out rows. The ELBO does not compare them: it equals the
density for the linear model only.

Reconstruction. Posterior means are shrunk towards 0 by the factor 1 - s^2, where s^2 is the mean
posterior variance of a latent. `inverse_transform` divides by it if this reconstructs the rows of
the fit better. For probabilistic PCA this gives the projection of PCA (Tipping & Bishop 1999,
section 3.3).
"""

import math
import warnings
from collections.abc import Sequence
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from poise import networks
from poise.balance import Balance, ComputedBalance, TableError, make_balance
from poise.errors import InputError, RunError
from poise.flow import Flow
from poise.latent import DiagonalGaussian
from poise.metrics import encode_all
from poise.metrics.encoding import CHUNK
from poise.metrics.likelihood import CERTAIN_NATS, ENOUGH_CERTAIN, no_refined
from poise.metrics.likelihood import MOST_LATENTS as MOST_REFINED
from poise.priors import FlowPrior, MixturePrior, Prior, TrainedModel, make_prior
from poise.priors.mixture import MOST_LATENTS
from poise.recipes.settings import Stage
from poise.sampling import sample
from poise.support.progress import progress
from poise.support.seeds import derive, generator, noise_per_image, seeded
from poise.tables.columns import DTYPES, Columns, with_nan
from poise.tables.line import FLOOR, Line
from poise.tables.scoring import (
    LARGEST_ROW,
    HeldOut,
    drawn_rows,
    expected_rows,
    row_nll,
    stretch,
)
from poise.tables.stopping import EarlyStopping, ElboOf, VelocityErrorOf
from poise.tables.transforms import Kind, Transforms
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
from poise.variants import PRIORS, PriorName, Proposal, SecondStage, find_prior

Noise = Literal["column", "shared"]

MOST_REPEATED = 1_000_000  # rows that whole sample weights may repeat a table to
FEWEST_TO_SPLIT = 4  # minimum number of rows for a split; two of them are held out
WIDTHS = (16, 128)  # smallest and largest width of hidden="auto"
COMPONENTS = 10  # mixture components, if there are ten rows per latent and component
FLOW_AVERAGE = 0.99  # decay of the averaged weights of a flow


class VAEEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Fit a VAE with a computed balance to the rows of a table (eq. 1).

    Tables are arrays or frames of pandas or polars. Cells may be missing: NaN or null.

    Args:
        latent_dim: number of latents, >= 1: the number of columns of `transform`.
        hidden: widths of the encoder's hidden layers, >= 1 each. The decoder has them in reverse
            order. Empty: a linear VAE. "auto": two layers whose width is the root of the number of
            values of the table, rounded down to a power of two, from 16 to 128.
        noise: "column": each numeric column has a scale and a gamma2 of its own. "shared": one for
            all. Balances with a fixed or controlled gamma2 have one for all columns, relative to
            their scales.
        categorical_features: "from_dtype": columns of a frame that hold categories, texts or
            booleans. Or a list of names or indices, or of one boolean for each column. None: none.
        transforms: monotone transform of each numeric column, see `poise.tables.transforms`. "auto"
            chooses it on held-out rows, and dequantises whole numbers. "power", "bounded" and
            "quantile" are transforms of all columns. None: none. With transforms, a column without
            negative values has samples of at least 0.
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
        score_prior: prior of the latents in `score`: "normal" is N(0, I). "mixture" and "flow" are
            the fitted prior, with `prior="mixture"` and `prior="flow"`. A flow takes long.
        score_proposal: where these latents are drawn from: "refined" fits a proposal to each row;
            "encoder" is the posterior of the encoder, which is several times faster, and too low
            for rows unlike those of the fit (see `poise.metrics.likelihood`).
        device: device of training: "auto", "cpu", "cuda", ... The fitted model is on the CPU.
        random_state: seed of weights, order, noise and samples, as in scikit-learn. An integer
            gives the same model every time on one machine.
        verbose: show progress.

    Attributes:
        hidden_: the widths of the hidden layers.
        transforms_: kind of the transform of each numeric column; column_transforms_ are they.
        columns_: layout of the table, see `poise.tables.columns`.
        mean_: m of eq. 1, (numeric features,), of the transformed columns, as are scale_ and
            noise_variance_.
        scale_: s of eq. 1, (numeric features,), or a number with `noise="shared"`.
        noise_variance_: s^2 gamma2 of eq. 1, (numeric features,), or a number with
            `noise="shared"`: the maximum likelihood estimate. scikit-learn's `PCA` divides by
            n - 1: its value is n / (n - 1) times that of a trained model without hidden layers. If
            PCA was kept, it is PCA's value.
        categories_: the categories of each categorical column, sorted.
        vae_, balance_: the trained VAE and balance, for rows (x - m) / s, then one-hot categories.
        n_iter_: training step of the weights that were kept. 0: the linear model was kept.
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
        noise: Noise = "column",
        categorical_features: Any = "from_dtype",
        transforms: Kind | Literal["auto"] | None = None,
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
        self.noise: Noise = noise
        self.categorical_features = categorical_features
        self.transforms: Kind | Literal["auto"] | None = transforms
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
            X: (rows, features), numbers and categories, two rows or more; NaN or null where
                missing. There may be more latents than rows or columns. Those that the rows cannot
                determine stay N(0, 1).
            y: not used.
            sample_weight: (rows,), >= 0. A weight of 2 counts as two equal rows. Weights that are
                not whole, or whose sum is above a million and above ten for each row, are rounded,
                up or down in proportion, so that as many rows are trained on as X has. None: 1 for
                each row.

        Returns:
            The estimator itself.

        Raises:
            InputError: a parameter is out of range, a column has no observed cell, or values are
                too large to be squared. It is a ValueError, as scikit-learn raises for invalid
                tables.
            RunError: the loss is not finite.
        """
        self._check_parameters()
        # A fit that fails leaves no model, instead of parts of an earlier one.
        vars(self).pop("vae_", None)
        self.columns_ = Columns(X, self.categorical_features)
        table = self._read(X, ensure_min_samples=2)
        counts = _counts(table, sample_weight)
        repeated = np.repeat(table, counts, 0)
        numbers = repeated[:, : len(self.columns_.numeric)]
        _check_observed(numbers, self.columns_)
        self.column_transforms_ = Transforms(numbers, self.transforms)
        self.transforms_ = self.column_transforms_.kinds
        table = self._transformed(self.column_transforms_.dequantised(table))
        repeated = np.repeat(table, counts, 0)
        numbers = repeated[:, : len(self.columns_.numeric)]
        self.categories_ = self.columns_.levels
        self.mean_, self.scale_ = _moments(numbers, shared=self.noise == "shared")
        hidden: Any = self.hidden
        self.hidden_: tuple[int, ...] = (
            _widths(repeated.shape) if hidden == "auto" else tuple(hidden)
        )
        self.history_: list[dict[str, float]] = []
        seed = _seed(self.random_state)
        with denormals_as_zero():
            rows = self._scaled(table[counts > 0])
            interrupted = self._train(rows, counts[counts > 0], seed)
        if interrupted:
            raise KeyboardInterrupt
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "vae_")

    def _check_parameters(self) -> None:
        if self.prior not in PRIORS:
            raise InputError(f"prior must be one of {', '.join(PRIORS)}, not {self.prior!r}")
        if self.noise not in get_args(Noise):
            raise InputError(f"noise must be {' or '.join(get_args(Noise))}, not {self.noise!r}")
        if self.transforms not in (None, "auto", *get_args(Kind)):
            raise InputError(
                f"transforms must be auto, {', '.join(get_args(Kind))} or None, "
                f"not {self.transforms!r}"
            )
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
        if self.prior == "mixture" and self.latent_dim > MOST_LATENTS:
            raise InputError(
                f'the prior "mixture" takes at most {MOST_LATENTS} latents, not {self.latent_dim}: '
                'use prior="flow" or prior="normal"'
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
        fitted = self.prior if self.prior in ("mixture", "flow") else "normal"
        if self.score_prior not in {"normal", fitted}:
            raise InputError(
                'score_prior must be "normal", or "mixture" or "flow" with the same prior, '
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

    def _new_balance(self, spec: str, **known: float) -> Balance:
        return make_balance(spec, latent_dim=self.latent_dim, **known)

    def _balance_of_columns(self, holes: bool) -> tuple[Balance, TableError]:
        """Return the balance of stage 1 and its error."""
        numeric = len(self.columns_.numeric)
        own = self.noise == "column" and numeric > 0
        balance = self._new_balance(
            self.balance, **({"groups": numeric, "floor": FLOOR} if own else {})
        )
        error = TableError(numeric, self.columns_.sizes, groups=balance.groups, holes=holes)
        return balance.measuring(error), error

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
        compared = held_out[repeats[held_out] > 0]
        distinct, weights = rows[compared], repeats[compared]
        rows = rows.repeat_interleave(repeats, 0)
        number = torch.arange(len(counts)).repeat_interleave(repeats)
        held_out, kept = (torch.isin(number, part).nonzero()[:, 0] for part in (held_out, kept))
        if (counts == 1).all():  # in the order of the split, as without weights
            held_out, kept = _split(len(rows), fraction, seed)
        balance, error = self._balance_of_columns(holes=bool(rows.isnan().any()))
        shared = self.noise == "shared"
        line = Line.fitted(rows[kept], self.latent_dim, error, shared=shared)
        with seeded(derive("weights", seed, 1)):
            vae = line.beside(self.hidden_, error)
        stage = Stage(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            balance=self.balance,
        )
        data = VectorBatches(rows[kept], choose_device(self.device))
        unseen = rows[held_out]
        state, interrupted = self._train_stage(1, stage, vae, data, ElboOf(unseen), seed, balance)
        if len(unseen) and _is_elbo(state.balance):
            trained = HeldOut.of(state.network, state.balance, distinct, weights)
            linear = HeldOut.of(*line.model(state.balance, error), distinct, weights)
            if not trained.is_better_than(linear, shared=shared):
                line = Line.fitted(rows, self.latent_dim, error, shared=shared)
                state.step, (state.network, state.balance) = 0, line.model(state.balance, error)
        self.stretch_ = stretch(state.network, error, rows).double().numpy()
        gamma2 = state.balance.gamma2
        self.noise_variance_: Any = self.scale_**2 * (
            float(gamma2) if gamma2.dim() == 0 else gamma2.double().numpy()
        )
        self.balance_, self.n_iter_, self.n_latents_ = state.balance, state.step, self.latent_dim
        self.prior_, again = self._fit_prior(
            state.network, rows, (held_out, kept), seed, 1 if interrupted else self.second_steps
        )
        self.vae_ = state.network
        return interrupted or again

    def _train_stage(
        self,
        number: int,
        stage: Stage,
        network: Network,
        data: Batches,
        score: ElboOf | VelocityErrorOf,
        seed: int,
        balance: Balance | None = None,
    ) -> tuple[TrainingState[Network], bool]:
        """Return the state with the best score, on the CPU, and whether Ctrl-C ended training."""
        balance = balance or self._new_balance(stage.balance).measuring(
            TableError(self.latent_dim, holes=False)
        )
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
                    f"learning_rate={self.learning_rate / 10:g}"
                    + (
                        ", or standardise the columns (StandardScaler)"
                        if self.noise == "shared" and number == 1
                        else ""
                    )
                ) from None
        stopping.restore()
        for module in (state.network, state.balance):
            module.cpu().eval().requires_grad_(False)
        return state, interrupted

    def _fit_prior(
        self, vae: VAE, rows: Tensor, split: tuple[Tensor, Tensor], seed: int, second_steps: int
    ) -> tuple[Prior, bool]:
        """Return the prior, and whether Ctrl-C ended its training."""
        codes = cache(lambda: encode_all(vae, rows))
        second, interrupted = None, False
        if kind := find_prior(self.prior).second_stage:
            second, interrupted = self._second_stage(kind, codes(), split, seed, second_steps)
        model = TrainedModel(
            self.latent_dim,
            codes,
            second=second and second.network,
            gamma2=second and second.balance.gamma2,
            components=min(COMPONENTS, max(1, len(rows) // (10 * self.latent_dim))),
            seed=seed,
        )
        return make_prior(self.prior, model), interrupted

    def _second_stage(
        self,
        kind: SecondStage,
        codes: DiagonalGaussian,
        split: tuple[Tensor, Tensor],
        seed: int,
        steps: int,
    ) -> tuple[TrainingState[Any], bool]:
        held_out, kept = split
        stage = Stage(
            steps=steps,
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
            return self._train_stage(2, stage, second, data, ElboOf(others), seed)
        second.set_statistics(DiagonalGaussian(codes.mean[kept], codes.logvar[kept]))
        return self._train_stage(2, stage, second, data, VelocityErrorOf(others, seed), seed)

    def transform(self, X: Any) -> np.ndarray:
        """Return the posterior means of rows, (rows, latent_dim), in the precision of `X`.

        Args:
            X: (rows, features), numbers and categories as in the fit; missing cells do not count.
        """
        table = self._checked(X)
        codes = encode_all(self.vae_, self._scaled(self._transformed(table)))
        return codes.mean.numpy().astype(table.dtype)

    def inverse_transform(self, X: Any) -> Any:
        """Return the rows decoded from latents, (rows, features).

        For the latents of `transform` these are the reconstructions. Latents are multiplied by
        `stretch_` before they are decoded. A category is the most probable one. The rows are a
        frame if the fit had a frame, else an array.

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
        numbers, codes = self._unscaled(torch.cat(rows))
        return self.columns_.table(numbers.astype(latents.dtype), codes, exact=False)

    def impute(self, X: Any, *, draws: bool = False, random_state: Any = None) -> Any:
        """Return rows with their missing cells filled.

        Args:
            X: (rows, features), NaN or null where missing.
            draws: fill with one draw from p(missing | observed cells), under the parameters of
                this fit. For multiple imputation, fit on a bootstrap sample of the rows for each
                draw. False: fill numbers with their conditional means (under transforms: the
                inverse transform of the mean), and categories with the most probable one, by
                importance sampling.
            random_state: seed of the draws, as in scikit-learn. None: that of the estimator.

        Returns:
            A frame with the columns' own types if the fit had a frame, else an array.
        """
        table = self._checked(X)
        rows, numeric = self._scaled64(self._transformed(table)), len(self.columns_.numeric)
        samples = self.importance_samples
        if draws:
            seed = _seed(self.random_state if random_state is None else random_state)
            filled = drawn_rows(self.vae_, self.balance_, rows, samples=samples, seed=seed)
            filled = self._noisy(filled, derive("impute", seed))
        else:
            filled = expected_rows(self.vae_, self.balance_, rows, samples=samples)
        rows = torch.where(rows.isnan(), filled, rows)
        numbers, codes = self._unscaled(rows)
        observed = ~np.isnan(table[:, :numeric])
        numbers = np.where(observed, table[:, :numeric], numbers).astype(table.dtype)
        return self.columns_.table(numbers, codes, exact=True, like=X)

    def sample(self, n_samples: int = 1, *, noise: bool = True, random_state: Any = None) -> Any:
        """Generate new rows, (n_samples, features).

        The rows are a frame with the columns' own names and types if the fit had a frame, else an
        array.

        Args:
            n_samples: number of rows, >= 1.
            noise: add the Gaussian noise of eq. 1, which the rows of the table have, and draw
                categories. False: return the output of the decoder, and the most probable category.
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
            rows = self._noisy(rows, derive("rows", seed))
        numbers, codes = self._unscaled(rows)
        return self.columns_.table(numbers, codes, exact=True)

    def _noisy(self, decoded: Tensor, seed: int) -> Tensor:
        """Add noise to decoded rows: Gaussian to numbers, Gumbel to logits."""
        noise, numeric = (
            noise_per_image(len(decoded), decoded.shape[1], seed),
            len(self.columns_.numeric),
        )
        gamma2 = self.balance_.gamma2 if self.balance_.groups else float(self.balance_.gamma2)
        numbers = decoded[:, :numeric] + gamma2**0.5 * noise[:, :numeric]
        uniform = torch.special.ndtr(noise[:, numeric:].double()).clamp(1e-12, 1 - 1e-12)
        return torch.cat([numbers, decoded[:, numeric:] - (-uniform.log()).log()], 1)

    def score_samples(self, X: Any) -> np.ndarray:
        """Return the log-likelihood log p(x) of the observed cells of each row, in nats, (rows,).

        The prior is `score_prior`. Equal rows have equal values, whatever the other rows.

        Args:
            X: (rows, features), numbers and categories as in the fit; missing cells do not count.

        Warns:
            ConvergenceWarning: more than a tenth of the rows is not certain, see `score_details`.
        """
        scores = self.score_details(X)
        if self.score_proposal == "refined" and self.n_latents_ > MOST_REFINED:
            warnings.warn(no_refined(self.n_latents_), ConvergenceWarning, stacklevel=2)
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
            X: (rows, features), numbers and categories as in the fit; missing cells do not count.

        Source: importance sampling, see `poise.metrics.likelihood`.
        """
        table = self._checked(X)
        prior = None if self.score_prior == "normal" else self.prior_
        wanted = {"mixture": MixturePrior, "flow": FlowPrior}.get(self.score_prior)
        if prior is not None and type(prior) is not wanted:
            raise InputError(
                f"score_prior={self.score_prior!r} is not the prior of the fit: fit again with "
                f"prior={self.score_prior!r}"
            )
        assert prior is None or isinstance(prior, (MixturePrior, FlowPrior))
        takes_long = isinstance(prior, FlowPrior)
        found = row_nll(
            self.vae_,
            self.balance_,
            self._scaled64(self._transformed(table)),
            samples=self.importance_samples,
            most=(1 if takes_long else 10) * self.importance_samples,
            proposal=self.score_proposal,
            log_prior=prior and prior.log_density,
            prior_takes_long=takes_long,
        )
        nll, share, error = (values.numpy() for values in found)
        observed = ~np.isnan(table[:, : len(self.mean_)])
        if self.noise == "shared":
            density = -nll - observed.sum(1) * math.log(self.scale_)
        else:
            density = -nll - observed @ np.log(self.scale_)
        density = density + self.column_transforms_.log_slope(table[:, : len(self.mean_)])
        return Scores(density, share, error, error <= CERTAIN_NATS)

    def score(self, X: Any, y: Any = None) -> float:
        """Return the mean log-likelihood of rows, in nats per row, under the prior `score_prior`.

        For tables of numbers it is comparable with `PCA.score` and `GaussianMixture.score` on the
        same rows.

        Args:
            X: (rows, features), numbers and categories as in the fit; missing cells do not count.
            y: not used.
        """
        return float(self.score_samples(X).mean())

    def _read(self, X: Any, **checks: Any) -> np.ndarray:
        """Return a table as numbers, then one-hot categories; see `poise.tables.columns`."""
        if self.columns_.plain:
            table: Any = validate_data(
                self, with_nan(X), dtype=DTYPES, ensure_all_finite="allow-nan", **checks
            )
            return table
        validate_data(self, X, skip_check_array=True, reset=checks.pop("reset", True))
        return self.columns_.encoded(X, **checks)

    def _checked(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return self._read(X, reset=False)

    def _scaled64(self, table: np.ndarray) -> Tensor:
        numeric = len(self.mean_)
        scaled = (table[:, :numeric] - self.mean_) / self.scale_
        return torch.from_numpy(np.concatenate([scaled, table[:, numeric:]], 1))

    def _scaled(self, table: np.ndarray) -> Tensor:
        return self._scaled64(table).clamp(-LARGEST_ROW, LARGEST_ROW).float()

    def _unscaled(self, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers and the codes of the most probable categories of decoded rows."""
        numeric = len(self.mean_)
        numbers, logits = rows.double().split([numeric, rows.shape[1] - numeric], 1)
        codes = np.zeros((len(rows), len(self.columns_.sizes)), int)
        if self.columns_.sizes:
            for column, block in enumerate(logits.split(self.columns_.sizes, 1)):
                codes[:, column] = block.argmax(1)
        return self.column_transforms_.inverse(self.mean_ + self.scale_ * numbers.numpy()), codes

    def _transformed(self, table: np.ndarray) -> np.ndarray:
        """Return a table with transformed numbers, in its precision."""
        if self.transforms is None:
            return table
        numeric = len(self.columns_.numeric)
        moved = self.column_transforms_(table[:, :numeric].astype(np.float64))
        return np.concatenate([moved, table[:, numeric:]], 1).astype(table.dtype)

    @property
    def _n_features_out(self) -> int:
        return self.n_latents_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.input_tags.allow_nan = True
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


def _is_elbo(balance: Balance) -> bool:
    """Return whether training maximises the ELBO, gamma2 included."""
    return isinstance(balance, ComputedBalance) and balance.kl_weight == 1


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
    few = weights.sum() <= max(MOST_REPEATED, 10 * len(table))  # repeated rows are held in memory
    whole = bool((weights == np.round(weights)).all()) and few
    total = max(weights.sum(), np.finfo(float).tiny)
    sums = weights.cumsum() if whole else weights.cumsum() / total * len(weights)
    counts = np.diff(np.round(sums), prepend=0).astype(np.int64)
    if (counts > 0).sum() < 2:
        raise InputError("sample_weight must leave at least two rows with a weight above 0")
    return counts


def _check_observed(numbers: np.ndarray, columns: Columns) -> None:
    """Raise InputError for a numeric column without an observed cell."""
    for column in np.flatnonzero(np.isnan(numbers).all(0)):
        name = columns.name(columns.numeric[column])
        raise InputError(f"column {name} has no observed value: leave it out")


def _moments(table: np.ndarray, *, shared: bool) -> tuple[Any, Any]:
    """Return mean and scale of the observed cells of each numeric column.

    Shared, the scale is the root of the columns' mean variance. It is 1 for columns that vary only
    by rounding.

    Raises:
        InputError: a variance is not finite.
    """
    if not table.shape[1]:
        return np.empty(0), 1.0 if shared else np.empty(0)
    observed = ~np.isnan(table)
    with np.errstate(over="ignore", invalid="ignore"):
        if observed.all():
            mean, variance = table.mean(0, dtype=np.float64), table.var(0, dtype=np.float64)
        else:
            mean, variance = np.nanmean(table, 0, np.float64), np.nanvar(table, 0, np.float64)
        scale = np.sqrt(variance.mean() if shared else variance)
    if not np.isfinite(scale).all():
        raise InputError(
            "the table's values are too large to be squared: scale them first (StandardScaler)"
        )
    size = np.abs(np.where(observed, table, 0.0)).max(0)
    if shared:
        return mean, float(scale) if scale > 1e-12 * float(size.max()) else 1.0
    return mean, np.where(scale > 1e-12 * size, scale, 1.0)


def _seed(random_state: Any) -> int:
    """Return a seed for a `random_state` of scikit-learn. Equal integers give equal seeds."""
    return int(check_random_state(random_state).randint(2**31 - 1))
