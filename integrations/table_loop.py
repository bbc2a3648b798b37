"""A loop of your own over a table of 30 numbers and a category: the breast cancer data.

The library's loss is that of TabSyn's autoencoder: mean squared error + mean cross-entropy + 0.01
times the mean KL.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

import poise  # poise
from integrations.comparing import Figures, Outputs, batches, figures, main

LATENTS = 8
HELD_OUT = 169


def rows(seed: int) -> tuple[Tensor, Tensor]:
    """Return numbers (569, 30), standardised by training rows, and categories (569,)."""
    table, labels = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    numbers = torch.tensor(table, dtype=torch.float32)[order]
    train = numbers[HELD_OUT:]
    return (numbers - train.mean(0)) / train.std(0), torch.as_tensor(labels)[order]


def train(seed: int, steps: int, balance: poise.ComputedBalance | None) -> Figures:
    torch.manual_seed(seed)
    numbers, labels = rows(seed)
    encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2 * LATENTS))
    decoder = nn.Sequential(nn.Linear(LATENTS, 64), nn.ReLU(), nn.Linear(64, 32))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)

    def forward(index: Tensor | slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        row = torch.cat([numbers[index], F.one_hot(labels[index], 2)], dim=1)
        mean, logvar = encoder(row).chunk(2, dim=1)
        output = decoder(mean + (0.5 * logvar).exp() * torch.randn_like(mean))
        return output[:, :30], output[:, 30:], mean, logvar

    def terms(index: Tensor | slice) -> Outputs:
        restored, scores, mean, logvar = forward(index)
        error = (restored - numbers[index]).square()  # a group for each column
        nll = F.cross_entropy(scores, labels[index], reduction="none")
        kl = poise.DiagonalGaussian(mean, logvar).kl()
        return Outputs(error, torch.ones_like(error), kl, nll)

    for index in batches(len(numbers) - HELD_OUT, steps, seed):
        index = index + HELD_OUT
        restored, scores, mean, logvar = forward(index)
        if balance is None:
            kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).mean()
            numeric, category = numbers[index], labels[index]
            loss = F.mse_loss(restored, numeric) + F.cross_entropy(scores, category) + 0.01 * kl
        else:
            error = (restored - numbers[index]).square()  # poise
            nll = F.cross_entropy(scores, labels[index], reduction="none")  # poise
            kl = poise.DiagonalGaussian(mean, logvar).kl()  # poise
            loss = balance.combine(error, kl, num_dims=[1] * 30, nll=nll).loss  # poise
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = terms(slice(HELD_OUT, None)), terms(slice(HELD_OUT))
    return figures(*found) | {"error": float(found[1].error.mean())}


def own(seed: int, steps: int) -> Figures:
    return train(seed, steps, None)


def balanced(seed: int, steps: int) -> Figures:
    return train(seed, steps, poise.ComputedBalance(groups=30))  # poise


if __name__ == "__main__":
    main(own, balanced, steps=2_000)
