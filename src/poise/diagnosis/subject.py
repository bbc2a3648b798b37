"""Inputs of a diagnosis (model, images, loss), checked first, and the model's reconstructions.

The model is not changed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.balance import Balance
from poise.data import Rows, checked_images, gather
from poise.diagnosis.course import Course, as_course, read_courses
from poise.diagnosis.foreign import (
    Adapted,
    Function,
    at,
    modules_of,
    parts_of,
    posterior_of,
    referred,
)
from poise.errors import InputError
from poise.latent import ACTIVE_VARIANCE, DiagonalGaussian
from poise.metrics.encoding import CHUNK, check_precision
from poise.objectives import Deterministic
from poise.priors import Prior
from poise.runs.run import Run
from poise.shapes import PerImage, Values
from poise.support.files import read_json
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


def device_of(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


@torch.no_grad()
def look(vae: VAE, images: Values, seed: int) -> Seen:
    """Return posteriors and reconstructions. The noise of image i depends on (seed, i) only."""
    parts, device = [], device_of(vae)
    for start in range(0, len(images), CHUNK):
        chunk = at(vae, start)
        posterior = chunk.encode(images[start : start + CHUNK].to(device))
        noise = noise_per_image(len(posterior.mean), posterior.mean.shape[1], seed, start).to(
            device
        )
        restored = chunk.decode(posterior.sample(noise))
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
MOST_VALUES = 2**26  # values of all images together, 256 MiB: it limits the number of large images


@dataclass(frozen=True)
class Case:
    """Inputs of a diagnosis: model, images (n, ...), training images, loss, second-stage priors.

    Attributes:
        model: a `VAE` or another model that `foreign.parts_of` knows.
        conditions, train_conditions: further arguments of the model for each image, (n, ...).
        courses: training error of each stage at its steps, if known.
    """

    model: Any
    images: Any
    train_images: Any
    loss: Loss | None
    conditions: tuple[Any, ...] = ()
    train_conditions: tuple[Any, ...] = ()
    priors: Mapping[str, Prior] = field(default_factory=dict)
    is_run: bool = False
    courses: Mapping[int, Course] = field(default_factory=dict)

    @cached_property
    def balance(self) -> Balance | None:
        return balance_of(self.loss)

    @property
    def modules(self) -> list[nn.Module]:
        """Return all modules of model and loss, to be set to evaluation mode."""
        parts = parts_of(self.model) or ()
        found = [module for part in (self.model, *parts, self.loss) for module in modules_of(part)]
        return found if self.balance is None else [*found, self.balance]

    @property
    def in_unit_range(self) -> bool:
        """Whether 1 means white, as in runs and for bytes."""
        return self.is_run or self.images.dtype in (torch.uint8, np.uint8)


def balance_of(loss: Any) -> Balance | None:
    """Return the balance that is the loss, or the only one that the loss function refers to."""
    owners = [loss, *referred(loss), *getattr(loss, "__dict__", {}).values()]
    found = {
        id(part): part
        for owner in owners
        if isinstance(owner, nn.Module)
        for part in owner.modules()
        if isinstance(part, Balance)
    }
    return next(iter(found.values())) if len(found) == 1 else None


def as_case(
    model: Any, images: Any, train_images: Any, loss: Loss | None, history: Any = None
) -> Case:
    """Check the arguments of `diagnose` and return them as a case.

    Raises:
        InputError: neither a run nor a VAE, a model without a posterior, no images, images that are
            not an array, a loss that cannot be called, or a history that is not errors.
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
        case = _case_of_run(model, images, train_images, loss)
        own = {} if history is None else {1: as_course(history)}
        return replace(case, courses={**case.courses, **own})
    if parts_of(model) is None:
        raise InputError(_not_a_model(model))
    if images is None:
        raise InputError(
            "images are needed to diagnose a VAE: diagnose(vae, images), "
            "with the same values as in training"
        )
    (images, *conditions), (train_images, *train_conditions) = (
        given if isinstance(given, tuple) and given else (given,)
        for given in (images, train_images)
    )
    if train_images is not None and len(conditions) != len(train_conditions):
        raise InputError(
            f"images come with {len(conditions)} conditions and train_images with "
            f"{len(train_conditions)}: pass both as (images, condition)"
        )
    given = images, train_images, loss, tuple(conditions), tuple(train_conditions)
    return Case(model, *given, courses={} if history is None else {1: as_course(history)})


def _not_a_model(model: Any) -> str:
    if isinstance(model, (str, Path)):
        return (
            f"model must be a run or a VAE, not a name: poise.diagnose(poise.load({str(model)!r}))"
        )
    return (
        f"model must be a run or a VAE, not {_kind(model)}: "
        "poise.diagnose(poise.VAE(encoder, decoder), images), or for functions "
        "poise.diagnose((encode, decode), images)"
    )


def _kind(thing: Any) -> str:
    return "None" if thing is None else type(thing).__name__


def _case_of_run(run: Run, images: Any, train_images: Any, loss: Loss | None) -> Case:
    if images is None:
        dataset = run.dataset()
        images, train_images = dataset.test, dataset.train if train_images is None else train_images
    images = _as_trained(images, "images", run)
    train_images = None if train_images is None else _as_trained(train_images, "train_images", run)
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
        priors=of_second,
        is_run=True,
        courses=_courses(run),
    )


def _courses(run: Run) -> dict[int, Course]:
    """Return the courses of a run's stages; of stage 1 up to the weights that validation kept."""
    courses = read_courses(run.folder / "metrics.jsonl")
    try:
        summary = read_json(run.folder / "summary.json", dict[str, Any])
    except InputError:  # the run is not finished
        summary = {}
    kept = (summary.get("validation") or {}).get("best_step")
    if kept is not None and 1 in courses:
        courses[1] = [point for point in courses[1] if point[0] <= kept]
    return courses


def _as_trained(images: Any, name: str, run: Run) -> Any:
    """Bring images to a run's shape (c, h, w), from (c, h, w), (h, w, c), or (h, w) if grey.

    Images of 16 bits and masks are scaled as in training. Floats stay as they are: another range is
    something to find.
    """
    _check_array(images, name)
    shape = run.data["shape"]
    given, (channels, height, width) = list(images.shape[1:]), shape
    if str(images.dtype).removeprefix("torch.") in ("uint16", "bool"):
        return checked_images(images, shape, run.levels)
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


def chosen(
    model: Any, images: Any, conditions: tuple[Any, ...], name: str, seed: int
) -> tuple[VAE, Values]:
    """Return the model as a VAE with flat latents, and the images to diagnose, checked against it.

    Of many images, these are a random subset.

    Raises:
        InputError: not an array of at least two images, images that do not fit the VAE, or images
            that are all the same.
    """
    total = len(images) if hasattr(images, "__len__") else 0
    images = some_images(images, name, seed)
    for condition in conditions:
        _check_array(condition, f"a condition of {name}")
        if len(condition) != total:
            raise InputError(
                f"a condition of {name} has {len(condition)} rows, but there are {total} {name}"
            )
    rows = tuple(_some_rows(condition, total, len(images), seed) for condition in conditions)
    vae = fitted(model, images, rows, name)
    if bool((images == images[:1]).all()):
        raise InputError(f"all {len(images)} {name} are the same: there is nothing to learn")
    return vae, images


def _some_rows(condition: Any, total: int, count: int, seed: int) -> Tensor:
    """Return the rows of a condition for the images of `some_images`, in their order."""
    rows = _order(total, seed)[:count]
    return torch.as_tensor(condition)[torch.from_numpy(rows)].detach().cpu()


def _order(total: int, seed: int) -> np.ndarray:
    """Return a random order, because data sets are often sorted by class."""
    return np.random.default_rng(derive("diagnosis", seed)).permutation(total)


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
    try:
        return gather(images, _order(len(images), seed)[:count]).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:  # numpy has types that torch lacks
        raise InputError(
            f"{name} of type {images.dtype} cannot be read: {first_line(error)}"
        ) from error


@torch.no_grad()
def fitted(model: Any, images: Values, conditions: tuple[Tensor, ...], name: str) -> VAE:
    """Return the model as a VAE with flat latents.

    A `VAE` whose latents are flat is returned as it is.

    Raises:
        InputError: the model does not accept such images, or does not reconstruct them in the same
            shape, or its weights are not float32.
    """
    parts = parts_of(model)
    assert parts is not None
    for module in (module for part in (model, *parts) for module in modules_of(part)):
        check_precision(module, "a diagnosis")
    given = f"{name} of shape ({', '.join(map(str, images.shape[1:]))})"
    some = images[:CHUNK]
    try:
        vae = Adapted(*parts, _latent_shape(parts[0], some, conditions), conditions)
        mean = vae.encode(some.to(device_of(vae))).mean
        produced = tuple(vae.decode(mean).shape)
    except Exception as error:  # a user's network can raise anything
        raise InputError(f"the VAE does not take {given}: {first_line(error)}") from error
    if len(mean) != len(some) or not mean.shape[1]:
        raise InputError(
            f"the encoder gives codes of shape {(len(mean), *vae.latent_shape)} for {len(some)} "
            f"{name}; a diagnosis needs (n, ...)"
        )
    if produced[1:] != tuple(images.shape[1:]) or produced[0] != len(mean):
        raise InputError(
            f"the decoder gives images of shape {produced[1:]} for {given}: they must be the same"
        )
    flat = isinstance(model, VAE) and len(vae.latent_shape) == 1 and not conditions
    return model if flat else vae


def _latent_shape(
    encode: Function, images: Values, conditions: tuple[Tensor, ...]
) -> tuple[int, ...]:
    device = next((device_of(module) for module in modules_of(encode)), torch.device("cpu"))
    rows = [condition[: len(images)].to(device) for condition in conditions]
    mean = posterior_of(encode(images.to(device), *rows)).mean
    if mean.dim() < 2:
        raise TypeError(
            f"the encoder must return (mean, logvar), (n, ...) each, not of shape "
            f"{tuple(mean.shape)}"
        )
    return tuple(mean.shape[1:])
