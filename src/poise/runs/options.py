"""What surrounds a run and is none of its settings."""

from dataclasses import dataclass

from poise.errors import InputError
from poise.recipes.settings import check_words
from poise.training import Engine


@dataclass(frozen=True)
class Options:
    """What surrounds a run and is none of its settings.

    Attributes:
        device: "auto", "cpu", "cuda", ... Each kind of device draws other noise from a seed: numbers differ in the way
            that those of two seeds do.
        save_seconds: time between checkpoints.
        tensorboard: write TensorBoard files into the run's folder.
        quiet: no progress display.
        engine: how a step is taken. "captured": a CUDA graph, recorded once and replayed, with the same numbers as "eager";
            for one process and for networks that decide nothing in Python from step to step (all of `poise.networks`).
            "compiled": forward and backward as machine code made by torch.compile, within rounding of the eager step; worth
            its minute of compiling on long runs. "compiled-captured": a CUDA graph of the compiled step. "auto": "captured"
            for one process on CUDA, where a network that cannot be recorded goes on as "eager" with a warning; else "eager".
            What was used stands in config.json.
        threads: of the CPU, that share the work of this run; torch's own number stays as it is. None: one for a small dense
            network, as many as torch has for others. 0, as the command has it: whichever number was fastest for some steps
            when the run began. A run goes on with the number it began with (config.json), unless another is given.
    """

    device: str = "auto"
    save_seconds: float = 60.0
    tensorboard: bool = False
    quiet: bool = False
    engine: Engine = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        check_words(self)
        if self.threads is not None and self.threads < 0:
            raise InputError(
                f"threads must be at least 1, or 0 to choose by measuring, not {self.threads}"
            )
        if not self.save_seconds >= 0:
            raise InputError(f"save_seconds must be at least 0, not {self.save_seconds}")
