"""The 8x8 handwritten digits that come with scikit-learn: no download, about a minute.

poise train digits
"""

from poise.recipes.settings import Data, Network, Recipe, Stage

DIGITS = Recipe(
    name="digits",
    data=Data("digits"),
    network=Network("mlp", latent_dim=16, hidden=(512, 512), second_hidden=256),
    first=Stage(epochs=300, batch_size=100, learning_rate=1e-3, halve_every=100),
    second=Stage(epochs=300, batch_size=100, learning_rate=1e-3, halve_every=100),
    cost="about a minute on two CPU cores",
)
