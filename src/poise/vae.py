"""The variational autoencoder: an encoder and a decoder, without a loss (see `poise.balance`).

Standard latents. With mu and s^2 the posterior mean and variance of a latent, the map

    z' = (z - m) / t,    m = E[mu],    t^2 = Var(mu) + E[s^2],

gives the aggregate posterior mean 0 and variance 1. The decoder gets t z' + m = z, so that every
reconstruction stays as it is. The map lowers the KL divergence, averaged over the images, by

    1/2 sum (E[mu^2] + E[s^2] - 1 - log t^2) >= 0,

and no other map of this kind lowers it further. It is the renormalisation of latents (Asperti &
Trentin 2020, section 5), applied to the model and not to samples. A network that is trained to the
end would find m and t itself, since its first and last layers can express them. The loss is flat in
this direction, and training stops before.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from poise.latent import LEAST_VARIANCE, DiagonalGaussian, channel_moments
from poise.shapes import Batch, Latents, PerLatent, Values
from poise.support.collectives import is_shared, sum_over_ranks
from poise.support.snapshots import in_backward, snapshot


class VAE(nn.Module):
    """Combine an encoder and a decoder.

    Args:
        encoder: module that maps a batch to `(mean, logvar)`, each (n, latents). logvar is the log
            *variance*.
        decoder: module that maps latents (n, latents) to a batch of the encoder's input shape.

    Example:
        >>> encoder, decoder = poise.networks.mlp((1, 8, 8), latent_dim=4)
        >>> vae = poise.VAE(encoder, decoder)
        >>> reconstruction, posterior = vae(torch.rand(10, 1, 8, 8))
        >>> reconstruction.shape, posterior.kl().shape
        (torch.Size([10, 1, 8, 8]), torch.Size([10]))
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, images: Values) -> DiagonalGaussian:
        """Return the posterior q(z|x) of each image.

        Raises:
            TypeError: the encoder does not return two tensors of equal shape.
        """
        return as_posterior(self.encoder(images))

    def decode(self, latents: Latents) -> Values:
        """Return the mean of p(x|z) for each latent vector."""
        return self.decoder(latents)

    def reconstruct(self, images: Values) -> Values:
        """Return the reconstruction of each image from its posterior mean.

        It is deterministic in evaluation mode.
        """
        return self.decode(self.encode(images).mean)

    def forward(
        self, images: Values, noise: Tensor | None = None
    ) -> tuple[Values, DiagonalGaussian]:
        """Return reconstructions from sampled latents, and the posteriors of the images.

        Args:
            images: (n, ...).
            noise: (n, latents), standard normal. None: drawn from torch's global generator.

        Returns:
            The reconstructions, (n, ...), and the posteriors that the latents are sampled from.

        Raises:
            TypeError: the encoder does not return two tensors of equal shape.
        """
        posterior = self.encode(images)
        if noise is None:
            noise = torch.randn_like(posterior.mean)
        return self.decode(posterior.sample(noise)), posterior

    if TYPE_CHECKING:  # for checkers of types: a call of a plain Module returns Any

        def __call__(
            self, images: Values, noise: Tensor | None = None
        ) -> tuple[Values, DiagonalGaussian]: ...


def as_posterior(codes: Any) -> DiagonalGaussian:
    """Return the output of an encoder as a posterior.

    Args:
        codes: `(mean, logvar)`, each (n, latents), or a posterior, which is returned as it is.

    Raises:
        TypeError: `codes` are not two tensors of equal shape.
    """
    if isinstance(codes, DiagonalGaussian):
        return codes
    tensors = isinstance(codes, (tuple, list)) and all(isinstance(code, Tensor) for code in codes)
    if not (tensors and len(codes) == 2 and codes[0].shape == codes[1].shape):
        raise TypeError(
            "the encoder must return (mean, logvar), two tensors of the same shape; "
            "logvar is the log variance"
        )
    return DiagonalGaussian(codes[0], codes[1])


class StandardLatents(nn.Module):
    """Map latents to mean 0 and variance 1 over a data set, by a shift and a scale of each latent.

    It is the identity until `fit` sets it, or until training does with `every`. Of a latent map,
    all positions of a channel share their shift and scale.

    With `every`, each call of `forward` in training mode adds a batch to a running average of the
    moments, and every so many calls the map is set from the average. Shift and scale are buffers:
    gradients treat them as constants, and the optimizer's moments stay as they are, because no
    parameter changes. Batches that are not finite are left out.

    Args:
        latent_shape: (latents,), or (c, h, w) of a latent map.
        every: number of training steps between two settings of the map. None: only `fit` sets it.
        decay: decay of the running average, which is corrected for its start.
        process_group: group of ranks that share the average, as of a `Balance`. False: none.

    Example:
        >>> latents = StandardLatents((2,))
        >>> codes = DiagonalGaussian(torch.tensor([[0.0, 5.0], [4.0, 5.0]]), torch.zeros(2, 2))
        >>> latents.fit(codes).mean
        tensor([[-0.8944,  0.0000],
                [ 0.8944,  0.0000]])
        >>> latents.restore(torch.zeros(1, 2))
        tensor([[2., 5.]])
    """

    shift: Tensor
    scale: Tensor
    moments: Tensor
    weight: Tensor
    steps: Tensor

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        *,
        every: int | None = None,
        decay: float = 0.99,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.latent_shape, self.every, self.decay = latent_shape, every, decay
        self.process_group = process_group
        channels = latent_shape[0]
        self.register_buffer("shift", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        if every is not None:
            self.register_buffer("moments", torch.zeros(2, channels))
            self.register_buffer("weight", torch.zeros(()))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def __deepcopy__(self, memo: dict[int, Any]) -> "StandardLatents":
        """Copy the module. The copy has the same process group, which cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def forward(self, posterior: DiagonalGaussian) -> DiagonalGaussian:
        """Return the posterior of standard latents.

        Args:
            posterior: (n, latents), or (n, c, h, w), of the network's own latents.
        """
        if self.training and self.every is not None and not in_backward():
            self._observe(posterior, self.every)
        shift, scale = (
            self._like(self.shift, posterior.mean),
            self._like(self.scale, posterior.mean),
        )
        return DiagonalGaussian(
            (posterior.mean - shift) / scale, posterior.logvar - 2 * scale.log()
        )

    def restore(self, latents: Batch) -> Batch:
        """Return the network's own latents for standard ones, of the same shape."""
        return latents * self._like(self.scale, latents) + self._like(self.shift, latents)

    @torch.no_grad()
    def fit(self, codes: DiagonalGaussian) -> DiagonalGaussian:
        """Set the map from the posteriors of a data set, and return them in the new coordinates.

        Args:
            codes: (n, latents), of all images, as `forward` returned them.
        """
        mean, variance = channel_moments(codes, self.latent_shape)
        mean, std = mean.to(self.shift), variance.sqrt().to(self.scale)
        self.shift += self.scale * mean
        self.scale *= std
        mean, std = self._like(mean.to(codes.mean), codes.mean), self._like(std, codes.mean)
        return DiagonalGaussian((codes.mean - mean) / std, codes.logvar - 2 * std.log())

    @torch.no_grad()
    def _observe(self, posterior: DiagonalGaussian, every: int) -> None:
        """Add a batch to the running average, and set the map when it is due."""
        dtype = torch.promote_types(posterior.mean.dtype, torch.float32)
        mean, logvar = (
            value.to(dtype).reshape(len(posterior), len(self.shift), -1)
            for value in (posterior.mean, posterior.logvar)
        )
        count = mean.new_full((), mean.shape[0] * mean.shape[2])
        sums = torch.stack([mean.sum((0, 2)), (mean.square() + logvar.exp()).sum((0, 2))])
        totals = torch.cat([sums.flatten(), count[None]])
        if is_shared(self.process_group):
            sum_over_ranks(totals, self.process_group or None)
        batch = (totals[:-1].view_as(sums) / totals[-1]).to(self.moments)
        finite = torch.isfinite(batch).all()
        share = torch.where(finite, 1 - self.decay, 0.0)
        self.moments.lerp_(torch.where(finite, batch, self.moments), share)
        self.weight.lerp_(torch.ones_like(self.weight), share)
        self.steps += 1
        due = (self.steps % every == 0) & (self.weight > 0)
        first, second = self.moments / self.weight
        std = (second - first.square()).clamp_min(LEAST_VARIANCE).sqrt()
        self.shift.copy_(torch.where(due, first, self.shift))
        self.scale.copy_(torch.where(due, std, self.scale))

    def _like(self, values: PerLatent, latents: Batch) -> Tensor:
        """Return a value per channel with the shape of one item of `latents`."""
        if self.training and self.every is not None:
            values = snapshot(values)  # the next step changes it, perhaps before backward
        size = latents[0].numel() // len(values)
        return values[:, None].expand(-1, size).reshape(latents.shape[1:]).to(latents.device)

    def extra_repr(self) -> str:
        return f"{self.latent_shape}, every={self.every}"


class StandardisedEncoder(nn.Module):
    """Return the posteriors of an encoder in the coordinates of `StandardLatents`."""

    def __init__(self, encoder: nn.Module, latents: StandardLatents) -> None:
        super().__init__()
        self.encoder, self.latents = encoder, latents

    def forward(self, images: Values) -> tuple[Tensor, Tensor]:
        posterior = self.latents(as_posterior(self.encoder(images)))
        return posterior.mean, posterior.logvar


class StandardisedDecoder(nn.Module):
    """Decode latents that are in the coordinates of `StandardLatents`."""

    def __init__(self, decoder: nn.Module, latents: StandardLatents) -> None:
        super().__init__()
        self.decoder, self.latents = decoder, latents
        if hasattr(decoder, "latent_shape"):
            self.latent_shape: Any = decoder.latent_shape

    def forward(self, latents: Latents) -> Values:
        return self.decoder(self.latents.restore(latents))


def standardised(
    vae: VAE,
    latent_shape: tuple[int, ...],
    *,
    every: int | None = None,
    process_group: Any = None,
) -> VAE:
    """Return a VAE with the same networks and `StandardLatents` between them.

    Call `latents_of(vae).fit(posterior)` with the posteriors of the training images after training.

    Args:
        vae: any VAE. Its networks are shared, not copied.
        latent_shape: (latents,), or (c, h, w) of a latent map.
        every, process_group: see `StandardLatents`.
    """
    latents = StandardLatents(latent_shape, every=every, process_group=process_group)
    return VAE(StandardisedEncoder(vae.encoder, latents), StandardisedDecoder(vae.decoder, latents))


def latents_of(vae: VAE) -> StandardLatents | None:
    """Return the map of latents of a VAE that `standardised` made, or None."""
    decoder = vae.decoder
    return decoder.latents if isinstance(decoder, StandardisedDecoder) else None
