"""What a decoder can produce at all, and where it stops listening to its latents."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import ParametrizationList

from poise.shapes import Latents
from poise.support.seeds import generator

ROUNDING = 1e-6  # relative: of two equal latents in one batch, outputs may differ by some 1e-7; the least response seen in a
# collapsed but living decoder is 1e-4
PROBES = 64
SCALES = (1.0, 3.0, 10.0)  # of N(0, I): a decoder that answers to none of them answers to nothing
LARGE = (1e3, 1e4)  # of the last layer's weights: activations saturate, sums grow
SATURATED = 1e-3  # of the range: how much a bound may move from the first of LARGE to the second


@dataclass(frozen=True)
class Layer:
    """How one layer of a decoder answers to a batch of different latents.

    Attributes:
        name: in the decoder, as in "layers.1".
        kind: class of the module.
        hears: whether its input differs between latents.
        answers: whether its output does.
        constant: share of its outputs that are the same for all latents.
        units: outputs per latent.
        silent: whether every output is 0.
        zero_weight: whether it has a weight and all of it is 0.
    """

    name: str
    kind: str
    hears: bool
    answers: bool
    constant: float
    units: int
    silent: bool
    zero_weight: bool


def probes(mean: Latents, seed: int) -> Tensor:
    """Latents to try a decoder with: codes of images, and draws from N(0, I), from narrow to far too wide."""
    noise = torch.randn(PROBES, mean.shape[1], generator=generator("probes", seed))
    return torch.cat([mean[:PROBES], *(scale * noise for scale in SCALES)])


def response(outputs: Tensor) -> float:
    """Largest difference that latents make to any value, relative to the largest value."""
    values = outputs.cpu().double().flatten(1)
    return float((values.amax(0) - values.amin(0)).max() / values.abs().max().clamp_min(1e-30))


@torch.no_grad()
def reachable_range(decoder: nn.Module, latents: Latents, seed: int = 0) -> tuple[float, float]:
    """Least and greatest value that the decoder's last activation can give, whatever the weights; infinite without bound.

    All weights are replaced by random ones, those of the last layer that has any by large ones, and by ten times larger
    ones: the outputs of a sigmoid stay within [0, 1], those of a linear layer grow. So neither training nor collapse nor
    divergence hides the range.
    """
    last = _last_weighted(decoder, latents)
    if last is None or isinstance(last[1], ParametrizationList):  # a normalised weight does not grow
        return -math.inf, math.inf
    (low, high), (further_low, further_high) = (_range_at(decoder, last[0], latents, scale, seed) for scale in LARGE)
    width = high - low
    if not 0 < width < math.inf:
        return -math.inf, math.inf
    least = low if abs(further_low - low) <= SATURATED * width else -math.inf
    return least, high if abs(further_high - high) <= SATURATED * width else math.inf


def _last_weighted(decoder: nn.Module, latents: Latents) -> tuple[str, nn.Module] | None:
    called: list[tuple[str, nn.Module]] = []
    weighted = {name: part for name, part in decoder.named_modules() if any(True for _ in part.parameters(recurse=False))}
    with _hooked(weighted, lambda name, module, inputs, output: called.append((name, module))):
        decoder(latents[:2])
    return called[-1] if called else None


def _range_at(decoder: nn.Module, last: str, latents: Latents, scale: float, seed: int) -> tuple[float, float]:
    source, prefix = generator("range", seed), f"{last}." if last else ""
    state = {name: buffer.where(buffer.isfinite(), torch.ones_like(buffer)) for name, buffer in decoder.named_buffers()}
    own = {name for name, _ in decoder.named_parameters() if name.startswith(prefix) and "." not in name[len(prefix) :]}
    for name, parameter in decoder.named_parameters():
        random = torch.randn(parameter.shape, generator=source).to(parameter)
        state[name] = random * (scale if name in own else max(1, _fan_in(parameter)) ** -0.5)
    opposite = {name: -value if name in own else value for name, value in state.items()}
    outputs = torch.cat([functional_call(decoder, each, (latents,)).float() for each in (state, opposite)])
    return float(outputs.min()), float(outputs.max())


def _fan_in(parameter: Tensor) -> int:
    return math.prod(parameter.shape[1:])


@torch.no_grad()
def trace(decoder: nn.Module, latents: Latents) -> list[Layer]:
    """The decoder's innermost layers in the order in which they are called."""
    layers: list[Layer] = []

    def record(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and inputs and isinstance(inputs[0], Tensor):
            layers.append(_layer(name, module, inputs[0], output))

    leaves = {name: module for name, module in decoder.named_modules() if not list(module.children())}
    with _hooked(leaves, record):
        decoder(latents)
    return layers


def _layer(name: str, module: nn.Module, given: Tensor, output: Tensor) -> Layer:
    values = output.cpu().flatten(1)
    weight = getattr(module, "weight", None)
    return Layer(
        name=name,
        kind=type(module).__name__,
        hears=response(given) > ROUNDING,
        answers=response(output) > ROUNDING,
        constant=float((values.amax(0) == values.amin(0)).double().mean()),
        units=values.shape[1],
        silent=not bool(values.any()),
        zero_weight=isinstance(weight, Tensor) and not bool(weight.any()),
    )


def first_deaf(layers: list[Layer]) -> Layer | None:
    """The first layer whose output is the same for every latent."""
    return next((layer for layer in layers if not layer.answers), None)


@contextmanager
def _hooked(modules: dict[str, nn.Module], record: Callable[[str, nn.Module, Any, Any], Any]):
    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def call(module: nn.Module, inputs: Any, output: Any) -> None:
            record(name, module, inputs, output)

        return call

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
