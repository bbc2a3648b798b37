"""The training loop of both stages. The stages differ in their batches and their balance.

A step is a function of (state, batch, noise). The order of an epoch is f(seed, stage, epoch). The
noise of a step is f(seed, stage, step). The position is one integer. So a run that is stopped at
any step and resumed from its checkpoint ends with bit-identical weights on the same machine.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from poise.errors import InputError, RunError
from poise.flow import Flow
from poise.objectives import is_deterministic
from poise.recipes.settings import FLOW_OBJECTIVE, VAE_OBJECTIVE, Stage
from poise.support.kernels import LOCK, generators_kept, kernels, own_kernels
from poise.support.progress import progress
from poise.support.seeds import derive
from poise.training import distributed
from poise.training.batches import Batches, fetched_ahead, global_batches
from poise.training.engines import Engine, choose_engine, step_of
from poise.training.machine import tuned
from poise.training.state import TERMS, TrainingState, Verdict
from poise.training.step import fix_order_of_sums
from poise.vae import VAE

LOGS_PER_STAGE = 400
SECONDS_BETWEEN_UPDATES = 0.5  # of the progress display
STEPS_BETWEEN_READS = {"cpu": 1, "otherwise": 50}  # of the verdict; a read waits for the GPU


@dataclass
class Watch:
    """Callbacks of the loop: logging, pictures, checkpoints, stopping.

    Attributes:
        log: receives one dictionary per log entry.
        save: called with the state when a checkpoint is due.
        stop: called after every step; if true, the loop saves and returns early.
        fell_back: called with the reason if a step cannot be recorded; training goes on with eager
            steps. None: raise an error instead.
        save_seconds: time between checkpoints.
        quiet: no progress display.
        show: called at each tenth of the stage with the state and the tenth, 1 to 10. It must not
            change the state.
        measure: called with the state at each log entry. What it returns is added to the entry. It
            must not change the state.
        ends: called after `log` and `show`, if one of them was called; if true, the stage ends with
            this step.
    """

    log: Callable[[dict[str, float]], None] = field(default=lambda entry: None)
    save: Callable[[TrainingState], None] = field(default=lambda state: None)
    stop: Callable[[], bool] = field(default=lambda: False)
    fell_back: Callable[[str], None] | None = None
    save_seconds: float = 60.0
    quiet: bool = False
    show: Callable[[TrainingState, int], None] = field(default=lambda state, tenth: None)
    measure: Callable[[TrainingState], dict[str, float]] = field(default=lambda state: {})
    ends: Callable[[], bool] = field(default=lambda: False)


def fit(
    state: TrainingState,
    data: Batches,
    stage: Stage,
    *,
    number: int,
    seed: int,
    watch: Watch,
    engine: Engine = "eager",
    threads: int | None = None,
) -> bool:
    """Train from `state.step` to the end of the stage.

    Args:
        state: changed in place.
        data: the training data.
        stage: gives the length, the batch size, the learning rate, the objective and the precision.
        number: of the stage, 1 or 2; shown, logged, and part of every seed.
        seed: of the order of images and of the noise.
        watch: logging, pictures, checkpoints, stopping. If one process is asked to stop, all stop
            together.
        engine: "compiled" is a `CompiledStep`, "captured" a `CapturedStep` (CUDA, one process),
            "compiled-captured" a recorded `CompiledStep`; "auto": see `choose_engine`.
        threads: number of CPU threads; None: see `usual_threads`.

    Returns:
        Whether the stage is finished, after its last step or because `watch.ends` was true. False:
            `watch.stop` was true, and the state was saved.

    Raises:
        RunError: the loss is not finite. The message names the term, the step and the images.
        InputError: there are more processes than images in a batch.
    """
    device = state.sums.device
    total = stage.total_steps(len(data))
    size, alone = min(stage.batch_size, len(data)), distributed.ranks() == 1
    if size < distributed.ranks():
        raise InputError(
            f"a batch of {size} images cannot be shared by {distributed.ranks()} processes: "
            "start fewer"
        )
    share = distributed.share(size)
    log_every = steps_between_logs(total)
    read_every = STEPS_BETWEEN_READS.get(device.type, STEPS_BETWEEN_READS["otherwise"])
    take_step = step_of(choose_engine(engine, device), stage, watch.fell_back)
    columns = count_noise(state.network, data)
    draws = may_draw(state.network) or stage.objective not in (VAE_OBJECTIVE, FLOW_OBJECTIVE)
    random_layers = partial(seeded_layers, device) if draws else nothing
    if state.shared is not None:
        noise = torch.zeros(1, columns, device=device)
        with random_layers("order of sums", seed, number):
            fix_order_of_sums(state, first_item(data, device), noise, stage)
    state.network.train()
    state.balance.train()
    state.verdict.zero_()
    statistics = Statistics(state)
    wanted = global_batches(stage, len(data), number=number, seed=seed, start=state.step)
    source, began = torch.Generator(device), state.step
    logged = began  # for the rate only: restored sums may include earlier steps
    saved_at = logged_at = shown_at = time.monotonic()
    latest: dict[str, str] = {}

    def draw(columns: int) -> Tensor:
        """Draw the noise of the global batch; return the rows of this process."""
        return torch.randn(size, columns, generator=source, device=device)[share]

    with (
        tuned(state.network, device, threads),
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
        progress(f"stage {number}", total, state.step, quiet=watch.quiet) as display,
        fetched_ahead(data, wanted, share) as fetched_batches,
    ):
        for fetched in fetched_batches:
            source.manual_seed(derive("noise", seed, number, state.step))
            batch = data.place(fetched, draw)
            noise = draw(columns)
            set_learning_rate(state.optimizer, stage.learning_rate_at(state.step, len(data)))
            if stage.ema_warmup:
                state.ema_share.fill_(1 - stage.ema_decay_at(state.step))
            if not alone and watch.stop():
                state.asked.fill_(1)
            try:
                with (
                    kernels(device, tf32=stage.precision != "ieee"),
                    random_layers("modules", seed, number, state.step),
                ):
                    take_step(state, batch, noise, stage)
            except torch.OutOfMemoryError as error:
                raise RunError(
                    f"out of memory on {device}: try a smaller --batch-size, with another --out"
                ) from error
            state.step += 1
            logs = state.step % log_every == 0 or state.step == total
            tenth = 10 * state.step // total
            shows = tenth > 10 * (state.step - 1) // total
            if not (logs or shows or state.step % read_every == 0 or (alone and watch.stop())):
                continue
            verdict = Verdict(*state.verdict.tolist())
            if verdict.failed:
                statistics.restore()
                step = began + int(verdict.steps) - 1
                indices = next(
                    global_batches(stage, len(data), number=number, seed=seed, start=step)
                )
                power = state.balance.power
                raise nonfinite(stage, power, number, step, verdict, indices)
            statistics.keep()
            if logs:
                now = time.monotonic()
                entry = log_entry(state, stage, number, len(data))
                entry["images_per_second"] = round(
                    (state.step - logged) * size / max(now - logged_at, 1e-9), 1
                )
                logged_at, logged = now, state.step
                entry |= watch.measure(state)
                watch.log(entry)
                latest = figures(entry)
            if shows:
                watch.show(state, tenth)
            if time.monotonic() - shown_at > SECONDS_BETWEEN_UPDATES or state.step == total:
                display.update(state.step, latest)
                shown_at = time.monotonic()
            if (logs or shows) and watch.ends():
                return True
            if verdict.asked or (alone and watch.stop()):
                watch.save(state)
                return False
            if time.monotonic() - saved_at > watch.save_seconds:
                watch.save(state)
                saved_at = time.monotonic()
    return True


def steps_between_logs(total: int) -> int:
    """Return the number of steps between two log entries of a stage of `total` steps."""
    return max(1, total // LOGS_PER_STAGE)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate; a tensor is changed in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def count_noise(network: VAE | Flow, data: Batches) -> int:
    """Return the number of columns of noise that the objective of a network needs."""
    return network.noise_dims if isinstance(network, Flow) else count_latents(network, data)


@torch.no_grad()
def count_latents(vae: VAE, data: Batches) -> int:
    """Return the number of latents of a VAE. Encodes one image, in evaluation mode.

    Raises:
        InputError: its posteriors are not vectors.
    """
    one = first_item(data, next(vae.parameters()).device)
    with own_kernels(one.device):
        shape = tuple(vae.eval().encode(one).mean.shape)
    if len(shape) != 2:
        raise InputError(
            f"the encoder must return mean and logvar of shape (n, latents), not {shape}: flatten "
            "them, and give the decoder a first layer nn.Unflatten(1, shape)"
        )
    return shape[1]


def first_item(data: Batches, device: torch.device) -> Tensor:
    """Return a batch of the first item alone, with zeros for its noise."""
    fetched = data.fetch(torch.zeros(1, dtype=torch.long))
    return data.place(fetched, lambda columns: torch.zeros(1, columns, device=device))


class Statistics:
    """Copies of the buffers of a network, such as BatchNorm's running averages.

    The forward pass of a failed step changes them. On a CPU they are restored to the step before.
    On a GPU, where the verdict is read every 50 steps, they are restored to the last read.

    Args:
        state: its network and the average of its weights have the buffers.
    """

    def __init__(self, state: TrainingState) -> None:
        self._buffers = [*state.network.buffers()]
        if state.average is not None:
            self._buffers += state.average.buffers()
        self._kept = [buffer.detach().clone() for buffer in self._buffers]

    @torch.no_grad()
    def keep(self) -> None:
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            kept.copy_(buffer)

    @torch.no_grad()
    def restore(self) -> None:
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            buffer.copy_(kept)


# These layers draw random numbers in training.
RANDOM_LAYERS = (
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)


def may_draw(network: nn.Module) -> bool:
    """Return whether a network may draw from torch's global generators in training.

    True for layers such as dropout, for classes of others than torch and this package, and for
    modules with hooks, which may do anything.
    """
    return any(
        isinstance(module, RANDOM_LAYERS)
        or not type(module).__module__.startswith(("torch.nn.", "poise."))
        or module._forward_hooks
        or module._forward_pre_hooks
        for module in network.modules()
    )


@contextmanager
def seeded_layers(device: torch.device, *place: int | str) -> Iterator[None]:
    """Seed torch's global generators inside the block, and restore them after it.

    Layers such as dropout have no generator of their own. Other threads that train wait, so that
    each thread draws the numbers that it would draw alone. Each process gets another seed.
    """
    seed = derive(*place) if distributed.rank() == 0 else derive(*place, distributed.rank())
    with LOCK, generators_kept(device):
        # torch.manual_seed would queue a call for every absent device.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield


def nothing(*place: int | str) -> AbstractContextManager[None]:
    """Return an empty block, in place of `seeded_layers`, for a network that draws nothing."""
    return nullcontext()


def log_entry(state: TrainingState, stage: Stage, number: int, num_images: int) -> dict[str, float]:
    """Return the means since the last log entry, and reset the sums."""
    *sums, count = state.sums.tolist()
    state.sums.zero_()
    batch_size = min(stage.batch_size, num_images)
    entry: dict[str, float] = {"stage": number, "step": state.step}
    entry["images_seen"] = state.step * batch_size
    entry["epoch"] = round(state.step / stage.steps_per_epoch(num_images), 4)
    entry |= {name: value / count for name, value in zip(TERMS, sums, strict=True)}
    if (name := error_name(state.balance.power)) != "mse":
        entry[name] = entry.pop("mse")
    if is_deterministic(stage.objective):
        entry["penalty"] = entry.pop("kl_nats")  # this objective has a penalty instead of a KL
    if stage.objective == FLOW_OBJECTIVE:  # no reconstruction and no KL
        entry["velocity_mse"] = entry.pop("mse")
        del entry["reconstruction_nats"], entry["kl_nats"]
    return entry | {"learning_rate": stage.learning_rate_at(state.step - 1, num_images)}


def error_name(power: float) -> str:
    """Return the name of the mean error |x - x^|^power in the log."""
    return "mse" if power == 2 else "mae" if power == 1 else "error"


def figures(entry: dict[str, float]) -> dict[str, str]:
    """Return the part of a log entry that the progress bar shows."""
    formats = {
        "mse": ("MSE", ".5f"),
        "mae": ("MAE", ".5f"),
        "error": ("error", ".5f"),
        "velocity_mse": ("MSE of the velocity", ".5f"),
        "penalty": ("penalty", ".3f"),
        "kl_nats": ("KL", ".1f"),
        "gamma2": ("gamma2", ".5f"),
        "held_out_elbo_nats": ("held-out ELBO", ".1f"),
        "images_per_second": ("img/s", ".0f"),
    }
    return {name: f"{entry[key]:{style}}" for key, (name, style) in formats.items() if key in entry}


def nonfinite(
    stage: Stage, power: float, number: int, step: int, verdict: Verdict, indices: Tensor
) -> RunError:
    """Return the error for a non-finite loss or gradient, with the non-finite terms first.

    Args:
        stage, number: settings and number of the stage.
        power: of the balance.
        step, verdict, indices: the step, its terms and its images.
    """
    numbers = {name: getattr(verdict, name) for name in ("kl", "mse", "reconstruction", "gradient")}
    numbers[error_name(power)] = numbers.pop("mse")
    ordered = sorted(numbers.items(), key=lambda item: math.isfinite(item[1]))
    terms = ", ".join(f"{name}={value:g}" for name, value in ordered)
    images = "batch images" if number == 1 else "batch codes"
    some = ", ".join(map(str, indices[:8].tolist())) + (", ..." if len(indices) > 8 else "")
    options = [f"--learning-rate {stage.learning_rate / 10:g}"]
    options += ["--precision float32"] if stage.precision == "bfloat16" else []
    options += ["another --network"] if number == 1 else []
    return RunError(
        f"the loss or its gradient is not finite at step {step} of stage {number} ({terms}; "
        f"{images} {some}); weights did not change: try a lower learning rate "
        f"({' or '.join(options)}), with another --out"
    )
