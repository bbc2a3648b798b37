"""The 8x8 handwritten digits that come with scikit-learn: no download, about a minute.

poise train digits

Stage 2 starts from a small gamma2: from its first batch's error, which is about the latents' variance, it stays long near
KL = 0 (docs/log.md, 2026-11-22).
"""

from poise.recipes.settings import Data, Network, Recipe, Stage

DIGITS = Recipe(
    name="digits",
    data=Data("digits"),
    network=Network("mlp", latent_dim=10, hidden=(256, 256), second_hidden=256),
    first=Stage(epochs=100, batch_size=50, learning_rate=1e-3, halve_every=40),
    second=Stage(epochs=400, batch_size=32, learning_rate=2e-3, halve_every=133, balance="computed:start=0.001"),
    cost="about a minute on two CPU cores",
)
