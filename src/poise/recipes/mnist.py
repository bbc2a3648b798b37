"""MNIST, 28x28 grey.

poise train mnist                  # a shorter schedule at a higher rate
poise train mnist-published        # the schedule of Dai & Wipf 2019, section D of their appendix
"""

from dataclasses import replace

from poise.recipes.settings import Data, Network, Recipe, Stage

MNIST = Recipe(
    name="mnist",
    data=Data("mnist"),
    network=Network("infogan", latent_dim=64, second_hidden=1024),
    first=Stage(epochs=40, batch_size=64, learning_rate=5e-4, halve_every=15),
    second=Stage(epochs=80, batch_size=64, learning_rate=5e-4, halve_every=30),
    cost="stage 1 about 2 hours on one CPU core, at the 350 images/s measured there; not timed on a GPU",
    published=(
        "FID, 10k test images, each stretched to its own range (Dai & Wipf 2019, table 1): "
        "learned gamma GEN-1 54.5, two-stage GEN-2 12.6, gamma = 1 52.0",
    ),
)

MNIST_PUBLISHED = replace(
    MNIST,
    name="mnist-published",
    network=replace(MNIST.network, norm_decay=0.999),
    first=Stage(epochs=400, batch_size=64, learning_rate=1e-4, halve_every=150),
    second=Stage(epochs=800, batch_size=64, learning_rate=1e-4, halve_every=300),
    cost="stage 1 about 19 hours on one CPU core, at the 350 images/s measured there; not timed on a GPU",
)
