"""One step of Adam: the same for both stages and for any number of processes."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from poise.balance import Balance, LossTerms
from poise.objectives import make_objective
from poise.recipes.settings import Stage
from poise.shapes import Latents, Scalar, Values
from poise.training import distributed
from poise.training.state import TrainingState, Verdict, parameters_of
from poise.vae import VAE

Loss = Callable[[VAE, Balance, Tensor, Tensor], LossTerms]  # as an `Objective` is called
Step = Callable[[TrainingState, Tensor, Tensor, Stage], None]  # as `training_step` is called


def training_step(
    state: TrainingState,
    batch: Values,
    noise: Latents,
    stage: Stage,
    *,
    objective: Loss | None = None,
) -> None:
    """One step of Adam on the loss of a batch, in place: a function of (state, batch, noise), without host synchronisation.

    Network and balance are to be in training mode. Of several processes each gives its share of the batch. Where the loss or
    its gradient is not finite, weights and optimiser stay as they are, in this step and in all that follow.

    Args:
        state: changed in place.
        batch, noise: of this step.
        stage: whose objective, precision and decay of the average are used.
        objective: a compiled form of the stage's; None: as it is.
    """
    objective = objective or make_objective(stage.objective)
    mixed = stage.precision == "bfloat16"
    with torch.autocast(batch.device.type, torch.bfloat16) if mixed else nullcontext():
        terms = objective(state.vae, state.balance, batch, noise)
    state.optimizer.zero_grad(set_to_none=True)
    terms.loss.backward()
    gradients = [p.grad for p in parameters_of(state.optimizer) if p.grad is not None]
    loss, asked = distributed.average(gradients, terms.loss.detach(), state.asked)
    note(state, terms, loss, asked, nn.utils.get_total_norm(gradients))
    state.optimizer.found_inf = failed(state)  # pyright: ignore[reportAttributeAccessIssue]  (fused Adam then leaves all as it is)
    state.optimizer.step()
    if state.average is not None and stage.ema_decay is not None:
        update_averaged_weights(state.average, state.vae, stage.ema_decay)
    values = (loss, terms.reconstruction, terms.kl, terms.mse, state.balance.gamma2)
    state.sums += torch.stack([*values, torch.ones_like(terms.kl)])


def note(
    state: TrainingState, terms: LossTerms, loss: Tensor, asked: Tensor, gradient: Tensor
) -> None:
    """Update the verdict, which after a failure stays as it is: it then tells that step."""
    fails = ~torch.isfinite(loss + gradient)
    steps = state.verdict[Verdict._fields.index("steps")] + 1
    now = Verdict(fails, asked, steps, terms.kl, terms.mse, terms.reconstruction, gradient)  # pyright: ignore[reportArgumentType]
    state.verdict.copy_(torch.where(failed(state) > 0, state.verdict, torch.stack(now)))  # pyright: ignore[reportArgumentType]


def failed(state: TrainingState) -> Scalar:
    """1 if a loss or gradient was not finite since the loop began, else 0."""
    return state.verdict[Verdict._fields.index("failed")]


@torch.no_grad()
def update_averaged_weights(average: nn.Module, current: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * current for parameters; buffers (BatchNorm's statistics) are copied."""
    for kept, new in zip(average.parameters(), current.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)
    for kept, new in zip(average.buffers(), current.buffers(), strict=True):
        kept.copy_(new)
