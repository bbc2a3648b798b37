"""FSDP2 (`fully_shard`) on two ranks, which equal one process.

Each rank has half of every batch. The balance sums errors and counts over the ranks, so that both
have the gamma2 of the whole batch. The own loss is the usual one of tutorials: squared error + KL,
each summed over dimensions.
"""

import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes

import poise  # poise
from integrations.comparing import Figures, Outputs, batches, digits, figures, main

RANKS = 2


class Network(nn.Module):
    """A VAE of rows. It returns no views of other tensors, which FSDP2 warns of."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
        self.mean, self.logvar = nn.Linear(128, 16), nn.Linear(128, 16)
        self.decoder = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, rows: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.features(rows)
        mean, logvar = self.mean(features), self.logvar(features)
        return self.decoder(mean + (0.5 * logvar).exp() * noise), mean, logvar


def train(seed: int, steps: int, balance: poise.ComputedBalance | None) -> Figures:
    """Train on this rank's part of each batch, and return the figures."""
    torch.manual_seed(seed)
    images, held_out = (part.flatten(1) for part in digits(seed)[::2])
    network = Network()
    sharded = dist.is_initialized()
    if sharded:
        mesh = init_device_mesh("cpu", (RANKS,))
        for part in (network.features, network.decoder, network):
            fully_shard(part, mesh=mesh)
    mine = slice(dist.get_rank(), None, RANKS) if sharded else slice(None)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for index in batches(len(images), steps, seed):
        batch, noise = images[index][mine], torch.randn(len(index), 16)[mine]
        restored, mean, logvar = network(batch, noise)
        if balance is None:
            error = (restored - batch).square().sum(1)
            kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(1)
            loss = (error + kl).mean()
        else:
            loss = balance(restored, batch, mean, logvar).loss  # poise
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def terms(rows: Tensor) -> Outputs:
        restored, mean, logvar = network(rows, torch.randn(len(rows), 16))
        error = (restored - rows).square().sum(1, keepdim=True)
        kl = poise.DiagonalGaussian(mean, logvar).kl()
        return Outputs(error, torch.full_like(error, 64), kl)

    with torch.no_grad():
        found = figures(terms(images), terms(held_out))
    return found if balance is None else found | {"gamma2": float(balance.gamma2)}


def on_rank(rank: int, seed: int, steps: int, folder: str, own_loss: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=RANKS)
    balance = None if own_loss else poise.ComputedBalance()  # poise
    found = train(seed, steps, balance)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def on_two_ranks(seed: int, steps: int, own_loss: bool) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        arguments = (seed, steps, folder, own_loss)
        start_processes(on_rank, arguments, nprocs=RANKS, start_method="fork")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(RANKS)]
    assert found[0] == found[1], f"the ranks differ: {found}"
    return found[0]


def own(seed: int, steps: int) -> Figures:
    return on_two_ranks(seed, steps, own_loss=True)


def balanced(seed: int, steps: int) -> Figures:
    return on_two_ranks(seed, steps, own_loss=False)


if __name__ == "__main__":
    main(own, balanced, steps=500)
