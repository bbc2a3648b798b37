"""Take one step of Adam, for both stages and for any number of processes."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from poise.balance import Balance, LossTerms
from poise.objectives import make_objective
from poise.recipes.settings import Stage
from poise.shapes import Latents, Scalar, Values
from poise.training import distributed
from poise.training.distributed import Loss
from poise.training.state import TrainingState, Verdict, parameters_of

Step = Callable[[TrainingState, Tensor, Tensor, Stage], None]  # called like `training_step`


def training_step(
    state: TrainingState,
    batch: Values,
    noise: Latents,
    stage: Stage,
    *,
    objective: Loss | None = None,
) -> None:
    """Take one step of Adam on the loss of a batch, in place and without host synchronisation.

    The network and the balance must be in training mode. With several processes, each passes its
    own share of the batch. If the loss or its gradient is not finite, this step and all later steps
    leave weights and optimizer unchanged.

    Args:
        state: changed in place.
        batch: (n, ...), images or codes.
        noise: (n, latents), standard normal.
        stage: settings: the objective, the precision and the decay of the averaged weights.
        objective: the stage's objective, compiled. None: the objective of `stage`, not compiled.
    """
    terms = loss_terms(state, batch, noise, stage, objective)
    state.optimizer.zero_grad(set_to_none=True)
    averages = distributed.start_average(terms.loss.detach(), state.asked)
    terms.loss.backward()
    loss, asked = averages()
    gradients = [p.grad for p in parameters_of(state.optimizer) if p.grad is not None]
    note(state, terms, loss, asked, nn.utils.get_total_norm(gradients))
    # If found_inf is 1, fused Adam changes nothing.
    state.optimizer.found_inf = failed(state)  # pyright: ignore[reportAttributeAccessIssue]
    state.optimizer.step()
    if state.average is not None and stage.ema_decay is not None:
        share = state.ema_share if stage.ema_warmup else 1 - stage.ema_decay
        update_averaged_weights(state.average, state.network, share)
    error, gamma2 = logged_error(state.balance, terms)
    values = (loss, terms.reconstruction, terms.kl, error, gamma2)
    state.sums += torch.stack([*values, torch.ones_like(terms.kl)])


def loss_terms(
    state: TrainingState,
    batch: Values,
    noise: Latents,
    stage: Stage,
    objective: Loss | None = None,
) -> LossTerms:
    """Return the loss of a batch in the stage's precision; see `training_step`."""
    objective = objective or make_objective(stage.objective)
    mixed = stage.precision == "bfloat16"
    with torch.autocast(batch.device.type, torch.bfloat16) if mixed else nullcontext():
        if state.shared is None:
            return objective(state.network, state.balance, batch, noise)
        loss, *others = state.shared(objective, batch, noise)
    return LossTerms(loss, *(value.detach() for value in others))


def logged_error(balance: Balance, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """Return the error and gamma2 for the log: means, or those of the pixels beside features."""
    if balance.error.groups is None:
        return terms.error, balance.gamma2
    if balance.error.is_likelihood:
        return terms.error, balance.gamma2.mean()
    return terms.group_error[0], balance.gamma2[0]


def fix_order_of_sums(state: TrainingState, batch: Values, noise: Latents, stage: Stage) -> None:
    """Fix the order in which DistributedDataParallel sums gradients, without taking a step.

    DistributedDataParallel groups gradients by the order in which they arrive in its first two
    backward passes. If these passes were steps, a resumed run would sum gradients in another order
    than an uninterrupted run. So both passes happen here, in evaluation mode, and change no state.
    """
    state.network.eval()
    state.balance.eval()
    for _ in range(2):
        loss_terms(state, batch, noise, stage).loss.backward()
        state.optimizer.zero_grad(set_to_none=True)


def note(
    state: TrainingState, terms: LossTerms, loss: Tensor, asked: Tensor, gradient: Tensor
) -> None:
    """Update the verdict. After a failed step it no longer changes and describes that step."""
    fails = ~torch.isfinite(loss + gradient)
    steps = state.verdict[Verdict._fields.index("steps")] + 1
    now = Verdict(fails, asked, steps, terms.kl, terms.error, terms.reconstruction, gradient)  # pyright: ignore[reportArgumentType]
    state.verdict.copy_(torch.where(failed(state) > 0, state.verdict, torch.stack(now)))  # pyright: ignore[reportArgumentType]


def failed(state: TrainingState) -> Scalar:
    """Return 1 if any loss or gradient since the start of the loop was not finite, else 0."""
    return state.verdict[Verdict._fields.index("failed")]


@torch.no_grad()
def update_averaged_weights(average: nn.Module, current: nn.Module, share: float | Tensor) -> None:
    """Set parameters to (1 - share) * average + share * current; copy buffers (of BatchNorm)."""
    for kept, new in zip(average.parameters(), current.parameters(), strict=True):
        kept.lerp_(new, share)
    for kept, new in zip(average.buffers(), current.buffers(), strict=True):
        kept.copy_(new)
