"""Test that any encoder and decoder make a VAE whose outputs depend only on the noise."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from poise.latent import DiagonalGaussian, variance_law
from poise.networks import conv, mlp
from poise.vae import VAE, latents_of, standardised


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


@pytest.mark.parametrize("network", ["vectors", "maps"])
def test_standard_latents_lower_the_kl_as_far_as_a_shift_and_a_scale_can(network):
    """The closed form is that of the module's docstring."""
    torch.manual_seed(0)
    pair = mlp((1, 8, 8), 3, hidden=(8,)) if network == "vectors" else conv(8, 1, 2, width=8)
    plain, images = VAE(*pair).eval(), torch.rand(50, 1, 8, 8)
    shape = getattr(plain.decoder, "latent_shape", (3,))
    vae = standardised(plain, shape).eval()
    latents = latents_of(vae)
    with torch.no_grad():
        before = plain.encode(images)
        assert torch.equal(vae.encode(images).mean, before.mean)
        fitted = latents.fit(vae.encode(images))
        after = vae.encode(images)
        noise = torch.randn_like(before.mean)
        for old, new in zip(plain(images, noise)[:1], vae(images, noise)[:1], strict=True):
            torch.testing.assert_close(new, old, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fitted.mean, after.mean, atol=1e-5, rtol=1e-5)
    law = variance_law(after.mean, after.logvar).view(shape[0], -1).mean(1)
    moment = after.mean.double().square().mean(0).view(shape[0], -1).mean(1)
    if network == "vectors":
        torch.testing.assert_close(law, torch.ones_like(law), atol=1e-5, rtol=0)
        assert after.mean.mean(0).abs().max() < 1e-5
    count = before.mean[0].numel() // shape[0]
    second = (before.mean.double().square() + before.logvar.double().exp()).mean(0)
    second = second.view(shape[0], -1).mean(1)
    variance = second - before.mean.double().mean(0).view(shape[0], -1).mean(1).square()
    gain = 0.5 * count * (second - 1 - variance.log()).sum()
    torch.testing.assert_close((before.kl() - after.kl()).double().mean(), gain, atol=1e-4, rtol=0)
    assert moment.max() <= 1 + 1e-4
    least = after.kl().mean()
    for shift, scale in ((0.02, 1.0), (-0.02, 1.0), (0.0, 1.02), (0.0, 0.98)):
        moved = DiagonalGaussian(
            (after.mean - shift) / scale, after.logvar - 2 * torch.tensor(scale).log()
        )
        assert moved.kl().mean() > least


def test_latents_are_standardised_during_training_from_finite_batches_only():
    vae = standardised(VAE(*mlp((1, 4, 4), 2, hidden=(8,))), (2,), every=3).train()
    latents, batch = latents_of(vae), torch.rand(20, 1, 4, 4)
    own = vae.encoder.encoder(batch)
    vae.encode(batch)
    vae.encode(batch * torch.nan)
    assert torch.equal(latents.scale, torch.ones(2))
    vae.encode(batch)
    torch.testing.assert_close(latents.shift, own[0].mean(0))
    torch.testing.assert_close(latents.scale.square(), variance_law(*own).float())
    kept = copy.deepcopy(vae)
    vae.eval().encode(batch)
    assert torch.equal(latents_of(kept).scale, latents.scale) and latents.steps == 3
    assert latents_of(kept) is kept.encoder.latents
    with torch.no_grad():
        assert torch.equal(kept.eval().reconstruct(batch), vae.reconstruct(batch))


GROUP = threading.Lock()  # like a process group, it cannot be copied


@pytest.mark.parametrize(("group", "shared"), [(None, [None]), (False, []), (GROUP, [GROUP])])
def test_moments_are_shared_within_the_process_group(group, shared, monkeypatch):
    groups = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("poise.vae.sum_over_ranks", lambda totals, group: groups.append(group))
    plain = VAE(*mlp((1, 4, 4), 2, hidden=(8,)))
    vae = standardised(plain, (2,), every=3, process_group=group).train()
    vae.encode(torch.rand(20, 1, 4, 4))
    assert groups == shared
    latents = latents_of(copy.deepcopy(vae))
    assert latents is not None and latents.process_group is group and latents.steps == 1


def test_latents_that_change_during_training_may_be_used_twice_before_backward():
    """Gradient accumulation. Former defect: backward found a changed scale and raised an error."""
    vae = standardised(VAE(*mlp((1, 4, 4), 2, hidden=(8,))), (2,), every=3).train()
    images = torch.rand(8, 1, 4, 4)
    sum(vae(images)[0].sum() for _ in range(2)).backward()
    latents = latents_of(vae)
    assert latents is not None and latents.steps == 2
    checkpoint(lambda x: vae(x)[0].sum(), images, use_reentrant=False).backward()
    assert latents.steps == 3, "a recomputation is no step"
