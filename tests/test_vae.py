"""Test that any encoder and decoder make a VAE whose outputs depend only on the noise."""

import pytest
import torch
from torch import nn

from poise.latent import DiagonalGaussian
from poise.networks import mlp
from poise.vae import VAE


class Returns(nn.Module):
    """An encoder that returns fixed codes."""

    def __init__(self, codes: object) -> None:
        super().__init__()
        self.codes = codes

    def forward(self, values: torch.Tensor) -> object:
        return self.codes


@pytest.fixture
def vae() -> VAE:
    return VAE(*mlp((1, 4, 4), 3, hidden=(8,)))


def test_any_modules_make_a_vae():
    class Split(nn.Linear):
        def forward(self, input: torch.Tensor) -> list[torch.Tensor]:
            return list(super().forward(input).chunk(2, -1))

    vae = VAE(Split(7, 6), nn.Sequential(nn.Linear(3, 7), nn.Tanh()))
    reconstruction, posterior = vae(torch.rand(5, 7))
    assert reconstruction.shape == (5, 7)
    assert posterior.mean.shape == posterior.logvar.shape == (5, 3)
    posterior.kl().sum().backward()
    assert vae.encoder.weight.grad.abs().sum() > 0


def test_an_encoder_may_return_a_posterior():
    posterior = DiagonalGaussian(torch.zeros(2, 3), torch.ones(2, 3))
    assert VAE(Returns(posterior), nn.Identity()).encode(torch.rand(2, 9)) is posterior


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(2, 3),
        (torch.zeros(2, 3),),
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)),
        (torch.zeros(2, 3), None),
        None,
    ],
    ids=["one tensor", "one code", "two shapes", "three codes", "no logvar", "nothing"],
)
def test_an_encoder_that_returns_anything_else_is_refused(codes):
    with pytest.raises(TypeError, match=r"\(mean, logvar\)"):
        VAE(Returns(codes), nn.Identity()).encode(torch.rand(2, 9))


def test_reconstructions_are_decoded_means(vae):
    images = torch.rand(5, 1, 4, 4)
    first, second = vae.eval().reconstruct(images), vae.reconstruct(images)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, vae(images, torch.zeros(5, 3))[0], rtol=0, atol=0)


def test_the_noise_decides_the_sample(vae):
    images, noise = torch.rand(5, 1, 4, 4), torch.randn(5, 3)
    given, posterior = vae(images, noise)
    torch.testing.assert_close(given, vae(images, noise)[0], rtol=0, atol=0)
    torch.testing.assert_close(
        given, vae.decode(posterior.mean + (posterior.logvar / 2).exp() * noise)
    )
    assert not torch.equal(vae(images)[0], vae(images)[0])
    torch.manual_seed(3)
    drawn = vae(images)[0]
    torch.manual_seed(3)
    torch.testing.assert_close(drawn, vae(images, torch.randn(5, 3))[0], rtol=0, atol=0)
