"""A step whose forward and backward pass torch.compile turned into machine code; the optimiser is fused as it is."""

from typing import final

import torch

from poise.errors import RunError
from poise.objectives import make_objective
from poise.recipes.settings import Stage
from poise.shapes import Latents, Values
from poise.training.state import TrainingState
from poise.training.step import Loss, training_step


@final
class CompiledStep:
    """Does what `training_step` does. The first step compiles, which takes from seconds to a minute or two.

    Batches have one size throughout a stage, so that code is made for that size alone. Sums are taken in another order than
    in the eager step: weights differ from its by rounding.
    """

    def __init__(self, stage: Stage) -> None:
        self.objective: Loss = torch.compile(make_objective(stage.objective), dynamic=False)

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
