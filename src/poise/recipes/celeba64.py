"""CelebA, cropped to 128x128 (rows 45:173, columns 25:153) and resized to 64x64: the paper's second experiment.

    poise train celeba64               # sorted official split, plain running average, KL weight 1
    poise train celeba64-released      # every departure of the released code, KL weight 4 among them

Both have the released network (19.3 million parameters, stage 2 68.5 million) and schedule: 113,900 + 227,800 steps.
"""

from dataclasses import replace

from poise.recipes.cifar10 import RELEASED_GENERATION
from poise.recipes.settings import Data, Network, Recipe, Stage

SECOND = Stage(epochs=140, batch_size=100, learning_rate=5e-5, halve_every=120)

CELEBA64 = Recipe(
    name="celeba64",
    data=Data("celeba64"),
    network=Network("resnet", latent_dim=64, second_hidden=4096, initialisation="pytorch"),
    first=Stage(epochs=70, batch_size=100, learning_rate=5e-5, halve_every=60),
    second=SECOND,
    cost="not timed: 11.4 million images of 64x64 in stage 1, 22.8 million codes in stage 2",
    published=(
        "FID, 10k test images, each stretched to its own range (Dai & Wipf 2019, table 1): "
        "learned gamma GEN-1 60.5, two-stage GEN-2 44.4",
        "FID (Ghosh et al. 2020, table 1), REC / N(0,I) / mixture: VAE 39.12 / 48.12 / 45.52, RAE-L2 43.52 / 51.13 / 47.97",
    ),
)

CELEBA64_RELEASED = replace(
    CELEBA64,
    name="celeba64-released",
    data=Data("celeba64", file_order="listing"),
    network=replace(CELEBA64.network, norm_decay=0.999, initialisation="released"),
    first=replace(CELEBA64.first, balance="released"),
    second=replace(SECOND, balance="computed:start=1,monotone=true"),
    generation=RELEASED_GENERATION,
)
