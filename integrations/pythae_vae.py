"""pythae's VAE, trained by pythae's trainer.

The own loss is pythae's: half the squared error + KL, each summed over dimensions.
"""

# pyright: reportMissingImports=false

import tempfile

import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAE, VAEConfig
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from torch import Tensor

import poise  # poise
from integrations.comparing import Figures, Outputs, digits, figures, main

BATCH = 100


class BalancedVAE(VAE):  # poise
    def __init__(self, *arguments, **named) -> None:  # poise
        super().__init__(*arguments, **named)  # poise
        self.balance = poise.ComputedBalance()  # poise: a submodule, so pythae saves its state

    def loss_function(self, recon_x, x, mu, log_var, z):  # poise
        terms = self.balance(recon_x.view_as(x), x, mu, log_var)  # poise
        return terms.loss, terms.error, terms.kl  # poise


def train(seed: int, steps: int, kind: type[VAE]) -> Figures:
    torch.manual_seed(seed)
    images, _, held_out, _ = digits(seed)
    model = kind(VAEConfig(input_dim=(1, 8, 8), latent_dim=16))
    fit(model, images, steps, seed)

    def terms(rows: Tensor) -> Outputs:
        codes = model.encoder(rows)
        mean, logvar = codes.embedding, codes.log_covariance
        latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        restored = model.decoder(latents).reconstruction.view_as(rows)
        error = (restored - rows).square().flatten(1).sum(1, keepdim=True)
        return Outputs(error, torch.full_like(error, 64), poise.DiagonalGaussian(mean, logvar).kl())

    torch.manual_seed(seed)
    with torch.no_grad():
        return figures(terms(images), terms(held_out))


def fit(model: VAE, images: Tensor, steps: int, seed: int) -> None:
    """Train a model of pythae with its own trainer, at least `steps` steps."""
    batches = -(-len(images) // BATCH)
    with tempfile.TemporaryDirectory() as folder:
        config = BaseTrainerConfig(
            output_dir=folder,
            num_epochs=-(-steps // batches),
            learning_rate=1e-3,
            per_device_train_batch_size=BATCH,
            no_cuda=True,
            seed=seed,
        )
        data = BaseDataset(images, torch.zeros(len(images)))
        trainer = BaseTrainer(model, train_dataset=data, training_config=config)
        trainer.train()
        model.load_state_dict(trainer.model.state_dict())
    model.eval()


def own(seed: int, steps: int) -> Figures:
    return train(seed, steps, VAE)


def balanced(seed: int, steps: int) -> Figures:
    return train(seed, steps, BalancedVAE)


if __name__ == "__main__":
    main(own, balanced, steps=990)
