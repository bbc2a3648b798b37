"""Check a machine: versions, device, threads, files, and ten steps of training.

The ten steps train a small convolutional VAE on the digits, from fixed weights and with noise that
is drawn on the CPU. So all machines compute the same figures but for rounding. `EXPECTED` was
measured on the CPU of an x86-64 Linux machine with torch 2.13. A machine passes if each figure is
within `TOLERANCE` of it, relative to the larger of its size and 1 nat.
"""

import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from poise import networks
from poise.balance import ComputedBalance
from poise.data import gather, load
from poise.data.encoded import available_cores
from poise.errors import RunError
from poise.recipes.settings import Stage
from poise.runs.checkpoint import newest_intact_checkpoint, save_checkpoint
from poise.support.guards import locked
from poise.support.kernels import kernels
from poise.support.seeds import generator, seeded
from poise.support.version import __version__
from poise.training import new_state
from poise.training.machine import choose_device, tuned
from poise.training.step import training_step
from poise.vae import VAE

TOLERANCE = 1e-3
STAGE = Stage(steps=10, batch_size=20, learning_rate=1e-3, precision="ieee")
EXPECTED = (
    (36.33522, 0.48740),
    (35.28933, 0.31605),
    (34.67892, 0.18753),
    (34.66192, 0.13139),
    (34.84028, 0.08607),
    (32.90379, 0.08311),
    (32.41598, 0.08826),
    (31.22680, 0.08832),
    (30.64278, 0.10112),
    (29.92302, 0.10716),
)
"""Loss and KL of each step, in nats per image."""

Outcome = Literal["ok", "note", "failed"]
_LEFT_OUT = ("all", "test")  # extras that are made of others


@dataclass(frozen=True)
class Check:
    """One line of a checkup: what was checked, its outcome, and what was found."""

    name: str
    outcome: Outcome
    found: str

    def __str__(self) -> str:
        return f"{self.outcome:6}  {self.name}: {self.found}"


@dataclass(frozen=True)
class Checkup:
    """Results of all checks of a machine. `ok` is True if none failed."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.outcome != "failed" for check in self.checks)

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))


def check_machine(device: str = "auto") -> Checkup:
    """Return what works on this machine, and what does not.

    Args:
        device: "auto", "cpu", "cuda", "mps", ...

    Raises:
        InputError: the device does not exist or is not available.
    """
    place = choose_device(device)
    checks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("versions", check_versions),
        ("extras", check_extras),
        ("device", lambda: check_device(place)),
        ("files", check_files),
        ("training", lambda: check_training(place)),
    ]
    found: list[Check] = []
    for name, work in checks:
        try:
            found += work()
        except Exception as error:  # a check must not hide the others
            reason = " ".join(str(error).split())
            found.append(Check(name, "failed", f"{type(error).__name__}: {reason}"))
    return Checkup(tuple(found))


def check_versions() -> Iterator[Check]:
    """Yield the versions of this package, Python and the packages that it needs."""
    yield Check("poise", "ok", __version__)
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for requirement in _requirements(None):
        yield _check_package(*requirement)


def check_extras() -> Iterator[Check]:
    """Yield which extras are installed."""
    try:
        extras = metadata.metadata("poise").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        yield Check("extras", "note", "unknown: poise runs from a folder that is not installed")
        return
    for extra in extras:
        if extra in _LEFT_OUT:
            continue
        found = [_check_package(*requirement) for requirement in _requirements(extra)]
        missing = [check.name for check in found if check.outcome != "ok"]
        how = f'not installed ({", ".join(missing)}): pip install "poise[{extra}]"'
        state: tuple[Outcome, str] = ("note", how) if missing else ("ok", "installed")
        yield Check(f"extra {extra}", *state)


def _requirements(extra: str | None) -> Iterator[tuple[str, str]]:
    """Yield name and least version of each package that poise, or one of its extras, needs."""
    try:
        lines = metadata.requires("poise") or []
    except metadata.PackageNotFoundError:
        return
    for line in lines:
        needs, _, condition = line.partition(";")
        of = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", condition)
        if (of[1] if of else None) == extra and (
            found := re.match(r"([\w.-]+)(?:\[.*\])?\s*(?:>=\s*([\d.]+))?", needs.strip())
        ):
            yield found[1], found[2] or "0"


def _check_package(name: str, least: str) -> Check:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "failed", f"not installed: pip install {name}")
    if _numbers(version) < _numbers(least):
        return Check(name, "failed", f"{version} is older than {least}: pip install -U {name}")
    return Check(name, "ok", version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def check_device(device: torch.device) -> Iterator[Check]:
    """Yield the devices of this machine, the one that is checked, and the CPU threads."""
    kinds = ["cpu"]
    if torch.cuda.is_available():
        kinds += [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        kinds.append("mps")
    yield Check("device", "ok", f"{device}, of {', '.join(kinds)}")
    limit = os.environ.get("OMP_NUM_THREADS")
    yield Check(
        "threads",
        "ok",
        f"{torch.get_num_threads()} of torch on {available_cores()} cores"
        + (f", OMP_NUM_THREADS={limit}" if limit else ""),
    )
    if device.type == "mps":
        yield Check("precision", "note", "mps has no float64: figures are computed on the CPU")
    before = float(torch.tensor(5e-324, dtype=torch.float64) * 1) == 0
    flushes = torch.set_flush_denormal(True)
    torch.set_flush_denormal(before)
    if not flushes:
        slow = "this processor cannot treat denormal numbers as zero: long training slows down"
        yield Check("denormals", "note", slow)


def check_files() -> Iterator[Check]:
    """Yield whether a checkpoint is written, replaced and read, and whether a folder is locked."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        with locked(folder):
            for step in (1, 2):
                meta = {"stage": 1, "step": step, "seconds": 0.0, "finished": False}
                tensors = {"weight": torch.arange(3.0)}
                save_checkpoint(folder / "checkpoints", step, tensors, meta)
            saved, complaints = newest_intact_checkpoint(folder / "checkpoints")
    if saved is None or complaints or saved.meta["step"] != 2:
        raise RunError(f"a checkpoint was not read back: {'; '.join(complaints)}")
    yield Check("files", "ok", "a checkpoint was written, replaced and read; a folder was locked")


def check_training(device: torch.device) -> Iterator[Check]:
    """Yield whether ten steps of training give the stored figures."""
    found = ten_steps(device)
    differences = [
        abs(value - expected) / max(1.0, abs(expected))
        for step, stored in zip(found, EXPECTED, strict=True)
        for value, expected in zip(step, stored, strict=True)
    ]
    largest = max(differences)
    said = f"difference from the stored figures {largest:.1e}, and {TOLERANCE:g} is allowed"
    if not largest <= TOLERANCE:  # also of NaN
        said += f"; loss {found[-1][0]:.4f} instead of {EXPECTED[-1][0]:.4f} after ten steps"
    yield Check("training", "ok" if largest <= TOLERANCE else "failed", f"{device}, {said}")


def ten_steps(device: torch.device) -> list[tuple[float, float]]:
    """Train for ten steps, and return loss and KL of each, in nats per image."""
    images = gather(load("digits").train, range(STAGE.batch_size * 10))
    with seeded(0):
        vae = VAE(*networks.conv(8, 1, latent_channels=2, width=16))
    state = new_state(vae, ComputedBalance(), STAGE, device)
    state.network.train()
    state.balance.train()
    noise, found = generator("checkup"), []
    with tuned(state.network, device), kernels(device, tf32=False):
        for batch in images.split(STAGE.batch_size):
            state.sums.zero_()
            draws = torch.randn(len(batch), 2 * 2 * 2, generator=noise)
            placed = batch.contiguous(memory_format=torch.channels_last).to(device)
            training_step(state, placed, draws.to(device), STAGE)
            loss, _, kl, *_ = state.sums.tolist()
            found.append((loss, kl))
    return found
