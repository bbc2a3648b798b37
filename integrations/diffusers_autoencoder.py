"""diffusers' AutoencoderKL with the error of pixels and an error of features.

The networks are tiny and start from random weights. The features are those of a small classifier
that is fitted to the training digits and then fixed.

The own loss is that of latent diffusion (Rombach et al. 2022): absolute error + a perceptual error,
summed over pixels, + 1e-6 times the KL. Its discriminator is left out of both.
"""

# pyright: reportMissingImports=false

import tempfile

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

import poise  # poise
from integrations.comparing import Figures, Outputs, batches, digits, figures, main
from poise.latent import latent_scale

PIXELS, FEATURES = 64, 16 * 16  # values per image
PERCEPTUAL_SCALE, KL_SCALE = 0.5, 1e-6  # of the own loss


def fitted_features(images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Return the first layers of a classifier of the digits, (n, 1, 8, 8) to (n, 256)."""
    layers = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    head = nn.Linear(FEATURES, 10)
    optimizer = torch.optim.Adam([*layers.parameters(), *head.parameters()], lr=3e-3)
    for index in batches(len(images), 200, seed):
        optimizer.zero_grad()
        F.cross_entropy(head(layers(images[index])), labels[index]).backward()
        optimizer.step()
    return layers.requires_grad_(False)


def train(seed: int, steps: int, balance: poise.ComputedBalance | None) -> Figures:
    torch.manual_seed(seed)
    images, labels, held_out, _ = digits(seed)
    features = fitted_features(images, labels, seed)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        latent_channels=2,
        norm_num_groups=8,
        sample_size=8,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)

    def errors(restored: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        of_features = (features(restored) - features(targets)).abs()
        return (restored - targets).abs().flatten(1), of_features

    def terms(rows: Tensor) -> Outputs:
        posterior = vae.encode(rows).latent_dist
        both = errors(vae.decode(posterior.sample()).sample, rows)
        error = torch.stack([each.sum(1) for each in both], dim=1)
        dims = torch.tensor([PIXELS, FEATURES]).expand(len(rows), 2)
        return Outputs(error, dims, posterior.kl())

    for index in batches(len(images), steps, seed, size=50):
        targets = images[index]
        posterior = vae.encode(targets).latent_dist
        pixels, of_features = errors(vae.decode(posterior.sample()).sample, targets)
        kl = posterior.kl()
        if balance is None:
            perceptual = of_features.mean(1, keepdim=True)
            nll = (pixels + PERCEPTUAL_SCALE * perceptual).sum() / len(targets)
            loss = nll + KL_SCALE * kl.mean()
        else:
            error = torch.stack([pixels.sum(1), of_features.sum(1)], dim=1)  # poise
            loss = balance.combine(error, kl, num_dims=[PIXELS, FEATURES]).loss  # poise
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vae.eval()
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        scaling_factor = save(vae, posterior)
        found = figures(terms(images), terms(held_out), power=1)
    return found | {"scaling_factor": scaling_factor}


def save(vae: AutoencoderKL, posterior) -> float:
    """Save the folder that diffusers loads, with the scaling factor of the latents."""
    codes = poise.DiagonalGaussian(posterior.mean.flatten(1), posterior.logvar.flatten(1))
    scale = latent_scale(codes, tuple(posterior.mean.shape[1:]))
    vae.register_to_config(scaling_factor=scale.scaling_factor, shift_factor=scale.shift_factor)
    with tempfile.TemporaryDirectory() as folder:
        vae.save_pretrained(folder)
        config = AutoencoderKL.from_pretrained(folder).config
    latents = (posterior.sample() - config.shift_factor) * config.scaling_factor
    assert abs(float(latents.mean())) < 0.05 and abs(float(latents.std()) - 1) < 0.05
    return config.scaling_factor


def own(seed: int, steps: int) -> Figures:
    return train(seed, steps, None)


def balanced(seed: int, steps: int) -> Figures:
    return train(seed, steps, poise.ComputedBalance(groups=2, power=1))  # poise


if __name__ == "__main__":
    main(own, balanced, steps=300)
