"""Options of a run that are not settings of its recipe."""

from dataclasses import dataclass
from typing import Annotated

from poise.errors import InputError
from poise.recipes.settings import Engine, Option, check_values


@dataclass(frozen=True)
class Options:
    """Options of a run that are not settings of its recipe.

    Attributes:
        device: auto, cpu, cuda, cuda:1 or mps. With the same seed, different kinds of device draw
            different noise, so their results differ like those of two seeds.
        save_seconds: seconds between checkpoints.
        engine: how a training step is computed. eager: plain PyTorch. captured: a CUDA graph, with
            the same numbers as eager, for one process and for networks without Python branches that
            depend on tensor values. compiled: torch.compile, equal to eager within rounding; worth
            its compile time in long runs. compiled-captured: a CUDA graph of the compiled step.
            auto: captured for one process on CUDA if the network can be captured, otherwise eager.
            config.json says which engine was used.
        threads: number of CPU threads. 0: measure at the start which number is fastest. None: one
            for a small dense network, torch's own number for others. A resumed run keeps the number
            in config.json unless another is given.
        tensorboard: write TensorBoard files to the run's folder.
        quiet: show no progress.
    """

    device: Annotated[str, Option("run")] = "auto"
    save_seconds: Annotated[float, Option("run")] = 60.0
    tensorboard: Annotated[bool, Option("run")] = False
    quiet: bool = False
    engine: Annotated[Engine, Option("run")] = "auto"
    threads: Annotated[int | None, Option("run")] = None

    def __post_init__(self) -> None:
        check_values(self)
        if self.threads is not None and self.threads < 0:
            raise InputError(
                f"threads must be at least 1, or 0 to measure which is fastest, not {self.threads}"
            )
        if not self.save_seconds >= 0:
            raise InputError(f"save_seconds must be at least 0, not {self.save_seconds}")
