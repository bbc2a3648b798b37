"""The 8x8 handwritten digits that come with scikit-learn: no download, about a minute.

poise train digits
"""

from poise.recipes.settings import Data, Network, Recipe, Stage

DIGITS = Recipe(
    name="digits",
    data=Data("digits"),
    network=Network("mlp", latent_dim=10, hidden=(256, 256), second_hidden=256),
    first=Stage(epochs=100, batch_size=50, learning_rate=1e-3, halve_every=40),
    second=Stage(epochs=600, batch_size=32, learning_rate=1e-3, halve_every=200),
    cost="about a minute on two CPU cores",
)
