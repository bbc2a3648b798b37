"""Models of other libraries as VAEs: encoders and decoders of any form, latent maps, conditions.

A diagnosis works on a `VAE` with flat latents. `fitted` returns a model as such a VAE.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from poise.latent import DiagonalGaussian
from poise.vae import VAE, as_posterior

Function = Callable[..., Any]
# Attributes of an encoder's output that hold mean and logvar: diffusers, and pythae.
NAMES = (("mean", "logvar"), ("embedding", "log_covariance"))


class Adapted(VAE):
    """A model as a VAE with flat latents.

    Args:
        encode: function or module that maps images, and conditions if there are any, to a
            posterior, see `posterior_of`.
        decode: function or module that maps latents, and conditions, to images.
        latent_shape: shape of the latents of one image, as `encode` and `decode` have it.
        conditions: tensors (n, ...), one row for each image.
        first: number of the image to which the first row of a batch belongs.
        logits: whether `decode` returns logits. A sigmoid is then part of the decoder.
    """

    def __init__(
        self,
        encode: Function,
        decode: Function,
        latent_shape: Sequence[int],
        conditions: Sequence[Tensor] = (),
        first: int = 0,
        *,
        logits: bool = False,
    ) -> None:
        super().__init__(
            _Encoder(encode, conditions, first),
            _Decoder(decode, conditions, first, latent_shape, logits),
        )
        self.parts = (encode, decode)
        self.latent_shape = tuple(latent_shape)
        self.conditions, self.first, self.logits = tuple(conditions), first, logits
        if next(self.parameters(), None) is None:  # `sample` asks the parameters for the device
            self.nothing = nn.Parameter(torch.empty(0))


def parts_of(model: Any) -> tuple[Function, Function] | None:
    """Return the functions that encode and decode; None: the model has no such functions.

    Args:
        model: a `VAE`, a pair (encode, decode) of functions or modules, or an object with the
            methods `encode` and `decode`.
    """
    if isinstance(model, Adapted):
        return model.parts
    if isinstance(model, VAE):
        return model.encoder, model.decoder
    pair = isinstance(model, (tuple, list)) and len(model) == 2
    names = ("encode", "decode")
    encode, decode = model if pair else (getattr(model, name, None) for name in names)
    return (encode, decode) if callable(encode) and callable(decode) else None


def with_logits(vae: VAE) -> VAE:
    """Return a VAE whose decoder ends with a sigmoid, for a decoder that returns logits."""
    parts = parts_of(vae)
    assert parts is not None
    if isinstance(vae, Adapted):
        return Adapted(*parts, vae.latent_shape, vae.conditions, vae.first, logits=True)
    return Adapted(*parts, (-1,), logits=True)


def at(vae: VAE, first: int) -> VAE:
    """Return a VAE for a batch that begins with image `first`: its conditions are then those."""
    if not isinstance(vae, Adapted) or not vae.conditions:
        return vae
    return Adapted(*vae.parts, vae.latent_shape, vae.conditions, first, logits=vae.logits)


def modules_of(model: Any) -> list[nn.Module]:
    """Return the modules that a function refers to, that of a bound method, or a module itself."""
    if isinstance(model, nn.Module):
        return [model]
    return list(
        {id(part): part for part in referred(model) if isinstance(part, nn.Module)}.values()
    )


def referred(function: Any) -> list[Any]:
    """Return the objects that a function, a bound method or a `partial` refers to by name."""
    inner = getattr(function, "func", function)  # of a functools.partial
    found = [getattr(inner, "__self__", None), *getattr(function, "args", ())]
    found += getattr(function, "keywords", {}).values()
    try:
        named = inspect.getclosurevars(inner)
        found += [*named.nonlocals.values(), *named.globals.values()]
    except (TypeError, ValueError):  # not a function written in Python, or a name without a value
        pass
    return found


def shown_name(name: str) -> str:
    """Return the name of a parameter or layer as its own library has it."""
    for prefix in ("encoder.model.", "decoder.model.", "model."):
        name = name.removeprefix(prefix)
    return name.replace("network.", "", 1)


class _Part(nn.Module):
    """A function and its conditions, with the module that it belongs to."""

    def __init__(self, function: Function, conditions: Sequence[Tensor], first: int) -> None:
        super().__init__()
        if isinstance(function, nn.Module):
            self.network = function
        else:
            self.function = function
            for number, module in enumerate(modules_of(function)):
                setattr(self, f"model_{number}" if number else "model", module)
        self.conditions, self.first = tuple(conditions), first

    def call(self, values: Tensor) -> Any:
        function = self.network if hasattr(self, "network") else self.function
        rows = [self._rows(condition, values) for condition in self.conditions]
        return function(values, *rows)

    def _rows(self, condition: Tensor, values: Tensor) -> Tensor:
        numbers = (torch.arange(len(values)) + self.first) % len(condition)
        return condition[numbers].to(values.device)


class _Encoder(_Part):
    def forward(self, images: Tensor) -> DiagonalGaussian:
        posterior = posterior_of(self.call(images))
        return DiagonalGaussian(posterior.mean.flatten(1), posterior.logvar.flatten(1))


class _Decoder(_Part):
    def __init__(
        self,
        function: Function,
        conditions: Sequence[Tensor],
        first: int,
        latent_shape: Sequence[int],
        logits: bool,
    ) -> None:
        super().__init__(function, conditions, first)
        self.latent_shape, self.logits = tuple(latent_shape), logits

    def forward(self, latents: Tensor) -> Tensor:
        images = images_of(self.call(latents.unflatten(1, self.latent_shape)))
        return images.sigmoid() if self.logits else images


def posterior_of(output: Any) -> DiagonalGaussian:
    """Return the output of an encoder of any library as a posterior.

    Args:
        output: `(mean, logvar)`; a `Normal` of torch.distributions; an object with `mean` and
            `logvar`, or `embedding` and `log_covariance`; or an object with one of them as
            `latent_dist`, as diffusers' AutoencoderKL returns.

    Raises:
        TypeError: none of these.
    """
    output = getattr(output, "latent_dist", output)
    if isinstance(output, Independent):
        output = output.base_dist
    if isinstance(output, Normal):
        return DiagonalGaussian(output.loc, 2 * output.scale.log())
    for names in NAMES:
        values = [getattr(output, name, None) for name in names]
        if all(isinstance(value, Tensor) for value in values):
            return as_posterior(values)
    return as_posterior(output)


def images_of(output: Any) -> Tensor:
    """Return the output of a decoder of any library as a tensor.

    Args:
        output: a tensor, or an object with a tensor `sample` (diffusers) or `reconstruction`
            (pythae).

    Raises:
        TypeError: none of these.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("sample", "reconstruction"):
        if isinstance(value := getattr(output, name, None), Tensor):
            return value
    raise TypeError(f"the decoder must return a tensor of images, not {type(output).__name__}")
