"""What surrounds a run and is none of its settings."""

from dataclasses import dataclass
from typing import Annotated

from poise.errors import InputError
from poise.recipes.settings import Engine, Option, check_values


@dataclass(frozen=True)
class Options:
    """What surrounds a run and is none of its settings.

    Attributes:
        device: auto, cpu, cuda, cuda:1 or mps. Each kind of device draws other noise from a seed: their numbers differ as
            those of two seeds do.
        save_seconds: seconds between checkpoints.
        engine: how a step is computed. captured: a recorded CUDA graph, with the numbers of eager, for one process and for
            networks without decisions in Python. compiled: torch.compile, within rounding of eager, for long runs.
            compiled-captured: a CUDA graph of the compiled step. auto: captured for one process on CUDA, and eager if the
            network cannot be recorded; otherwise eager. config.json says which was used.
        threads: CPU threads. 0: measure at the start which number is fastest. None: one for a small dense network, torch's
            own number for others. A resumed run keeps its number (config.json) unless another is given.
        tensorboard: write TensorBoard files into the run's folder.
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
                f"threads must be at least 1, or 0 to choose by measuring, not {self.threads}"
            )
        if not self.save_seconds >= 0:
            raise InputError(f"save_seconds must be at least 0, not {self.save_seconds}")
