"""The density p(x, z) of some values x, as a function of the latents z.

`Target` is that of images and of rows with a squared or absolute error. `TableTarget` is that of
rows of a table with missing cells, a variance for each column or categories.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from poise.balance import Balance, TableError, negative_log_likelihood
from poise.metrics.reconstruction import grouped_error, in_float64
from poise.shapes import Values
from poise.support.kernels import own_kernels
from poise.vae import VAE

LogPrior = Callable[[Tensor], Tensor]  # latents (n, L), float64 -> log p(z), (n,)

FEWEST_AT_ONCE = 100  # least number of latents that are decoded together
VALUES_AT_ONCE = {"cpu": 2**18, "mps": 2**18}  # decoded together, by type of device
VALUES_AT_ONCE_ELSEWHERE = 2**23


def target_of(
    vae: VAE, balance: Balance, values: Values, log_prior: LogPrior | None = None
) -> "Target":
    """Return the density of values under a model, see `poise.metrics.likelihood.nll_of_values`."""
    error = balance.error
    table = isinstance(error, TableError) and (
        error.categories or error.groups is not None or bool(values.isnan().any())
    )
    return (TableTarget if table else Target)(vae, balance, values, log_prior)


class Target:
    """The density p(x, z) of some values x, as a function of the latents z.

    Args:
        vae, balance, values, log_prior: see `poise.metrics.likelihood.nll_of_values`.
    """

    def __init__(
        self, vae: VAE, balance: Balance, values: Values, log_prior: LogPrior | None
    ) -> None:
        self.vae, self.balance, self.values, self.log_prior = vae, balance, values, log_prior
        # Apple's GPUs have no float64.
        self.place = torch.device("cpu") if values.device.type == "mps" else values.device
        self.gamma2 = in_float64(balance.gamma2).to(self.place)
        self.num_dims = values[0].numel() // self.gamma2.numel()  # of each group
        # gamma2 of each dimension: groups are channels, the first dimension of an image.
        self.variances = self.gamma2.reshape(-1).repeat_interleave(self.num_dims)

    def rows(self, rows: Tensor) -> "Target":
        """Return the target of some of the values."""
        values = self.values[rows.to(self.values.device)]
        return type(self)(self.vae, self.balance, values, self.log_prior)

    def log_joint_of_shared(self, latents: Tensor) -> Tensor:
        """Return log p(x, z) of all values for the same latents (S, L), (n, S)."""
        decoded, prior = self._decode(latents), self._log_prior(latents[None])
        size = max(1, VALUES_AT_ONCE["cpu"] // decoded.numel())
        errors = [
            grouped_error((part[:, None] - decoded).flatten(0, 1), self.balance)
            for part in self.values.split(size)
        ]
        return self._density(torch.cat(errors), len(latents)) + prior

    def slope(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of log p(x|z) and a root of its Gauss-Newton curvature.

        Args:
            latents: one latent vector for each value, (n, L), float64.

        Returns:
            The gradient J^T w r, (n, L), and the root R, (n, L, M), of -R R^T = -J^T w J, for
            residuals r, the Jacobian J of the decoder, and weights w that make |r|^p / (p gamma2) a
            sum of squares.
        """
        power, around = self.balance.power, self._around(latents)
        count = around.shape[1]
        parts = [
            in_float64(self._values(numbers, count) - self._decode(part)).flatten(1)
            for part, numbers in self._in_parts(around)
        ]
        residuals = torch.cat(parts).view(len(around), count, -1).to(self.place)
        residual = residuals[:, 0]
        jacobian = (residuals[:, :1] - residuals[:, 1:]) / self._step
        size = torch.maximum(residual.abs(), 0.1 * self.variances.pow(1 / power))
        weighted = size.pow(power - 2) / self.variances
        gradient = (jacobian @ (weighted * residual)[..., None])[..., 0]
        return gradient, jacobian * weighted.sqrt()[:, None]

    @property
    def _step(self) -> float:
        return 1e-5 if self.values.dtype == torch.float64 else 1e-3

    def _around(self, latents: Tensor) -> Tensor:
        """Return latents and those one step away along each axis, (n, 1 + L, L)."""
        size = latents.shape[1]
        shifted = self._step * torch.eye(size, dtype=latents.dtype, device=latents.device)
        return latents[:, None] + torch.cat([torch.zeros_like(shifted[:1]), shifted])

    def log_joint(self, latents: Tensor) -> Tensor:
        """Return log p(x, z) for latents (n, S, L), (n, S); -inf where it is NaN."""
        count = latents.shape[1]
        errors = [
            grouped_error(self._values(numbers, count) - self._decode(part), self.balance)
            for part, numbers in self._in_parts(latents)
        ]
        density = self._density(torch.cat(errors), count) + self._log_prior(latents)
        return density.nan_to_num(-math.inf, -math.inf, -math.inf)

    def _density(self, error: Tensor, count: int) -> Tensor:
        """Return log p(x|z) for errors (n S, ...) of S latents per value, (n, S)."""
        error = error.unflatten(0, (-1, count)).to(self.place)
        nats = negative_log_likelihood(error, self.gamma2, self.num_dims, power=self.balance.power)
        return -nats if self.balance.groups is None else -nats.sum(-1)

    def _log_prior(self, latents: Tensor) -> Tensor:
        if self.log_prior is not None:
            return self.log_prior(latents.flatten(0, 1)).view(latents.shape[:2])
        return -0.5 * latents.square().sum(-1) - latents.shape[-1] / 2 * math.log(2 * math.pi)

    def _in_parts(self, latents: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return parts of all latents, and the number of each latent."""
        flat = latents.flatten(0, 1)
        kind = self.values.device.type
        most = VALUES_AT_ONCE.get(kind, VALUES_AT_ONCE_ELSEWHERE) // self.values[0].numel()
        size = max(FEWEST_AT_ONCE, most)
        numbers = torch.arange(len(flat), device=self.values.device)
        return list(zip(flat.split(size), numbers.split(size), strict=True))

    def _values(self, numbers: Tensor, count: int) -> Tensor:
        return self.values[numbers // count]

    def _decode(self, latents: Tensor) -> Tensor:
        with own_kernels(self.values.device):
            decoded = self.vae.decode(latents.to(self.values.device, self.values.dtype))
        return decoded.to(self.values.dtype)


class TableTarget(Target):
    """The density of rows of a table, see `poise.balance.TableError`. NaN is not observed.

    Args:
        vae, balance, values, log_prior: see `poise.metrics.likelihood.nll_of_values`.
    """

    def __init__(
        self, vae: VAE, balance: Balance, values: Values, log_prior: LogPrior | None
    ) -> None:
        super().__init__(vae, balance, values, log_prior)
        assert isinstance(balance.error, TableError)
        self.error = balance.error
        self.variances = self.gamma2.reshape(-1).expand(self.error.numeric)
        self.given = in_float64(values).to(self.place)
        self.observed = ~self.given[:, : self.error.numeric].isnan()
        self.complete = bool(self.observed.all())
        # Of each row: -2 log p(x|z) of its observed numbers where the decoder meets them.
        self.least = self.observed.double() @ (2 * math.pi * self.variances).log()

    def log_joint_of_shared(self, latents: Tensor) -> Tensor:
        decoded, prior = self._decoded(latents), self._log_prior(latents[None])
        size = max(1, VALUES_AT_ONCE["cpu"] // decoded.numel())
        numbers = torch.arange(len(self.given), device=self.place)
        parts = [self._log_density(part[:, None], decoded) for part in numbers.split(size)]
        return torch.cat(parts) + prior

    def log_joint(self, latents: Tensor) -> Tensor:
        count = latents.shape[1]
        parts = [
            self._log_density(numbers.to(self.place) // count, self._decoded(part))
            for part, numbers in self._in_parts(latents)
        ]
        density = torch.cat(parts).view(latents.shape[:2]) + self._log_prior(latents)
        return density.nan_to_num(-math.inf, -math.inf, -math.inf)

    def _decoded(self, latents: Tensor) -> Tensor:
        return in_float64(self._decode(latents)).to(self.place)

    def _log_density(self, numbers: Tensor, decoded: Tensor) -> Tensor:
        """Return log p(x|z) of rows by their numbers, whose shape broadcasts to that of latents."""
        numeric = self.error.numeric
        apart = self.given[numbers][..., :numeric] - decoded[..., :numeric]
        if not self.complete:
            apart = torch.where(self.observed[numbers], apart, 0.0)
        nats = -0.5 * (apart.square() @ (1 / self.variances) + self.least[numbers])
        of_categories = self.error.nats(decoded, self.given[numbers])
        return nats if of_categories is None else nats - of_categories

    def slope(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of log p(x|z) and a root of its Gauss-Newton curvature.

        With probabilities p of the categories, one-hot values h and the Jacobian J of their logits,
        a categorical column adds J^T (h - p) to the gradient. The curvature is Fisher's,
        J^T (diag(p) - p p^T) J.
        """
        around = self._around(latents)
        decoded = torch.cat([self._decoded(part) for part, _ in self._in_parts(around)])
        decoded = decoded.view(*around.shape[:2], -1)
        jacobian = (decoded[:, 1:] - decoded[:, :1]) / self._step
        values, numeric = self.given, self.error.numeric
        observed = ~values.isnan()
        residual = torch.where(observed, values - decoded[:, 0], 0.0)[:, :numeric]
        of_numbers = jacobian[..., :numeric] * observed[:, None, :numeric]
        gradient = (of_numbers @ (residual / self.variances)[..., None])[..., 0]
        roots, first = [of_numbers / self.variances.sqrt()], numeric
        sizes: Sequence[int] = self.error.categories
        for size in sizes:
            block = slice(first, first := first + size)
            share, seen = decoded[:, 0, block].softmax(-1), observed[:, block]
            apart = torch.where(seen, values[:, block] - share, 0.0)
            of_logits = jacobian[..., block]
            gradient = gradient + (of_logits @ apart[..., None])[..., 0]
            centred = of_logits - of_logits @ share[..., None]
            roots.append(centred * (seen * share).sqrt()[:, None])
        return gradient, torch.cat(roots, -1)
