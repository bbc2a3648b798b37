"""CIFAR-10, 32x32 RGB: the experiment of Asperti & Trentin 2020.

    poise train cifar10                # lossless pixels, plain running average, variance law with E[s^2]
    poise train cifar10-released       # every departure of the released code, each a named setting

Both have the released network (5.2 million parameters, stage 2 17.5 million) and schedule: 350,000 + 700,000 steps.
"""

from dataclasses import replace

from poise.recipes.settings import Data, Generation, Network, Recipe, Stage

RELEASED_GENERATION = Generation(
    second_stage_noise=False,
    renormalise="when-lost",
    variance_law="released",
    adjust_reconstructions=True,
    reconstruct_from="sample",
)

SECOND = Stage(epochs=1400, batch_size=100, learning_rate=1e-4, halve_every=400)

CIFAR10 = Recipe(
    name="cifar10",
    data=Data("cifar10"),
    network=Network("resnet", latent_dim=64, second_hidden=2048, initialisation="pytorch"),
    first=Stage(epochs=700, batch_size=100, learning_rate=1e-4, halve_every=250),
    second=SECOND,
    cost="stage 1 about 60 hours on two CPU cores, at the 160 images/s measured there; not timed on a GPU",
    published=(
        "FID, 10k test images, each stretched to its own range (Dai & Wipf 2019, table 1): "
        "learned gamma GEN-1 76.7, two-stage GEN-2 72.9",
        "FID (Ghosh et al. 2020, table 1), REC / N(0,I) / mixture: VAE 57.94 / 106.37 / 103.78, RAE-L2 32.24 / 80.80 / 74.16",
    ),
)

CIFAR10_RELEASED = replace(
    CIFAR10,
    name="cifar10-released",
    data=Data("cifar10", jpeg_quality=75),
    network=replace(CIFAR10.network, norm_decay=0.999, initialisation="released"),
    first=replace(CIFAR10.first, balance="released"),
    second=replace(SECOND, balance="computed:start=1,monotone=true"),
    generation=RELEASED_GENERATION,
)
