"""How a step is taken: as it is, compiled to machine code, recorded once as a CUDA graph and replayed, or both.

Recording leaves the numbers as they are; compiling changes them by rounding.
"""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from poise.balance import Balance, LossTerms
from poise.errors import InputError, RunError
from poise.objectives import make_objective
from poise.recipes.settings import Engine, Stage
from poise.shapes import Latents, Values
from poise.training import distributed
from poise.training.state import TrainingState
from poise.training.step import Loss, Step, training_step
from poise.vae import VAE

EAGER_STEPS = 3  # before a recording


def choose_engine(engine: Engine, device: torch.device) -> Engine:
    """Return the engine to use: what was asked for, or for "auto" a captured step on one GPU and an eager one elsewhere.

    Raises:
        InputError: a captured step on another device than CUDA, or by one of several processes.
    """
    recordable = device.type == "cuda" and not distributed.launched()
    if engine == "auto":
        return "captured" if recordable else "eager"
    if "captured" in engine and not recordable:
        raise InputError(
            f"a captured step is for one process on cuda, not for {device}: leave --engine out"
        )
    return engine


def step_of(engine: Engine, stage: Stage, fell_back: Callable[[str], None] | None) -> Step:
    """Return the function that takes a step with an engine; see `Watch` for `fell_back`."""
    step = CompiledStep(stage) if engine.startswith("compiled") else training_step
    return CapturedStep(step, fell_back) if engine.endswith("captured") else step


@final
class CapturedStep:
    """Takes the same step as another one, with the same numbers, on a CUDA device.

    The first steps run as they are, on the stream of the recording, so that cuBLAS, cuDNN and Adam have allocated what they
    keep. The next one is recorded: forward, balance, backward, Adam, sums and verdict, with batch and noise in memory of their
    own, into which every later batch and noise is copied. The seed of dropout is read at each replay (pytorch/pytorch#84967),
    and the learning rate, a tensor, by each step of Adam.

    A network that decides in Python, step by step (a counter, a schedule), would repeat the decisions of the recording. One
    that reads a value back from the GPU cannot be recorded.

    Args:
        step: what is recorded: `training_step`, or a compiled one, whose first call compiles before anything is recorded.
        fell_back: called with the reason where the step cannot be recorded; all steps are then taken as they are. None: raise.
    """

    def __init__(self, step: Step, fell_back: Callable[[str], None] | None = None) -> None:
        self.step, self.fell_back = step, fell_back
        self.stream: torch.cuda.Stream | None = (
            None  # of the device that is current when the first step is taken
        )
        self.taken = 0
        self.recordable = True
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, state: TrainingState, batch: Values, noise: Latents, stage: Stage) -> None:
        """Take one step.

        Raises:
            RunError: the step cannot be recorded, and nobody wants to fall back.
        """
        self.stream = self.stream or torch.cuda.Stream()
        if self.graph is None and self.recordable and self.taken >= EAGER_STEPS:
            self._record(state, batch, noise, stage)
        if self.graph is None:
            self._take(state, batch, noise, stage)
            self.taken += 1
            return
        self.batch.copy_(batch)
        self.noise.copy_(noise)
        self.graph.replay()

    def _record(self, state: TrainingState, batch: Values, noise: Latents, stage: Stage) -> None:
        self.batch, self.noise, graph = (
            torch.empty_like(batch),
            torch.empty_like(noise),
            torch.cuda.CUDAGraph(),
        )
        try:
            # "thread_local": a thread may pin the next batch meanwhile, which "global" would take for part of the recording
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.step(state, self.batch, self.noise, stage)
        except (torch.OutOfMemoryError, RunError):
            raise
        except RuntimeError as error:  # nothing was computed: the step is still to be taken
            reason = str(error).strip().splitlines()[0]
            if self.fell_back is None:
                raise RunError(
                    f"the step cannot be recorded as a CUDA graph ({reason}): use the engine eager"
                ) from error
            self.recordable = False
            state.optimizer.zero_grad(set_to_none=True)
            self.fell_back(reason)
        else:
            self.graph = graph

    def _take(self, state: TrainingState, batch: Values, noise: Latents, stage: Stage) -> None:
        now = torch.cuda.current_stream()
        assert self.stream is not None
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            self.step(state, batch, noise, stage)
        now.wait_stream(self.stream)


@final
class CompiledStep:
    """Does what `training_step` does. The first step compiles, which takes from seconds to a minute or two.

    Batches have one size throughout a stage, so that code is made for that size alone. Sums are taken in another order than
    in the eager step: weights differ from its by rounding.
    """

    def __init__(self, stage: Stage) -> None:
        self.objective: Loss = torch.compile(
            with_code_of_its_own(make_objective(stage.objective)), dynamic=False
        )

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
            raise RunError(
                f"this network cannot be compiled here ({reason}): use the engine eager"
            ) from error


def with_code_of_its_own(objective: Loss) -> Loss:
    """The same function, with a code object that no other has.

    Torch counts compilations by code object: what is compiled for a ninth network, or for another balance, would run
    uncompiled, with no more than a warning (torch._dynamo.config.recompile_limit). A comparison has that many in one process.
    """

    def loss(vae: VAE, balance: Balance, batch: Tensor, noise: Tensor) -> LossTerms:
        return objective(vae, balance, batch, noise)

    loss.__code__ = loss.__code__.replace()
    return loss
