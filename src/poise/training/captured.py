"""A step recorded once as a CUDA graph and replayed: one launch in place of hundreds."""

from typing import final

import torch

from poise.recipes.settings import Stage
from poise.shapes import Latents, Values
from poise.training.state import TrainingState
from poise.training.step import Step

EAGER_STEPS = 3


@final
class CapturedStep:
    """Does what another step does, on a CUDA device.

    The first steps run as they are, on the stream of the recording, so that cuBLAS, cuDNN and Adam have allocated what they
    keep. The next one is recorded: forward, balance, backward, Adam, sums and verdict, with batch and noise in memory of their
    own, into which every later batch and noise is copied. The seed of dropout is read at each replay (pytorch/pytorch#84967),
    and the learning rate, a tensor, by each step of Adam.

    A network that decides in Python, step by step (a counter, a schedule), would repeat the decisions of the recording.

    Args:
        step: what is recorded: `training_step`, or a compiled one, whose first call compiles before anything is recorded.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.stream = torch.cuda.Stream()
        self.taken = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, state: TrainingState, batch: Values, noise: Latents, stage: Stage) -> None:
        if self.taken < EAGER_STEPS:
            self._take(state, batch, noise, stage)
            self.taken += 1
            return
        if self.graph is None:
            self.batch, self.noise, self.graph = torch.empty_like(batch), torch.empty_like(noise), torch.cuda.CUDAGraph()
            # "thread_local": a thread may pin the next batch meanwhile, which "global" would take for part of the recording
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.step(state, self.batch, self.noise, stage)
        self.batch.copy_(batch)
        self.noise.copy_(noise)
        self.graph.replay()

    def _take(self, state: TrainingState, batch: Values, noise: Latents, stage: Stage) -> None:
        now = torch.cuda.current_stream()
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            self.step(state, batch, noise, stage)
        now.wait_stream(self.stream)
