"""Linear Gaussian models of tables, in closed form, and networks that start at them.

A row x of numbers is Gaussian around a linear map of its latents,

    x = W z + b + noise,        z ~ N(0, I),        noise ~ N(0, diag(psi)).                     (1)

With one psi for all columns this is probabilistic PCA (Tipping & Bishop 1999), with one for each
column factor analysis. W is rotated so that W^T diag(1/psi) W is diagonal, with entries c. The
posterior of z is then diagonal,

    z | x ~ N( (I + c)^-1 W^T diag(1/psi) (x - b), (I + c)^-1 ).                                 (2)

Missing cells. The sums over columns in (2) are over the observed columns o of a row. The maximum
likelihood of the observed cells is found by expectation maximisation (Rubin & Thayer 1982): the
E step is (2) for each row, and the M step is a least squares fit of each column to [z, 1],

    [w_j, b_j] = (sum of E[z~ z~^T])^-1 sum of x_ij E[z~],        z~ = [z, 1],                   (3)

with sums over the rows that have column j; psi_j is the mean squared residual.

Categories. Their indicators, without that of the most frequent category, are columns of (1) of
their own. The decoder needs logits. They are a logistic regression of the categories on draws of
(2). On the means of (2) it would be too sure of the categories, because a row's mean follows from
its category, too.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from poise import networks
from poise.balance import Balance, TableError
from poise.support.seeds import generator
from poise.vae import VAE

LARGEST_LOGVAR = 20.0  # bound of the posterior's logvar, infinite for a row far from all others
FLOOR = 1e-6  # least variance of the noise of a column, relative to the column's variance
# Of fewer rows per column than this, factor analysis makes the noise of some columns 0. Then
# cross-validation chooses a larger floor, or probabilistic PCA.
ROWS_PER_COLUMN, FOLDS = 10, 5
FLOORS = (FLOOR, 1e-3, 1e-2, 0.1)
ITERATIONS, CONVERGED_NATS = 1_000, 1e-5  # of expectation maximisation; gain of a row's likelihood
MOST_ROWS = 10_000  # rows of expectation maximisation, chosen evenly


class Line(NamedTuple):
    """A linear model as encoder and decoder (eq. 1 and 2), of P columns and L latents.

    Attributes:
        weight, mean: of the decoder, (P, L) and (P,): W and b for numbers, and maps to logits in
            the blocks of categories.
        encoder, bias: maps rows to posterior means, (L, P) and (L,).
        logvar: of the posterior of a row without missing cells, (L,).
        noise: psi of the numbers, (numeric,), or a scalar if all share it.
        factors: W, b and psi of all columns, indicators included: (P, L), (P,), (P,).
    """

    weight: Tensor
    mean: Tensor
    encoder: Tensor
    bias: Tensor
    logvar: Tensor
    noise: Tensor
    factors: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def fitted(cls, rows: Tensor, latents: int, error: TableError, *, shared: bool) -> "Line":
        """Fit the model to rows. Latents beyond their rank have columns of zeros in W.

        Args:
            rows: (n, P), see `poise.balance.TableError`.
            latents: L, >= 1.
            error: says which columns are numbers.
            shared: whether all numbers share one psi.
        """
        table = rows.double().numpy()
        if shared and not error.categories and not np.isnan(table).any():
            return cls._principal(table, latents)
        numeric = error.numeric
        blocks = np.split(table[:, numeric:], np.cumsum(error.categories)[:-1], axis=1)
        kept = [*range(numeric), *_indicators(blocks, numeric)]
        weight, mean, psi = _factors(table[:, kept], latents, numeric if shared else 0)
        columns = table.shape[1]
        # The indicator of the most frequent category is 1 minus the others, and tells nothing.
        factors = np.zeros((columns, latents)), np.zeros(columns), np.full(columns, 1e30)
        for whole, part in zip(factors, (weight, mean, psi), strict=True):
            whole[kept] = part
        first = numeric
        for size in error.categories:
            (left,) = set(range(first, first + size)) - set(kept)
            factors[0][left] = -factors[0][first : first + size].sum(0)
            factors[1][left] = 1 - factors[1][first : first + size].sum()
            first += size
        of_weight, of_mean, of_psi = (torch.from_numpy(part) for part in factors)
        scaled = of_weight.T / of_psi
        precision = 1 + (scaled * of_weight.T).sum(1)
        encoder = scaled / precision[:, None]
        bias, logvar = -encoder @ of_mean, -precision.log()
        noise = of_psi[:numeric]
        noise = noise[:1].sum() if shared else noise  # without numbers: 0
        decoder, centre = of_weight.clone(), of_mean.clone()
        if error.categories:
            draws = _draws(torch.from_numpy(table), of_weight, of_mean, of_psi)
            decoder[numeric:], centre[numeric:] = _logits(draws.numpy(), blocks)
        return cls(decoder, centre, encoder, bias, logvar, noise, (of_weight, of_mean, of_psi))

    @classmethod
    def _principal(cls, table: np.ndarray, latents: int) -> "Line":
        """Fit probabilistic PCA (Tipping & Bishop 1999, eq. 7 and 8)."""
        number = min(latents, table.shape[1] - 1, len(table) - 2)
        if number < 1 or table.var(0).max() < 1e-20:  # PCA divides by the variance
            noise = max(float(table.var(0).mean()), 1e-12)
            weight = torch.zeros(table.shape[1], latents, dtype=torch.float64)
            variances, mean = np.full(latents, noise), torch.from_numpy(table.mean(0))
        else:
            pca = PCA(number, svd_solver="full").fit(table)
            # Of fewer rows than columns, scikit-learn leaves out eigenvalues that are 0 in eq. 8.
            share = (min(table.shape) - number) / (table.shape[1] - number)
            noise = max(share * float(pca.noise_variance_), 1e-12)
            variances = np.full(latents, noise)
            variances[:number] = pca.explained_variance_.clip(noise)
            axes: Any = pca.components_
            scaled = np.zeros((table.shape[1], latents))
            scaled[:, :number] = axes.T * np.sqrt(variances[:number] - noise)
            weight, mean = torch.from_numpy(scaled), torch.from_numpy(pca.mean_)
        of_rows = torch.from_numpy(variances)
        encoder = weight.T / of_rows[:, None]
        of_all = torch.full_like(mean, noise)
        return cls(
            weight,
            mean,
            encoder,
            -encoder @ mean,
            (noise / of_rows).log(),
            of_all[0],
            (weight, mean, of_all),
        )

    def beside(self, hidden: Sequence[int], error: TableError) -> VAE:
        """Return a VAE of this model plus networks that return zeros, or without hidden layers.

        If rows may have missing cells, the network of the encoder also gets which are observed.
        """
        columns, latents = self.weight.shape
        encoder = decoder = None
        if hidden:
            encoder, decoder = networks.mlp(columns, latents, hidden=hidden, output="linear")
            if error.holes:
                encoder, _ = networks.mlp(2 * columns, latents, hidden=hidden, output="linear")
            # The heads of the encoder, and the output layer of the decoder.
            for layer in [*_dense(encoder)[-2:], _dense(decoder)[-1]]:
                nn.init.zeros_(layer.weight)
        return VAE(LineEncoder(self, encoder, holes=error.holes), LineDecoder(self, decoder))

    def model(self, balance: Balance, error: TableError) -> tuple[VAE, Balance]:
        """Return this model as a VAE and a copy of a balance."""
        balance = copy.deepcopy(balance)
        noise = self.noise if balance.groups is not None else self.noise.mean().nan_to_num()
        balance.gamma2.copy_(noise.clamp_min(balance.floor or 0.0))
        return self.beside((), error).eval().requires_grad_(False), balance


def posteriors(rows: Tensor, weight: Tensor, mean: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    """Return the posteriors (2) of rows with missing cells: means (n, L), precisions (n, L, L)."""
    observed = ~rows.isnan()
    scaled = weight / psi[:, None]
    outer = (weight[:, :, None] * scaled[:, None]).flatten(1)
    precision = (observed.to(rows) @ outer).view(len(rows), weight.shape[1], -1)
    precision = precision + torch.eye(weight.shape[1]).to(rows)
    seen = torch.where(observed, rows - mean, 0.0) @ scaled
    return torch.linalg.solve(precision, seen[..., None])[..., 0], precision


def _draws(rows: Tensor, *factors: Tensor) -> Tensor:
    """Return two opposite draws of each row's posterior, (2, n, L), with a fixed seed."""
    means, precision = posteriors(rows, *factors)
    noise = torch.randn(means.shape, generator=generator("line"), dtype=rows.dtype)[..., None]
    root = torch.linalg.cholesky(precision).mT
    apart = torch.linalg.solve_triangular(root, noise, upper=True)[..., 0]
    return torch.stack([means + apart, means - apart])


def _indicators(blocks: list[np.ndarray], numeric: int) -> list[int]:
    """Return the columns of all indicators but that of each block's most frequent category."""
    kept, first = [], numeric
    for block in blocks:
        most = int(np.nansum(block, 0).argmax()) if block.shape[1] else 0
        kept += [first + k for k in range(block.shape[1]) if k != most]
        first += block.shape[1]
    return kept


def _factors(
    table: np.ndarray, latents: int, shared: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return W, b and psi of factor analysis, with W^T diag(1/psi) W diagonal.

    The first `shared` columns share one psi.
    """
    columns = table.shape[1]
    observed = ~np.isnan(table)
    counts = observed.sum(0)
    sums = np.where(observed, table, 0.0).sum(0)
    mean = sums / np.maximum(counts, 1)
    filled = np.where(observed, table, mean)
    unit = np.maximum(filled.var(0) * len(table) / np.maximum(counts, 1), 1e-6)
    number = min(latents, columns - 1, len(table) - 2)
    weight, psi = np.zeros((columns, latents)), np.maximum(filled.var(0), FLOOR * unit)
    if number < 1 or filled.var(0).max() < 1e-20:
        return weight, mean, psi
    floor = _floor(filled, number)
    part, psi = _linear_models(filled, number, [floor])[0]
    least = (floor or FLOOR) * unit
    if shared or not observed.all():
        together = shared or (columns if floor is None else 0)  # probabilistic PCA has one psi
        part, mean, psi = expectation_maximisation(table, part, mean, psi, least, together)
    _, vectors = np.linalg.eigh(part.T @ (part / psi[:, None]))
    turned = (part @ vectors)[:, ::-1]
    # The sign of an axis is a matter of rounding: its largest entry is made positive.
    signs = np.sign(turned[np.abs(turned).argmax(0), np.arange(number)])
    weight[:, :number] = turned * np.where(signs == 0, 1.0, signs)
    return weight, mean, psi


def _linear_models(
    table: np.ndarray, latents: int, floors: Sequence[float | None]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return W and psi of a table without holes for each floor.

    Args:
        floors: of psi in factor analysis, relative to the columns' variances. None: probabilistic
            PCA, with one psi.
    """
    covariance, found = np.cov(table.T, bias=True).reshape(table.shape[1], -1), []
    factors = factor_analysis(covariance, latents) if any(floors) else None
    for floor in floors:
        if floor is not None and factors is not None:
            least = floor * np.maximum(covariance.diagonal(), 1e-6)
            found.append((factors[0], np.maximum(factors[1], least)))
            continue
        values, vectors = np.linalg.eigh(covariance)
        noise = max(values[:-latents].mean(), 1e-12)
        weight = vectors[:, -latents:] * np.sqrt((values[-latents:] - noise).clip(0))
        found.append((weight, np.full(len(covariance), noise)))
    return found


def factor_analysis(covariance: np.ndarray, latents: int) -> tuple[np.ndarray, np.ndarray]:
    """Return W and psi of factor analysis, of maximum likelihood for a covariance.

    W is that of maximum likelihood for psi, and psi what W leaves of the variances, in turn. (The
    steps of scikit-learn's FactorAnalysis. It warns where the noise of a column goes to 0.)

    Source: Barber 2012, Bayesian Reasoning and Machine Learning, section 21.2.
    """
    variances = np.maximum(covariance.diagonal(), 1e-12)
    weight, psi, earlier = np.zeros((len(variances), latents)), variances, -math.inf
    for _ in range(ITERATIONS):
        root = np.sqrt(psi)
        values, vectors = np.linalg.eigh(covariance / root / root[:, None])
        top = values[-latents:].clip(1)
        weight = root[:, None] * vectors[:, -latents:] * np.sqrt(top - 1)
        rest = values.sum() - values[-latents:].clip(1).sum()
        height = -0.5 * (np.log(psi).sum() + np.log(top).sum() + rest)
        if height - earlier < CONVERGED_NATS / 100:
            break
        earlier, psi = height, np.maximum(variances - np.square(weight).sum(1), 1e-9 * variances)
    return weight, psi


def _floor(table: np.ndarray, latents: int) -> float | None:
    """Return the floor for `_linear_models` with the highest density of held-out rows."""
    rows, columns = table.shape
    latents = min(latents, rows - math.ceil(rows / FOLDS) - 2)
    if rows >= ROWS_PER_COLUMN * columns or latents < 1:
        return FLOOR
    order, floors = np.random.default_rng(0).permutation(rows), (*FLOORS, None)
    nats = np.zeros(len(floors))
    for fold in range(FOLDS):
        unseen = order[fold::FOLDS]
        seen = np.delete(table, unseen, 0)
        apart = table[unseen] - seen.mean(0)
        for k, (weight, psi) in enumerate(_linear_models(seen, latents, floors)):
            covariance = weight @ weight.T + np.diag(np.maximum(psi, 1e-12))
            distances = (apart * np.linalg.solve(covariance, apart.T).T).sum()
            nats[k] += distances + len(unseen) * np.linalg.slogdet(covariance)[1]
    return floors[int(nats.argmin())]


def expectation_maximisation(
    table: np.ndarray,
    weight: np.ndarray,
    mean: np.ndarray,
    psi: np.ndarray,
    least: np.ndarray,
    shared: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit factor analysis to the observed cells of a table (eq. 2 and 3).

    Args:
        table: (n, columns), NaN where missing. Of more than `MOST_ROWS` rows, so many are used.
        weight, mean, psi: the start, (columns, L), (columns,) and (columns,).
        least: floor of psi, (columns,).
        shared: number of columns, the first ones, that share one psi.

    Returns:
        W, b and psi. Columns without an observed cell keep a W of zeros.

    Source: Rubin & Thayer 1982, with the sums over observed cells.
    """
    if len(table) > MOST_ROWS:
        table = table[np.linspace(0, len(table) - 1, MOST_ROWS).astype(int)]
    rows, latents = len(table), weight.shape[1]
    observed = ~np.isnan(table)
    seen = np.where(observed, table, 0.0)
    mask, counts, squares = observed.astype(float), observed.sum(0), np.square(seen).sum(0)
    earlier = -math.inf
    for _ in range(ITERATIONS):
        scaled = weight / psi[:, None]
        outer = (weight[:, :, None] * scaled[:, None]).reshape(len(weight), -1)
        precision = np.eye(latents) + (mask @ outer).reshape(rows, latents, latents)
        covariance = np.linalg.inv(precision)
        centred = np.where(observed, table - mean, 0.0)
        projected = centred @ scaled
        codes = (covariance @ projected[..., None])[..., 0]
        nats = (mask @ np.log(2 * np.pi * psi)).sum() + (centred**2 / psi).sum()
        nats += np.linalg.slogdet(precision)[1].sum() - (projected * codes).sum()
        if -0.5 * nats / rows - earlier < CONVERGED_NATS:
            break
        earlier = -0.5 * nats / rows
        extended = np.concatenate([codes, np.ones((rows, 1))], 1)
        moments = extended[:, :, None] * extended[:, None]
        moments[:, :latents, :latents] += covariance
        gram = (mask.T @ moments.reshape(rows, -1)).reshape(-1, latents + 1, latents + 1)
        gram += 1e-9 * np.eye(latents + 1)
        cross = seen.T @ extended
        solution = np.linalg.solve(gram, cross[..., None])[..., 0]
        weight, mean = solution[:, :latents], solution[:, latents]
        residuals = np.maximum(squares - (solution * cross).sum(1), 0.0)
        psi = np.where(counts > 0, residuals / np.maximum(counts, 1), 1.0)
        psi[:shared] = residuals[:shared].sum() / max(1, counts[:shared].sum())
        psi = np.maximum(psi, least)
    return weight, mean, psi


def _logits(draws: np.ndarray, blocks: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return the linear map from latents to logits of all categories, (K, L), and its bias, (K,).

    Counts of categories are smoothed by 1/2. Categories that the rows lack get their bias only.

    Args:
        draws: latents of each row, (draws, n, L).
        blocks: the indicators of each column of categories, (n, categories).
    """
    weights, biases = [], []
    for block in blocks:
        seen = ~np.isnan(block[:, 0])
        counts = block[seen].sum(0)
        weight = np.zeros((block.shape[1], draws.shape[2]))
        bias = np.log((counts + 0.5) / (counts.sum() + 0.5 * len(counts)))
        labels = block[seen].argmax(1)
        found = np.unique(labels)
        if len(found) > 1:
            codes = draws[:, seen].reshape(-1, draws.shape[2])
            share = np.full(len(codes), 1 / len(draws))
            model = LogisticRegression(max_iter=1_000, tol=1e-3)
            model.fit(codes, np.tile(labels, len(draws)), share)
            slope, offset = model.coef_, model.intercept_
            if len(found) == 2:  # scikit-learn has one row, the logit of the second
                slope, offset = np.vstack([-slope, slope]) / 2, np.r_[-offset, offset] / 2
            weight[found] = slope
            # The same total for the categories of these rows as their smoothed counts have.
            top = np.logaddexp.reduce(bias[found])
            bias[found] = offset - np.logaddexp.reduce(offset) + top
        weights.append(weight)
        biases.append(bias)
    return torch.from_numpy(np.concatenate(weights)), torch.from_numpy(np.concatenate(biases))


def _dense(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


class LineEncoder(nn.Module):
    """Encode rows with a linear map plus a network.

    Missing cells are filled with their conditional means under the factors of the line, so that the
    linear map gives the posterior mean (2) of a row with missing cells. The log variances grow by
    what the missing cells would have told. Log variances are bounded, so that they are finite for
    rows far from all others.

    Args:
        line: where the linear map and the log variances start.
        network: maps rows to `(mean, logvar)`, which are added. None: the log variance is that of
            the line for all rows.
        holes: whether the network also gets which cells are observed, 1 or 0, as further columns.
    """

    def __init__(self, line: Line, network: nn.Module | None, *, holes: bool = False) -> None:
        super().__init__()
        self.line = _linear(line.encoder, line.bias)
        self.logvar = nn.Parameter(line.logvar.float())
        self.network, self.holes = network, holes
        for name, value in zip(("weight", "mean", "psi"), line.factors, strict=True):
            self.register_buffer(name, value.float())

    weight: Tensor
    mean: Tensor
    psi: Tensor

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        observed = ~rows.isnan()
        more_logvar: Tensor | float = 0.0
        if not observed.all():
            rows, more_logvar = self._filled(rows, observed)
        mean, logvar = self.line(rows), self.logvar.expand(len(rows), -1) + more_logvar
        if self.network is not None:
            given = torch.cat([rows, observed.to(rows)], 1) if self.holes else rows
            more, more_logvar = self.network(given)
            mean, logvar = mean + more, logvar + more_logvar
        return mean, logvar.clamp(-LARGEST_LOGVAR, LARGEST_LOGVAR)

    @torch.no_grad()
    def _filled(self, rows: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows without missing cells, and what is added to the log variances."""
        kind = torch.float32 if rows.device.type == "mps" else torch.float64  # Apple's GPUs
        weight, mean, psi = (value.to(kind) for value in (self.weight, self.mean, self.psi))
        codes, _ = posteriors(rows.to(kind), weight, mean, psi)
        filled = torch.where(observed, rows, (codes @ weight.T + mean).to(rows))
        told = weight.square() / psi[:, None]
        lost = (1 + told.sum(0)).log() - (1 + observed.to(kind) @ told).log()
        return filled, lost.to(rows)


class LineDecoder(nn.Module):
    """Decode latents with a linear map plus a network, if any.

    With a psi for each column, a number is computed in units of the noise of the line, so that a
    step of Adam moves all columns alike, relative to their noise.

    Args:
        line: where the linear map starts.
        network: maps latents to rows, which are added. None: the linear map alone.
    """

    scale: Tensor

    def __init__(self, line: Line, network: nn.Module | None) -> None:
        super().__init__()
        scale = torch.ones_like(line.mean)
        scale[: line.noise.numel()] = 1.0 if line.noise.dim() == 0 else line.noise.sqrt()
        self.line = _linear(line.weight / scale[:, None], line.mean / scale)
        self.network = network
        self.register_buffer("scale", scale.float())

    def forward(self, latents: Tensor) -> Tensor:
        rows = self.line(latents)
        return self.scale * (rows if self.network is None else rows + self.network(latents))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer: Any = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer
