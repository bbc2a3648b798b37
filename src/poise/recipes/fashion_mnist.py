"""Fashion-MNIST, 28x28 grey: the network and schedules of MNIST.

poise train fashion-mnist
poise train fashion-mnist-published
"""

from dataclasses import replace

from poise.recipes.mnist import MNIST, MNIST_PUBLISHED
from poise.recipes.settings import Data

PUBLISHED = (
    "FID, 10k test images, each stretched to its own range (Dai & Wipf 2019, table 1): "
    "learned gamma GEN-1 60.0, two-stage GEN-2 29.3, gamma = 1 84.6",
)

FASHION_MNIST = replace(MNIST, name="fashion-mnist", data=Data("fashion-mnist"), published=PUBLISHED)

FASHION_MNIST_PUBLISHED = replace(
    MNIST_PUBLISHED, name="fashion-mnist-published", data=Data("fashion-mnist"), published=PUBLISHED
)
