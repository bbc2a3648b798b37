"""pythae's importance-weighted autoencoder (IWAE), trained by pythae's trainer.

The gradient of the bound log mean_k w_k, w_k = p(x|z_k) p(z_k) / q(z_k|x), is

    sum_k v_k grad log w_k,        v_k = w_k / sum_j w_j.

So the balance gets the errors and the log ratios q / p of the samples, averaged with the weights
v_k. Where the bound is largest, gamma2 is the weighted mean error: the derivative of the bound with
respect to gamma2 is 0 there.

The figure "elbo" is this bound for 50 samples, because the ELBO does not suit a posterior that is
trained for it.
"""

# pyright: reportMissingImports=false

import math

import torch
from pythae.models import IWAE, IWAEConfig
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import poise  # poise
from integrations.comparing import Figures, digits, main
from integrations.pythae_vae import fit
from poise.balance import negative_log_likelihood

SAMPLES = 5
HELD_OUT_SAMPLES = 50


class BalancedIWAE(IWAE):  # poise
    def __init__(self, *arguments, **named) -> None:  # poise
        super().__init__(*arguments, **named)  # poise
        self.balance = poise.ComputedBalance()  # poise

    def loss_function(self, recon_x, x, mu, log_var, z):  # poise
        target = x.flatten(1).unsqueeze(1)  # poise
        squared = (recon_x.view(len(x), SAMPLES, -1) - target).square().sum(2)  # poise: (n, K)
        posterior = Normal(mu, (0.5 * log_var).exp())  # poise
        ratio = (posterior.log_prob(z) - Normal(0, 1).log_prob(z)).sum(2)  # poise
        weight = (-squared / (2 * self.balance.gamma2) - ratio).softmax(1).detach()  # poise
        error, kl = (weight * squared).sum(1), (weight * ratio).sum(1)  # poise
        terms = self.balance.combine(error, kl, num_dims=x[0].numel())  # poise
        return terms.loss, terms.error, terms.kl  # poise


def train(seed: int, steps: int, kind: type[IWAE]) -> Figures:
    torch.manual_seed(seed)
    images, _, held_out, _ = digits(seed)
    config = IWAEConfig(input_dim=(1, 8, 8), latent_dim=16, number_samples=SAMPLES)
    model = kind(config)
    fit(model, images, steps, seed)

    torch.manual_seed(seed)
    return bounds(model, images, held_out)


@torch.no_grad()
def bounds(model: IWAE, train: Tensor, test: Tensor) -> Figures:
    """Return the figures of `comparing`, with the importance-weighted bound as "elbo".

    As there, gamma2 is the one that is best for the training rows: the weighted mean error.
    """

    def drawn(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return error and log q/p of each sample, (n, K), and the KL, (n,)."""
        codes = model.encoder(rows)
        posterior = Normal(codes.embedding, (0.5 * codes.log_covariance).exp())
        z = posterior.sample((HELD_OUT_SAMPLES,))
        restored = model.decoder(z.flatten(0, 1)).reconstruction.view(len(z), *rows.shape)
        squared = (restored - rows).square().flatten(2).sum(2).T
        ratio = (posterior.log_prob(z) - Normal(0, 1).log_prob(z)).sum(2).T
        return squared, ratio, kl_divergence(posterior, Normal(0, 1)).sum(1)

    squared, ratio, _ = drawn(train)
    dims, gamma2 = train[0].numel(), squared.mean() / train[0].numel()
    for _ in range(50):
        weight = (-squared / (2 * gamma2) - ratio).softmax(1)
        gamma2 = (weight * squared).sum(1).mean() / dims
    squared, ratio, kl = drawn(test)
    log_weight = -negative_log_likelihood(squared, gamma2, dims) - ratio
    bound = log_weight.logsumexp(1) - math.log(HELD_OUT_SAMPLES)
    return {
        "error": float(squared.mean()) / dims,
        "kl_nats": float(kl.mean()),
        "elbo": float(bound.mean()) / dims,
    }


def own(seed: int, steps: int) -> Figures:
    return train(seed, steps, IWAE)


def balanced(seed: int, steps: int) -> Figures:
    return train(seed, steps, BalancedIWAE)


if __name__ == "__main__":
    main(own, balanced, steps=600)
