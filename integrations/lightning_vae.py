"""A Lightning module: what to log, resume, weight averaging.

The own loss is that of Lightning Bolts' VAE: mean squared error + 0.1 times the KL, which is
averaged over latents.
"""

# pyright: reportMissingImports=false

import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import poise  # poise
from integrations.comparing import Figures, Outputs, digits, figures, main

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Autoencoder(lightning.LightningModule):
    """A VAE with the loss of Lightning Bolts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)
        )
        self.decoder = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.encoder(images).chunk(2, dim=1)
        latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        return self.decoder(latents).view_as(images), mean, logvar

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (images,) = batch
        restored, mean, logvar = self(images)
        kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).mean()
        return F.mse_loss(restored, images) + 0.1 * kl

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Balanced(Autoencoder):
    def __init__(self) -> None:
        super().__init__()
        self.balance = poise.ComputedBalance()  # poise: a submodule, so checkpoints hold its state

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (images,) = batch
        restored, mean, logvar = self(images)
        terms = self.balance(restored, images, mean, logvar)  # poise
        self.log("error", terms.error)  # poise
        self.log("kl", terms.kl)  # poise
        self.log("gamma2", self.balance.gamma2.clone())  # poise
        return terms.loss  # poise


def loader(images: Tensor, steps: int) -> DataLoader:
    order = RandomSampler(images, num_samples=100 * steps, replacement=True)
    return DataLoader(TensorDataset(images), batch_size=100, sampler=order)


def train(seed: int, steps: int, module: type[Autoencoder]) -> Figures:
    lightning.seed_everything(seed, verbose=False)
    images, _, held_out, _ = digits(seed)
    model = module()
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(max_steps=steps, default_root_dir=folder, **QUIET)
        trainer.fit(model, loader(images, steps))
        if isinstance(model, Balanced):
            check(trainer, model, images, folder)

    def terms(rows: Tensor) -> Outputs:
        restored, mean, logvar = model(rows)
        error = (restored - rows).square().flatten(1).sum(1, keepdim=True)
        kl = poise.DiagonalGaussian(mean, logvar).kl()
        return Outputs(error, torch.full_like(error, 64), kl)

    with torch.no_grad():
        return figures(terms(images), terms(held_out))


def check(trainer: lightning.Trainer, model: Balanced, images: Tensor, folder: str) -> None:
    """Check that gamma2 is logged, resumes from a checkpoint and is averaged with the weights."""
    gamma2, steps = model.balance.gamma2.clone(), trainer.global_step
    assert float(trainer.logged_metrics["gamma2"]) == float(gamma2)
    file = Path(folder) / "last.ckpt"
    trainer.save_checkpoint(file)
    again = Balanced()
    # The average of the weights includes buffers. A NaN would show that it lost the state.
    average = EMAWeightAveraging(decay=0.9, use_buffers=True)
    resumed = lightning.Trainer(
        max_steps=steps + 5, default_root_dir=folder, callbacks=[average], **QUIET
    )
    resumed.fit(again, loader(images, 5), ckpt_path=file)
    assert 0.5 < float(again.balance.gamma2 / gamma2) < 2, "resumed near the earlier gamma2"


def own(seed: int, steps: int) -> Figures:
    return train(seed, steps, Autoencoder)


def balanced(seed: int, steps: int) -> Figures:
    return train(seed, steps, Balanced)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    main(own, balanced, steps=2_000)
