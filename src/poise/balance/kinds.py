"""Kinds of reconstruction error: squared, absolute, and the error of features.

The loss of a balance and the figures of `poise.metrics` use the same object, `Balance.error`.

An error |x - x^|^p is a likelihood of x (eq. 5 of `poise.balance`), so that there is an ELBO. The
error of features,

    E_0 = |x - x^|^2,        E_l = |h_l(x) - h_l(x^)|^2    for the layers l of a network h,

has a group of dimensions for the pixels and one for each layer, each with a gamma2 of its own. So
the layers need no weights. But features are not independent of pixels, so that the sum over groups
is not a likelihood of x: there is no ELBO.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Protocol, final, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.balance.inputs import at_least_float32, summed_errors
from poise.errors import InputError
from poise.shapes import Batch
from poise.support.seeds import generator

LAYERS = 3
WIDTHS = (2, 4, 8)  # channels of each layer per channel of the images: 0.9 features per value


@runtime_checkable
class Error(Protocol):
    """Interface of the errors.

    Attributes:
        name: its name as a setting.
        power: p of |x - x^|^p.
        groups: number of groups of dimensions; None: those of the balance.
        is_likelihood: whether it is the negative logarithm of a density of x, up to its scale.
    """

    is_likelihood: ClassVar[bool]

    @property
    def groups(self) -> int | None: ...
    @property
    def name(self) -> str: ...
    @property
    def power(self) -> float: ...

    def __call__(
        self,
        reconstruction: Tensor,
        target: Tensor,
        *,
        per_group: bool,
        mask: Tensor | None,
        samples: int | None,
    ) -> tuple[Tensor, int | Tensor]:
        """Return the error of each image and the number of its dimensions, see `Balance.errors`."""
        ...


@final
@dataclass(frozen=True)
class PowerError:
    """The error |x - x^|^power, summed over dimensions.

    Args:
        power: finite and > 0. 2 is the squared error (Gaussian), 1 the absolute error (Laplace).
    """

    power: float = 2.0
    is_likelihood: ClassVar[bool] = True

    @property
    def groups(self) -> None:
        return None

    @property
    def name(self) -> str:
        return {2.0: "squared", 1.0: "absolute"}.get(self.power, f"power {self.power:g}")

    def __call__(
        self,
        reconstruction: Tensor,
        target: Tensor,
        *,
        per_group: bool,
        mask: Tensor | None,
        samples: int | None,
    ) -> tuple[Tensor, int | Tensor]:
        return summed_errors(
            reconstruction, target, self.power, per_group=per_group, mask=mask, samples=samples
        )


@final
class FeatureError(nn.Module):
    """The squared error of pixels, and that of the features of a network with fixed weights.

    The network has three 3x3 convolutions of stride 2, each followed by a leaky ReLU. Its weights
    are random, and the same for every seed of a run. Random features see edges and textures of
    several sizes. They are not those of a network trained on photographs.

    Args:
        channels: channels of the images, >= 1.

    Raises:
        InputError: `channels` is not at least 1.

    Example:
        >>> error = poise.balance.FeatureError(channels=3)
        >>> balance = poise.ComputedBalance(groups=4).measuring(error)
        >>> images, codes = torch.rand(8, 3, 16, 16), torch.zeros(8, 2)
        >>> balance(torch.rand(8, 3, 16, 16), images, codes, codes).group_error.shape
        torch.Size([4])
    """

    is_likelihood: ClassVar[bool] = False

    @property
    def groups(self) -> int:
        return 1 + LAYERS

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise InputError(f"channels must be at least 1, not {channels}")
        self.name, self.power, self.channels = "features", 2.0, channels
        sizes = (channels, *(width * channels for width in WIDTHS))
        for layer, (given, made) in enumerate(pairwise(sizes)):
            # Not saved with the balance: it is drawn again.
            self.register_buffer(
                f"weight_{layer}", torch.empty(made, given, 3, 3), persistent=False
            )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights. They depend on the number of channels only."""
        for layer, weight in enumerate(self.buffers()):
            source = generator("features of an error", layer)
            drawn = torch.randn(weight.shape, generator=source)
            # Without a constant part, so that it sees edges, not brightness.
            drawn = drawn - drawn.mean((2, 3), keepdim=True) if layer == 0 else drawn
            weight.copy_(drawn / drawn.square().sum((1, 2, 3), keepdim=True).sqrt())

    def features(self, images: Batch) -> list[Tensor]:
        """Return the features of images (n, channels, height, width), a map for each layer."""
        found = []
        with torch.autocast(images.device.type, enabled=False):  # features that are nearly equal
            for weight in self.buffers():
                weight = weight.to(images.dtype)
                images = F.leaky_relu(F.conv2d(images, weight, stride=2, padding=1), 0.2)
                found.append(images)
        return found

    def forward(
        self,
        reconstruction: Tensor,
        target: Tensor,
        *,
        per_group: bool,
        mask: Tensor | None,
        samples: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the error of pixels and of each layer, (n, 4), and their dimensions, (4,)."""
        if mask is not None or samples is not None or target.dim() != 4:
            raise InputError(
                "the error of features takes images (n, channels, height, width) without mask and "
                f"samples, not {tuple(target.shape)}: use the error squared or absolute"
            )
        if target.shape[1] != self.channels:
            raise InputError(
                f"the error of features was made for {self.channels} channels, not "
                f"{target.shape[1]}: make it with channels={target.shape[1]}"
            )
        given, wanted = at_least_float32(reconstruction), at_least_float32(target)
        with torch.no_grad():
            of_target = [wanted, *self.features(wanted)]
        pairs = zip([given, *self.features(given)], of_target, strict=True)
        errors = [(a - b).square().flatten(1).sum(1) for a, b in pairs]
        dims = [errors[0].new_full((), part[0].numel()) for part in of_target]
        return torch.stack(errors, 1), torch.stack(dims)


def make_error(name: str, channels: int) -> Error:
    """Return the error with a name.

    Args:
        name: "squared", "absolute" or "features".
        channels: channels of the images.

    Raises:
        InputError: the name is unknown.
    """
    makers: dict[str, Callable[[], Error]] = {
        "squared": PowerError,
        "absolute": lambda: PowerError(1.0),
        "features": lambda: FeatureError(channels),
    }
    if name not in makers:
        raise InputError(f"error must be one of {', '.join(makers)}, not {name!r}")
    return makers[name]()
