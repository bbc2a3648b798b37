"""Use the computed balance in your own training loop. The three lines that it needs are marked.

python examples/your_own_loop.py [EPOCHS]
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import poise

encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * 8))
decoder = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
images = torch.tensor(load_digits(return_X_y=True)[0] / 16, dtype=torch.float32)

balance = poise.ComputedBalance()  # 1

for epoch in range(int(sys.argv[1]) if len(sys.argv) > 1 else 30):
    for batch in images[torch.randperm(len(images))].split(100):
        mean, logvar = encoder(batch).chunk(2, dim=1)
        latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        reconstruction = decoder(latents)

        terms = balance(reconstruction, batch, mean, logvar)  # 2
        optimizer.zero_grad()
        terms.loss.backward()  # 3
        optimizer.step()
        # To log: terms.reconstruction, terms.kl (nats per image) and terms.error (per dimension).
    print(f"epoch {epoch + 1}: gamma2 {balance.gamma2:.4f}")

# Save balance.state_dict() with that of your model: it holds the running average, as in BatchNorm.
