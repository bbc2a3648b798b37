"""Inputs of a diagnosis (model, images, loss), checked first, and the model's reconstructions.

The model is not changed.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.balance import Balance
from poise.data import Rows, gather
from poise.errors import InputError
from poise.latent import ACTIVE_VARIANCE, DiagonalGaussian
from poise.metrics import CHUNK
from poise.objectives import Deterministic
from poise.priors import Prior
from poise.runs.log import read_log
from poise.runs.run import Run
from poise.shapes import PerImage, Values
from poise.support.seeds import derive, noise_per_image
from poise.vae import VAE
from poise.variants import PRIORS, available_priors

SIDE = 16  # images are averaged down to this side before samples are compared with them


@dataclass(frozen=True)
class Seen:
    """Images with their posteriors and reconstructions, on the CPU.

    Attributes:
        images: (n, ...).
        codes: posteriors of the images.
        restored: reconstructions, each from one posterior sample.
    """

    images: Tensor
    codes: DiagonalGaussian
    restored: Tensor

    def error(self, power: float = 2) -> PerImage:
        """Return |x - x^|^power of each image, the *mean* over dimensions."""
        return (self.restored - self.images).double().abs().pow(power).flatten(1).mean(1)

    @cached_property
    def mse(self) -> float:
        return float(self.error().mean())

    @cached_property
    def variance(self) -> float:
        """Variance of the images about their mean image, mean over dimensions.

        It is the MSE of a decoder that returns the mean image for all latents.
        """
        return float(self.images.double().var(0).mean())

    @cached_property
    def active(self) -> Tensor:
        """Whether each latent is active: its mean varies over images (Burda et al. 2016)."""
        return self.codes.mean.double().var(0, correction=0) > ACTIVE_VARIANCE

    @property
    def num_dims(self) -> int:
        return math.prod(self.images.shape[1:])


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Set modules to evaluation mode inside the block.

    On exit, restores their modes and the state of torch's global generator.
    """
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for part, training in modes:
            part.training = training


def device_of(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


@torch.no_grad()
def look(vae: VAE, images: Values, seed: int) -> Seen:
    """Return posteriors and reconstructions. The noise of image i depends on (seed, i) only."""
    parts, device = [], device_of(vae)
    for start in range(0, len(images), CHUNK):
        posterior = vae.encode(images[start : start + CHUNK].to(device))
        noise = noise_per_image(len(posterior.mean), posterior.mean.shape[1], seed, start).to(
            device
        )
        restored = vae.decode(posterior.sample(noise))
        parts.append([part.float().cpu() for part in (posterior.mean, posterior.logvar, restored)])
    mean, logvar, restored = (torch.cat(part) for part in zip(*parts, strict=True))
    return Seen(images, DiagonalGaussian(mean, logvar), restored)


def small(images: Values) -> Tensor:
    """Return images as (n, values). Images with height and width are averaged down to 16x16."""
    if images.dim() == 4:
        height, width = (min(side, SIDE) for side in images.shape[2:])
        images = F.adaptive_avg_pool2d(images, (height, width))
    return images.flatten(1)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


Loss = Balance | Callable[..., Any]
MOST_IMAGES = 2_000  # enough for an accuracy of some percent; a small network takes seconds
FEWEST_POINTS = 20  # entries of a log
MOST_VALUES = 2**26  # values of all images together, 256 MiB: it limits the number of large images


@dataclass(frozen=True)
class Case:
    """Inputs of a diagnosis: model, images (n, ...), training images, loss, second-stage priors.

    `falls` is for runs only: how far the error of each stage fell at the end, see `Facts`.
    """

    vae: VAE
    images: Any
    train_images: Any
    loss: Loss | None
    priors: Mapping[str, Prior] = field(default_factory=dict)
    is_run: bool = False
    falls: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def in_unit_range(self) -> bool:
        """Whether 1 means white, as in runs and for bytes."""
        return self.is_run or self.images.dtype in (torch.uint8, np.uint8)


def as_case(model: Any, images: Any, train_images: Any, loss: Loss | None) -> Case:
    """Check the arguments of `diagnose` and return them as a case.

    Raises:
        InputError: neither a run nor a VAE, a model without a posterior, no images, images that are
            not an array, or a loss that cannot be called.
    """
    if loss is not None and not callable(loss):
        raise InputError(
            "loss must be a balance or a function (reconstruction, images, mean, logvar), "
            f"not {_kind(loss)}"
        )
    vae = model.first.vae if isinstance(model, Run) else model
    if isinstance(vae, VAE) and isinstance(vae.encoder, Deterministic):
        raise InputError(
            "a deterministic autoencoder has no posterior to diagnose: poise evaluate measures it"
        )
    if isinstance(model, Run):
        return _case_of_run(model, images, train_images, loss)
    if not isinstance(model, VAE):
        raise InputError(_not_a_model(model))
    if images is None:
        raise InputError(
            "images are needed to diagnose a VAE: diagnose(vae, images), "
            "with the same values as in training"
        )
    return Case(model, images, train_images, loss)


def _not_a_model(model: Any) -> str:
    if isinstance(model, (str, Path)):
        return (
            f"model must be a run or a VAE, not a name: poise.diagnose(poise.load({str(model)!r}))"
        )
    if (
        isinstance(model, (tuple, list))
        and len(model) == 2
        and all(isinstance(part, nn.Module) for part in model)
    ):
        return (
            "model must be a run or a VAE, not two networks: "
            "poise.diagnose(poise.VAE(encoder, decoder), images)"
        )
    return (
        f"model must be a run or a VAE, not {_kind(model)}: "
        "poise.diagnose(poise.VAE(encoder, decoder), images)"
    )


def _kind(thing: Any) -> str:
    return "None" if thing is None else type(thing).__name__


def _case_of_run(run: Run, images: Any, train_images: Any, loss: Loss | None) -> Case:
    if images is None:
        dataset = run.dataset()
        images, train_images = dataset.test, dataset.train if train_images is None else train_images
    images = _as_trained(images, "images", run.data["shape"])
    train_images = (
        None
        if train_images is None
        else _as_trained(train_images, "train_images", run.data["shape"])
    )
    of_second = {
        name: run.prior(name)
        for name in available_priors(run.second_stage)
        if PRIORS[name].second_stage is not None
    }
    balance = run.first.balance if loss is None else loss
    return Case(
        run.first.vae,
        images,
        train_images,
        balance,
        of_second,
        is_run=True,
        falls=_falls(run.folder / "metrics.jsonl"),
    )


def _falls(log: Path) -> dict[int, tuple[float, float]]:
    """Read from a log the MSE of each stage at 65 to 75 % of training and in the last tenth.

    Stages with fewer than `FEWEST_POINTS` entries are left out.
    """
    points: dict[int, list[tuple[float, float]]] = {}
    for entry in read_log(log, {"stage", "step", "mse"}):  # a flow has no MSE
        points.setdefault(int(entry["stage"]), []).append((entry["step"], entry["mse"]))
    found = {}
    for stage, curve in points.items():
        end = curve[-1][0]
        before = [mse for step, mse in curve if 0.65 * end < step <= 0.75 * end]
        after = [mse for step, mse in curve if 0.9 * end < step]
        if len(curve) >= FEWEST_POINTS and before:
            found[stage] = (fmean(before), fmean(after))
    return found


def _as_trained(images: Any, name: str, shape: list[int]) -> Any:
    """Bring images to a run's shape (c, h, w), from (c, h, w), (h, w, c), or (h, w) if grey."""
    _check_array(images, name)
    given, (channels, height, width) = list(images.shape[1:]), shape
    if given == list(shape):
        return images
    if given == [height, width, channels]:
        return (
            images.permute(0, 3, 1, 2)
            if isinstance(images, Tensor)
            else np.asarray(images).transpose(0, 3, 1, 2)
        )
    if given == [height, width] and channels == 1:
        return images[:, None] if isinstance(images, Tensor) else np.asarray(images)[:, None]
    wanted = f"(n, {', '.join(map(str, shape))})"
    raise InputError(
        f"{name} must have shape {wanted}, as the run was trained on, not {tuple(images.shape)}"
    )


def _check_array(images: Any, name: str) -> None:
    if isinstance(images, (list, tuple)):
        raise InputError(
            f"{name} must be one array or tensor (n, ...), not a {_kind(images)}: "
            "torch.stack or np.stack them"
        )
    if not isinstance(images, (Tensor, np.ndarray, Rows)):
        raise InputError(f"{name} must be an array or a tensor (n, ...), not {_kind(images)}")
    if isinstance(images, np.ndarray) and images.dtype.kind not in "fiub":
        raise InputError(f"{name} must be numbers, bytes or floats, not of type {images.dtype}")
    if isinstance(images, Tensor) and images.is_complex():
        raise InputError(f"{name} must be bytes or floats, not of type {images.dtype}")


def chosen(vae: VAE, images: Any, name: str, seed: int) -> Values:
    """Return the images to diagnose, a random subset if there are many, checked against the VAE.

    Raises:
        InputError: not an array of at least two images, images that do not fit the VAE, or images
            that are all the same.
    """
    images = some_images(images, name, seed)
    check_fit(vae, images, name)
    if bool((images == images[:1]).all()):
        raise InputError(f"all {len(images)} {name} are the same: there is nothing to learn")
    return images


def some_images(images: Any, name: str, seed: int) -> Values:
    """Return at most `MOST_IMAGES` images in random order, float32 on the CPU.

    Bytes are divided by 255.

    Raises:
        InputError: not an array of at least two images.
    """
    _check_array(images, name)
    shape = tuple(images.shape)
    if len(shape) < 2 or 0 in shape or len(images) < 2:
        raise InputError(f"{name} must be (n, ...) with at least two images, not of shape {shape}")
    count = max(2, min(len(images), MOST_IMAGES, MOST_VALUES // math.prod(shape[1:])))
    order = np.random.default_rng(derive("diagnosis", seed)).permutation(len(images))
    try:
        # In random order, because data sets are often sorted by class.
        return gather(images, order[:count]).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:  # numpy has types that torch lacks
        raise InputError(
            f"{name} of type {images.dtype} cannot be read: {first_line(error)}"
        ) from error


@torch.no_grad()
def check_fit(vae: VAE, images: Values, name: str) -> None:
    """Check that the VAE accepts such images and reconstructs them in the same shape.

    Raises:
        InputError: it does not, its codes are not (n, latents), or its weights are not float32.
    """
    _check_precision(vae)
    given = f"{name} of shape ({', '.join(map(str, images.shape[1:]))})"
    try:
        mean = vae.encode(images[:CHUNK].to(device_of(vae))).mean
        produced = tuple(vae.decode(mean).shape)
    except Exception as error:  # a user's network can raise anything
        raise InputError(f"the VAE does not take {given}: {first_line(error)}") from error
    if mean.dim() != 2 or len(mean) != len(images[:CHUNK]) or not mean.shape[1]:
        raise InputError(
            f"the encoder gives codes of shape {tuple(mean.shape)}; "
            "a diagnosis needs (n, latents): flatten them"
        )
    if produced[1:] != tuple(images.shape[1:]) or produced[0] != len(mean):
        raise InputError(
            f"the decoder gives images of shape {produced[1:]} for {given}: they must be the same"
        )


def _check_precision(vae: VAE) -> None:
    for name, parameter in vae.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise InputError(
                f"{name} is {kind}, and a diagnosis computes in float32: "
                "diagnose(copy.deepcopy(vae).float(), ...)"
            )
