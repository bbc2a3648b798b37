"""The networks of a run as modules of one function each, for export: encoder, decoder, samplers."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from poise.errors import InputError, RunError
from poise.priors import Prior
from poise.runs.run import Run
from poise.shapes import Images, Latents, Noise
from poise.vae import VAE, as_posterior
from poise.variants import PriorName


class Encoder(nn.Module):
    """Return the mean and the log variance of the posterior of each image, (n, latents) each."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.encoder = vae.encoder

    def forward(self, images: Images) -> tuple[Tensor, Tensor]:
        posterior = as_posterior(self.encoder(images))
        return posterior.mean.float(), posterior.logvar.float()


class Decoder(nn.Module):
    """Return the image of each code, in [0, 1]."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.decoder = vae.decoder

    def forward(self, latents: Latents) -> Images:
        return self.decoder(latents).float().clamp(0, 1)


class Sampler(nn.Module):
    """Return the latents (n, latents) of standard normal noise (n, noise) under a prior."""

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, noise: Noise) -> Latents:
        return self.prior.latents(noise).float()


def priors_of(
    run: Run, names: Sequence[PriorName] | None, notes: list[str]
) -> Iterator[tuple[PriorName, Prior]]:
    """Yield priors of a run with their names.

    Args:
        run: the run.
        names: names of the priors. None: all that the run has.
        notes: gets a sentence for each prior that is left out, because it cannot be made.

    Raises:
        InputError, RunError: a prior that was named cannot be made.
    """
    for name in names or run.available_priors:
        try:
            yield name, run.prior(name)
        except (InputError, RunError) as error:
            if names:
                raise
            notes.append(f"no prior {name}: {error}")
