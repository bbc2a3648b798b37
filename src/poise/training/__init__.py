"""Training of one stage. `batches` say what is learned from, `state` is what a step changes, `step` changes it, `loop` repeats
it; `machine` says how a network runs here, `compiled` and `captured` are other ways to take a step, `batch_norm` is for several
processes.
"""

from poise.training.batches import Batches, CodeBatches, ImageBatches, VectorBatches
from poise.training.loop import Engine, Watch, choose_engine, count_latents, fit
from poise.training.machine import denormals_as_zero, threads, usual_threads
from poise.training.state import TrainingState, new_state, restore_state, state_tensors, under

__all__ = [
    "Batches",
    "CodeBatches",
    "Engine",
    "ImageBatches",
    "TrainingState",
    "VectorBatches",
    "Watch",
    "choose_engine",
    "count_latents",
    "denormals_as_zero",
    "fit",
    "new_state",
    "restore_state",
    "state_tensors",
    "threads",
    "under",
    "usual_threads",
]
