"""Any folder or array of images: the released network at the images' size, a fixed number of steps.

poise train photos/ --size 64
"""

from poise.recipes.settings import Data, Network, Recipe, Stage

IMAGES = Recipe(
    name="images",
    data=Data("images"),
    network=Network("resnet", latent_dim=64, second_hidden=1024, initialisation="pytorch"),
    first=Stage(steps=30_000, batch_size=64, learning_rate=2e-4, halve_every=10_000),
    second=Stage(steps=60_000, batch_size=100, learning_rate=2e-4, halve_every=20_000),
)
