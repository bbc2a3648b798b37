"""Train one stage.

`batches` loads data, `state` holds model and optimizer, `step` is one update, `loop` repeats it.
`machine` sets threads and the device, `engines` compiles or records a step, and `distributed`
trains one model in several processes.
"""

from poise.training.batches import Batches, CodeBatches, ImageBatches, VectorBatches
from poise.training.loop import (
    Engine,
    Watch,
    choose_engine,
    count_latents,
    fit,
    steps_between_logs,
)
from poise.training.machine import denormals_as_zero, threads, usual_threads
from poise.training.state import (
    TrainingState,
    check_groups,
    check_weights,
    new_state,
    restore_state,
    state_tensors,
    under,
)

__all__ = [
    "Batches",
    "CodeBatches",
    "Engine",
    "ImageBatches",
    "TrainingState",
    "VectorBatches",
    "Watch",
    "check_groups",
    "check_weights",
    "choose_engine",
    "count_latents",
    "denormals_as_zero",
    "fit",
    "new_state",
    "restore_state",
    "state_tensors",
    "steps_between_logs",
    "threads",
    "under",
    "usual_threads",
]
