"""Train a two-stage VAE with a computed balance on 8x8 handwritten digits, in one file.

    python examples/minimal.py [samples.png [EPOCHS]]

It implements Asperti & Trentin 2020 (arXiv 2002.07514) without `poise`. Read it from top to bottom.
"""

import math
import sys

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import pad

LATENTS = 16
HIDDEN = 256
BATCH = 100


def dense(inputs: int, outputs: int) -> nn.Sequential:
    widths = [(inputs, HIDDEN), (HIDDEN, HIDDEN)]
    hidden = [layer for width in widths for layer in (nn.Linear(*width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, outputs))


# The encoder returns the mean and log standard deviation of q(z|x), the decoder the mean of p(x|z).
class VAE(nn.Module):
    def __init__(self, inputs: int, output: nn.Module) -> None:
        super().__init__()
        self.encoder = dense(inputs, 2 * LATENTS)
        self.decoder = nn.Sequential(dense(LATENTS, inputs), output)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.encoder(x).chunk(2, dim=1)
        return mean, log_std.exp()


# Return loss, MSE and KL of a batch. Each term is one value per image, summed over dimensions, in
# nats. The average over the batch is taken once, at the end.
def loss_terms(vae: VAE, x: Tensor, gamma2: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, std = vae.encode(x)
    z = mean + std * torch.randn_like(std)
    squared_error = (x - vae.decoder(z)).square().sum(1)
    reconstruction = squared_error / (2 * gamma2) + x.shape[1] / 2 * math.log(2 * math.pi * gamma2)
    kl = 0.5 * (mean.square() + std.square() - 2 * std.log() - 1).sum(1)
    mse = squared_error.mean() / x.shape[1]
    return (reconstruction + kl).mean(), mse.detach(), kl.mean().detach()


# The idea of the paper is one line: gamma2, the balance of the two terms, is a running average of
# the error. It starts from the error of the first batch. A step uses the value from earlier
# batches, and no gradient passes through it.
def train(vae: VAE, data: Tensor, stds: Tensor | None, epochs: int) -> float:
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, epochs // 3), gamma=0.5)
    gamma2 = None
    mse = kl = torch.zeros(())
    for epoch in range(epochs):
        for batch in torch.randperm(len(data)).split(BATCH):
            x = data[batch]
            if stds is not None:  # stage 2: sample new latents from q(z|x) in every epoch
                x = x + stds[batch] * torch.randn_like(x)
            if gamma2 is None:
                gamma2 = float(loss_terms(vae, x, gamma2=1.0)[1])
            loss, mse, kl = loss_terms(vae, x, gamma2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            gamma2 = 0.99 * gamma2 + 0.01 * float(mse)  # <- the computed balance
        schedule.step()
        if (epoch + 1) % max(1, epochs // 5) == 0:
            print(
                f"  epoch {epoch + 1:4d}   gamma2 {gamma2:.4f}   MSE {mse:.4f}   KL {kl:5.1f} nats"
            )
    assert gamma2 is not None
    return gamma2


def grid(images: Tensor, columns: int = 16) -> Image.Image:
    framed = pad(images.clamp(0, 1).reshape(-1, columns, 8, 8), (1, 1, 1, 1))
    rows = (framed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1) * 255).byte().numpy()
    height, width = rows.shape
    return Image.fromarray(rows).resize((width * 5, height * 5), Image.Resampling.NEAREST)


def main(path: str, epochs: int) -> None:
    torch.manual_seed(0)
    pixels = load_digits(return_X_y=True)[0] / 16  # (1797, 64), in [0, 1]
    images = torch.tensor(pixels, dtype=torch.float32)

    print("stage 1: images -> latents")
    first = VAE(64, nn.Sigmoid())
    train(first, images, None, epochs)

    print("stage 2: latents -> latents of stage 2, which are closer to N(0, I)")
    with torch.no_grad():
        mean, std = first.encode(images)
    second = VAE(LATENTS, nn.Identity())
    gamma2 = train(second, mean, std, epochs)

    # If the aggregate posterior equals the prior, then Var(mean) + E[s^2] = 1 for each latent.
    print(f"variance law: {float((mean.var(0) + std.square().mean(0)).mean()):.3f}")

    # Generate: u ~ N(0, I) -> decoder of stage 2 plus noise -> z -> decoder of stage 1 -> image.
    with torch.no_grad():
        u = torch.randn(128, LATENTS)
        z = second.decoder(u) + math.sqrt(gamma2) * torch.randn_like(u)
        grid(first.decoder(z)).save(path)
    print(f"samples: {path}")


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(given.get(1, "samples.png"), int(given.get(2, 150)))
