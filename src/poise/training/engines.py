"""Run a training step eagerly, compiled by torch.compile, recorded as a CUDA graph, or both.

A recorded step gives the same numbers as an eager step. A compiled step differs by rounding.
"""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from poise.balance import Balance, LossTerms
from poise.errors import InputError, RunError
from poise.objectives import make_objective
from poise.recipes.settings import Engine, Stage
from poise.shapes import Latents, Values
from poise.training import distributed
from poise.training.distributed import Loss
from poise.training.state import TrainingState
from poise.training.step import Step, training_step

EAGER_STEPS = 3  # before the recorded step


def choose_engine(engine: Engine, device: torch.device) -> Engine:
    """Return the engine to use; "auto" is "captured" on one GPU and "eager" elsewhere.

    Raises:
        InputError: a captured step is not possible: the device is not CUDA, or there are several
            processes.
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
    """Record a step as a CUDA graph and replay it, with the same numbers as the eager step.

    The first steps are eager, on the stream of the recording, so that cuBLAS, cuDNN and Adam
    allocate their persistent memory. The next step is recorded whole: forward, balance, backward,
    Adam, sums and verdict. The graph reads batch and noise from fixed memory; each later step
    copies its batch and noise there. Each replay reads the seed of dropout
    (pytorch/pytorch#84967). Adam reads the learning rate from a tensor.

    Trap: a network that decides in Python at each step (a counter, a schedule) repeats the
    decisions of the recording. A network that reads a value back from the GPU cannot be recorded.

    Args:
        step: the step to record: `training_step`, or a `CompiledStep`, which compiles in its first
            call.
        fell_back: called with the reason if the step cannot be recorded; all steps are then eager.
            None: raise an error instead.
    """

    def __init__(self, step: Step, fell_back: Callable[[str], None] | None = None) -> None:
        self.step, self.fell_back = step, fell_back
        self.stream: torch.cuda.Stream | None = None  # made on the device of the first step
        self.taken = 0
        self.recordable = True
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, state: TrainingState, batch: Values, noise: Latents, stage: Stage) -> None:
        """Take one step.

        Raises:
            RunError: the step cannot be recorded, and `fell_back` is None.
        """
        self.stream = self.stream or torch.cuda.Stream(batch.device)
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
        generator = torch.cuda.get_rng_state(batch.device)
        try:
            # "global" would forbid the prefetching thread to pin the next batch.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.step(state, self.batch, self.noise, stage)
        except (torch.OutOfMemoryError, RunError):
            raise
        except RuntimeError as error:  # nothing was computed: the caller takes the step
            reason = str(error).strip().splitlines()[0]
            if self.fell_back is None:
                raise RunError(
                    f"the step cannot be recorded as a CUDA graph ({reason}): use the engine eager"
                ) from error
            self.recordable = False
            graph.reset()
            renew_generator(batch.device, generator)
            state.optimizer.zero_grad(set_to_none=True)
            self.fell_back(reason)
        else:
            self.graph = graph

    def _take(self, state: TrainingState, batch: Values, noise: Latents, stage: Stage) -> None:
        now = torch.cuda.current_stream(batch.device)
        assert self.stream is not None
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            self.step(state, batch, noise, stage)
        now.wait_stream(self.stream)


def renew_generator(device: torch.device, state: Tensor) -> None:
    """Replace a GPU's global random generator after a failed recording, and set its state.

    PyTorch 2.11 leaves the generator in the mode of a recording, so that dropout raises an error
    ("Offset increment outside graph capture", pytorch/pytorch#171263).

    Args:
        device: the GPU.
        state: see `torch.cuda.get_rng_state`; that before the recording, so that the step that
            could not be recorded draws the numbers of an eager step.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    fresh = torch.Generator(device).graphsafe_get_state()
    torch.cuda.default_generators[index].graphsafe_set_state(fresh)
    torch.cuda.set_rng_state(state, device)


@final
class CompiledStep:
    """Take a step with a compiled objective. The first step compiles it, which can take minutes.

    The batch size is constant in a stage, so the code is compiled for that size alone. The compiled
    code sums in another order than the eager step, so weights differ by rounding.
    """

    def __init__(self, stage: Stage) -> None:
        self.objective: Loss = torch.compile(
            with_code_of_its_own(make_objective(stage.objective)), dynamic=False
        )

    def __call__(self, state: TrainingState, batch: Values, noise: Latents, stage: Stage) -> None:
        """Take one step.

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
    """Return the same function with a new code object.

    torch.compile counts compilations per code object. After eight it falls back to eager code, with
    only a warning (torch._dynamo.config.recompile_limit). A comparison compiles more networks than
    that in one process.
    """

    def loss(network: Any, balance: Balance, batch: Tensor, noise: Tensor) -> LossTerms:
        return objective(network, balance, batch, noise)

    loss.__code__ = loss.__code__.replace()
    return loss
