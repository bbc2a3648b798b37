"""A step whose forward and backward pass torch.compile turned into machine code; the optimiser is fused as it is."""

from typing import final

import torch
from torch import Tensor

from poise.balance import Balance, LossTerms
from poise.errors import RunError
from poise.objectives import make_objective
from poise.recipes.settings import Stage
from poise.shapes import Latents, Values
from poise.training.state import TrainingState
from poise.training.step import Loss, training_step
from poise.vae import VAE


@final
class CompiledStep:
    """Does what `training_step` does. The first step compiles, which takes from seconds to a minute or two.

    Batches have one size throughout a stage, so that code is made for that size alone. Sums are taken in another order than
    in the eager step: weights differ from its by rounding.
    """

    def __init__(self, stage: Stage) -> None:
        self.objective: Loss = torch.compile(with_code_of_its_own(make_objective(stage.objective)), dynamic=False)

    def __call__(self, state: TrainingState, batch: Values, noise: Latents, stage: Stage) -> None:
        """One step.

        Raises:
            RunError: the network cannot be compiled, or there is no C++ compiler (on a CPU).
        """
        from torch._dynamo.exc import TorchDynamoException

        try:
            training_step(state, batch, noise, stage, objective=self.objective)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise RunError(f"this network cannot be compiled here ({reason}): use the engine eager") from error


def with_code_of_its_own(objective: Loss) -> Loss:
    """The same function, with a code object that no other has.

    Torch counts compilations by code object: what is compiled for a ninth network, or for another balance, would run
    uncompiled, with no more than a warning (torch._dynamo.config.recompile_limit). A comparison has that many in one process.
    """

    def loss(vae: VAE, balance: Balance, batch: Tensor, noise: Tensor) -> LossTerms:
        return objective(vae, balance, batch, noise)

    loss.__code__ = loss.__code__.replace()
    return loss
