"""A conditional VAE of padded action chunks, as ACT's, on simulated demonstrations.

An arm moves its hand in the plane to a goal and closes a gripper there. It passes an obstacle on
the left or on the right, at a speed that differs between demonstrations: this is what the latents
should hold. Chunks have 20 actions (velocity and gripper) and are padded after the end of a
demonstration.

The own loss is that of ACT (Zhao et al. 2023, arXiv 2304.13705): the absolute error, averaged over
all values, those of the padding included, + 10 times the KL, which is summed over latents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import poise  # poise
from integrations.comparing import Figures, Outputs, batches, figures, main

CHUNK, JOINTS, LATENTS = 20, 3, 8
ROWS, HELD_OUT = 2_000, 400


def demonstrations(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return states (n, 4), hand and goal; actions (n, 20, 3); and is_pad (n, 20)."""
    source = torch.Generator().manual_seed(seed)
    hand = 0.2 * torch.randn(ROWS, 2, generator=source)
    goal = hand + torch.tensor([1.0, 0.0]) + 0.2 * torch.randn(ROWS, 2, generator=source)
    side = 1 - 2.0 * torch.randint(2, (ROWS, 1), generator=source)
    length = torch.randint(10, 31, (ROWS, 1), generator=source)
    time = torch.arange(CHUNK + 1)
    share = (time / length).clamp(max=1)  # of the way, (n, 21)
    aside = 0.5 * side * (torch.pi * share).sin()
    path = hand[:, None] + share[..., None] * (goal - hand)[:, None]
    path = path + torch.stack([torch.zeros_like(aside), aside], dim=2)
    gripper = (share[:, 1:] > 0.8).float()[..., None]
    actions = torch.cat([10 * path.diff(dim=1), gripper], dim=2)
    actions = actions + 0.02 * torch.randn(actions.shape, generator=source)
    is_pad = time[:-1] >= length
    return torch.cat([hand, goal], dim=1), actions.masked_fill(is_pad[..., None], 0.0), is_pad


def train(seed: int, steps: int, balance: poise.ComputedBalance | None) -> Figures:
    torch.manual_seed(seed)
    states, actions, is_pad = demonstrations(seed)
    size = CHUNK * JOINTS
    encoder = nn.Sequential(
        nn.Linear(4 + size + CHUNK, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, 2 * LATENTS),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Linear(4 + LATENTS, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, size),
    )  # fmt: skip
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=1e-3)

    def forward(index: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        seen = [states[index], actions[index].flatten(1), is_pad[index].float()]
        mu, logvar = encoder(torch.cat(seen, dim=1)).chunk(2, dim=1)
        latents = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        chunk = decoder(torch.cat([states[index], latents], dim=1))
        return chunk.unflatten(1, (CHUNK, JOINTS)), mu, logvar

    def terms(index: slice) -> Outputs:
        a_hat, mu, logvar = forward(index)
        seen = ~is_pad[index]
        error = ((a_hat - actions[index]).abs() * seen[..., None]).flatten(1).sum(1)
        dims = JOINTS * seen.sum(1, keepdim=True)
        return Outputs(error[:, None], dims.float(), poise.DiagonalGaussian(mu, logvar).kl())

    for index in batches(ROWS - HELD_OUT, steps, seed):
        index = index + HELD_OUT
        a_hat, mu, logvar = forward(index)
        if balance is None:
            all_l1 = F.l1_loss(a_hat, actions[index], reduction="none")
            l1 = (all_l1 * ~is_pad[index].unsqueeze(2)).mean()
            kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()
            loss = l1 + 10 * kl
        else:
            seen = ~is_pad[index]  # poise
            loss = balance(a_hat, actions[index], mu, logvar, mask=seen).loss  # poise
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return figures(terms(slice(HELD_OUT, None)), terms(slice(HELD_OUT)), power=1)


def own(seed: int, steps: int) -> Figures:
    return train(seed, steps, None)


def balanced(seed: int, steps: int) -> Figures:
    return train(seed, steps, poise.ComputedBalance(power=1))  # poise


if __name__ == "__main__":
    main(own, balanced, steps=3_000)
