"""Test `diagnose` on models and losses in the forms of other libraries.

The models are linear VAEs at the optimum of probabilistic PCA (Tipping & Bishop 1999), whose noise
variance GAMMA2 is the balanced one. So no model is trained here.
"""

import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import poise
from poise.balance import ComputedBalance, FixedBalance
from poise.diagnosis import Diagnosis, diagnose
from poise.diagnosis.course import as_course, late_spike
from poise.errors import InputError
from poise.latent import gaussian_kl

GAMMA2 = 0.0025
LATENTS = 6
MAP = (2, 3, 1)
IMAGE = (1, 4, 4)


class Linear(nn.Module):
    """A linear VAE at the optimum, with vectors as latents.

    Args:
        end: what the decoder applies to its outputs.
    """

    def __init__(self, end: Callable[[Tensor], Tensor] = lambda images: images) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(1)
        axes = torch.linalg.qr(torch.randn(16, LATENTS, generator=source))[0]
        self.to_pixels = nn.Linear(LATENTS, 16)
        self.to_pixels.weight.data = axes * torch.linspace(0.15, 0.25, LATENTS)
        self.to_pixels.bias.data.fill_(0.5)
        self.end = end

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.to_pixels.weight
        scale = weight.square().sum(0) + GAMMA2
        mean = (images.flatten(1) - 0.5) @ weight / scale
        return mean, (GAMMA2 / scale).log().expand_as(mean)

    def images(self, latents: Tensor) -> Tensor:
        return self.end(self.to_pixels(latents.flatten(1))).view(-1, *IMAGE)


class LikeAutoencoderKL(Linear):
    """The interface of diffusers' AutoencoderKL: latent maps, `latent_dist` and `sample`."""

    def encode(self, images: Tensor) -> Any:
        mean, logvar = (part.view(-1, *MAP) for part in self.moments(images))
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=logvar))

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=self.images(latents))


class LikeTutorial(Linear):
    """A module with `encode`, which returns (mean, logvar), and `decode`."""

    encode, decode = Linear.moments, Linear.images


class Conditional(Linear):
    """A VAE of images that are shifted by a condition, (n, 1)."""

    def encode(self, images: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return self.moments(images - 0.3 * shift.view(-1, 1, 1, 1))

    def decode(self, latents: Tensor, shift: Tensor) -> Tensor:
        return self.images(latents) + 0.3 * shift.view(-1, 1, 1, 1)


def with_distribution() -> tuple[Callable, Callable]:
    """A pair of functions, whose encoder returns a distribution of torch."""
    model = Linear()

    def encode(images: Tensor) -> Independent:
        mean, logvar = model.moments(images)
        return Independent(Normal(mean, (0.5 * logvar).exp()), 1)

    return encode, model.images


@cache
def images() -> Tensor:
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        clean = Linear().images(torch.randn(400, LATENTS, generator=source))
    return (clean + GAMMA2**0.5 * torch.randn(clean.shape, generator=source)).clamp(0.01, 0.99)


@cache
def conditioned() -> tuple[Tensor, Tensor]:
    shift = torch.randint(-1, 2, (400, 1), generator=torch.Generator().manual_seed(3)).float()
    return images() + 0.3 * shift.view(-1, 1, 1, 1), shift


def columns(seed: int) -> Tensor:
    return torch.randn(400, 8, generator=torch.Generator().manual_seed(seed))


class Table(nn.Module):
    """A VAE of tables whose decoder gets some columns by a condition, as if learned by heart.

    Columns 0 to 3 are latents. Column 7 is the condition, and the others are left at 0.
    """

    def __init__(self, scale: float = 1.0, distort: float = 0.0) -> None:
        super().__init__()
        self.scale, self.distort = scale, distort

    def encode(self, rows: Tensor, *condition: Tensor) -> tuple[Tensor, Tensor]:
        first = rows[:, :4] / torch.tensor([self.scale, 1, 1, 1])
        return first, torch.full_like(first, 1e-4).log()

    def decode(self, latents: Tensor, *condition: Tensor) -> Tensor:
        bent = latents + self.distort * (20 * latents).sin()
        rows = torch.cat([bent, torch.zeros_like(bent)], 1) * torch.tensor([self.scale] + [1.0] * 7)
        return rows if not condition else torch.cat([rows[:, :7], condition[0]], 1)


def as_logits(images: Tensor) -> Tensor:
    return images.clamp(1e-3, 1 - 1e-3).logit()


def squared(r: Tensor, x: Tensor) -> Tensor:
    return (r - x).square().flatten(1).sum(1)


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).flatten(1).sum(1)


def weighed(r: Tensor, x: Tensor, m: Tensor, v: Tensor, *, gamma2: float) -> Tensor:
    return squared(r, x).mean() / (2 * gamma2) + kl(m, v).mean()


def logits(r: Tensor, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    error = F.binary_cross_entropy_with_logits(r, x, reduction="sum")
    return error / len(x) + kl(m, v).mean()


def inside(r: Tensor, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    return BALANCE(r, x, m, v).loss + 9 * kl(m, v).mean()


BALANCE = ComputedBalance(start=GAMMA2)
L1 = partial(F.l1_loss, reduction="sum")
OF_COLUMNS = torch.tensor([1e-4] * 4 + [1.0] * 3 + [1e-3])

# Model, loss, model, images, loss, verdict, words of its sentence or remedy.
WRONG: list[tuple[str, str, Any, Any, Any, str, str]] = [
    (
        "AutoencoderKL, latent maps",
        "summed L1 + 1e-6 KL",
        LikeAutoencoderKL(),
        images(),
        lambda r, x, m, v: L1(r, x) / len(x) + 1e-6 * kl(m, v).mean(),
        "under-regularised",
        "multiplies the KL by 1e-06",
    ),
    (
        "AutoencoderKL, latent maps",
        "mean squared error + mean KL over latents",
        LikeAutoencoderKL(),
        images(),
        lambda r, x, m, v: F.mse_loss(r, x) - 0.5 * (1 + v - m.square() - v.exp()).mean(),
        "reduction",
        "the KL over the 6 latents",
    ),
    (
        "AutoencoderKL, latent maps",
        "squared error / (2 gamma2), without KL",
        LikeAutoencoderKL(),
        images(),
        lambda r, x, m, v: squared(r, x).mean() / (2 * GAMMA2),
        "under-regularised",
        "it has no KL",
    ),
    (
        "decoder of logits",
        "mean cross-entropy of logits + KL",
        LikeTutorial(as_logits),
        images(),
        lambda r, x, m, v: F.binary_cross_entropy_with_logits(r, x) + kl(m, v).mean(),
        "reduction",
        "averages the cross-entropy over the 16 values",
    ),
    (
        "decoder with sigmoid",
        "summed cross-entropy of logits + KL",
        LikeTutorial(lambda images: (4 * images - 2).sigmoid()),
        images(),
        logits,
        "data-range",
        "The loss already applies a sigmoid",
    ),
    (
        "encode and decode, vectors",
        "squared error and KL, summed over the batch",
        LikeTutorial(),
        images(),
        lambda r, x, m, v: F.mse_loss(r, x, reduction="sum") + kl(m, v).sum(),
        "over-regularised",
        "a decoder variance gamma2 of 0.5, but",
    ),
    (
        "encode and decode, vectors",
        "squared error summed over the batch + mean KL",
        LikeTutorial(),
        images(),
        lambda r, x, m, v: F.mse_loss(r, x, reduction="sum") + kl(m, v).mean(),
        "reduction",
        "over the batch and sums the other",
    ),
    (
        "pair of functions, torch Normal",
        "KL with logvar as log standard deviation",
        with_distribution(),
        images(),
        lambda r, x, m, v: squared(r, x).mean() / (2 * GAMMA2) + gaussian_kl(m, 2 * v).mean(),
        "kl-formula",
        "log standard deviation",
    ),
    (
        "conditional",
        "mean L1 + 10 KL",
        Conditional(),
        conditioned(),
        lambda r, x, m, v: F.l1_loss(r, x) + 10 * kl(m, v).mean(),
        "reduction",
        "averages the absolute error over the 16 values",
    ),
    (
        "conditional",
        "squared error / (2 gamma2) - KL",
        Conditional(),
        conditioned(),
        lambda r, x, m, v: squared(r, x).mean() / (2 * GAMMA2) - kl(m, v).mean(),
        "kl-formula",
        "wrong sign",
    ),
    (
        "table, a column times 1,000",
        "squared error / (2 gamma2) + KL",
        Table(1e3, distort=0.1),
        columns(0) * torch.tensor([1e3] + [1.0] * 7),
        partial(weighed, gamma2=1e4 / 2 / 8),
        "dominating-error",
        "The error of column 0 is 9",
    ),
    (
        "table, an overfitted column",
        "squared error / (2 gamma2) + KL, one gamma2 for each column",
        Table(),
        (columns(1), columns(2)[:, 7:]),
        lambda r, x, m, v: ((r - x).square() / (2 * OF_COLUMNS)).sum(1).mean() + kl(m, v).mean(),
        "learned-by-heart",
        "overfits column 7",
    ),
    (
        "encode and decode, vectors",
        "a function that adds 9 KL to a ComputedBalance",
        LikeTutorial(),
        images(),
        inside,
        "over-regularised",
        "Return the balance's terms.loss as it is",
    ),
]
RIGHT: list[tuple[str, str, Any, Any, Any]] = [
    ("AutoencoderKL, latent maps", "ComputedBalance", LikeAutoencoderKL(), images(), BALANCE),
    (
        "encode and decode, vectors",
        "squared error / (2 gamma2) + KL, summed over the batch",
        LikeTutorial(),
        images(),
        lambda r, x, m, v: squared(r, x).sum() / (2 * GAMMA2) + kl(m, v).sum(),
    ),
    (
        "decoder of logits",
        "summed cross-entropy of logits + KL",
        LikeTutorial(as_logits),
        images(),
        logits,
    ),
    (
        "conditional",
        "squared error / (2 gamma2) + KL",
        Conditional(),
        conditioned(),
        partial(weighed, gamma2=GAMMA2),
    ),
]


def train_rows(given: Any) -> Any:
    """Return training rows for the case whose model knows column 7 of them, else None."""
    if isinstance(given, tuple) and given[0].dim() == 2:
        rows = columns(4)
        return rows, rows[:, 7:] + 0.03 * columns(5)[:, :1]
    return None


@pytest.mark.parametrize(
    "model, given, loss, name, words",
    [case[2:] for case in WRONG],
    ids=[f"{model}: {loss}" for model, loss, *_ in WRONG],
)
def test_a_wrong_loss_is_named_whatever_the_form_of_the_model(model, given, loss, name, words):
    diagnosis = diagnose(model, given, train_images=train_rows(given), loss=loss)
    assert diagnosis.cause is not None and diagnosis.cause.name == name, str(diagnosis)
    assert words in f"{diagnosis.cause.sentence} {diagnosis.cause.remedy}", str(diagnosis)
    assert "128" not in diagnosis.cause.sentence or "batches of 128" in diagnosis.cause.sentence


@pytest.mark.parametrize(
    "model, given, loss",
    [case[2:] for case in RIGHT],
    ids=[f"{model}: {loss}" for model, loss, *_ in RIGHT],
)
def test_a_right_loss_is_called_healthy_whatever_the_form_of_the_model(model, given, loss):
    diagnosis = diagnose(model, given, loss=loss)
    assert diagnosis.healthy and diagnosis.figures["loss_known"], str(diagnosis)
    assert diagnosis.figures["equivalent_beta"] == pytest.approx(1, abs=0.1)
    assert diagnosis.figures["mse"] == pytest.approx(GAMMA2, rel=0.05)


def test_the_page_shows_these_verdicts():
    page = (Path(__file__).parent.parent / "docs" / "diagnosis.md").read_text()
    shown = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", page, re.M)[1:]
    expected = [(model, loss, verdict) for model, loss, *_, verdict, _ in WRONG]
    expected += [(model, loss, "healthy") for model, loss, *_ in RIGHT]
    assert [row for row in shown if not row[0].startswith("-")] == expected


def verdict_on(model: Any, given: Any, **settings: Any) -> Diagnosis:
    return diagnose(model, given, **settings)


def test_logits_are_recognised_by_the_loss_and_without_it():
    model = LikeTutorial(as_logits)
    by_loss = verdict_on(model, images(), loss=logits)
    by_model = verdict_on(LikeTutorial(lambda x: 6 * as_logits(x)), images().round())
    assert "its gradient is sigmoid(r) - x" in str(by_loss.notes)
    assert by_model.cause is None or by_model.cause.name != "diverged", str(by_model)
    assert "looks as if it returned logits" in str(by_model.notes)
    assert by_loss.figures["mse"] == pytest.approx(GAMMA2, rel=0.05)


def test_conditions_stay_with_their_images():
    """Images are drawn at random and taken in chunks. A wrong condition would shift them by 0.3."""
    (given, shift), model = conditioned(), Conditional()
    assert verdict_on(model, (given, shift)).figures["mse"] == pytest.approx(GAMMA2, rel=0.05)
    wrong = verdict_on(model, (given, shift.roll(1, 0))).figures["mse"]
    assert wrong > 10 * GAMMA2
    with pytest.raises(InputError, match="has 9 rows, but there are 400 images"):
        verdict_on(model, (given, shift[:9]))
    with pytest.raises(InputError, match="1 conditions and train_images with 0"):
        verdict_on(model, (given, shift), train_images=given)


def test_large_values_of_a_table_are_to_be_standardised_by_column():
    rows = columns(0) * torch.logspace(0, 6, 8)
    vae = poise.VAE(*poise.networks.mlp((8,), 4, hidden=(16,), output="linear"))
    cause = verdict_on(vae, rows).cause
    assert cause is not None and "Standardise each column" in cause.remedy, cause
    assert "ivide" not in cause.remedy.replace("divide by its standard deviation", "")


def test_the_remedy_for_a_gap_can_be_followed_with_latent_maps():
    model, n = LikeAutoencoderKL(), 3
    shifted = LikeAutoencoderKL()
    shifted.to_pixels.weight.data *= 3  # the decoder expects codes three times as narrow
    shifted.moments = lambda x: (model.moments(x)[0] / 3, model.moments(x)[1])
    finding = verdict_on(shifted, images()).findings[-1]
    assert finding.name == "prior-gap", finding
    code = re.search(r"prior = (.+?), then decode (.+?)\.$", finding.remedy)
    assert code is not None
    with torch.no_grad():
        mean, logvar = (part.view(-1, *MAP) for part in shifted.moments(images()))
        names = {"poise": poise, "torch": torch, "mean": mean, "logvar": logvar, "n": n}
        names["prior"] = eval(code[1], names)
        assert shifted.decode(eval(code[2], names)).sample.shape == (n, *IMAGE)


def curve(*levels: float) -> Tensor:
    noise = 1 + 0.1 * torch.randn(100 * len(levels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(levels).repeat_interleave(100) * noise


@pytest.mark.parametrize(
    "history, step",
    [
        (curve(1, 0.5, 0.3, 0.6, 0.6), 301),  # not recovered
        (torch.stack([100 * torch.arange(1, 401), curve(1, 0.3, 0.9, 0.8)], 1), 20_100),
        (curve(1, 0.5, 0.3, 0.6, 0.3), None),  # recovered
        (curve(1, 0.5, 0.3, 0.3), None),
        (curve(*torch.linspace(0.3, 0.6, 20).tolist()), None),  # a slow rise, as of a KL weight
    ],
)
def test_a_late_spike_is_found_if_training_did_not_recover(history, step):
    found = late_spike(as_course(history))
    assert found is None if step is None else found is not None and found[0] == step, found
    if history.dim() == 1:  # one error of each of 40,000 steps
        found = late_spike(as_course(history.repeat_interleave(40_000 // len(history))))
        assert found is None if step is None else abs(found[0] - 80 * step) < 400, found


def test_a_spike_is_the_cause_of_a_model_that_was_fine_before():
    model, history = LikeTutorial(), torch.cat([curve(0.5, 0.002), curve(0.0025)])
    assert verdict_on(model, images(), loss=BALANCE, history=history).healthy
    history = torch.cat([curve(0.5, 0.001), curve(0.0025)])
    cause = verdict_on(model, images(), loss=BALANCE, history=history.tolist()).cause
    assert cause is not None and cause.name == "late-spike"
    assert "until step 201" in cause.sentence
    for wrong, words in (([[1, 2, 3]], "pairs"), ("x", "pairs"), (-history, "not terms.loss")):
        with pytest.raises(InputError, match=words):
            verdict_on(model, images(), history=wrong)


def test_training_that_was_short_is_said_to_be_short():
    falling = torch.linspace(1, 0.6, 300) * GAMMA2
    diagnosis = verdict_on(LikeTutorial(), images(), loss=BALANCE, history=falling)
    assert diagnosis.healthy and "but training was short" in diagnosis.verdict
    assert "Training was short: the MSE still fell by 14% in its" in diagnosis.notes[-1]


def test_blur_is_shown_by_the_differences_of_neighbouring_pixels():
    sharp, blurred = LikeTutorial(), LikeTutorial(lambda x: 0.5 + 0.5 * (x - 0.5))
    shares = [verdict_on(model, images()).figures["detail"] for model in (sharp, blurred)]
    assert shares[1] == pytest.approx(shares[0] / 4, rel=1e-3) and 0.7 < shares[0] < 1


def test_a_group_of_a_balance_that_counts_too_much_is_named():
    def loss(r: Tensor, x: Tensor, m: Tensor, v: Tensor) -> Any:
        error = torch.stack([squared(r, x), squared(r[..., 1:], x[..., 1:])], 1)
        return balance.combine(error, kl(m, v), [16, 12])

    for gamma2, name in ((GAMMA2, None), (GAMMA2 / 5, "dominating-error")):
        balance = FixedBalance(gamma2=[GAMMA2, gamma2])
        found = verdict_on(LikeTutorial(), images(), train_images=images(), loss=loss).findings
        assert [finding.name for finding in found if "Group" in finding.sentence] == (
            [name] if name else []
        )


def test_what_is_in_use_is_not_advised():
    vae = poise.VAE(nn.Flatten(), nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
    for momentum, advised in ((0.1, False), (0.01, True)):
        vae.decoder[1].momentum = momentum
        vae.decoder[1].running_var.fill_(1e-6)
        cause = verdict_on((lambda x: (x[:, :4], x[:, :4] * 0 - 2), vae.decoder), columns(0)).cause
        assert cause is not None and cause.name == "norm-unsettled"
        assert ("momentum" in cause.remedy) == advised
    counts = ComputedBalance(start=GAMMA2)
    verdict_on(LikeTutorial(), images(), loss=lambda *given: counts(*given).loss)
    assert float(counts.count) == 0, "a balance inside a function is in evaluation mode"
