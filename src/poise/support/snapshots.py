"""Keep a module's state: in torch.compile, in gradient checkpointing, and during evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def snapshot(state: Tensor) -> Tensor:
    """Return a copy of a buffer that later in-place updates do not change, even in backward.

    In eager mode this is `clone`. To save memory, a compiled backward may recompute a clone from
    the buffer after its update. Gradients are then wrong, without an error
    (pytorch/pytorch#197039; 10 % in our tests, torch 2.13). torch.compile never recomputes an
    operation it does not know, so compiled code calls a custom operation.

    Args:
        state: a buffer. A parameter is returned unchanged, because only the optimizer updates it.
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


def in_backward() -> bool:
    """Return whether autograd is computing gradients in this thread.

    A module whose forward runs there is recomputed by gradient checkpointing. Compiled code cannot
    ask, and returns False.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Set modules to evaluation mode inside the block, and restore the mode of each part."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training
