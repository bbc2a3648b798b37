"""The recipes that come with Poise.

poise train                   # digits: 8x8 digits of scikit-learn, no download, about a minute
poise train mnist             # 28x28 grey; a shorter schedule at a higher learning rate
poise train mnist-published   # the schedule of Dai & Wipf 2019, section D of their appendix
poise train fashion-mnist     # 28x28 grey: the network and schedules of MNIST
poise train fashion-mnist-published
poise train cifar10           # 32x32 RGB, lossless, plain running average, variance law with E[s^2]
poise train cifar10-released  # every departure of the released code, each a named setting
poise train celeba64          # rows 45:173, columns 25:153, resized to 64x64; sorted official split
poise train celeba64-released # every departure of the released code, among them a KL weight of 4
poise train photos/ --size 64 # images: any folder or array, latent maps and a flow
poise train photos/ --recipe images-large --size 64   # the same for a GPU: wider, in large batches
poise train photos/ --recipe images-resnet --size 64  # the released network at their size

CIFAR-10 and CelebA are the experiments of Asperti & Trentin 2020. They use the released networks:
5.2 and 19.3 million parameters in stage 1, 17.5 and 68.5 million in stage 2. They also use the
released schedules: 350,000 + 700,000 and 113,900 + 227,800 steps.
"""

from dataclasses import replace

from poise.recipes.settings import Data, Generation, Network, Recipe, Stage

DIGITS = Recipe(
    name="digits",
    data=Data("digits"),
    network=Network("mlp", latent_dim=10, hidden=(256, 256), second_hidden=256),
    first=Stage(epochs=100, batch_size=50, learning_rate=1e-3, halve_every=40),
    # gamma2 starts small. By default it starts at the first batch's error, about the variance of
    # the latents. Stage 2 then stays near KL = 0 for long (docs/log.md, 2026-11-22).
    second=Stage(
        epochs=400,
        batch_size=32,
        learning_rate=2e-3,
        halve_every=133,
        balance="computed:start=0.001",
    ),
    cost="about a minute on two CPU cores",
)

MNIST = Recipe(
    name="mnist",
    data=Data("mnist"),
    network=Network("infogan", latent_dim=64, second_hidden=1024),
    first=Stage(epochs=40, batch_size=64, learning_rate=5e-4, halve_every=15),
    second=Stage(epochs=80, batch_size=64, learning_rate=5e-4, halve_every=30),
    cost=(
        "stage 1: about 2 hours on one CPU core, at the 350 images/s measured there; "
        "not timed on a GPU"
    ),
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
    cost=(
        "stage 1: about 19 hours on one CPU core, at the 350 images/s measured there; "
        "not timed on a GPU"
    ),
)

FASHION_MNIST = replace(
    MNIST,
    name="fashion-mnist",
    data=Data("fashion-mnist"),
    published=(
        "FID, 10k test images, each stretched to its own range (Dai & Wipf 2019, table 1): "
        "learned gamma GEN-1 60.0, two-stage GEN-2 29.3, gamma = 1 84.6",
    ),
)

FASHION_MNIST_PUBLISHED = replace(
    MNIST_PUBLISHED,
    name="fashion-mnist-published",
    data=FASHION_MNIST.data,
    published=FASHION_MNIST.published,
)

RELEASED_GENERATION = Generation(
    second_stage_noise=False,
    renormalise="when-lost",
    variance_law="released",
    adjust_reconstructions=True,
    reconstruct_from="sample",
)
RELEASED_SECOND_BALANCE = "computed:start=1,monotone=true"

CIFAR10 = Recipe(
    name="cifar10",
    data=Data("cifar10"),
    network=Network("resnet", latent_dim=64, second_hidden=2048, initialisation="pytorch"),
    first=Stage(epochs=700, batch_size=100, learning_rate=1e-4, halve_every=250),
    second=Stage(epochs=1400, batch_size=100, learning_rate=1e-4, halve_every=400),
    cost=(
        "stage 1: about 60 hours on two CPU cores, at the 160 images/s measured there; "
        "both stages: about 35 minutes on an H200"
    ),
    published=(
        "FID, 10k test images, each stretched to its own range (Dai & Wipf 2019, table 1): "
        "learned gamma GEN-1 76.7, two-stage GEN-2 72.9",
        "FID (Ghosh et al. 2020, table 1), REC / N(0,I) / mixture: "
        "VAE 57.94 / 106.37 / 103.78, RAE-L2 32.24 / 80.80 / 74.16",
    ),
)

CIFAR10_RELEASED = replace(
    CIFAR10,
    name="cifar10-released",
    data=Data("cifar10", jpeg_quality=75),
    network=replace(CIFAR10.network, norm_decay=0.999, initialisation="released"),
    first=replace(CIFAR10.first, balance="released"),
    second=CIFAR10.second and replace(CIFAR10.second, balance=RELEASED_SECOND_BALANCE),
    generation=RELEASED_GENERATION,
)

CELEBA64 = Recipe(
    name="celeba64",
    data=Data("celeba64"),
    network=Network("resnet", latent_dim=64, second_hidden=4096, initialisation="pytorch"),
    first=Stage(epochs=70, batch_size=100, learning_rate=5e-5, halve_every=60),
    second=Stage(epochs=140, batch_size=100, learning_rate=5e-5, halve_every=120),
    cost="not timed: 11.4 million images of 64x64 in stage 1, 22.8 million codes in stage 2",
    published=(
        "FID, 10k test images, each stretched to its own range (Dai & Wipf 2019, table 1): "
        "learned gamma GEN-1 60.5, two-stage GEN-2 44.4",
        "FID (Ghosh et al. 2020, table 1), REC / N(0,I) / mixture: "
        "VAE 39.12 / 48.12 / 45.52, RAE-L2 43.52 / 51.13 / 47.97",
    ),
)

CELEBA64_RELEASED = replace(
    CELEBA64,
    name="celeba64-released",
    data=Data("celeba64", file_order="listing"),
    network=replace(CELEBA64.network, norm_decay=0.999, initialisation="released"),
    first=replace(CELEBA64.first, balance="released"),
    second=CELEBA64.second and replace(CELEBA64.second, balance=RELEASED_SECOND_BALANCE),
    generation=RELEASED_GENERATION,
)

# Eight channels and half of the time for each stage were compared with other settings in
# docs/defaults.md. Small batches reach a smaller error in the same time (docs/log.md, 2026-11-26).
IMAGES = Recipe(
    name="images",
    data=Data("images", flips=True),
    network=Network("conv", latent_channels=8),
    first=Stage(steps=9_800, batch_size=16, learning_rate=1e-3, decay=0.5),
    second=Stage(
        steps=6_600,
        batch_size=32,
        learning_rate=1e-3,
        warmup=0.02,
        decay=0.5,
        objective="flow",
        ema_decay=0.999,
        ema_warmup=True,
    ),
    # After so short a training, few steps have a smaller FID than many (docs/defaults.md).
    generation=Generation(flow_steps=4),
)

# For a GPU: 24.4 million parameters, at 32 pixels. The learning rate and the batches of the flow
# are those of Karras et al. 2022 (arXiv 2206.00364, table 7) for CIFAR-10.
IMAGES_LARGE = replace(
    IMAGES,
    name="images-large",
    network=Network("conv", latent_channels=16, conv_width=256, flow_width=192, flow_blocks=10),
    first=replace(IMAGES.first, steps=30_000, batch_size=256, warmup=0.02, precision="bfloat16"),
    second=IMAGES.second
    and replace(IMAGES.second, steps=30_000, batch_size=512, precision="bfloat16"),
    generation=Generation(flow_steps=8),
)

IMAGES_RESNET = Recipe(
    name="images-resnet",
    data=Data("images"),
    network=Network("resnet", latent_dim=64, second_hidden=1024, initialisation="pytorch"),
    first=Stage(steps=30_000, batch_size=64, learning_rate=2e-4, halve_every=10_000),
    second=Stage(steps=60_000, batch_size=100, learning_rate=2e-4, halve_every=20_000),
)
