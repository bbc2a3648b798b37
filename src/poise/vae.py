"""The variational autoencoder: an encoder and a decoder, without a loss (see `poise.balance`)."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from poise.latent import DiagonalGaussian
from poise.shapes import Latents, Values


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
