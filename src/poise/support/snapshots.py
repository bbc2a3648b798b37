"""Copies of a module's state that stay correct under torch.compile."""

import torch
from torch import Tensor


def snapshot(state: Tensor) -> Tensor:
    """Return a copy of a buffer that later in-place updates do not change, in backward either.

    In eager mode this is `clone`. A compiled backward may recompute a clone from the buffer to save
    memory, after the buffer was updated: gradients are then wrong, without an error
    (pytorch/pytorch#197039; 10 % in our tests, torch 2.13). torch.compile never recomputes an
    operation it does not know, so compiled code calls a custom operation.

    Args:
        state: a buffer. A parameter is returned as it is: only the optimizer updates it.
    """
    if state.requires_grad:
        return state
    return _opaque_copy(state) if torch.compiler.is_compiling() else state.clone()


@torch.library.custom_op("poise::opaque_copy", mutates_args=())
def _opaque_copy(tensor: Tensor) -> Tensor:
    return tensor.clone()


@_opaque_copy.register_fake
def _opaque_copy_of_fake(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)
