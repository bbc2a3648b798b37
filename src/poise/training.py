"""The one loop, for both stages: what varies is where a batch comes from, and the balance.

A step is a function of (state, batch, noise). The order of an epoch is f(seed, stage, epoch), the noise of a step
f(seed, stage, step), and the position is one integer, so that a run stopped anywhere and resumed from a checkpoint ends with
bit-identical weights on the same machine.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, final, runtime_checkable

import torch
from torch import Tensor, nn

from poise.balance import Balance, LossTerms
from poise.datasets import gather
from poise.errors import RunError
from poise.progress import progress
from poise.recipes.settings import Stage
from poise.seeds import derive, generator
from poise.shapes import Latents, Values
from poise.vae import VAE

LOGS_PER_STAGE = 400
SMALL_PARAMETERS = 1_000_000
SECONDS_BETWEEN_UPDATES = 0.5  # of the progress display
TERMS = ("loss", "reconstruction_nats", "kl_nats", "mse", "gamma2")


@runtime_checkable
class Batches(Protocol):
    """Where batches come from: pictures, or codes of stage 1."""

    def __len__(self) -> int: ...
    def batch(self, indices: Tensor, source: torch.Generator) -> Tensor: ...


@final
class ImageBatches:
    """Batches of images: uint8 in memory or on disk, float32 in [0, 1] when used.

    Args:
        images: uint8 (or float32 in [0, 1]) array (n, channels, height, width), perhaps memory-mapped.
        device: where batches are wanted.
    """

    def __init__(self, images: Any, device: torch.device) -> None:
        self.images = images
        self.device = device

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, source: torch.Generator) -> Values:
        images = gather(self.images, indices.numpy()).to(self.device, non_blocking=True)
        return images.contiguous(memory_format=torch.channels_last)


@final
class CodeBatches:
    """Batches of latents z = mean + s * noise, drawn afresh at every visit from the stored codes of stage 1.

    Args:
        mean, logvar: (n, latents).
        device: where batches are wanted.
    """

    def __init__(self, mean: Latents, logvar: Latents, device: torch.device) -> None:
        self.mean = mean.to(device)
        self.std = (0.5 * logvar).exp().to(device)

    def __len__(self) -> int:
        return len(self.mean)

    def batch(self, indices: Tensor, source: torch.Generator) -> Latents:
        chosen = indices.to(self.mean.device)
        noise = torch.randn(len(indices), self.mean.shape[1], generator=source, device=self.mean.device)
        return self.mean[chosen] + self.std[chosen] * noise


@dataclass
class TrainingState:
    """Everything that a step changes.

    Attributes:
        vae, balance, optimizer: of this stage.
        average: running average of the weights, if the stage keeps one.
        sums: sums since the last log entry of the values in `TERMS`, and their number.
        step: batches seen.
    """

    vae: VAE
    balance: Balance
    optimizer: torch.optim.Optimizer
    average: VAE | None
    sums: Tensor
    step: int = 0

    @property
    def trained(self) -> VAE:
        """The network to use afterwards: the average of the weights where there is one."""
        return self.vae if self.average is None else self.average


def new_state(vae: VAE, balance: Balance, stage: Stage, device: torch.device) -> TrainingState:
    """The state before the first step."""
    vae, balance = vae.to(device), balance.to(device)
    if any(parameter.dim() == 4 for parameter in vae.parameters()):
        vae = vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (torch's stub lacks it)
    parameters = [*vae.parameters(), *balance.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=stage.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)
    average = copy.deepcopy(vae).requires_grad_(False) if stage.ema_decay is not None else None
    return TrainingState(vae, balance, optimizer, average, torch.zeros(len(TERMS) + 1, device=device))


class StepResult(NamedTuple):
    """What a step tells the loop; on the device, so that reading it is the loop's choice."""

    terms: LossTerms
    gradient: Tensor  # norm
    failed: Tensor  # 1 if the loss or its gradient is not finite: weights and optimiser are then as they were


def training_step(state: TrainingState, batch: Values, noise: Latents, stage: Stage) -> StepResult:
    """One step of Adam on the loss of a batch, in place: a function of (state, batch, noise), without host synchronisation.

    Network and balance are to be in training mode.
    """
    mixed = stage.precision == "bfloat16"
    with torch.autocast(batch.device.type, torch.bfloat16) if mixed else nullcontext():
        reconstruction, posterior = state.vae(batch, noise)
    terms = state.balance(reconstruction, batch, posterior.mean, posterior.logvar)
    state.optimizer.zero_grad(set_to_none=True)
    terms.loss.backward()
    gradient = nn.utils.get_total_norm([p.grad for p in parameters_of(state.optimizer) if p.grad is not None])
    failed = (~torch.isfinite(terms.loss.detach() + gradient)).float()
    state.optimizer.found_inf = failed  # pyright: ignore[reportAttributeAccessIssue]  (fused Adam then leaves all as it is)
    state.optimizer.step()
    if state.average is not None and stage.ema_decay is not None:
        update_average(state.average, state.vae, stage.ema_decay)
    values = (terms.loss.detach(), terms.reconstruction, terms.kl, terms.mse, state.balance.gamma2)
    state.sums += torch.stack([*values, torch.ones_like(terms.kl)])
    state.step += 1
    return StepResult(terms, gradient, failed)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything an optimiser moves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def describe(result: StepResult) -> str:
    """The values of the loss terms and the norm of the gradient, those that are not finite first."""
    terms = result.terms
    values = {"kl": terms.kl, "mse": terms.mse, "reconstruction": terms.reconstruction, "gradient": result.gradient}
    numbers = {name: float(value) for name, value in values.items()}
    return ", ".join(f"{name}={value:g}" for name, value in sorted(numbers.items(), key=lambda item: math.isfinite(item[1])))


@torch.no_grad()
def update_average(average: nn.Module, current: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * current for parameters; buffers (BatchNorm's statistics) are copied."""
    for kept, new in zip(average.parameters(), current.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)
    for kept, new in zip(average.buffers(), current.buffers(), strict=True):
        kept.copy_(new)


@contextmanager
def threads_for(vae: VAE) -> Iterator[None]:
    """One CPU thread inside the block for a small dense network, whose products are too short to share; all for others.

    On two cores that other processes kept busy, a step of a dense network of 256 took 2 ms with one thread and 18 with two,
    which wait for each other (2026-11-22).
    """
    convolutions = any(parameter.dim() == 4 for parameter in vae.parameters())
    small = sum(parameter.numel() for parameter in vae.parameters()) < SMALL_PARAMETERS
    before = torch.get_num_threads()
    torch.set_num_threads(1 if small and not convolutions else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Torch's global generators are as before after the block; inside it cuDNN uses its deterministic kernels."""
    devices = [device] if device.type == "cuda" else []
    kernels = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with torch.random.fork_rng(devices=devices), kernels if devices else nullcontext():
        yield


def seed_modules(seed: int, device: torch.device) -> None:
    """Seeds what modules draw from: dropout and its like. torch.manual_seed would queue a call for every absent device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@dataclass
class Watch:
    """What happens around the steps.

    Attributes:
        log: receives one dictionary per log entry.
        save: called with the state when a checkpoint is due.
        stop: asked after every step; if true, the loop saves and returns early.
        save_seconds: time between checkpoints.
        quiet: no progress display.
    """

    log: Callable[[dict[str, float]], None] = field(default=lambda entry: None)
    save: Callable[[TrainingState], None] = field(default=lambda state: None)
    stop: Callable[[], bool] = field(default=lambda: False)
    save_seconds: float = 60.0
    quiet: bool = False


def fit(state: TrainingState, data: Batches, stage: Stage, *, number: int, seed: int, watch: Watch) -> bool:
    """Train from `state.step` to the end of the stage.

    Args:
        state: changed in place.
        data: where batches come from.
        stage: length, batch size, learning rate, balance.
        number: of the stage, 1 or 2: shown, logged, and part of every seed.
        seed: of order and noise.
        watch: logging, checkpoints, early stop.

    Returns:
        Whether the stage is finished (False: `watch.stop` asked to stop, and the state was saved).

    Raises:
        RunError: the loss is not finite. Says which term, which step, which images, and what to try.
    """
    device = state.sums.device
    total = stage.total_steps(len(data))
    per_epoch, size = stage.steps_per_epoch(len(data)), min(stage.batch_size, len(data))
    log_every = max(1, total // LOGS_PER_STAGE)
    num_latents = count_latents(state.vae, data)
    state.vae.train()
    state.balance.train()
    source = torch.Generator(device)
    order, order_epoch = torch.empty(0), -1
    saved_at = logged_at = shown_at = time.monotonic()
    latest: dict[str, str] = {}
    with (
        threads_for(state.vae),
        reproducible(device),
        progress(f"stage {number}", total, state.step, quiet=watch.quiet) as display,
    ):
        while state.step < total:
            epoch, position = divmod(state.step, per_epoch)
            if epoch != order_epoch:
                order = torch.randperm(len(data), generator=generator("order", seed, number, epoch))
                order_epoch = epoch
            indices = order[position * size : (position + 1) * size]
            source.manual_seed(derive("noise", seed, number, state.step))
            batch = data.batch(indices, source)
            noise = torch.randn(size, num_latents, generator=source, device=device)
            for group in state.optimizer.param_groups:
                group["lr"] = stage.learning_rate_at(state.step, len(data))
            seed_modules(derive("modules", seed, number, state.step), device)
            try:
                result = training_step(state, batch, noise, stage)
            except torch.OutOfMemoryError as error:
                raise RunError(f"out of memory on {device}: try a smaller --batch-size, with another --out") from error
            if result.failed.item():
                raise nonfinite(number, state.step - 1, describe(result), indices)
            if state.step % log_every == 0 or state.step == total:
                now = time.monotonic()
                entry = log_entry(state, stage, number, len(data))
                entry["images_per_second"] = round(entry.pop("images") / max(now - logged_at, 1e-9), 1)
                logged_at = now
                watch.log(entry)
                latest = figures(entry)
            if time.monotonic() - shown_at > SECONDS_BETWEEN_UPDATES or state.step == total:
                display.update(state.step, latest)
                shown_at = time.monotonic()
            if watch.stop():
                watch.save(state)
                return False
            if time.monotonic() - saved_at > watch.save_seconds:
                watch.save(state)
                saved_at = time.monotonic()
    return True


@torch.no_grad()
def count_latents(vae: VAE, data: Batches) -> int:
    """The number of latents, asked of the encoder with one image; leaves no trace in its statistics."""
    one = data.batch(torch.zeros(1, dtype=torch.long), generator("latents", device=next(vae.parameters()).device))
    return vae.eval().encode(one).mean.shape[1]


def log_entry(state: TrainingState, stage: Stage, number: int, num_images: int) -> dict[str, float]:
    """Means since the last entry, for the log; the sums start anew."""
    *sums, count = state.sums.tolist()
    state.sums.zero_()
    batch_size = min(stage.batch_size, num_images)
    entry: dict[str, float] = {"stage": number, "step": state.step, "images_seen": state.step * batch_size}
    entry["epoch"] = round(state.step / stage.steps_per_epoch(num_images), 4)
    entry |= {name: value / count for name, value in zip(TERMS, sums, strict=True)}
    entry["learning_rate"] = stage.learning_rate_at(state.step - 1, num_images)
    return entry | {"images": count * batch_size}


def figures(entry: dict[str, float]) -> dict[str, str]:
    """The part of a log entry that a progress bar has room for."""
    shown = {"MSE": f"{entry['mse']:.5f}", "KL": f"{entry['kl_nats']:.1f}", "gamma2": f"{entry['gamma2']:.5f}"}
    return shown | {"img/s": f"{entry['images_per_second']:.0f}"}


def nonfinite(number: int, step: int, terms: str, indices: Tensor) -> RunError:
    """The error of a loss that is not finite."""
    images = "batch images" if number == 1 else "batch codes"
    some = ", ".join(map(str, indices[:8].tolist())) + (", ..." if len(indices) > 8 else "")
    return RunError(
        f"the loss or its gradient is not finite at step {step} of stage {number} ({terms}; {images} {some}); weights were not "
        "touched: try a lower --learning-rate, a larger start of the balance, or float32, with another --out"
    )


def state_tensors(state: TrainingState) -> dict[str, Tensor]:
    """Everything a checkpoint of a stage in progress needs, by name."""
    tensors = {f"vae.{name}": tensor for name, tensor in state.vae.state_dict().items()}
    tensors |= {f"balance.{name}": tensor for name, tensor in state.balance.state_dict().items()}
    if state.average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in state.average.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in values.items()}
    return tensors | {"sums": state.sums, "step": torch.tensor(state.step)}


def restore_state(state: TrainingState, tensors: dict[str, Tensor]) -> None:
    """Put back what `state_tensors` gave, in place."""
    state.vae.load_state_dict(under("vae", tensors))
    state.balance.load_state_dict(under("balance", tensors))
    if state.average is not None:
        state.average.load_state_dict(under("average", tensors))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in under("optimizer", tensors).items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = tensor
    parameters = parameters_of(state.optimizer)
    for index, values in moments.items():
        like = parameters[index]  # its memory format is the one that the fused kernel relies on
        moments[index] = {key: value if key == "step" else torch.empty_like(like).copy_(value) for key, value in values.items()}
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state.sums.copy_(tensors["sums"])
    state.step = int(tensors["step"])


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix` and a dot, without them."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}
