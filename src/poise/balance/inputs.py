"""Check what a balance is given, and sum errors over dimensions.

Of tensors only shapes, types and devices are checked. A look at values would wait for the device.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError

NumDims = int | np.integer | np.ndarray | Sequence[int] | Tensor


def check_data(
    reconstruction: Tensor,
    target: Tensor,
    samples: int | None,
    groups: int | None,
    per: str | None,
) -> None:
    """Check shapes and types of the data of `Balance.forward`.

    Raises:
        InputError: see `Balance.forward`.
    """
    found, wanted = reconstruction.shape, target.shape
    if samples is not None:
        one = found[:1] + found[2:]
        if len(found) < 3 or found[1] != samples or wanted not in (one, found):
            raise InputError(
                f"with samples={samples}, reconstruction must be (n, {samples}, ...) and target "
                f"(n, ...) or of the same shape, not {shapes_of(reconstruction, target)}"
            )
    elif found != wanted:
        several = len(found) == len(wanted) + 1
        hint = "; for K posterior samples per item, (n, K, ...), pass samples=K"
        raise InputError(f"{shapes_of(reconstruction, target)} differ in shape{hint * several}")
    if not (reconstruction.is_floating_point() and target.is_floating_point()):
        raise InputError(
            "reconstruction and target must be floating point, not "
            f"{reconstruction.dtype} and {target.dtype}"
        )
    if len(wanted) < 2:
        raise InputError(
            "reconstruction and target must be (n, ...) with at least two dimensions, not "
            f"{tuple(wanted)}: for one value per item pass x.unsqueeze(1)"
        )
    if target.numel() == 0:
        raise InputError(f"the batch is empty: target is {tuple(wanted)}; skip it")
    if samples is None and target.stride(1) == 0 and wanted[1] > 1:
        raise InputError(
            f"target {tuple(wanted)} repeats each item along dimension 1: for K posterior "
            "samples per item pass samples=K; if the repetition is data, pass "
            "target.contiguous()"
        )
    if groups is None:
        return
    channels = found[1 if samples is None else 2]
    if per is None:
        raise InputError(
            f'with groups={groups}, forward needs per="channel" in the constructor (a '
            "group per channel); for other groups pass errors (n, groups) to combine"
        )
    if channels != groups:
        raise InputError(
            f'with per="channel" and groups={groups}, dimension 1 of the data must be '
            f"{groups}, not {channels}"
        )


def summed_errors(
    reconstruction: Tensor,
    target: Tensor,
    power: float,
    *,
    per_group: bool,
    mask: Tensor | None,
    samples: int | None,
) -> tuple[Tensor, int | Tensor]:
    """Return |x - x^|^power summed over dimensions, and the number of these; see `Balance.errors`.

    Args:
        per_group: leave dimension 1 of the data, which are groups, out of the sum.
    """
    if samples is not None and target.dim() < reconstruction.dim():
        target = target.unsqueeze(1)
    difference = at_least_float32(reconstruction) - at_least_float32(target)
    weights = None
    if mask is not None:
        item = reconstruction if samples is None else reconstruction[:, 0]
        weights = aligned(mask, item).to(difference.dtype)
        shown = weights if samples is None else weights.unsqueeze(1)
        # 1, not 0, because |x|^p with p < 1 has no derivative at 0.
        difference = torch.where(shown > 0, difference, 1.0)
    error = difference.square() if power == 2 else difference.abs().pow(power)
    if weights is not None:
        error = error * (weights if samples is None else weights.unsqueeze(1))
    before = (1 if samples is None else 2) + per_group
    num_dims = error.shape[before:].numel()
    error = error.flatten(before).sum(before) if error.dim() > before else error
    if weights is None:
        return error, num_dims
    kept = 1 + per_group
    times = num_dims // weights.shape[kept:].numel()
    return error, times * weights.reshape(*weights.shape[:kept], -1).sum(kept)


def shapes_of(reconstruction: Tensor, target: Tensor) -> str:
    return f"reconstruction {tuple(reconstruction.shape)} and target {tuple(target.shape)}"


def aligned(mask: Tensor, item: Tensor) -> Tensor:
    """Return the mask with a dimension of size 1 for each one that it lacks at the end.

    Raises:
        InputError: the sizes or the device do not agree with those of the data.
    """
    check_device("mask", mask, item)
    widened = mask.reshape(mask.shape + (1,) * (item.dim() - mask.dim()))
    agrees = len(widened) == len(item) and broadcasts(widened.shape, item.shape)
    if mask.dim() == 0 or not agrees:
        raise InputError(
            f"mask {tuple(mask.shape)} must have the batch size of the data {tuple(item.shape)} "
            "first, then its sizes or 1; dimensions may lack at the end"
        )
    return widened


def checked_terms(
    error: Tensor | None,
    kl: Tensor,
    nll: Tensor | None,
    samples: int | None,
    groups: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return error, kl and nll, one value per image (and group), in float32 or better.

    Raises:
        InputError: see `Balance.combine`.
    """
    of_groups = () if groups is None else (groups,)
    several = () if samples is None else (samples,)
    of_nll = kl.shape + several
    if (
        kl.dim() != 1
        or (error is not None and error.shape != of_nll + of_groups)
        or (nll is not None and nll.shape != of_nll)
    ):
        given = {"error": error, "kl": kl, "nll": nll}
        form = "n, samples" if several else "n"
        raise InputError(
            "error, kl and nll must be one value per image, not "
            + ", ".join(f"{k} {tuple(v.shape)}" for k, v in given.items() if v is not None)
            + f": kl (n,), nll ({form},), error ({form}{', groups' if groups else ','})"
            + (not several) * "; for K posterior samples per image, (n, K), pass samples=K"
        )
    if len(kl) == 0:
        raise InputError("the batch is empty: kl is (0,); skip it")
    if error is None:
        if nll is None:
            raise InputError("combine needs error, nll or both; both are None")
        error = nll.new_zeros(kl.shape + of_groups)
    elif several:
        error = at_least_float32(error).mean(1)
    if nll is not None:
        nll = at_least_float32(nll)
        nll = nll.mean(1) if several else nll
    return at_least_float32(error), at_least_float32(kl), nll


def checked_dims(error: Tensor, num_dims: NumDims | None, groups: int | None) -> int | Tensor:
    """Return the number of dimensions as a number, or as a tensor that broadcasts.

    Raises:
        InputError: its form does not fit the error.
    """
    if isinstance(num_dims, int) and num_dims >= 1:
        return num_dims
    if isinstance(num_dims, (np.integer, np.ndarray)):
        plain = num_dims.shape in ((), (groups,))
        if plain or num_dims.dtype.kind not in "iuf":
            return checked_dims(error, num_dims.tolist(), groups)
        given = torch.from_numpy(np.ascontiguousarray(num_dims))
        return checked_dims(error, given.to(error.device), groups)
    if isinstance(num_dims, Tensor):
        check_device("num_dims", num_dims, error)
        if broadcasts(num_dims.shape, error.shape):
            return num_dims.to(error.dtype)
    elif isinstance(num_dims, Sequence) and len(num_dims) == groups and min(num_dims) >= 1:
        # Made on the device, without a copy from the host.
        return torch.stack([error.new_full((), dims) for dims in num_dims])
    form = "tensor (n,)"
    if groups is not None:
        form = f"{groups} of them, or a tensor (groups,), (n, 1) or (n, groups)"
    given = f"shape {tuple(num_dims.shape)}" if isinstance(num_dims, Tensor) else num_dims
    raise InputError(
        f"num_dims must be a whole number >= 1 or {form}, for error {tuple(error.shape)}, "
        f"not {given}"
    )


def check_device(name: str, given: Tensor, data: Tensor) -> None:
    if given.device != data.device:
        raise InputError(
            f"{name} is on {given.device}, but the data are on {data.device}: move it there"
        )


def broadcasts(shape: Sequence[int], onto: Sequence[int]) -> bool:
    """Return whether a tensor of one shape can be expanded to another."""
    sizes = zip(reversed(shape), reversed(onto), strict=False)
    return len(shape) <= len(onto) and all(size in (1, other) for size, other in sizes)


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{name} must be a finite number > 0, not {value}")
    return float(value)


def whole(name: str, value: float) -> int:
    if not (value >= 1 and float(value).is_integer()):
        raise InputError(f"{name} must be a whole number >= 1, not {value}")
    return int(value)


def checked_decay(decay: float) -> float:
    if not 0 <= decay < 1:
        raise InputError(f"decay must be in [0, 1), not {decay}")
    return decay
