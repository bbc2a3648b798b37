"""A loop with Hugging Face accelerate: gradient accumulation and checkpoints.

The own loss is the usual one of tutorials: squared error + KL, each summed over dimensions.
"""

# pyright: reportMissingImports=false

import tempfile

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import poise  # poise
from integrations.comparing import Figures, Outputs, digits, figures, main

ACCUMULATED = 2


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)
        )
        self.decoder = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.encoder(images).chunk(2, dim=1)
        latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        return self.decoder(latents).view_as(images), mean, logvar


def train(seed: int, steps: int, balance: poise.ComputedBalance | None) -> Figures:
    torch.manual_seed(seed)
    images, _, held_out, _ = digits(seed)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    order = RandomSampler(images, num_samples=100 * steps, replacement=True)
    loader = DataLoader(TensorDataset(images), batch_size=50, sampler=order)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    if balance is not None:
        accelerator.register_for_checkpointing(balance)  # poise: saved by save_state
    for (batch,) in loader:
        with accelerator.accumulate(network):
            restored, mean, logvar = network(batch)
            if balance is None:
                error = (restored - batch).square().flatten(1).sum(1)
                kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(1)
                loss = (error + kl).mean()
            else:
                loss = balance(restored, batch, mean, logvar).loss  # poise
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    if balance is not None:
        check_resume(accelerator, balance)

    def terms(rows: Tensor) -> Outputs:
        restored, mean, logvar = network(rows)
        error = (restored - rows).square().flatten(1).sum(1, keepdim=True)
        kl = poise.DiagonalGaussian(mean, logvar).kl()
        return Outputs(error, torch.full_like(error, 64), kl)

    with torch.no_grad():
        return figures(terms(images), terms(held_out))


def check_resume(accelerator: Accelerator, balance: poise.ComputedBalance) -> None:
    """Check that a checkpoint of accelerate brings back the state of the balance."""
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        expected = balance.gamma2.clone()
        balance.reset_parameters()
        accelerator.load_state(folder)
    assert torch.equal(balance.gamma2, expected) and float(expected) != 1


def own(seed: int, steps: int) -> Figures:
    return train(seed, steps, None)


def balanced(seed: int, steps: int) -> Figures:
    decay = 0.99 ** (1 / ACCUMULATED)  # poise: micro-batches are steps of the average
    return train(seed, steps, poise.ComputedBalance(decay=decay))  # poise


if __name__ == "__main__":
    main(own, balanced, steps=2_000)
